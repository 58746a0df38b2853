#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 17: DQN of widths 1 and 3 at four replay ratios and four final sparsities.
# Its curves are in the paper; we have no number of them to compare with.
# 2,400 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
RATIOS=${RATIOS:-"0.25 0.5 1 2"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 1 3 --replay-ratio $RATIOS"

add="python benchmark/launch.py add $grid"
for sparsity in 0 0.8 0.95 0.99; do
  $add "sparsity $sparsity" dqn_atari_gmp.py $COMMON --sparsity $sparsity
done
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x replay-ratio --panel width
