#!/usr/bin/env bash
# Single-shot pruning for offline RL (arXiv 2112.15579), here on CQL: return against sparsity for each pruner.
# It found, by its abstract: most experiments keep their return with 95 % of the weights pruned. Datasets, sparsities
# and the number of seeds are our choice; GraSP empties a layer from about 0.8 on, which the script refuses.
# Data, once: python cleanrl_sparse/make_datasets.py --env-id Hopper-v5
# 90 runs of 1M gradient steps; hours of a run: benchmark/README.md. What results/ has is, on a CPU:
#     STEPS=20000 PRECISION=bf16 SPARSITIES='0.9 0.95 0.99' FLAGS='--batch-size 64 --epoch-steps 1000' \
#         benchmark/cql_pruners.sh --workers 2
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
DATASETS=${DATASETS:-"local/hopper/medium-v0 local/hopper/medium-expert-v0"}
SEEDS=${SEEDS:-"1 2 3"}
SPARSITIES=${SPARSITIES:-"0.5 0.9 0.95 0.99"}
COMMON="--dataset $DATASETS --seed $SEEDS --total-timesteps ${STEPS:-1000000} --precision ${PRECISION:-fp32}"

add="python benchmark/launch.py add $grid"
$add dense cql_offline_snip.py $COMMON --pruner none
for pruner in snip random magnitude; do
  $add $pruner cql_offline_snip.py $COMMON --pruner $pruner --sparsity $SPARSITIES
done
$add grasp cql_offline_snip.py $COMMON --pruner grasp --sparsity ${GRASP_SPARSITIES:-0.5 0.7}
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x sparsity --flat dense --last 5 --score d4rl
