"""The section `launch` of a recipe: how a cluster starts the run."""

import shlex
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from malora_dist.config.base import MOST, Section


def _shell_lines(value: Any) -> Any:
    return value.splitlines() if isinstance(value, str) else value


def _flags(value: Any) -> Any:
    try:
        return shlex.split(value) if isinstance(value, str) else value
    except ValueError as error:
        raise PydanticCustomError(
            "unbalanced", "must be flags as on a command line: {why}", {"why": str(error)}
        ) from error


def _one_line(value: str) -> str:
    if "\n" in value or "\r" in value:
        raise PydanticCustomError("line_break", "must be one line, without a line break")
    return value


def _one_flag(value: str) -> str:
    if not value.startswith("-"):
        raise PydanticCustomError("no_flag", "must be flags of one word each, such as --partition=gpu")
    return _one_line(value)


ShellLine = Annotated[str, AfterValidator(_one_line)]
Flag = Annotated[str, AfterValidator(_one_flag)]


class LaunchConfig(Section):
    """How a cluster starts the run: read by `malora launch` and its job scripts, by nothing that trains."""

    aliases: ClassVar = {"sbatch_flags": "sbatch", "srun_flags": "srun", "modules": "setup", "retries": "max_restarts"}

    setup: Annotated[tuple[ShellLine, ...], BeforeValidator(_shell_lines)] = Field(
        (),
        description="Shell lines that a job script runs first, such as module load or source venv/bin/activate. Empty: "
        "the job inherits the environment of the submission.",
    )
    sbatch: Annotated[tuple[Flag, ...], BeforeValidator(_flags)] = Field(
        (), description="Additional sbatch flags for every job, such as --partition=gpu --account=mine."
    )
    srun: Annotated[tuple[Flag, ...], BeforeValidator(_flags)] = Field(
        (), description="Additional srun flags, such as --container-image=IMAGE where pyxis is installed."
    )
    max_restarts: int = Field(
        3,
        ge=0,
        le=MOST,
        description="Maximum number of consecutive restarts of a job without a newer checkpoint.",
    )
