"""What the processes of the benchmark's test do: the whole command, with every message and every variant recorded."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.bench.ep import bench
from malora_dist.bench.ep_options import EpOptions
from malora_dist.bench.measure import Subject
from malora_dist.bench.results import StepRecord
from malora_dist.config import load_config
from malora_dist.data.loader import MicroBatch
from malora_dist.distributed.process_groups import World
from malora_dist.models.nf4_linear import NF4Linear
from tests.distributed.exchange_runs import recorded_messages

STEP = Subject.step


def recorded_bench(world: World, options: EpOptions) -> dict[str, Any]:
    """Bytes of this process's messages in each variant's steps, and what was found in its engine."""
    found: dict[str, dict[str, Any]] = {}
    sent: dict[str, list[int]] = {}

    def step(subject: Subject, number: int, batches: Sequence[MicroBatch]) -> StepRecord:
        engine, all_to_all = subject.train_step.engine, subject.train_step.all_to_all
        spread = [layer for _, layer in mixture_layers(engine.module) if layer.dispatcher]
        dispatches = {id(layer.shared_input if layer.dispatcher.share else layer) for layer in spread}
        found[subject.variant.name] = {
            "zero_stage": engine.zero_optimization_stage(),
            "load_in_4bit": any(isinstance(module, NF4Linear) for module in engine.module.modules()),
            "experts": {layer.num_local_experts for _, layer in mixture_layers(engine.module)}.pop(),
            "overlap": all_to_all is None or all_to_all.overlap,
            "dispatches": len(dispatches),
        }
        with recorded_messages() as messages:
            record = STEP(subject, number, batches)
        sent.setdefault(subject.variant.name, []).append(sum(messages))
        return record

    with patch.object(Subject, "step", step):
        bench(options, load_config(options.recipe, options.overrides), world)
    return {"found": found, "sent": sent}
