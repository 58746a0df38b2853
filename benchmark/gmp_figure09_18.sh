#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figures 9 (Walker2d, Ant) and 18: soft actor-critic on five MuJoCo tasks.
# Its curves are in the paper; we have no number of them to compare with.
# 200 runs of 1M steps at 1,280 units and an L2 of 1e-4; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
ENVS=${ENVS:-"Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5 Walker2d-v5"}
SEEDS=${SEEDS:-"1 2 3 4 5 6 7 8 9 10"}

add="python benchmark/launch.py add $grid"
for sparsity in 0 0.9 0.95 0.99; do
  $add "sparsity $sparsity" sac_mujoco_gmp.py --env-id $ENVS --seed $SEEDS --sparsity $sparsity
done
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --sparsity
