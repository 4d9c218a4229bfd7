"""Bytes of a model as it lies in memory, against what `malora plan` says of it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.bench.local.allocation import storage_bytes
from malora_dist.bench.local.peers.baselines import Baseline
from malora_dist.bench.local.peers.build import build
from malora_dist.bench.local.records import Measurement
from malora_dist.bench.local.step_setup import StepSetup
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.plan.find_shape import shape_of
from malora_dist.plan.parameters import parameter_bytes
from malora_dist.plan.run import Run, ZeroSettings

BF16 = 2


def model_records(setup: StepSetup, baselines: Mapping[str, Baseline]) -> list[Measurement]:
    """Measure the parameters of our baselines' models, and the 4-bit linears alone; `plan` is the formula's number."""
    title = setup.title("bytes of the model")
    records = [_quantised(setup, title)] if setup.options.base == "nf4" else []
    for name, baseline in baselines.items():
        if baseline.maker == "ours":
            adapted = build(baseline, setup.base)
            assert adapted.spec is not None
            found = storage_bytes(adapted.model.parameters())
            planned = sum(parameter_bytes(planned_run(setup, adapted.spec)).values())
            facts = {"bytes": found, "plan": planned, "bytes / plan": found / planned}
            records.append(Measurement(f"model with {name}", title, facts=facts))
    return records


def _quantised(setup: StepSetup, title: str) -> Measurement:
    linears = [module for module in setup.base.ours.modules() if isinstance(module, NF4Linear)]
    found = storage_bytes(linear.packed_weight for linear in linears)
    full = BF16 * sum(linear.in_features * linear.out_features for linear in linears)
    facts = {"bytes": found, "bf16 bytes": full, "bytes / bf16": found / full}
    return Measurement("4-bit linears", title, facts=facts)


def planned_run(setup: StepSetup, spec: MixtureSpec) -> Run:
    """Return the run that `malora plan` would estimate for this model and batch, on one process without ZeRO."""
    model: Any = setup.base.ours
    shape = shape_of(_config(model), setup.options.model)
    return Run(
        shape=shape,
        spec=spec,
        adapted=tuple(linear for linear in shape.linears if linear.name in setup.base.targets),
        world_size=1,
        zero_stage=0,
        ep_size=1,
        micro_batch=setup.options.batch,
        accumulation=1,
        tokens_per_sample=setup.options.length,
        targets_per_sample=setup.options.length,
        itemsize=setup.dtype.itemsize,
        load_in_4bit=setup.options.base == "nf4",
        double_quant=False,
        checkpointing=False,
        attention="sdpa",
        dropout=setup.options.dropout,
        computation="auto",
        zero=ZeroSettings(),
    )


def _config(model: nn.Module) -> dict[str, Any]:
    values: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    return values
