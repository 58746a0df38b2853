#!/usr/bin/env bash
# Eau De Q-Network (arXiv 2503.01437), ablation of which network acts, 512 features.
# It shows the final score, and in the table the final sparsity. We have no number of the paper's to compare with.
# The paper's way is taken to be inverse-loss.
# 150 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"BeamRider MsPacman Qbert Pong Enduro SpaceInvaders Assault CrazyClimber Boxing VideoPinball"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
VALUES=${VALUES:-"inverse-loss uniform argmin"}

add="python benchmark/launch.py add $grid"
$add EauDeDQN eaudeqn_atari.py --env-id $GAMES --seed $SEEDS --behaviour $VALUES
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py sweep $grid --x behaviour
