#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 22: RigL, sparse from the start, at four sparsities and widths 1 and 3.
# Its curves are in the paper; we have no number of them to compare with.
# 600 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 1 3"

add="python benchmark/launch.py add $grid"
$add "sparsity 0" dqn_atari_gmp.py $COMMON --sparsity 0
for sparsity in 0.9 0.95 0.99; do
  $add "sparsity $sparsity" dqn_atari_baselines.py $COMMON --sparsity $sparsity --pruner rigl --prune-every 5000
done
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --panel width --reference Impala-DQN
