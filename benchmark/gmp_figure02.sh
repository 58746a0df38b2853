#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 2: the schedules of runs of 40M and of 100M frames, and what they leave.
# It shows the cubic schedule from 20 % to 80 % of the gradient steps. Game and seed are our choice.
# 2 runs of 40M and 100M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-Breakout}
SEEDS=${SEEDS:-1}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3 --sparsity 0.95"

add="python benchmark/launch.py add $grid"
$add "40M frames" dqn_atari_gmp.py $COMMON --total-timesteps 10000000
$add "100M frames" dqn_atari_gmp.py $COMMON --total-timesteps 25000000
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py metrics $grid --keys sparsity/target sparsity/prunable
