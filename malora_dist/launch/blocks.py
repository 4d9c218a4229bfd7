"""The bash of job scripts, in pieces. `launch.script` puts them together; slurm/ shows the results."""

PLACE = """\
# The processes meet on the first node, at a port that no other job there uses.
# Not `scontrol | head -n1`: with pipefail that ends the job when scontrol still has names to write.
unset RANK LOCAL_RANK WORLD_SIZE
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${nodes[0]}"
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export PYTHONUNBUFFERED=1"""

LOGS = """\
# What each process says, beside this job's own log.
export LOGS={logs} MALORA_EXIT_CODE={logs}/exit_code
mkdir -p "$LOGS"
rm -f "$MALORA_EXIT_CODE\""""

PROCESS = """\
# One process of a run, with its own log. USR1 would end it while it still imports, and tee: it begins without an ear
# for it. TERM goes to all of a job step, and tee is to hear the last word.
process() {
  trap "" USR1
  exec > >(trap "" TERM && exec tee -a "$LOGS/rank-${RANK:-$SLURM_PROCID}.log") 2>&1
  exec python -m "$@"
}"""

LAUNCHER = """\
# On every node: a launcher, which starts a process for each of the node's GPUs, or NPROC_PER_NODE processes.
node() {
  local processes="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" launcher code
  local threads=$((${SLURM_CPUS_PER_TASK:-1} / processes))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  # Slurm's TERM is not the launcher's either: it would end the processes one by one, in their save.
  export PET_SIGNALS_TO_HANDLE=SIGINT
  (trap "" USR1 TERM && torchrun --nnodes "$SLURM_JOB_NUM_NODES" --node_rank "$SLURM_NODEID" \\
    --nproc_per_node "$processes" --rdzv_id "$SLURM_JOB_ID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \\
    --no_python bash -c 'process "$@"' malora "$@") &
  launcher=$!
  trap 'tell USR1 "$launcher"' USR1
  trap 'tell TERM "$launcher"' TERM
  code=0
  wait "$launcher" || code=$?
  while kill -0 "$launcher" 2>/dev/null; do code=0; wait "$launcher" || code=$?; done
  return "$code"
}
# A signal for the processes that train, which have a LOCAL_RANK, and for no launcher or container above them.
tell() {
  local child
  for child in $(cat "/proc/$2/task/"*/children 2>/dev/null); do
    if grep -qsz '^LOCAL_RANK=' "/proc/$child/environ"; then kill -s "$1" "$child" || true; else tell "$1" "$child"; fi
  done
}
export -f process node tell"""

TASKS = """\
# On every node: a task of srun for each process.
node() { OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" process "$@"; }
export -f process node"""

SRUN = """\
srun --kill-on-bad-exit=1 --export=ALL --nodes="$SLURM_JOB_NUM_NODES" {tasks} \\
  --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}"{flags} \\
  bash -c 'node "$@"' malora {module} "$@\""""

TRAIN = """\
# USR1: the time limit is near. TERM: scancel, preemption or scontrol requeue, of which Slurm tells the processes itself;
# it starts the job again if it is to.
told= ended=
trap 'told=yes' USR1
trap 'ended=yes' TERM

# Refuses a mistake before any process starts, and a job that ends again and again without a newer checkpoint.
malora launch begin "$@"

{srun} &
srun=$!
while kill -0 "$srun" 2>/dev/null; do
  # All save and end. They are told until they do: one that still imports does not hear.
  [[ -z "$told" ]] || kill -USR1 "$srun" 2>/dev/null || true
  sleep 10 &
  wait -n "$srun" $! || true
done
[[ -z "$ended" ]] || exit 143

# Saved, or lost a process or a node: once more, in the same run folder.
code=0
malora launch end "$@" || code=$?
((code == 75)) || exit "$code"
scontrol requeue "$SLURM_JOB_ID" || {{ echo "Slurm does not requeue this job; submit it again to go on"; exit 75; }}
# Slurm ends this script.
sleep 60"""

ARRAY = """\
# With one recipe a task's number is its seed; with several, it is the number of its recipe, from 1.
recipes=()
while (($#)) && [[ "$1" != --* && "$1" != *=* ]]; do recipes+=("$1") && shift; done
task="$SLURM_ARRAY_TASK_ID"
if ((${#recipes[@]} == 1)); then
  set -- "${recipes[0]}" "$@" --train.seed "$task" --output_dir "${OUTPUT_DIR:-runs/$SLURM_JOB_NAME}/seed-$task"
else
  set -- "${recipes[task - 1]:?there is no recipe number $task}" "$@"
fi"""

CONVERT = """\
srun --ntasks=1 --nodes=1 --export=ALL --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}"{flags} malora convert "$@\""""
