#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figures 9 and 18: soft actor-critic on five MuJoCo tasks, dense and 95 %.
# Its curves are in the paper; we have no number of them to compare with.
# 100 runs of 1M steps at 1,280 units; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
ENVS=${ENVS:-"Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5 Walker2d-v5"}
SEEDS=${SEEDS:-"1 2 3 4 5 6 7 8 9 10"}

add="python benchmark/launch.py add $grid"
$add "SAC dense" sac_mujoco_gmp.py --env-id $ENVS --seed $SEEDS --sparsity 0
$add "SAC 95 %" sac_mujoco_gmp.py --env-id $ENVS --seed $SEEDS --sparsity 0.95
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --sparsity
