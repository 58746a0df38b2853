#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 4: DQN and Rainbow with DQN's CNN, of width 1, 3 and 5, dense and 95 %.
# It found: with this network pruning gains little. `--width 1 --feature-size 512W` would be the other reading of a wider
# network, in which the dense layer is what grows.
# 900 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
WIDTHS=${WIDTHS:-"1 3 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network cnn --width $WIDTHS"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_atari_gmp.py $COMMON --sparsity 0
$add "DQN 95 %" dqn_atari_gmp.py $COMMON --sparsity 0.95
$add "Rainbow dense" rainbow_resnet_gmp.py $COMMON --sparsity 0
$add "Rainbow 95 %" rainbow_resnet_gmp.py $COMMON --sparsity 0.95
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x width --reference CNN-DQN CNN-Rainbow
