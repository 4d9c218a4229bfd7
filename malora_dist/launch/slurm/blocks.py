"""The bash of job scripts, in pieces, for bash >= 4.4. `launch.slurm.script` puts them together; results: slurm/."""

PLACE = """\
# The processes meet on the first node, at a port of this job's own.
# Not `scontrol | head -n1`: with pipefail that ends the job when scontrol still has names to write.
unset RANK LOCAL_RANK WORLD_SIZE
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${nodes[0]}"
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7 * ${SLURM_RESTART_COUNT:-0}) % 20000))
export PYTHONUNBUFFERED=1"""

SETUP = """\
# What your site needs. Such scripts read variables that are not set.
set +u
{lines}
set -u"""

LOGS = """\
# What each process says, beside this job's own log.
export LOGS={logs} MALORA_EXIT_CODE={logs}/exit_code
mkdir -p "$LOGS"
rm -f "$MALORA_EXIT_CODE"
# One process of a run. USR1 would end it while it still imports, and tee: it begins without an ear for it. TERM goes to
# all of a job step, and tee is to hear the last word. Without segments that grow, GPU memory that was freed would often
# not serve the next micro-batch, which has another number of tokens.
cat >"$LOGS/process.sh" <<'PROCESS'
trap "" USR1
[[ -v PYTORCH_CUDA_ALLOC_CONF ]] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF-expandable_segments:True}"
exec > >(trap "" TERM && exec tee -a "$LOGS/rank-${RANK:-$SLURM_PROCID}.log") 2>&1
exec python -m "$@"
PROCESS"""

LAUNCHER = """\
# On every node: a launcher, which starts a process for each of the node's GPUs, or NPROC_PER_NODE processes.
export PROCESSES="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
node() {
  trap "" USR1 TERM
  local processes="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" launcher code=0
  local threads=$((${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}} / processes))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  # Neither signal is the launcher's: USR1 would end it, and TERM let it end the processes one by one, in their save.
  export PET_SIGNALS_TO_HANDLE=SIGINT
  torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node_rank "$SLURM_NODEID" --nproc_per_node "$processes" \\
    --rdzv_id "$SLURM_JOB_ID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \\
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
export -f node tell"""

TASKS = """\
# On every node: a task of srun for each process.
export PROCESSES="$SLURM_NTASKS_PER_NODE"
node() { OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" exec bash "$LOGS/process.sh" "$@"; }
export -f node"""

SRUN = """\
srun --kill-on-bad-exit=1 --export=ALL --nodes="$SLURM_JOB_NUM_NODES" {tasks} \\
  ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}}{flags} \\
  bash -c 'node "$@"' malora {module} "$@\""""

TRAIN = """\
# USR1: the time limit is near. TERM: scancel, preemption or scontrol requeue; Slurm tells the processes itself, and
# starts the job again if it is to.
told= ended=
trap 'told=yes' USR1
trap 'ended=yes' TERM

# Refuses a mistake before any process starts.
malora launch begin "$@"
[[ -z "$ended" ]] || exit 143

{srun} &
srun=$!
while kill -0 "$srun" 2>/dev/null; do
  # All save and end. They are told until they do: one that still imports does not hear.
  [[ -z "$told" ]] || kill -USR1 "$srun" 2>/dev/null || true
  sleep 10 &
  wait -n "$srun" $! || true
done
[[ -z "$ended" ]] || exit 143

# A bare number of an array's task may be that of the array.
job="${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}"
job="${{job:-$SLURM_JOB_ID}}"
# On a node that Slurm had given up, the job may have begun again elsewhere, and this start has no say any more.
start=$(scontrol show job --oneliner "$job" | grep -o 'Restarts=[0-9]*') || true
[[ -z "$start" || "$start" == "Restarts=${{SLURM_RESTART_COUNT:-0}}" ]] || exit 143

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
exit 75"""

ARRAY = """\
# With one recipe a task's number is its seed; with several, it is the number of its recipe, from 1.
recipes=()
while (($#)) && [[ "$1" == *.y*ml && "$1" != --* ]]; do recipes+=("$1") && shift; done
task="$SLURM_ARRAY_TASK_ID"
if ((${#recipes[@]} == 1)); then
  set -- "${recipes[0]}" "$@" --train.seed "$task" --output_dir "${MALORA_RUNS:-runs/$SLURM_JOB_NAME}/seed-$task"
else
  ((task >= 1 && task <= ${#recipes[@]})) || { echo "--array: there is no recipe number $task" >&2; exit 2; }
  set -- "${recipes[task - 1]}" "$@"
fi"""

CONVERT = """\
srun --ntasks=1 --nodes=1 --export=ALL \\
  ${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}}{flags} \\
  bash -c 'malora convert "$@"' malora "$@\""""
