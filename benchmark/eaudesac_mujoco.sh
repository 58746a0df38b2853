#!/usr/bin/env bash
# Soft actor-critic on MuJoCo: dense, gradual magnitude pruning to 95 and 99 %, EauDeSAC with and without a pruned actor.
#
# Return and sparsity over 200,000 steps, 3 seeds, 256 units, all methods with slimSAC's settings so that they compare.
# It needs no GPU: 15 to 25 minutes for a run with one pair of critics, 35 to 50 for five, on one core with bf16.
# What is finished is left alone and what was broken off goes on, so start it again as often as you like.
#
#     benchmark/eaudesac_mujoco.sh                                    # JOBS=2 at a time, runs/eaudesac_mujoco/
#     pip install -e ".[plot]" && python benchmark/plot.py runs/eaudesac_mujoco benchmark/results/eaudesac_mujoco
set -euo pipefail
cd "$(dirname "$0")/.."

ENVS=${ENVS:-"Hopper-v5 HalfCheetah-v5"}
SEEDS=${SEEDS:-"1 2 3"}
METHODS=${METHODS:-"dense gmp-0.95 eaudesac gmp-0.99 eaudesac-pruned-actor"}
STEPS=${STEPS:-200000}
JOBS=${JOBS:-2}
RUNS=${RUNS:-runs/eaudesac_mujoco}

train() { # METHOD ENV SEED
  local script flags folder="$RUNS/$1/$2/$3"
  case $1 in
    eaudesac) script=sac_mujoco_eaudeqn.py flags="" ;;
    eaudesac-pruned-actor) script=sac_mujoco_eaudeqn.py flags="--prune-actor" ;;
    dense) script=sac_mujoco_gmp.py flags="--sparsity 0" ;;
    gmp-*) script=sac_mujoco_gmp.py flags="--sparsity ${1#gmp-}" ;;
    *) echo "METHODS: $1 is none of dense, gmp-SPARSITY, eaudesac, eaudesac-pruned-actor" >&2 && return 2 ;;
  esac
  if [ $script = sac_mujoco_gmp.py ]; then
    flags="$flags --width 1 --learning-starts 5000 --learning-rate 1e-3 --reward-scale 1 --target-entropy -1"
    flags="$flags --weight-decay 0"
  fi
  flags="--env-id $2 --seed $3 --total-timesteps $STEPS --precision bf16 $flags --run-dir $folder"
  [ -e "$folder/args.json" ] && flags="--resume $folder"
  mkdir -p "$folder"
  echo "$script $flags"
  # shellcheck disable=SC2086  # the flags are words
  OMP_NUM_THREADS=1 python "cleanrl_sparse/$script" $flags &>> "$folder/.log" && return
  echo "$folder did not finish: $(tail -n 1 "$folder/.log")" >&2 && return 1
}

export -f train
export RUNS STEPS
for seed in $SEEDS; do
  for method in $METHODS; do
    for env in $ENVS; do echo "$method $env $seed"; done
  done
done | xargs -P "$JOBS" -L 1 bash -c 'train "$@"' train
