# shellcheck shell=bash
srun --kill-on-bad-exit=1 --export=ALL --nodes="$SLURM_JOB_NUM_NODES" @TASKS@ \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}@FLAGS@ \
  bash -c 'node "$@"' malora @MODULE@ "$@"
