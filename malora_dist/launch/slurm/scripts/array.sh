# shellcheck shell=bash
# With one recipe a task's number is its seed; with several, it is the number of its recipe, from 1.
recipes=()
while (($#)) && [[ "$1" == *.y*ml && "$1" != --* ]]; do recipes+=("$1") && shift; done
task="$SLURM_ARRAY_TASK_ID"
if ((${#recipes[@]} == 1)); then
  set -- "${recipes[0]}" "$@" --train.seed "$task" --output_dir "${MALORA_RUNS:-runs/$SLURM_JOB_NAME}/seed-$task"
else
  ((task >= 1 && task <= ${#recipes[@]})) || { echo "--array: there is no recipe number $task" >&2; exit 2; }
  set -- "${recipes[task - 1]}" "$@"
fi
