"""Bytes of a model as it lies in memory, against what `malora plan` says of it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.bench.local.allocation import storage_bytes
from malora_dist.bench.local.peers.baselines import Contestant
from malora_dist.bench.local.peers.build import build
from malora_dist.bench.local.records import Record
from malora_dist.bench.local.step_stage import Stage
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.plan.find_shape import shape_of
from malora_dist.plan.parameters import parameter_bytes
from malora_dist.plan.run import Run, ZeroSettings

BF16 = 2


def model_records(stage: Stage, contestants: Mapping[str, Contestant]) -> list[Record]:
    """Parameters of our contestants' models, and the 4-bit linears by themselves; `plan` is the formula's number."""
    title = stage.title("bytes of the model")
    records = [_quantised(stage, title)] if stage.options.base == "nf4" else []
    for name, contestant in contestants.items():
        if contestant.maker == "ours":
            adapted = build(contestant, stage.base)
            assert adapted.spec is not None
            found = storage_bytes(adapted.model.parameters())
            planned = sum(parameter_bytes(planned_run(stage, adapted.spec)).values())
            facts = {"bytes": found, "plan": planned, "bytes / plan": found / planned}
            records.append(Record(f"model with {name}", title, facts=facts))
    return records


def _quantised(stage: Stage, title: str) -> Record:
    linears = [module for module in stage.base.ours.modules() if isinstance(module, NF4Linear)]
    found = storage_bytes(linear.packed_weight for linear in linears)
    full = BF16 * sum(linear.in_features * linear.out_features for linear in linears)
    facts = {"bytes": found, "bf16 bytes": full, "bytes / bf16": found / full}
    return Record("4-bit linears", title, facts=facts)


def planned_run(stage: Stage, spec: MixtureSpec) -> Run:
    """What `malora plan` would take for this model and batch, on one process without ZeRO."""
    model: Any = stage.base.ours
    shape = shape_of(_config(model), stage.options.model)
    return Run(
        shape=shape,
        spec=spec,
        adapted=tuple(linear for linear in shape.linears if linear.name in stage.base.targets),
        world_size=1,
        zero_stage=0,
        ep_size=1,
        micro_batch=stage.options.batch,
        accumulation=1,
        tokens_per_sample=stage.options.length,
        targets_per_sample=stage.options.length,
        itemsize=stage.dtype.itemsize,
        load_in_4bit=stage.options.base == "nf4",
        double_quant=False,
        checkpointing=False,
        attention="sdpa",
        dropout=stage.options.dropout,
        computation="auto",
        zero=ZeroSettings(),
    )


def _config(model: nn.Module) -> dict[str, Any]:
    values: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    return values
