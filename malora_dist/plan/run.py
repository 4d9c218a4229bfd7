"""The facts of a run that memory, traffic and time follow from, taken out of the recipe once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.target_names import name_matches
from malora_dist.config import RunConfig
from malora_dist.config.compatibility import check_plan
from malora_dist.config.deepspeed import read_ds_config
from malora_dist.errors import ConfigError
from malora_dist.ops.choices import VARLEN, attention_on_cuda
from malora_dist.optimizers.registry import DEFAULT
from malora_dist.plan.shapes import Linear, ModelShape


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """DeepSpeed's own settings that cost memory or traffic, with the defaults of 0.19.8. Sizes count elements."""

    persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    reduce_bucket_size: int = 500_000_000
    contiguous_gradients: bool = True
    overlap_comm: bool | None = None
    offload_optimizer: bool = False
    offload_param: bool = False


@dataclass(frozen=True)
class Lengths:
    """Mean length of a sample, by default its bound data.max_seq_length; and how many of it are learned, else all."""

    tokens_per_sample: int | None = None
    targets_per_sample: int | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. T is `tokens`: the tokens of one micro-batch on one rank, which are one row without padding."""

    shape: ModelShape
    spec: MixtureSpec
    adapted: tuple[Linear, ...]
    world_size: int
    zero_stage: int
    ep_size: int
    micro_batch: int
    accumulation: int
    tokens_per_sample: int
    targets_per_sample: int
    itemsize: int
    load_in_4bit: bool
    double_quant: bool
    checkpointing: bool
    attention: str
    dropout: float
    computation: str
    zero: ZeroSettings
    optim: str = DEFAULT
    lr_ratios: Mapping[str, float] = field(default_factory=dict)
    z_loss: bool = False
    projected_tasks: int = 0

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.tokens_per_sample

    @property
    def targets(self) -> int:
        """Tokens of a micro-batch whose logits are computed."""
        return self.micro_batch * self.targets_per_sample

    @property
    def masked(self) -> bool:
        """Return whether attention gets a (T, T) mask that keeps packed samples apart; varlen attention needs none."""
        return self.micro_batch > 1 and self.attention not in VARLEN

    @property
    def num_local_experts(self) -> int:
        return self.spec.num_experts // self.ep_size

    @property
    def expert_group(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.ep_size


def run_of(
    config: RunConfig,
    spec: MixtureSpec,
    shape: ModelShape,
    world_size: int,
    *,
    lengths: Lengths = Lengths(),  # noqa: B008  # frozen
    zero: ZeroSettings | None = None,
) -> Run:
    """Return the run of a recipe on `world_size` processes; `zero` replaces the settings of its DeepSpeed file.

    model.dtype `auto` is taken as bfloat16, which every GPU since 2020 multiplies, and attention as it is on such GPUs.
    Raises ConfigError or TopologyError for a plan that cannot run.
    """
    checked = check_plan(config, world_size)
    model, adapter = config.model, config.adapter
    tokens = lengths.tokens_per_sample or config.data.max_seq_length
    targets = lengths.targets_per_sample or tokens
    itemsize = 4 if model.dtype == "float32" else 2
    if targets > tokens:
        raise ConfigError(f"--targets-per-sample={targets} must be at most --tokens-per-sample={tokens}")
    return Run(
        shape=shape,
        spec=spec,
        adapted=_adapted(shape, adapter.target_modules),
        world_size=world_size,
        zero_stage=config.parallel.zero_stage,
        ep_size=config.parallel.ep_size,
        micro_batch=config.train.per_device_train_batch_size,
        accumulation=checked.gradient_accumulation_steps,
        tokens_per_sample=tokens,
        targets_per_sample=targets,
        itemsize=itemsize,
        load_in_4bit=model.load_in_4bit,
        double_quant=model.bnb_4bit_use_double_quant,
        checkpointing=config.train.gradient_checkpointing,
        attention=attention_on_cuda(model.attn_implementation, itemsize, shape.head_dim),
        dropout=adapter.lora_dropout,
        computation=adapter.computation,
        zero=zero_settings(config) if zero is None else zero,
        optim=config.train.optim,
        lr_ratios=config.train.lr_ratios.by_factor(),
        z_loss=adapter.router_z_loss_coef > 0,
        projected_tasks=len(config.data.tasks) if adapter.task_conflict == "project" else 0,
    )


def zero_settings(config: RunConfig) -> ZeroSettings:
    """Read DeepSpeed's settings in parallel.ds_config; without one, return the defaults."""
    if config.parallel.ds_config is None:
        return ZeroSettings()
    given = read_ds_config(config.parallel.ds_config).get("zero_optimization", {})
    names = {
        "persistence_threshold": "param_persistence_threshold",
        "max_live_parameters": "max_live_parameters",
        "reduce_bucket_size": "reduce_bucket_size",
        "contiguous_gradients": "contiguous_gradients",
        "overlap_comm": "overlap_comm",
    }
    found: dict[str, Any] = {}
    for name, key in names.items():
        value = given.get(f"stage3_{key}", given.get(key))
        if value is not None and value != "auto":
            found[name] = value if isinstance(value, bool) else int(value)
    for block in ("offload_optimizer", "offload_param"):
        found[block] = _device(given.get(block)) != "none"
    return ZeroSettings(**found)


def _device(block: Any) -> str:
    device = block.get("device", "none") if isinstance(block, Mapping) else "none"
    return "none" if device in (None, "auto") else str(device)


def _adapted(shape: ModelShape, targets: tuple[str, ...]) -> tuple[Linear, ...]:
    """Find the linears that `targets` name, with the matching of injection."""
    names = {linear: shape.names_of(linear) for linear in shape.linears if linear.is_trained_by_text}
    for target in targets:
        if not any(name_matches(target, name) for kind in names.values() for name in kind):
            known = ", ".join(dict.fromkeys(linear.name for linear in shape.linears))
            raise ConfigError(f"adapter.target_modules: {target!r} is not one of the linear layers of a block: {known}")
    found = []
    for linear, kind in names.items():
        meant = tuple(name for name in kind if any(name_matches(target, name) for target in targets))
        if meant:
            found.append(linear if meant == kind else replace(linear, names=meant))
    return tuple(found)


def is_grouped(run: Run) -> bool:
    """Return whether layers multiply the chosen experts only, on a GPU: the rule of `MixtureLinear.form`."""
    return run.spec.structure.routed and run.computation in ("grouped", "grouped_triton")
