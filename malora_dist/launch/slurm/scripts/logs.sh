# shellcheck shell=bash
# The output of each process, beside this job's own log.
export LOGS=@LOGS@ MALORA_EXIT_CODE=@LOGS@/exit_code
mkdir -p "$LOGS"
rm -f "$MALORA_EXIT_CODE"
# One process of a run. It and tee ignore USR1 until the handlers of the run are installed. TERM goes to all processes of
# a job step; tee ignores it, to write what the process prints last. With segments that grow, GPU memory that was freed
# serves the next micro-batch, which has another number of tokens.
cat >"$LOGS/process.sh" <<'PROCESS'
trap "" USR1
[[ -v PYTORCH_CUDA_ALLOC_CONF ]] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF-expandable_segments:True}"
exec > >(trap "" TERM && exec tee -a "$LOGS/rank-${RANK:-$SLURM_PROCID}.log") 2>&1
exec python -m "$@"
PROCESS
