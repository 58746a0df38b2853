#!/usr/bin/env bash
# Eau De Q-Network (arXiv 2503.01437), online: DQN, PolyPruneDQN (95 %) and EauDeDQN with 32, 512 and 2,048 features.
# It found: EauDeDQN keeps the score and ends at a sparsity of its own, higher in larger networks.
# 450 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"BeamRider MsPacman Qbert Pong Enduro SpaceInvaders Assault CrazyClimber Boxing VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
SIZES=${SIZES:-"32 512 2048"}
COMMON="--env-id $GAMES --seed $SEEDS --feature-size $SIZES"

add="python benchmark/launch.py add $grid"
$add DQN dqn_atari_gmp.py $COMMON --network cnn --sparsity 0
$add PolyPruneDQN dqn_atari_gmp.py $COMMON --network cnn --sparsity 0.95
$add EauDeDQN eaudeqn_atari.py $COMMON
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --x feature-size --sparsity --reference CNN-DQN
