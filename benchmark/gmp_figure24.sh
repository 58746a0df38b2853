#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 24: dense DQN with ReDo at several thresholds of dormancy.
# Its curves are in the paper; we have no number of them to compare with.
# 300 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
THRESHOLDS=${THRESHOLDS:-"0 0.025 0.1 0.3"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
$add "DQN ReDo" dqn_atari_baselines.py $COMMON --sparsity 0 --regulariser redo --redo-threshold $THRESHOLDS
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x redo-threshold
