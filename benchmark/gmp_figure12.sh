#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 12: DQN, dense and 95 %, against L2 features, weight decay, ReDo and resets
# at widths 1, 3 and 5: final scores here; the curves at width 3 are `WIDTHS=3` with `plot.py curves`.
# The baselines are dense networks. Of the paper's agents, DQN is here.
# 1,350 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"MsPacman Pong Qbert Assault Asterix BeamRider Boxing Breakout CrazyClimber DemonAttack Enduro
  FishingDerby SpaceInvaders Tutankham VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
WIDTHS=${WIDTHS:-"1 3 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width $WIDTHS"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_atari_gmp.py $COMMON --sparsity 0
$add "DQN 95 %" dqn_atari_gmp.py $COMMON --sparsity 0.95
for regulariser in l2-features weight-decay redo reset; do
  $add "DQN $regulariser" dqn_atari_baselines.py $COMMON --sparsity 0 --regulariser $regulariser
done
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x width --reference Impala-DQN
