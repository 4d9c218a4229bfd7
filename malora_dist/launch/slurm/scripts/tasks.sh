# shellcheck shell=bash
# On every node: a task of srun for each process.
export PROCESSES="$SLURM_NTASKS_PER_NODE"
node() { OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" exec bash "$LOGS/process.sh" "$@"; }
export -f node
