"""Checks before a job is submitted: the recipe, the run's folder, the plan and its memory."""

from pathlib import Path

from malora_dist.cli.cluster.job_commands import job_config
from malora_dist.config import RunConfig
from malora_dist.config.compatibility import check_plan
from malora_dist.config.summary import adapter_spec
from malora_dist.errors import ConfigError
from malora_dist.files.exit_status import FINISHED, read_exit_status
from malora_dist.launch.jobs import TRAIN, array_tasks, read_jobs
from malora_dist.launch.restarts import check_folder
from malora_dist.launch.scheduler import UNKNOWN
from malora_dist.launch.schedulers import queues
from malora_dist.plan import Lengths, Report, find_shape, hardware_of


def checked_recipe(recipe: str, overrides: list[str], world_size: int, *, trains: bool) -> RunConfig:
    """Return a recipe that can run on so many processes; if it `trains`, in a folder whose run is not finished.

    Raises ConfigError or TopologyError with all that is wrong.
    """
    config = job_config(recipe, overrides)
    adapter_spec(config)
    check_plan(config, world_size)
    run = Path(config.output_dir)
    check_folder(run)
    outcome = read_exit_status(run) if trains else None
    if outcome is not None and outcome["outcome"] == FINISHED:
        raise ConfigError(f"output_dir={run}: the run there is finished; give another --output_dir")
    return config


def check_no_job(run: Path) -> None:
    """Raise ConfigError if a job that trains in the folder waits or runs, as far as its scheduler knows."""
    for name, queue in queues().items():
        trains = [job for job in read_jobs(run / name) if job.stage == TRAIN][-1:]
        tasks = [f"{job.job}_{task}" for job in trains if job.array for task in array_tasks(job.array)]
        for job, state in queue.states(tasks or [job.job for job in trains]).items():
            if state.state != UNKNOWN and not state.ended:
                end = queue.cancel_command(job)
                raise ConfigError(f"output_dir={run}: job {job} is there for it already ({state}); {end} first")


def memory_note(config: RunConfig, nodes: int, gpus_per_node: int, hbm: str, model: str | None) -> str:
    """Return a sentence: the plan fits into the GPUs' memory, or why that is not known.

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
