# shellcheck shell=bash
# The processes meet on the first node, at a port of this job's own.
# Not `scontrol | head -n1`: with pipefail that ends the job when scontrol still has names to write.
unset RANK LOCAL_RANK WORLD_SIZE
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR="${nodes[0]}"
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 7 * ${SLURM_RESTART_COUNT:-0}) % 20000))
export PYTHONUNBUFFERED=1
