"""Which plans work: ZeRO stage x expert parallelism x quantisation x DeepSpeed version, and the batch arithmetic.

A plan is refused before anything is loaded, with the reason and the nearest plan that works.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from malora_dist.adapters.methods import METHODS
from malora_dist.config.base import MOST
from malora_dist.config.deepspeed import ds_config_problems, read_ds_config
from malora_dist.config.learning_rates import ratios_without_meaning
from malora_dist.config.schema import RunConfig
from malora_dist.config.topology import (
    accumulation_steps,
    expert_parallel_ranks,
    legal_world_sizes,
    local_experts,
)
from malora_dist.errors import ConfigError, MaloraError, TopologyError
from malora_dist.optimizers.registry import DEFAULT, optimizer_spec

# Versions that give the numbers of one process at every ZeRO stage they are allowed for, with experts spread or not.
TESTED_VERSIONS = ("0.19.7", "0.19.8")
LOWEST_VERSION, LOWEST_FOR_ZERO3 = (0, 19, 7), (0, 19, 8)
FIRST_TOO_NEW = (0, 20)
SUPPORTED_VERSIONS = ">=0.19.7,<0.20, for ZeRO-3 >=0.19.8"


@dataclass(frozen=True)
class Plan:
    """A plan that works, with what follows from it."""

    world_size: int
    gradient_accumulation_steps: int
    deepspeed_version: str | None
    notes: tuple[str, ...]


def installed_deepspeed() -> str | None:
    """Return the installed DeepSpeed's version, read without importing it; None if there is none."""
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return None


def check_plan(config: RunConfig, world_size: int, *, deepspeed_version: str | None = "installed") -> Plan:
    """Check the recipe for this number of processes.

    deepspeed_version: "installed" looks it up; None means that none is installed, which is a note and no error, so that
    a recipe can be checked on another machine. Raises TopologyError if processes and plan do not fit together,
    ConfigError otherwise; either names every refusal and the nearest plan that works.
    """
    version = installed_deepspeed() if deepspeed_version == "installed" else deepspeed_version
    errors = list(_plan_errors(config, world_size, version))
    if errors:
        kind = TopologyError if any(isinstance(error, TopologyError) for error in errors) else ConfigError
        raise kind("\n".join(str(error) for error in errors))
    train = config.train
    return Plan(
        world_size=world_size,
        gradient_accumulation_steps=accumulation_steps(
            train.global_batch_size, train.per_device_train_batch_size, world_size
        ),
        deepspeed_version=version,
        notes=tuple(_notes(config, world_size, version)),
    )


def suggest_world_sizes(config: RunConfig) -> list[int]:
    """Return the numbers of processes that this recipe's batch can be split over, rising; empty if there is none."""
    train = config.train
    worlds = legal_world_sizes(train.global_batch_size, train.per_device_train_batch_size)
    given = train.gradient_accumulation_steps
    rows = train.global_batch_size // train.per_device_train_batch_size
    worlds = [world for world in worlds if world % config.parallel.ep_size == 0]
    return worlds if given is None else [world for world in worlds if world * given == rows]


def _plan_errors(config: RunConfig, world_size: int, version: str | None) -> Iterator[MaloraError]:
    if not 1 <= world_size <= MOST:
        yield TopologyError(f"world size {world_size} must be at least 1 and at most {MOST}")
        return
    yield from _version_errors(version, config.parallel.zero_stage)
    yield from _batch_errors(config, world_size)
    yield from _expert_parallel_errors(config, world_size)
    yield from _ds_config_errors(config, world_size)
    yield from _optimizer_errors(config)
    yield from _learning_rate_errors(config)
    if config.adapter.task_conflict != "none" and len(config.data.tasks) < 2:
        yield ConfigError(
            f"adapter.task_conflict={config.adapter.task_conflict} has no meaning for one task, "
            f"{config.data.tasks[0].name}. Nearest legal plan: adapter.task_conflict: none"
        )


def _version_errors(version: str | None, zero_stage: int) -> Iterator[MaloraError]:
    if version is None:
        return
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if not LOWEST_VERSION <= numbers < FIRST_TOO_NEW:
        yield ConfigError(
            f"deepspeed {version} is installed; this package needs {SUPPORTED_VERSIONS} because it uses parts of "
            f"DeepSpeed that other versions lack or may change. Nearest tested: deepspeed=={TESTED_VERSIONS[-1]}"
        )
    elif zero_stage == 3 and numbers < LOWEST_FOR_ZERO3:
        yield ConfigError(
            f"parallel.zero_stage=3 is refused with deepspeed {version}: below 0.19.8 it gives out gathered weights "
            f"before all of them have arrived over gloo. Nearest legal plan: deepspeed=={TESTED_VERSIONS[-1]}, or "
            "parallel.zero_stage: 2"
        )


def _batch_errors(config: RunConfig, world_size: int) -> Iterator[MaloraError]:
    train = config.train
    try:
        derived = accumulation_steps(train.global_batch_size, train.per_device_train_batch_size, world_size)
    except TopologyError as error:
        yield error
        return
    given = train.gradient_accumulation_steps
    if given is not None and given != derived:
        yield TopologyError(
            f"train.gradient_accumulation_steps={given} contradicts "
            f"train.global_batch_size={train.global_batch_size} = "
            f"per_device_train_batch_size {train.per_device_train_batch_size} x {world_size} processes x {derived}. "
            f"Remove it, or set it to {derived}, or set global_batch_size to "
            f"{given * train.per_device_train_batch_size * world_size}"
        )


def _expert_parallel_errors(config: RunConfig, world_size: int) -> Iterator[MaloraError]:
    ep_size = config.parallel.ep_size
    if ep_size == 1:
        return
    structure = METHODS[config.adapter.method]
    if not structure.sparse:
        why = "whose tokens use every expert" if structure.routed else "which has one expert"
        yield ConfigError(
            f"parallel.ep_size={ep_size} has no meaning for adapter.method={config.adapter.method}, {why}. "
            "Nearest legal plan: parallel.ep_size: 1"
        )
        return
    for check in (
        lambda: local_experts(0, ep_size, config.adapter.num_experts),
        lambda: expert_parallel_ranks(world_size, ep_size),
    ):
        try:
            check()
        except TopologyError as error:
            yield error


def _ds_config_errors(config: RunConfig, world_size: int) -> Iterator[MaloraError]:
    if config.parallel.ds_config is None:
        return
    try:
        given = read_ds_config(config.parallel.ds_config)
    except ConfigError as error:
        yield error
        return
    for problem in ds_config_problems(config, world_size, given):
        yield ConfigError(problem)


def _optimizer_errors(config: RunConfig) -> Iterator[MaloraError]:
    spec, parallel = optimizer_spec(config.train.optim), config.parallel
    reason = f"{spec.rule}. Nearest legal plan:"
    if parallel.zero_stage not in spec.zero_stages:
        yield ConfigError(
            f"train.optim={spec.name} is refused at parallel.zero_stage={parallel.zero_stage}, where an optimizer gets "
            f"flat parts of many tensors: {reason} parallel.zero_stage: {max(spec.zero_stages)}, or train.optim: "
            f"{DEFAULT}"
        )
    if parallel.ep_size > 1 and not spec.expert_slices:
        yield ConfigError(
            f"train.optim={spec.name} is refused at parallel.ep_size={parallel.ep_size}, where a process has some of "
            f"the experts: {reason} parallel.ep_size: 1, or train.optim: {DEFAULT}"
        )


def _learning_rate_errors(config: RunConfig) -> Iterator[MaloraError]:
    ratios, method = config.train.lr_ratios.by_factor(), config.adapter.method
    for factor in ratios_without_meaning(ratios, method):
        key = "router" if factor == "gate" else factor
        yield ConfigError(
            f"train.lr_ratios.{key}={ratios[factor]:g} has no meaning for adapter.method={method}, which has no such "
            f"factor. Nearest legal plan: train.lr_ratios.{key}: 1"
        )


def _notes(config: RunConfig, world_size: int, version: str | None) -> Iterator[str]:
    if version is None:
        yield "DeepSpeed is not installed here, so its version was not checked."
    elif version not in TESTED_VERSIONS:
        yield f"deepspeed {version} should work; tested are {', '.join(TESTED_VERSIONS)}."
    if world_size == 1 and config.parallel.zero_stage > 0:
        yield f"With one process, ZeRO-{config.parallel.zero_stage} has nothing to split; zero_stage: 0 is faster."
    if world_size > 1 and config.parallel.zero_stage < 3:
        bits = "4-bit" if config.model.load_in_4bit else config.model.dtype
        yield f"Every process holds the whole {bits} base model; parallel.zero_stage: 3 splits it."
    if config.train.deterministic:
        yield "train.deterministic takes slower forms of some operations on a GPU; without it the last bits may differ."
    if config.model.dtype == "float32" and config.model.load_in_4bit:
        yield "4-bit weights are unpacked to float32 in each layer; model.dtype: bfloat16 is faster on most machines."
