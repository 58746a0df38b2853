#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 2: the schedule, here layer by layer for three final sparsities.
# It shows the cubic schedule from 20 % to 80 % of the gradient steps. Game and seed are our choice.
# 3 runs of 40M frames, which are also runs of figure 3; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-Breakout}
SEEDS=${SEEDS:-1}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
for sparsity in 0.9 0.95 0.99; do
  $add "final sparsity $sparsity" dqn_atari_gmp.py $COMMON --sparsity $sparsity
done
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py layers $grid
