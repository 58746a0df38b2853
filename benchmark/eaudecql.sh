#!/usr/bin/env bash
# Eau De Q-Network (arXiv 2503.01437), offline: CQL, PolyPruneCQL (95 %) and EauDeCQL with 512 and 2,048 features, from 5 %
# of the DQN replay. Which two of its three sizes the paper has is not known; SIZES changes them.
# It found: EauDeCQL keeps the score and ends at a sparsity of its own, higher in larger networks.
# Data: DATA/GAME/RUN/replay_logs, runs 1 to 5 for seeds 1 to 5 (docs/cql_atari.md).
# 300 runs of 3,125,000 gradient steps; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
DATA=${DATA:-data}
GAMES=${GAMES:-"BeamRider MsPacman Qbert Pong Enduro SpaceInvaders Assault CrazyClimber Boxing VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
SIZES=${SIZES:-"512 2048"}
COMMON="--dataset $DATA --env-id $GAMES --seed $SEEDS --feature-size $SIZES --total-timesteps ${STEPS:-3125000}"

add="python benchmark/launch.py add $grid"
$add CQL cql_atari_gmp.py $COMMON --td-loss squared --sparsity 0
$add PolyPruneCQL cql_atari_gmp.py $COMMON --td-loss squared --sparsity 0.95
$add EauDeCQL cql_atari_eaudeqn.py $COMMON
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x feature-size --last 5
