"""The section `train` of a recipe: steps, batches, optimizer, logging."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from malora_dist.config.base import MOST, MOST_STEPS, Rule, Section, split_commas, usable_path
from malora_dist.config.learning_rates import LearningRateRatios
from malora_dist.errors import ConfigError
from malora_dist.optimizers.registry import DEFAULT, OPTIMIZERS, choices_text, optimizer_spec


def _tracker_names(value: Any) -> Any:
    return [] if value == "none" else split_commas(value)


def _optimizer(value: str) -> str:
    """Return the optimizer's own name for one of its names."""
    try:
        return optimizer_spec(value).name
    except ConfigError as error:
        raise PydanticCustomError("optimizer", "must be one of {names}", {"names": ", ".join(OPTIMIZERS)}) from error


class TrainConfig(Section):
    """Steps, batches, optimizer, logging."""

    aliases: ClassVar = {
        "lr": "learning_rate",
        "optimizer": "optim",
        "scheduler": "lr_scheduler_type",
        "lr_scheduler": "lr_scheduler_type",
        "learning_rate_ratios": "lr_ratios",
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
        None, ge=1, le=MOST_STEPS, description="Number of optimizer steps. Set this or num_train_epochs."
    )
    num_train_epochs: float | None = Field(
        None,
        gt=0,
        le=MOST,
        description="Number of epochs over the mixture. Set this or max_steps; 3 if neither is set.",
    )
    global_batch_size: int = Field(16, ge=1, le=MOST, description="Samples per optimizer step, across all processes.")
    per_device_train_batch_size: int = Field(
        4, ge=1, le=MOST, description="Micro-batch size: samples per forward pass of one process."
    )
    gradient_accumulation_steps: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Micro-batches per optimizer step. null: derived from the batch sizes and the number of processes; "
        "a given value must agree with them.",
    )
    optim: Annotated[str, AfterValidator(_optimizer)] = Field(
        DEFAULT, description=f"The optimizer. {choices_text()}. See docs/optimizers.md."
    )
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate.")
    lr_ratios: LearningRateRatios = Field(
        LearningRateRatios(), description="Learning rates of parts of the adapter, as multiples of learning_rate."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="Learning rate schedule after warm-up."
    )
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="Fraction of all steps with linear warm-up of the learning rate from 0."
    )
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay, as in AdamW.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay rate of AdamW's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay rate of AdamW's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Maximum gradient norm over all processes, for clipping; 0: no clipping."
    )
    loss_normalization: Literal["token", "sample", "task"] = Field(
        "token",
        description="What is weighted equally in the loss of an optimizer step: response tokens, samples, or tasks.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    logging_steps: int = Field(10, ge=1, le=MOST_STEPS, description="Optimizer steps between log records.")
    eval_steps: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="Optimizer steps between evaluations on the validation split; null: no evaluation.",
    )
    save_steps: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="Optimizer steps between checkpoints; null: only at the end and when the run is stopped.",
    )
    save_total_limit: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="Maximum number of checkpoints to keep; the latest and the best are never deleted. null: keep all.",
    )
    async_save: bool = Field(
        True, description="Write checkpoints in the background, from a copy in memory, while training continues."
    )
    best_metric: Literal["average", "worst_task", "worst_drop"] = Field(
        "average",
        description="Score that selects the `best` checkpoint at each evaluation (eval_steps): average over tasks, the "
        "worst task, or the task that drops most below best_baseline.",
    )
    best_baseline: Annotated[str | None, AfterValidator(usable_path)] = Field(
        None,
        min_length=1,
        description="Baseline for worst_drop: path of an eval.json, whose `tuned` results are used, else `base`; null: "
        "the base model without adapter.",
    )
    stop_after_steps: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="Save and exit after this many steps of this process; the same command resumes the run. The "
        "learning rate schedule spans the full run.",
    )
    max_hours: float | None = Field(
        None,
        gt=0,
        description="Save and exit after this process has run for this many hours. In a Slurm job, the job's time "
        "limit applies too.",
    )
    seed: int = Field(
        42, ge=0, lt=2**63, description="Random seed of adapter initialisation, dropout and sample order."
    )
    deterministic: bool = Field(
        False,
        description="Use deterministic algorithms on GPUs too, so that runs are bitwise reproducible; some, such as "
        "attention's backward, are slower. An operation that has none ends the run with an error.",
    )
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_tracker_names)] = Field(
        (), description="Trackers to log to in addition to metrics.jsonl: tensorboard, wandb (the extra `trackers`)."
    )
    resume_from_checkpoint: Annotated[str | None, AfterValidator(usable_path)] = Field(
        "auto",
        min_length=1,
        description="auto: resume the unfinished run in output_dir, if there is one. A checkpoint folder: start a new "
        "run from it. null (or --new-run): start a new run.",
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
