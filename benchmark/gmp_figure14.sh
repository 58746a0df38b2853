#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 14: covariance of single transitions' gradients, dense and 95 %, here as
# cosines at the end of the run.
# Its curves are in the paper; we have no number of them to compare with.
# 20 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"Breakout VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_atari_gmp.py $COMMON --sparsity 0
$add "DQN 95 %" dqn_atari_gmp.py $COMMON --sparsity 0.95
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py covariance $grid
