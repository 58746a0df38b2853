#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 26: dense DQN with resets of the last layer, of the one before, and of both.
# Its curves are in the paper; we have no number of them to compare with.
# 225 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
LAYERS=${LAYERS:-"last penultimate both"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
$add "DQN reset" dqn_atari_baselines.py $COMMON --sparsity 0 --regulariser reset --reset-layers $LAYERS
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x reset-layers
