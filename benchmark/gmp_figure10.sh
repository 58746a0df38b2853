#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 10: DQN over 100M frames: dense, pruned on the schedule of a run of 40M
# frames, and on its own.
# Its curves are in the paper; we have no number of them to compare with.
# 225 runs of 100M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3 --total-timesteps 25000000"

add="python benchmark/launch.py add $grid"
$add "dense" dqn_atari_gmp.py $COMMON --sparsity 0
$add "schedule of 40M" dqn_atari_gmp.py $COMMON --sparsity 0.95 --prune-start 0.08 --prune-end 0.32
$add "schedule of 100M" dqn_atari_gmp.py $COMMON --sparsity 0.95
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --reference Impala-DQN
