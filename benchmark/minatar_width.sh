#!/usr/bin/env bash
# MinAtar, the pruning paper's figure 1 in small: DQN of width 1, 2 and 4, dense and 95 %.
# It found on Atari: dense networks lose with width, pruned ones gain.
# 150 runs of 1M steps, half an hour each on one core at width 1, more above: docs/eaudeqn_minatar.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"Asterix Breakout Freeway Seaquest SpaceInvaders"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
WIDTHS=${WIDTHS:-"1 2 4"}
COMMON="--env-id $GAMES --seed $SEEDS --total-timesteps ${STEPS:-1000000}"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_minatar_gmp.py $COMMON --width $WIDTHS --sparsity 0
$add "DQN 95 %" dqn_minatar_gmp.py $COMMON --width $WIDTHS --sparsity 0.95
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x width --baseline "DQN dense" ${WIDTHS%% *} --last 5
