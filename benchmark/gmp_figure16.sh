#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 16: Rainbow at final sparsities of 0, 0.9, 0.95 and 0.99 over 40M frames.
# Its curves are in the paper; we have no number of them to compare with.
# 300 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
for sparsity in 0 0.9 0.95 0.99; do
  $add "sparsity $sparsity" rainbow_resnet_gmp.py $COMMON --sparsity $sparsity
done
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --reference Impala-Rainbow
