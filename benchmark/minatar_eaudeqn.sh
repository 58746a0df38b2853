#!/usr/bin/env bash
# MinAtar, Eau De Q-Network's main figure in small: DQN, PolyPruneDQN (95 %) and EauDeDQN with 32, 128 and 512 units; and
# PolyPruneDQN to 50 %, about what EauDeDQN reached in what results/ has.
# It found on Atari: EauDeDQN keeps the score and ends at a sparsity of its own, higher in larger networks.
# 300 runs of 1M steps, half an hour (K = 5: an hour) each on one core: docs/eaudeqn_minatar.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"Asterix Breakout Freeway Seaquest SpaceInvaders"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
SIZES=${SIZES:-"32 128 512"}
[[ " $SIZES " = *" 128 "* ]] && base=128 || base=${SIZES%% *} # whose dense return is 1
COMMON="--env-id $GAMES --seed $SEEDS --total-timesteps ${STEPS:-1000000} --feature-size $SIZES"

add="python benchmark/launch.py add $grid"
$add DQN dqn_minatar_gmp.py $COMMON --sparsity 0
$add PolyPruneDQN dqn_minatar_gmp.py $COMMON --sparsity 0.95
$add "PolyPruneDQN 50 %" dqn_minatar_gmp.py $COMMON --sparsity 0.5
$add EauDeDQN eaudeqn_minatar.py $COMMON
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --panel feature-size --sparsity --baseline DQN $base --last 5
