# shellcheck shell=bash disable=SC1007,SC2034
# USR1: the time limit is near. TERM: scancel, preemption or scontrol requeue; Slurm tells the processes itself, and
# starts the job again if it is to.
told= ended=
trap 'told=yes' USR1
trap 'ended=yes' TERM

# Refuses a mistake before any process starts.
malora launch begin "$@"
[[ -z "$ended" ]] || exit 143

@SRUN@ &
srun=$!
while kill -0 "$srun" 2>/dev/null; do
  # All save and end. The signal is repeated until they do: a process that still imports ignores it.
  [[ -z "$told" ]] || kill -USR1 "$srun" 2>/dev/null || true
  sleep 10 &
  wait -n "$srun" $! || true
done
[[ -z "$ended" ]] || exit 143

# A bare number of an array's task may be that of the array.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
job="${job:-$SLURM_JOB_ID}"
# On a node that Slurm had given up, the job may have begun again elsewhere; this start must not requeue it.
start=$(scontrol show job --oneliner "$job" | grep -o 'Restarts=[0-9]*') || true
[[ -z "$start" || "$start" == "Restarts=${SLURM_RESTART_COUNT:-0}" ]] || exit 143

# Saved, or lost a process: once more, in the same run folder, if that helps.
code=0
malora launch end "$@" || code=$?
((code == 75)) || exit "$code"
for try in 1 2 3 4 5; do
  [[ -z "$ended" ]] || exit 143
  if said=$(scontrol requeue "$job" 2>&1); then
    # Slurm ends this script.
    sleep 60 & wait $! || true
    exit 75
  fi
  echo "scontrol requeue: $said"
  [[ "$said" != *disabled* ]] || break
  sleep 20
done
echo "this job is not requeued; submit it again to go on"
exit 75
