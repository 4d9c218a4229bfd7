# shellcheck shell=bash disable=SC2013
# On every node: a launcher, which starts a process for each of the node's GPUs, or NPROC_PER_NODE processes.
export PROCESSES="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
node() {
  trap "" USR1 TERM
  local processes="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" launcher code=0
  local threads=$((${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}} / processes))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  # The launcher gets neither signal: USR1 would end it, and at TERM it would end the processes while they save.
  export PET_SIGNALS_TO_HANDLE=SIGINT
  torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$processes" \
    --rdzv_id "$SLURM_JOB_ID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
    --no_python bash "$LOGS/process.sh" "$@" &
  launcher=$!
  trap 'tell USR1 "$launcher"' USR1
  trap 'tell TERM "$launcher"' TERM
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done
  wait "$launcher" || code=$?
  return "$code"
}
# A signal for the processes that train, which have a LOCAL_RANK, and for no launcher or container above them.
tell() {
  local child
  for child in $(cat "/proc/$2/task/"*/children 2>/dev/null); do
    if grep -qsz '^LOCAL_RANK=' "/proc/$child/environ"; then kill -s "$1" "$child" || true; else tell "$1" "$child"; fi
  done
}
export -f node tell
