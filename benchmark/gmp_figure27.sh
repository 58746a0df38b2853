#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 27: dense DQN at several weight decays.
# Its curves are in the paper; we have no number of them to compare with.
# 375 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
DECAYS=${DECAYS:-"1e-6 1e-5 1e-4 1e-3 1e-2"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
$add "DQN weight decay" dqn_atari_baselines.py $COMMON --sparsity 0 --regulariser weight-decay --weight-decay $DECAYS
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x weight-decay
