#!/usr/bin/env bash
# Pruned network (arXiv 2402.12479), figure 6: all 60 games, DQN and Rainbow, dense and 95 %.
# Five games have no human score, so the mean is over 55.
# Its curves are in the paper; we have no number of them to compare with.
# 1,200 runs of 40M frames; hours of a run: benchmark/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
grid=$(basename "$0" .sh)
GAMES=${GAMES:-"AirRaid Alien Amidar Assault Asterix Asteroids Atlantis BankHeist BattleZone BeamRider Berzerk Bowling
  Boxing Breakout Carnival Centipede ChopperCommand CrazyClimber DemonAttack DoubleDunk ElevatorAction
  Enduro FishingDerby Freeway Frostbite Gopher Gravitar Hero IceHockey Jamesbond JourneyEscape Kangaroo
  Krull KungFuMaster MontezumaRevenge MsPacman NameThisGame Phoenix Pitfall Pong Pooyan PrivateEye Qbert
  Riverraid RoadRunner Robotank Seaquest Skiing Solaris SpaceInvaders StarGunner Tennis TimePilot
  Tutankham UpNDown Venture VideoPinball WizardOfWor YarsRevenge Zaxxon"}
SEEDS=${SEEDS:-"1 2 3 4 5"}
COMMON="--env-id $GAMES --seed $SEEDS --network impala --width 3"

add="python benchmark/launch.py add $grid"
$add "DQN dense" dqn_atari_gmp.py $COMMON --sparsity 0
$add "DQN 95 %" dqn_atari_gmp.py $COMMON --sparsity 0.95
$add "Rainbow dense" rainbow_resnet_gmp.py $COMMON --sparsity 0
$add "Rainbow 95 %" rainbow_resnet_gmp.py $COMMON --sparsity 0.95
python benchmark/launch.py launch $grid "$@"
python benchmark/plot.py curves $grid --reference Impala-DQN Impala-Rainbow
