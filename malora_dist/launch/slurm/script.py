"""Job scripts for sbatch as text, each complete in itself, made of the bash in scripts/; slurm/ holds some."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from malora_dist.errors import ConfigError
from malora_dist.launch.scheduler import JobOptions

OWN_ENVIRONMENT = """\
# Lines for your site go here, such as module load or source .venv/bin/activate, between set +u and set -u. Without any,
# the job has the environment that sbatch was called in."""


@dataclass(frozen=True, kw_only=True)
class ScriptOptions(JobOptions):
    """Options of a job, and where its output goes: sbatch's pattern for a file, and bash for the processes' folder."""

    output: str = "%x_%j.out"
    logs: str = '"${SLURM_JOB_NAME}_$SLURM_JOB_ID"'


def shipped_scripts() -> dict[str, str]:
    """Return path and text of the scripts to submit by hand: those of slurm/."""
    one = ScriptOptions(nodes=1, time="2:00:00")
    return {
        "slurm/train.sbatch": train_script(ScriptOptions()),
        "slurm/array.sbatch": array_script(ScriptOptions(name="malora-array", nodes=1)),
        "slurm/eval.sbatch": evaluate_script(replace(one, name="malora-eval")),
        "slurm/convert.sbatch": convert_script(replace(one, name="malora-convert", gpus_per_node=0, cpus_per_task=8)),
    }


def train_script(job: ScriptOptions) -> str:
    """Render a run that saves, requeues itself and resumes. Raises ConfigError for what no script can give sbatch."""
    about = [
        "Trains. Near its time limit, preempted, or after a crash, it goes on in the same run folder:",
        "  sbatch slurm/train.sbatch RECIPE.yaml [--section.key value ...]",
    ]
    return _script(job, about, _goes_on(job), ["RECIPE.yaml"], [*_processes(job), _train(job)])


def array_script(job: ScriptOptions, *, tasks: str = "1-5", output_dir: str | None = None) -> str:
    """Render a run for each task of an array; one recipe's are below `output_dir`. Raises as `train_script`."""
    about = [
        "A training run for each seed, or for each of several recipes; every one goes on as train.sbatch does:",
        "  sbatch --array=1-5 slurm/array.sbatch RECIPE.yaml [--section.key value ...]",
        "  sbatch --array=1-3 slurm/array.sbatch A.yaml B.yaml C.yaml [--section.key value ...]",
    ]
    folder = [] if output_dir is None else [f"MALORA_RUNS={shlex.quote(output_dir)}"]
    body = [*folder, block("array"), *_processes(job), _train(job)]
    return _script(job, about, {"array": tasks, **_goes_on(job)}, ["RECIPE.yaml"], body)


def evaluate_script(job: ScriptOptions) -> str:
    """Render `malora evaluate` on all processes. Raises ConfigError as `train_script`."""
    about = ["Measures a run's accuracies again:", "  sbatch slurm/eval.sbatch RUN_DIR [--section.key value ...]"]
    return _script(job, about, {}, ["RUN_DIR"], [*_processes(job), _srun(job, "malora_dist.evaluate")])


def convert_script(job: ScriptOptions) -> str:
    """Render `malora convert`, one process on one node. Raises ConfigError as `train_script`."""
    about = ["Writes a run's adapter in another form:", "  sbatch slurm/convert.sbatch SRC DST --to KIND [--verify]"]
    body = [_setup(job), block("convert", FLAGS=_flags(job.srun))]
    return _script(job, about, {}, ["SRC", "DST", "--to", "KIND"], body)


def _script(
    job: ScriptOptions, about: Sequence[str], more: dict[str, str | None], usage: Sequence[str], body: list[str]
) -> str:
    if job.arguments is None:
        own = f'(($# >= {len(usage)})) || {{ echo "usage: {about[1].strip()}" >&2; exit 2; }}'
    else:
        own = f"set -- {shlex.join(job.arguments)}"
    head = ["#!/usr/bin/env bash", *(f"# {line}" for line in about), *_directives(job, more), "set -euo pipefail", own]
    return "\n\n".join(["\n".join(head), *body]) + "\n"


def _goes_on(job: ScriptOptions) -> dict[str, str | None]:
    return {"requeue": None, "signal": f"B:USR1@{job.save_before}"}


def _directives(job: ScriptOptions, more: dict[str, str | None]) -> list[str]:
    options: dict[str, str | None] = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.processes_per_node) if job.start == "tasks" else "1",
    }
    if job.gpus_per_node:
        kind = "" if job.gpu_type is None else f"{job.gpu_type}:"
        options["gpus-per-node"] = f"{kind}{job.gpus_per_node}"
    if job.cpus_per_task is not None:
        options["cpus-per-task"] = str(job.cpus_per_task)
    options |= {"time": job.time, "output": job.output, "open-mode": "append", "export": "ALL", **more}
    lines = [name if value is None else f"{name}={_quoted(name, value)}" for name, value in options.items()]
    return [f"#SBATCH {line}" for line in [*(f"--{line}" for line in lines), *map(_quoted_flag, job.sbatch)]]


def _quoted_flag(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return f"{name}{equals}{_quoted(f'launch.sbatch {name}', value) if equals else ''}"


def _quoted(name: str, value: str) -> str:
    """Quote a value for sbatch, which reads quotes in a script as bash does, one line at a time."""
    if "\n" in value or "\r" in value:
        raise ConfigError(f"{name}={value!r}: a job script cannot hold a line break there")
    return value if set(value) <= _PLAIN else shlex.quote(value)


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=+:@%./,[]")


def _processes(job: ScriptOptions) -> list[str]:
    """Return the bash that sets where the processes meet and what they write, and how a node starts its own."""
    number = [] if job.processes is None else [f"export NPROC_PER_NODE={job.processes}"]
    start = block("launcher") if job.start == "launcher" else block("tasks")
    # The setup may choose another address or port.
    return [block("place"), _setup(job), block("logs", LOGS=job.logs), "\n".join([*number, start])]


def _setup(job: ScriptOptions) -> str:
    return block("setup", LINES="\n".join(job.setup)) if job.setup else OWN_ENVIRONMENT


def _train(job: ScriptOptions) -> str:
    return block("train", SRUN=_srun(job, "malora_dist.train"))


def _srun(job: ScriptOptions, module: str) -> str:
    tasks = (
        '--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1'
        if job.start == "launcher"
        else '--ntasks-per-node="$SLURM_NTASKS_PER_NODE"'
    )
    return block("srun", TASKS=tasks, FLAGS=_flags(job.srun), MODULE=module)


def _flags(flags: Sequence[str]) -> str:
    return "".join(f" {shlex.quote(flag)}" for flag in flags)


def block(name: str, **values: str) -> str:
    """Return a piece of bash (4.4 or newer) with the values in place of @NAME@, without its line for shellcheck."""
    text = (files("malora_dist.launch.slurm") / "scripts" / f"{name}.sh").read_text(encoding="utf-8")
    lines = text.partition("\n")[2].rstrip("\n")
    for key, value in values.items():
        lines = lines.replace(f"@{key}@", value)
    return lines
