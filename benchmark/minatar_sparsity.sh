#!/usr/bin/env bash
# MinAtar, the pruning paper's figure 3 in small: DQN of width 4 at six final sparsities.
# It found on Atari: 90 and 95 % give +33 % over the dense network, 99 % keeps its score.
# 175 runs of 1M steps, more than half an hour each on one core: docs/eaudeqn_minatar.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"Asterix Breakout Freeway Seaquest SpaceInvaders"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
SPARSITIES=${SPARSITIES:-"0 0.5 0.8 0.9 0.95 0.98"}
COMMON="--env-id $GAMES --seed $SEEDS --total-timesteps ${STEPS:-1000000}"

add="python benchmark/launch.py add $grid"
$add "dense, width 1" dqn_minatar_gmp.py $COMMON --sparsity 0
$add "width 4" dqn_minatar_gmp.py $COMMON --width 4 --sparsity $SPARSITIES
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x sparsity --flat "dense, width 1" --baseline "dense, width 1" --last 5
