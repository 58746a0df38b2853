#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 1: score over the width of the network, DQN and Rainbow, dense and 95 %.
# It found: dense networks lose with width, pruned ones gain; 95 % gives about +60 % (DQN) and +50 % (Rainbow) over the
# dense network of width 1.
# The paper's table of the network has channels of 32, 64, 64 and seems to scale the dense layer as well: for that reading
# give a width W as --width 2W --feature-size 512W; here a width of 1 is Dopamine's 16, 32, 32 with 512 units.
# 1,500 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
WIDTHS=${WIDTHS:-"1 2 3 4 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width $WIDTHS"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_atari_gmp.py $COMMON --sparsity 0
$add "DQN 95 %" dqn_atari_gmp.py $COMMON --sparsity 0.95
$add "Rainbow dense" rainbow_resnet_gmp.py $COMMON --sparsity 0
$add "Rainbow 95 %" rainbow_resnet_gmp.py $COMMON --sparsity 0.95
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x width --reference Impala-DQN Impala-Rainbow
