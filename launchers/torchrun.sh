#!/usr/bin/env bash
# torchrun instead of the deepspeed launcher. One machine:
#   launchers/torchrun.sh RECIPE.yaml [--section.key value ...]
# Several machines, on each of them with its own NODE_RANK (from 0):
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=worker-1 launchers/torchrun.sh RECIPE.yaml
set -euo pipefail
: "${1:?usage: torchrun.sh RECIPE.yaml [--section.key value ...]}"
place=()
if [[ "${NNODES:-1}" -gt 1 ]]; then
  : "${NODE_RANK:?set NODE_RANK to the number of this machine, from 0}"
  : "${MASTER_ADDR:?set MASTER_ADDR to the name of machine 0}"
  place=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
fi
exec malora launch torchrun "$1" "${place[@]}" ${NPROC_PER_NODE:+--nproc_per_node "$NPROC_PER_NODE"} "${@:2}"
