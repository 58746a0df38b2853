#!/usr/bin/env bash
# MinAtar, the pruning paper's figure 5 in small, with DQN: replay ratios of 0.25, 0.5 and 1, dense and 95 %.
# It found on Atari, with Rainbow: pruned networks hold up at higher ratios.
# 150 runs of 1M steps, half an hour each on one core at a ratio of 0.25, more above: docs/eaudeqn_minatar.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"Asterix Breakout Freeway Seaquest SpaceInvaders"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
RATIOS=${RATIOS:-"0.25 0.5 1"}
COMMON="--env-id $GAMES --seed $SEEDS --total-timesteps ${STEPS:-1000000}"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_minatar_gmp.py $COMMON --replay-ratio $RATIOS --sparsity 0
$add "DQN 95 %" dqn_minatar_gmp.py $COMMON --replay-ratio $RATIOS --sparsity 0.95
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x replay-ratio --baseline "DQN dense" ${RATIOS%% *} --last 5
