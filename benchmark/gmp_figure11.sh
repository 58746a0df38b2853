#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 11: what happens in the networks on four games, DQN and Rainbow, dense
# and 95 %: returns, Q-variance, norms of parameters and Q-values, srank, dormant units.
# Its curves are in the paper; we have no number of them to compare with.
# 80 runs of 40M frames, which are also runs of figure 1; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"BeamRider Breakout Enduro VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_atari_gmp.py $COMMON --sparsity 0
$add "DQN 95 %" dqn_atari_gmp.py $COMMON --sparsity 0.95
$add "Rainbow dense" rainbow_resnet_gmp.py $COMMON --sparsity 0
$add "Rainbow 95 %" rainbow_resnet_gmp.py $COMMON --sparsity 0.95
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py metrics $grid --keys charts/epoch_return analysis/q_variance analysis/param_norm \
  analysis/q_norm analysis/srank analysis/dormant_0 analysis/dormant_0.1
