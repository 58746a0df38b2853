#!/usr/bin/env bash
# The first epochs of dense DQN and Rainbow with the CNN, to be set beside Dopamine's published runs (no paper's figure).
# A dense run does not depend on its length, so that its beginning can be compared without the rest.
# 7 runs of 4M frames. FLAGS="--precision bf16" where the CPU has instructions for it, else fp32 is far faster.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
DQN_GAMES=${DQN_GAMES:-"Breakout Enduro Qbert MsPacman KungFuMaster"}
RAINBOW_GAMES=${RAINBOW_GAMES:-"Breakout Qbert"}
SEEDS=${SEEDS:-"1"}
COMMON="--seed $SEEDS --network cnn --sparsity 0 --total-timesteps 1000000"

add="python benchmark/launch.py add $grid"
$add DQN dqn_atari_gmp.py --env-id $DQN_GAMES $COMMON
$add Rainbow rainbow_resnet_gmp.py --env-id $RAINBOW_GAMES $COMMON
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py epochs $grid --reference CNN-DQN CNN-Rainbow
