"""What a run is: the sections of a recipe with all their keys, defaults and meanings.

The sections `model` and `adapter` are in model_schema.py, `data` in data_schema.py, `train` in train_schema.py and
`launch` in launch_schema.py.
Names are those of transformers' TrainingArguments, peft and bitsandbytes wherever they have one.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from malora_dist.config.base import MOST, MOST_TOKENS, Section, usable_path
from malora_dist.config.data_schema import DataConfig, RowFields, TaskConfig
from malora_dist.config.launch_schema import LaunchConfig
from malora_dist.config.model_schema import AdapterConfig, ModelConfig
from malora_dist.config.train_schema import TrainConfig

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "EvaluationConfig",
    "LaunchConfig",
    "ModelConfig",
    "ParallelConfig",
    "RowFields",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
]

# What the system's clocks can wait for: thirty years.
MOST_SECONDS = 10**9


def _tokens(value: Any) -> Any:
    given = str(value)
    if given != "auto" and not (given.isdigit() and int(given) >= 1):
        raise PydanticCustomError("tokens", "must be a whole number of at least 1, or auto")
    return value


Tokens = Annotated[Annotated[int, Field(ge=1, le=MOST_TOKENS)] | Literal["auto"], BeforeValidator(_tokens)]


class ParallelConfig(Section):
    """How the run is distributed over processes."""

    aliases: ClassVar = {
        "stage": "zero_stage",
        "zero": "zero_stage",
        "expert_parallel_size": "ep_size",
        "expert_model_parallel_size": "ep_size",
        "timeout": "timeout_seconds",
        "deepspeed": "ds_config",
        "deepspeed_config": "ds_config",
    }

    zero_stage: int = Field(
        3,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO stage: 0 replicates everything, 1 and 2 partition optimizer states and gradients, "
        "3 partitions the weights too.",
    )
    ep_size: int = Field(
        1,
        ge=1,
        le=MOST,
        description="Expert-parallel size: number of processes that one set of experts is divided over. Above 1, "
        "tokens are dispatched by all-to-all.",
    )
    timeout_seconds: int = Field(
        1800,
        ge=1,
        le=MOST_SECONDS,
        description="Timeout of collectives: a process that waits longer than this for the others ends the run with an "
        "error.",
    )
    ds_config: Annotated[str | None, AfterValidator(usable_path)] = Field(
        None, description="DeepSpeed configuration file (JSON); its 'auto' values are filled in from this recipe."
    )


class EvaluationConfig(Section):
    """What is measured after training."""

    aliases: ClassVar = {"batch_size_tokens": "batch_tokens", "eval_split": "split"}

    base: bool = Field(True, description="Evaluate the base model without adapter too.")
    tuned: bool = Field(True, description="Evaluate the model with the trained adapter.")
    split: Literal["test", "validation"] = Field("test", description="Split to evaluate on.")
    batch_tokens: Tokens = Field(
        "auto",
        description="Maximum number of tokens per forward pass. auto: 1024 on a CPU; on a GPU 16384, or 4096 if "
        "attention uses a mask.",
    )
    write_scores: bool = Field(
        False,
        description="Also write the log-likelihood of every choice of every question, to scores-base.jsonl and "
        "scores-tuned.jsonl.",
    )


class RunConfig(Section):
    """A whole recipe."""

    aliases: ClassVar = {"peft": "adapter", "lora": "adapter", "training": "train", "eval": "evaluation"}

    model: ModelConfig = Field(description="The frozen base model.")
    adapter: AdapterConfig = Field(AdapterConfig(), description="The adapter, which is what is trained.")
    data: DataConfig = Field(description="The tasks and their mixture.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="How the run is distributed over processes.")
    train: TrainConfig = Field(TrainConfig(), description="Steps, batches, optimizer, logging.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="What is measured after training.")
    launch: LaunchConfig = Field(LaunchConfig(), description="Settings of cluster jobs.")
    output_dir: Annotated[str, AfterValidator(usable_path)] = Field(
        "runs/malora",
        min_length=1,
        description="Run folder. If it holds a run already, a new run gets the suffix -2, -3, ...",
    )
