#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 17: DQN at the replay ratios of figure 5, dense and 95 %.
# Its curves are in the paper; we have no number of them to compare with.
# 600 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
RATIOS=${RATIOS:-"0.25 0.5 1 2"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_atari_gmp.py $COMMON --sparsity 0 --replay-ratio $RATIOS
$add "DQN 95 %" dqn_atari_gmp.py $COMMON --sparsity 0.95 --replay-ratio $RATIOS
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x replay-ratio
