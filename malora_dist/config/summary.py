"""What `malora validate` shows: a recipe's essentials, with what follows from them. Needs no torch."""

import glob
import os
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from malora_dist.adapters.methods import MixtureSpec, mixture_spec
from malora_dist.adapters.parameter_counts import count_parameters
from malora_dist.config.compatibility import Plan
from malora_dist.config.schema import RunConfig


def adapter_spec(config: RunConfig) -> MixtureSpec:
    """Return the mixture that the recipe's `adapter` section describes. Raises ConfigError for impossible numbers."""
    adapter = config.adapter
    return mixture_spec(
        adapter.method,
        num_experts=adapter.num_experts,
        top_k=adapter.top_k,
        r=adapter.r,
        shared_r=adapter.shared_r,
        compression_ratio=adapter.compression_ratio,
        lora_alpha=adapter.lora_alpha,
        beta=adapter.beta,
        normalize_gates=adapter.normalize_gates,
        scaling_rule=adapter.scaling,
        router_input=adapter.router_input,
        router_dtype=adapter.router_dtype,
        use_rslora=adapter.use_rslora,
    )


def summary_table(config: RunConfig, plan: Plan, world_sizes: list[int], *, world_size_given: bool) -> Table:
    """Return a table of names and values. Without a given world size, all world sizes that work are listed."""
    table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    spec = adapter_spec(config)
    rows = {
        "model": _model_line(config),
        "adapter": _adapter_line(spec),
        "trainable": f"{_trainable(spec)} on each of {', '.join(config.adapter.target_modules)}",
        "tasks": f"{len(config.data.tasks)} ({', '.join(task.name for task in config.data.tasks)}), {_mixture(config)}",
        "batch": _batch_line(config, plan, world_sizes, world_size_given),
        "length": _length_line(config),
        "plan": _plan_line(config, plan),
        "output": config.output_dir,
    }
    for name, value in rows.items():
        # A name in brackets is no markup.
        table.add_row(name, Text(value))
    return table


def missing_files(config: RunConfig) -> Iterator[str]:
    """Yield a note on the task files that are not on this machine, which need not be the one that trains."""
    missing = list(_missing(config))
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        yield f"{len(missing)} of the tasks' files {'is' if len(missing) == 1 else 'are'} not on this machine: {shown}"


def _missing(config: RunConfig) -> Iterator[str]:
    for task in config.data.tasks:
        for split in ("train", "validation", "test"):
            for pattern in getattr(task, split) or ():
                if not os.path.exists(pattern) and not glob.glob(pattern, recursive=True):
                    yield pattern


def _model_line(config: RunConfig) -> str:
    model = config.model
    bits = f"4-bit {model.bnb_4bit_quant_type}" if model.load_in_4bit else "not quantised"
    double = ", scales quantised too" if model.load_in_4bit and model.bnb_4bit_use_double_quant else ""
    return f"{model.name_or_path}, {model.dtype}, {bits}{double}, {model.attn_implementation} attention"


def _adapter_line(spec: MixtureSpec) -> str:
    numbers = {"r": spec.r, "shared_r": spec.shared_r, "lora_alpha": spec.lora_alpha, "scaling": spec.scaling}
    if spec.structure.routed:
        numbers = {"num_experts": spec.num_experts, "top_k": spec.top_k, **numbers}
    if spec.structure.expert_down:
        numbers["beta"] = spec.beta
    return f"{spec.method}: " + ", ".join(f"{name} {value:g}" for name, value in numbers.items() if value is not None)


def _trainable(spec: MixtureSpec) -> str:
    """Return the trainable parameters on a linear, as a formula in the numbers of its inputs and outputs."""
    fixed = count_parameters(spec, 0, 0)
    for_input = count_parameters(spec, 1, 0) - fixed
    for_output = count_parameters(spec, 0, 1) - fixed
    return f"{for_input} x inputs + {for_output} x outputs" + (f" + {fixed}" if fixed else "")


def _mixture(config: RunConfig) -> str:
    data = config.data
    return f"{data.mixture} mixture" + (f" {data.temperature:g}" if data.mixture == "temperature" else "")


def _batch_line(config: RunConfig, plan: Plan, world_sizes: list[int], world_size_given: bool) -> str:
    train = config.train
    if not world_size_given:
        sizes = ", ".join(str(size) for size in world_sizes)
        per_device = train.per_device_train_batch_size
        return f"{train.global_batch_size} samples a step, {per_device} at a time, on {sizes} processes"
    return (
        f"{train.global_batch_size} samples a step = {train.per_device_train_batch_size} at a time "
        f"x {plan.world_size} processes x {plan.gradient_accumulation_steps} accumulated"
    )


def _length_line(config: RunConfig) -> str:
    train = config.train
    length = f"{train.max_steps} steps" if train.max_steps is not None else f"{train.num_train_epochs:g} epochs"
    stop = f", stopped after {train.stop_after_steps} steps" if train.stop_after_steps is not None else ""
    ratios = ", ".join(f"{factor} x {ratio:g}" for factor, ratio in train.lr_ratios.by_factor().items())
    rates = f" ({ratios})" if ratios else ""
    return f"{length}{stop}, learning rate {train.learning_rate:g}{rates} {train.lr_scheduler_type}"


def _plan_line(config: RunConfig, plan: Plan) -> str:
    parallel = config.parallel
    version = f", deepspeed {plan.deepspeed_version}" if plan.deepspeed_version is not None else ""
    file = f", {parallel.ds_config}" if parallel.ds_config is not None else ""
    return f"ZeRO-{parallel.zero_stage}, ep_size {parallel.ep_size}{version}{file}"
