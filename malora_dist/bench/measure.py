"""One variant of a run, built and ready, and what one of its steps costs."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.bench.results import StepRecord
from malora_dist.bench.variants import Variant
from malora_dist.bench.waiting import timed_messages
from malora_dist.config import RunConfig
from malora_dist.data.build import PreparedData
from malora_dist.data.loader import MicroBatch
from malora_dist.distributed.expert_groups import create_expert_groups
from malora_dist.distributed.expert_parallel import connect_experts
from malora_dist.distributed.process_groups import World, gather_lists, wait_for_all
from malora_dist.distributed.zero3 import resident_bytes
from malora_dist.plan.communication import ExchangeBytes, exchange_bytes, rows_per_token
from malora_dist.training.base_model import base_model
from malora_dist.training.deepspeed_engine import build_engine
from malora_dist.training.run_context import RunContext
from malora_dist.training.setup import add_adapters, engine_config, new_train_step, optimizer_settings
from malora_dist.training.train_step import TrainStep
from malora_dist.training.watchdog import Watchdog


@dataclass(frozen=True)
class Subject:
    """A variant's engine with all it needs; `kept_bytes` of parameters stay on this process between steps."""

    variant: Variant
    train_step: TrainStep
    recompute: bool
    dtype: torch.dtype
    kept_bytes: int

    @classmethod
    def build(
        cls,
        variant: Variant,
        recipe: RunConfig,
        folder: Path,
        data: PreparedData,
        world: World,
        *,
        steps: int,
        watchdog: Watchdog,
    ) -> "Subject":
        """Build the variant as a run of its own would be, for `steps` optimizer steps."""
        config, parallel = variant.of(recipe), variant.of(recipe).parallel
        watchdog.mark_phase(f"building {variant.name}")
        settings = engine_config(config, world)
        groups = create_expert_groups(parallel.ep_size, parallel.timeout_seconds)
        context = RunContext(config, world, watchdog)
        model = base_model(context, folder, settings)
        _, all_to_all = add_adapters(model, context, settings, groups)
        if groups is not None:
            all_to_all = connect_experts(model, groups, overlap=variant.overlap, share=variant.share)
        engine = build_engine(
            model,
            settings,
            optimizer_settings(config, steps),
            zero_stage=parallel.zero_stage,
            timeout_seconds=parallel.timeout_seconds,
            expert_groups=groups,
        )
        kept = sum(resident_bytes(model).values())
        train_step = new_train_step(context, data, engine, all_to_all, steps)
        return cls(variant, train_step, config.train.gradient_checkpointing, model.dtype, kept)

    def step(self, number: int, batches: Sequence[MicroBatch]) -> StepRecord:
        """Run optimizer step `number` and return its record, the same on every process."""
        all_to_all, world = self.train_step.all_to_all, self.train_step.world
        before = Counter() if all_to_all is None else Counter(all_to_all.sent_bytes)
        wait_for_all()
        started, cpu_started = time.perf_counter(), time.process_time()
        with timed_messages(all_to_all) as watch:
            result = self.train_step.run(number, batches)
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
        own = {
            "seconds": time.perf_counter() - started,
            "cpu": time.process_time() - cpu_started,
            "waiting": watch.seconds,
            "sent": {} if all_to_all is None else dict(all_to_all.sent_bytes - before),
            "uniform": self._uniform_bytes(batches),
        }
        everyone = gather_lists([own])
        return StepRecord(
            seconds=max(part["seconds"] for part in everyone),
            waiting_seconds=sum(part["waiting"] for part in everyone) / world.size,
            cpu_seconds=sum(part["cpu"] for part in everyone) / world.size,
            sent_bytes=dict(sum((Counter(part["sent"]) for part in everyone), Counter())),
            uniform_bytes=dict(sum((part["uniform"] for part in everyone), Counter())),
            loss=result.loss,
            tokens=result.tokens,
        )

    def _uniform_bytes(self, batches: Sequence[MicroBatch]) -> Counter[str]:
        """Return the bytes this process would send, by phase, if every set of top_k experts were equally likely."""
        total: Counter[str] = Counter()
        if self.train_step.all_to_all is not None:
            for _, layer in mixture_layers(self.train_step.engine.module):
                for batch in batches:
                    total.update(asdict(self._layer_bytes(layer, batch.input_ids.numel())))
        return total

    def _layer_bytes(self, layer: MixtureLinear, tokens: int) -> ExchangeBytes:
        W = self.variant.ep_size
        rows = [round(tokens * rows_per_token(layer.num_experts, layer.top_k, W) / W)] * (W - 1)
        return exchange_bytes(
            rows,
            rows,
            in_width=layer.spec.expert_width(layer.in_features),
            out_width=layer.out_features,
            num_local_experts=layer.num_local_experts,
            itemsize=self.dtype.itemsize,
            recompute=self.recompute,
        )
