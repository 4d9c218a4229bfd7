"""What a run is: the sections of a recipe with all their keys, defaults and meanings.

The sections `model` and `adapter` are in model_schema.py, `data` in data_schema.py, `launch` in
launch_schema.py.
Names are those of transformers' TrainingArguments, peft and bitsandbytes wherever they have one.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from malora_dist.config.base import MOST, MOST_STEPS, MOST_TOKENS, Rule, Section, split_commas, usable_path
from malora_dist.config.data_schema import DataConfig, RowFields, TaskConfig
from malora_dist.config.launch_schema import LaunchConfig
from malora_dist.config.model_schema import AdapterConfig, ModelConfig
from malora_dist.errors import ConfigError
from malora_dist.optimizers.registry import DEFAULT, OPTIMIZERS, choices_text, optimizer_spec

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


def _tracker_names(value: Any) -> Any:
    return [] if value == "none" else split_commas(value)


def _tokens(value: Any) -> Any:
    given = str(value)
    if given != "auto" and not (given.isdigit() and int(given) >= 1):
        raise PydanticCustomError("tokens", "must be a whole number of at least 1, or auto")
    return value


def _optimizer(value: str) -> str:
    """Return the optimizer's own name for one of its names."""
    try:
        return optimizer_spec(value).name
    except ConfigError as error:
        raise PydanticCustomError("optimizer", "must be one of {names}", {"names": ", ".join(OPTIMIZERS)}) from error


Tokens = Annotated[Annotated[int, Field(ge=1, le=MOST_TOKENS)] | Literal["auto"], BeforeValidator(_tokens)]


class ParallelConfig(Section):
    """How the run is spread over processes."""

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
        description="DeepSpeed ZeRO: 0 copies all, 1 and 2 split optimizer and gradients, 3 the weights too.",
    )
    ep_size: int = Field(
        1,
        ge=1,
        le=MOST,
        description="Processes that share one set of experts, each with a part. Above 1, tokens are dispatched.",
    )
    timeout_seconds: int = Field(
        1800,
        ge=1,
        le=MOST_SECONDS,
        description="A process that waits longer than this for the others ends the run with an error.",
    )
    ds_config: Annotated[str | None, AfterValidator(usable_path)] = Field(
        None, description="JSON file with DeepSpeed's own settings; 'auto' values come from this recipe."
    )


class TrainConfig(Section):
    """Steps, batches, optimizer, logging."""

    aliases: ClassVar = {
        "lr": "learning_rate",
        "optimizer": "optim",
        "scheduler": "lr_scheduler_type",
        "lr_scheduler": "lr_scheduler_type",
        "epochs": "num_train_epochs",
        "num_epochs": "num_train_epochs",
        "steps": "max_steps",
        "train_batch_size": "global_batch_size",
        "micro_batch_size": "per_device_train_batch_size",
        "per_device_batch_size": "per_device_train_batch_size",
        "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
        "gradient_accumulation": "gradient_accumulation_steps",
        "accumulation_steps": "gradient_accumulation_steps",
        "gradient_clipping": "max_grad_norm",
        "clip_grad_norm": "max_grad_norm",
        "activation_checkpointing": "gradient_checkpointing",
        "resume": "resume_from_checkpoint",
        "full_determinism": "deterministic",
    }

    max_steps: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="Optimizer steps to train. Give this or num_train_epochs."
    )
    num_train_epochs: float | None = Field(
        None, gt=0, le=MOST, description="Passes over the mixture. Give this or max_steps; 3 if neither is given."
    )
    global_batch_size: int = Field(16, ge=1, le=MOST, description="Samples of one optimizer step, over all processes.")
    per_device_train_batch_size: int = Field(4, ge=1, le=MOST, description="Samples one process handles at a time.")
    gradient_accumulation_steps: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="null: derived from the batch sizes and the number of processes. A given value is checked.",
    )
    optim: Annotated[str, AfterValidator(_optimizer)] = Field(
        DEFAULT, description=f"The optimizer. {choices_text()}. See docs/optimizers.md."
    )
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="Shape of the learning rate after warm-up."
    )
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="Share of all steps in which the learning rate rises from 0."
    )
    weight_decay: float = Field(0.01, ge=0, description="Weight decay, apart from the gradient as in AdamW.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradients' norm over all processes to this; 0: off.")
    loss_normalization: Literal["token", "sample", "task"] = Field(
        "token", description="What counts the same in a step's loss: each answer token, each sample, or each task."
    )
    gradient_checkpointing: bool = Field(False, description="Compute activations again in backward to save memory.")
    logging_steps: int = Field(10, ge=1, le=MOST_STEPS, description="Steps between log records.")
    eval_steps: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="Steps between evaluations on the validation split; null: none."
    )
    save_steps: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="Steps between checkpoints; null: one at the end, and one whenever the run is stopped.",
    )
    save_total_limit: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Checkpoints to keep; the latest and the best are always among them. null: all.",
    )
    async_save: bool = Field(True, description="Write checkpoints from memory while training goes on.")
    best_metric: Literal["average", "worst_task", "worst_drop"] = Field(
        "average",
        description="What makes a checkpoint `best`, by the validations of eval_steps: the tasks' average, the worst "
        "task, or the largest loss of a task against best_baseline.",
    )
    best_baseline: Annotated[str | None, AfterValidator(usable_path)] = Field(
        None,
        min_length=1,
        description="For worst_drop: an eval.json (its `tuned` side, else its `base`) to compare each task with; "
        "null: the untouched base model.",
    )
    stop_after_steps: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="Save and end after this many steps of this process; the same command then goes on. The learning "
        "rate's shape follows the full length.",
    )
    max_hours: float | None = Field(
        None, gt=0, description="Save and end when this process has run so long. In a Slurm job its limit counts too."
    )
    seed: int = Field(42, ge=0, lt=2**63, description="Seed of adapters, dropout and the order of samples.")
    deterministic: bool = Field(
        False,
        description="The same bits in every run on GPUs too: slower forms of some operations, such as attention's "
        "backward. An operation without such a form ends the run.",
    )
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_tracker_names)] = Field(
        (), description="Trackers beside metrics.jsonl: tensorboard, wandb (the extra `trackers`)."
    )
    resume_from_checkpoint: Annotated[str | None, AfterValidator(usable_path)] = Field(
        "auto",
        min_length=1,
        description="auto: go on with the unfinished run in output_dir, if there is one. A checkpoint's folder: a new "
        "run from there. null (or --new-run): a new run.",
    )

    @model_validator(mode="before")
    @classmethod
    def _three_epochs_by_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("max_steps") is None and data.get("num_train_epochs") is None:
            return {**data, "num_train_epochs": 3.0}
        return data

    def rules(self) -> Iterator[Rule]:
        if self.max_steps is not None and self.num_train_epochs is not None:
            yield Rule(
                ("max_steps", "num_train_epochs"),
                f"give either max_steps or num_train_epochs={self.num_train_epochs}, not both",
            )
        if self.best_baseline is not None and self.best_metric != "worst_drop":
            yield Rule(("best_baseline", "best_metric"), f"has no meaning for train.best_metric={self.best_metric}")
        if len(set(self.report_to)) < len(self.report_to):
            yield Rule(("report_to",), "must not name a tracker twice")

    def inapplicable_fields(self) -> dict[str, str]:
        spec = optimizer_spec(self.optim)
        return {key: f"has no meaning for train.optim={spec.name}" for key in spec.inapplicable}


class EvaluationConfig(Section):
    """What is measured after training."""

    aliases: ClassVar = {"batch_size_tokens": "batch_tokens", "eval_split": "split"}

    base: bool = Field(True, description="Evaluate the untouched base model too.")
    tuned: bool = Field(True, description="Evaluate the trained model.")
    split: Literal["test", "validation"] = Field("test", description="Rows to evaluate on.")
    batch_tokens: Tokens = Field(
        "auto",
        description="Tokens of one forward pass. auto: 1024 on a CPU, 16384 on a GPU, 4096 there if attention takes a "
        "mask.",
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
    adapter: AdapterConfig = Field(AdapterConfig(), description="What is trained.")
    data: DataConfig = Field(description="The tasks and their mixture.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="How the run is spread over processes.")
    train: TrainConfig = Field(TrainConfig(), description="Steps, batches, optimizer, logging.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="What is measured after training.")
    launch: LaunchConfig = Field(LaunchConfig(), description="How a cluster starts the run.")
    output_dir: Annotated[str, AfterValidator(usable_path)] = Field(
        "runs/malora",
        min_length=1,
        description="Folder of the run. A new run beside another one gets -2, -3, ... after its name.",
    )
