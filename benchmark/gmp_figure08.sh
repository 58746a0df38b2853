#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 8: offline CQL and CQL+C51 at 95 and 99 %, widths 1 and 3, from 5 % of the DQN
# replay. Data: DATA/GAME/RUN/replay_logs, runs 1 to 5 for seeds 1 to 5 (docs/cql_atari.md). Which 17 games
# the paper has could not be read: these are the 17 of Kumar et al. 2021 (arXiv 2112.04716), a guess.
# 1,020 runs of 12.5M gradient steps; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
DATA=${DATA:-data}
GAMES=${GAMES:-"Asterix Breakout Pong Seaquest Qbert SpaceInvaders Zaxxon YarsRevenge RoadRunner MsPacman BeamRider
  Jamesbond Enduro WizardOfWor IceHockey DoubleDunk DemonAttack"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
WIDTHS=${WIDTHS:-"1 3"}
SPARSITIES=${SPARSITIES:-"0 0.95 0.99"}
COMMON="--dataset $DATA --env-id $GAMES --seed $SEEDS --network impala --width $WIDTHS --sparsity $SPARSITIES"
COMMON="$COMMON --total-timesteps ${STEPS:-12500000}"

add="python benchmark/launch.py add $grid"
$add CQL cql_atari_gmp.py $COMMON
$add "CQL+C51" cql_atari_gmp.py $COMMON --n-step 3 --learning-rate 6.25e-5 --adam-eps 1.5e-4 --c51
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x sparsity --panel width --last 5
