#!/usr/bin/env bash
# Several machines reached by ssh without a password. HOSTFILE has a line for each, such as "worker-1 slots=8":
#   HOSTFILE=hosts launchers/multi_node.sh RECIPE.yaml [--section.key value ...]
# All machines need the same folder, Python environment and data at the same paths.
set -euo pipefail
: "${HOSTFILE:?set HOSTFILE to a file with one 'host slots=N' a line}"
: "${1:?usage: HOSTFILE=hosts multi_node.sh RECIPE.yaml [--section.key value ...]}"
exec malora launch deepspeed "$1" --hostfile "$HOSTFILE" ${MASTER_PORT:+--master_port "$MASTER_PORT"} "${@:2}"
