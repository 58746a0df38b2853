#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 15: DQN and Rainbow against their final sparsity, at widths 1 and 3.
# Its curves are in the paper; we have no number of them to compare with.
# 1,500 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
SPARSITIES=${SPARSITIES:-"0 0.5 0.95 0.98 0.99"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 1 3"

add="python benchmark/launch.py add $grid"
$add DQN dqn_atari_gmp.py $COMMON --sparsity $SPARSITIES
$add Rainbow rainbow_resnet_gmp.py $COMMON --sparsity $SPARSITIES
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x sparsity --panel width --reference Impala-DQN Impala-Rainbow
