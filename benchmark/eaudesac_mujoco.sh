#!/usr/bin/env bash
# Eau De Q-Network (arXiv 2503.01437), EauDeSAC on five MuJoCo tasks, with the actor dense and pruned, against dense SAC
# and gradual magnitude pruning to 80, 95 and 99 %, all with slimSAC's settings so that they compare; 80 % is about what
# EauDeSAC reached in what results/ has. The pruning paper has an L2 of 1e-4: a curve beside each, "L2".
# It found: EauDeSAC reaches high sparsity and keeps the score. Number of seeds: our choice.
# 250 runs of 1M steps; hours of a run: benchmark/README.md. What results/ has is, on a CPU:
#     ENVS='Hopper-v5 HalfCheetah-v5' SEEDS='1 2 3' STEPS=200000 PRECISION=bf16 benchmark/eaudesac_mujoco.sh
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
ENVS=${ENVS:-"Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5 Walker2d-v5"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
COMMON="--env-id $ENVS --seed $SEEDS --total-timesteps ${STEPS:-1000000} --precision ${PRECISION:-fp32}"
SLIM="--width 1 --learning-starts 5000 --learning-rate 1e-3 --reward-scale 1 --target-entropy -1"

add="python benchmark/launch.py add $grid"
$add "SAC dense" sac_mujoco_gmp.py $COMMON $SLIM --sparsity 0 --weight-decay 0
$add "SAC dense, L2" sac_mujoco_gmp.py $COMMON $SLIM --sparsity 0 --weight-decay 1e-4
for percent in 80 95 99; do
  $add "SAC $percent %" sac_mujoco_gmp.py $COMMON $SLIM --sparsity 0.$percent --weight-decay 0
  $add "SAC $percent %, L2" sac_mujoco_gmp.py $COMMON $SLIM --sparsity 0.$percent --weight-decay 1e-4
done
$add EauDeSAC sac_mujoco_eaudeqn.py $COMMON
$add "EauDeSAC, pruned actor" sac_mujoco_eaudeqn.py $COMMON --prune-actor
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --sparsity --last 5 --against "SAC dense"
