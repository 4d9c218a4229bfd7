"""One plan on one cluster, with all that follows from it, and the legal plans beside it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.config import RunConfig
from malora_dist.config.topology import divisors
from malora_dist.errors import MaloraError
from malora_dist.plan.duration import Hardware, step_seconds
from malora_dist.plan.memory import bytes_per_rank
from malora_dist.plan.parameters import trainable_parameters
from malora_dist.plan.run import Lengths, Run, ZeroSettings, run_of, zero_settings
from malora_dist.plan.shapes import ModelShape
from malora_dist.plan.steps import step_bytes, worst_token_bytes

USABLE = 0.94


@dataclass(frozen=True)
class Estimate:
    """Memory, traffic and time of a run."""

    run: Run
    hardware: Hardware

    @cached_property
    def memory(self) -> dict[str, int]:
        """Device bytes of a rank by kind, and `total`."""
        return bytes_per_rank(self.run)[0]

    @cached_property
    def host_memory(self) -> dict[str, int]:
        """Bytes of a rank in host memory by kind, and `total`."""
        return bytes_per_rank(self.run)[1]

    @cached_property
    def traffic(self) -> dict[str, int]:
        """Bytes a rank sends in a step by kind."""
        return step_bytes(self.run) | {"tokens_worst_case": worst_token_bytes(self.run)}

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds of a step by cause, and `total`."""
        return step_seconds(self.run, self.hardware)

    @property
    def fits(self) -> bool:
        """Whether it leaves 6 % of the device to CUDA, NCCL and fragmentation."""
        return self.memory["total"] <= USABLE * self.hardware.hbm

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.run.world_size * self.run.accumulation * self.run.tokens / self.seconds["total"]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that tell this plan from its alternatives, by their names in the recipe."""
        return {
            "parallel.zero_stage": self.run.zero_stage,
            "parallel.ep_size": self.run.ep_size,
            "train.gradient_checkpointing": self.run.checkpointing,
            "train.per_device_train_batch_size": self.run.micro_batch,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "settings": self.settings,
            "attention": self.run.attention,
            "trainable_parameters": trainable_parameters(self.run),
            "bytes_per_rank": self.memory,
            "host_bytes_per_rank": self.host_memory,
            "exchange_bytes_per_step": self.traffic,
            "seconds_per_step": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "fits": self.fits,
        }


def alternatives(
    config: RunConfig, spec: MixtureSpec, shape: ModelShape, hardware: Hardware, lengths: Lengths
) -> list[Estimate]:
    """Return every legal plan with the same global batch, the fastest first, with the recipe's DeepSpeed settings."""
    zero = zero_settings(config)
    found = []
    for candidate in _candidates(config, hardware.world_size):
        try:
            settings = _for_stage(zero, candidate.parallel.zero_stage)
            run = run_of(candidate, spec, shape, hardware.world_size, lengths=lengths, zero=settings)
        except MaloraError:
            continue
        found.append(Estimate(run, hardware))
    return sorted(found, key=lambda estimate: (estimate.seconds["total"], estimate.memory["total"]))


def _candidates(config: RunConfig, world_size: int) -> Iterator[RunConfig]:
    samples = config.train.global_batch_size // world_size
    shared = gcd(config.adapter.num_experts, world_size)
    for zero_stage in range(4):
        for ep_size in divisors(shared):
            for checkpointing in (False, True):
                for micro_batch in divisors(samples):
                    # The file may name a stage of its own, which these plans replace.
                    parallel = {"zero_stage": zero_stage, "ep_size": ep_size, "ds_config": None}
                    train = {
                        "per_device_train_batch_size": micro_batch,
                        "gradient_checkpointing": checkpointing,
                        "gradient_accumulation_steps": None,
                    }
                    yield config.model_copy(
                        update={
                            "parallel": config.parallel.model_copy(update=parallel),
                            "train": config.train.model_copy(update=train),
                        }
                    )


def _for_stage(zero: ZeroSettings, stage: int) -> ZeroSettings:
    """Return the settings without the offload that a stage does not support."""
    return replace(
        zero,
        offload_optimizer=zero.offload_optimizer and stage >= 1,
        offload_param=zero.offload_param and stage == 3,
    )
