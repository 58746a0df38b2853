#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 28: DQN of widths 3 and 5, dense and 95 %, at a learning rate divided by the
# width.
# Its curves are in the paper; we have no number of them to compare with.
# 300 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala"

add="python benchmark/launch.py add $grid"
for setting in "3 --learning-rate 2.08e-5" "5 --learning-rate 1.25e-5"; do
  $add "DQN dense, width ${setting%% *}" dqn_atari_gmp.py $COMMON --sparsity 0 --width $setting
  $add "DQN 95 %, width ${setting%% *}" dqn_atari_gmp.py $COMMON --sparsity 0.95 --width $setting
done
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --panel width --reference Impala-DQN
