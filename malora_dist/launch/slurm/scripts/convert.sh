# shellcheck shell=bash
srun --ntasks=1 --nodes=1 --export=ALL \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}@FLAGS@ \
  bash -c 'malora convert "$@"' malora "$@"
