#!/usr/bin/env bash
# MinAtar: what of Eau De Q-Network matters: the number of networks, which of them acts, and, as a control, the next target
# chosen at random and not by its loss.
# 125 runs of 1M steps, half an hour (K = 5: an hour) each on one core: docs/eaudeqn_minatar.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"Asterix Breakout Freeway Seaquest SpaceInvaders"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
COMMON="--env-id $GAMES --seed $SEEDS --total-timesteps ${STEPS:-1000000}"

add="python benchmark/launch.py add $grid"
for k in 2 5 10; do
  $add "K = $k" eaudeqn_minatar.py $COMMON --num-networks $k
done
$add "uniform behaviour" eaudeqn_minatar.py $COMMON --behaviour uniform
$add "random choice" eaudeqn_minatar.py $COMMON --selection random
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --sparsity --baseline "K = 5" --last 5
