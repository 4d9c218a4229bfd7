#!/usr/bin/env bash
# All GPUs of this machine, or NUM_GPUS of them:
#   NUM_GPUS=4 launchers/single_node.sh RECIPE.yaml [--section.key value ...]
set -euo pipefail
: "${1:?usage: single_node.sh RECIPE.yaml [--section.key value ...]}"
exec malora launch deepspeed "$1" ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} "${@:2}"
