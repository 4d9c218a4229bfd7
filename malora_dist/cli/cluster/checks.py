"""What is looked at before a job is submitted: the recipe, the run's folder, the plan and its memory."""

from collections.abc import Sequence
from pathlib import Path

from malora_dist.cli.cluster.job_commands import job_config
from malora_dist.config import RunConfig
from malora_dist.config.compatibility import check_plan
from malora_dist.config.summary import adapter_spec
from malora_dist.errors import ConfigError
from malora_dist.files.exit_status import FINISHED, read_outcome
from malora_dist.launch.jobs import SLURM_FOLDER, TRAIN, array_tasks, read_jobs
from malora_dist.launch.restarts import check_folder
from malora_dist.launch.slurm.queue import UNKNOWN, job_states
from malora_dist.plan import Lengths, Report, find_shape, hardware_of

# Flags of sbatch that malora launch slurm has an option for, or gives itself; a letter is a short flag.
LOGS, FIXED = "nothing: logs are in the run's folder", "nothing: the job script expects its own"
OWN_FLAGS = {
    "nodes": "--nodes", "N": "--nodes", "gpus-per-node": "--gpus-per-node and --gpu-type", "gpus": "--gpus-per-node",
    "G": "--gpus-per-node", "gpus-per-task": "--gpus-per-node", "ntasks": "--processes-per-node",
    "n": "--processes-per-node", "ntasks-per-node": "--processes-per-node", "ntasks-per-gpu": "--processes-per-node",
    "cpus-per-task": "--cpus-per-task", "c": "--cpus-per-task", "time": "--time", "t": "--time", "array": "--array",
    "a": "--array", "dependency": "--after", "d": "--after", "job-name": "--name", "J": "--name",
    "signal": "--save-before", "output": LOGS, "o": LOGS, "error": LOGS, "e": LOGS, "open-mode": LOGS,
    "parsable": FIXED, "wrap": FIXED, "chdir": FIXED, "D": FIXED, "export": FIXED,
}  # fmt: skip


def checked_recipe(recipe: str, overrides: list[str], world_size: int, *, trains: bool) -> RunConfig:
    """A recipe that can run on so many processes; if it `trains`, in a folder whose run is not finished.

    Raises ConfigError or TopologyError with all that is wrong.
    """
    config = job_config(recipe, overrides)
    adapter_spec(config)
    check_plan(config, world_size)
    run = Path(config.output_dir)
    check_folder(run)
    outcome = read_outcome(run) if trains else None
    if outcome is not None and outcome["outcome"] == FINISHED:
        raise ConfigError(f"output_dir={run}: the run there is finished; give another --output_dir")
    return config


def check_no_job(run: Path) -> None:
    """Raise ConfigError if a job that trains in the folder waits or runs, as far as Slurm tells."""
    trains = [job for job in read_jobs(run / SLURM_FOLDER) if job.stage == TRAIN][-1:]
    tasks = [f"{job.job}_{task}" for job in trains if job.array for task in array_tasks(job.array)]
    for job, state in job_states(tasks or [job.job for job in trains]).items():
        if state.state != UNKNOWN and not state.ended:
            raise ConfigError(f"output_dir={run}: job {job} is there for it already ({state}); scancel {job} first")


def memory_note(config: RunConfig, nodes: int, gpus_per_node: int, hbm: str, model: str | None) -> str:
    """That the plan fits into the GPUs' memory, in words, or why that is not known.

    Raises ConfigError, with what to change, if it does not fit.
    """
    hardware = hardware_of(
        config, nodes=nodes, gpus_per_node=gpus_per_node, hbm=hbm, intra="450GB/s", inter="50GB/s", flops="400TFLOP/s"
    )
    try:
        shape = find_shape(model or config.model.name_or_path, config.model.revision if model is None else None)
    except ConfigError as error:
        return f"whether it fits into {hbm} was not checked: {error}"
    report = Report(config, adapter_spec(config), shape, hardware, Lengths(None, None))
    if not report.chosen.fits:
        advice = "\n  ".join(report.advice)
        raise ConfigError(f"the plan does not fit into GPUs of --hbm {hbm}:\n  {advice}")
    return report.advice[0]


def check_flags(where: str, flags: Sequence[str]) -> None:
    """Raise ConfigError for a flag of sbatch that belongs to `malora launch slurm`; `where` it stands, in words."""
    for flag in flags:
        name = flag[2:].partition("=")[0] if flag.startswith("--") else flag[1:2] if flag.startswith("-") else ""
        if name in OWN_FLAGS:
            raise ConfigError(f"{flag}: not {where}; use {OWN_FLAGS[name]}")
