#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 23: DQN at several values of Adam's epsilon, dense and 95 %.
# Its curves are in the paper; we have no number of them to compare with.
# 450 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
EPSILONS=${EPSILONS:-"1.5e-5 5e-5 4.5e-4"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_atari_gmp.py $COMMON --sparsity 0 --adam-eps $EPSILONS
$add "DQN 95 %" dqn_atari_gmp.py $COMMON --sparsity 0.95 --adam-eps $EPSILONS
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x adam-eps
