"""Checks that the processes' devices can do what a recipe asks, before any weight is loaded."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from malora_dist.adapters.layer import require_triton
from malora_dist.config import RunConfig
from malora_dist.config.summary import adapter_spec
from malora_dist.data.encode import Sample
from malora_dist.data.loader import TrainLoader
from malora_dist.distributed.process_groups import World, gather_lists
from malora_dist.distributed.rank_errors import sharing_errors
from malora_dist.errors import ConfigError
from malora_dist.ops.devices import missing_for_triton
from malora_dist.optimizers.registry import optimizer_spec
from malora_dist.plan import Hardware, Lengths, Report, find_shape
from malora_dist.plan.memory import bytes_per_rank
from malora_dist.plan.run import run_of
from malora_dist.plan.units import show_bytes
from malora_dist.training.base_model import base_dtype
from malora_dist.training.gpu import Gpu, architecture_problem, bfloat16_problem, why_no_gpu

# What evaluation needs of a plan for training.
HELD = ("base_4bit", "base_other", "adapters", "weight_copies", "gathered", "dequantised")
# By how much the plan may be too high: what is refused could not have run.
PLAN_ERROR = 0.15


def check_device(config: RunConfig, world: World, *, trains: bool = True) -> list[str]:
    """Check that every process's device can do what the recipe asks; return notes for the log. Every process calls.

    Args:
        config: the recipe.
        world: all processes.
        trains: whether adapter.computation and train.optim are of effect.

    Raises:
        ConfigError: on all processes, if a GPU is too old for model.dtype, if this build of torch holds no code for it,
            or if the kernels that adapter.computation names or train.optim cannot run.
    """
    dtype = base_dtype(config, world)
    with sharing_errors(world):
        _check_one(config, world.device, dtype, trains)
    return list(_notes(config, world.device))


def _check_one(config: RunConfig, device: torch.device, dtype: torch.dtype, trains: bool) -> None:
    if device.type == "cuda":
        problems = gpu_problems(Gpu.of(device), config.model.dtype, dtype)
        if problems:
            raise ConfigError("\n  ".join(problems))
    if trains and uses_triton(config):
        require_triton(device, "adapter.computation")
    spec = optimizer_spec(config.train.optim)
    if trains and spec.devices and device.type not in spec.devices:
        raise ConfigError(f"train.optim={spec.name} runs on {' and '.join(spec.devices)}, not on {device.type}")


def gpu_problems(gpu: Gpu, setting: str, dtype: torch.dtype) -> list[str]:
    """Return what forbids a base of `dtype`, which model.dtype=`setting` stands for, on the GPU."""
    # `auto` is what the first process's GPU multiplies; another one may not.
    chosen = f"model.dtype={setting}" + (", bfloat16 by the first process's GPU" if setting == "auto" else "")
    problems = [architecture_problem(gpu)]
    if dtype == torch.bfloat16:
        problems.append(bfloat16_problem(gpu, chosen, "model.dtype=float32"))
    return [problem for problem in problems if problem is not None]


def uses_triton(config: RunConfig) -> bool:
    """Return whether the recipe names kernels that have no other form."""
    return config.adapter.computation == "grouped_triton" and adapter_spec(config).structure.routed


def _notes(config: RunConfig, device: torch.device) -> Iterator[str]:
    if device.type == "cpu" and (why := why_no_gpu()) is not None:
        yield why
    if device.type == "cuda" and not uses_triton(config) and (missing := missing_for_triton(device)) is not None:
        yield f"fused Triton kernels are disabled, PyTorch operations are used instead: Triton needs {missing}"


def first_lengths(loader: TrainLoader, samples: Sequence[Sample]) -> Lengths:
    """Return the mean lengths of the first global batch, the same on every process."""
    batch = [samples[int(number)] for number in loader.global_batch(0)]
    tokens = sum(len(sample.input_ids) for sample in batch)
    prompts = sum(sample.prompt_length for sample in batch)
    return Lengths(max(1, tokens // len(batch)), max(1, (tokens - prompts) // len(batch)))


def check_memory(config: RunConfig, folder: Path, world: World, lengths: Lengths | None) -> list[str]:
    """Compare the memory that `malora plan` counts with that of every process's GPU. Every process calls.

    Args:
        config: the recipe.
        folder: of the base's config.json.
        world: all processes.
        lengths: mean lengths of samples; None if nothing is trained.

    Returns:
        A note for the log, or none.

    Raises:
        ConfigError: on all processes, if the plan exceeds a whole GPU by more than `PLAN_ERROR`.
    """
    if world.device.type != "cuda":
        return []
    dtype, gpu = base_dtype(config, world), Gpu.of(world.device)
    with sharing_errors(world):
        notes = memory_notes(config, folder, world.size, dtype, gpu, lengths)
    return gather_lists(notes)[:1]


def memory_notes(
    config: RunConfig, folder: Path, world_size: int, dtype: torch.dtype, gpu: Gpu, lengths: Lengths | None
) -> list[str]:
    """Return a note if less is free on the GPU than the plan needs. Raises ConfigError if the plan
    exceeds the whole GPU by more than `PLAN_ERROR`.

    A model whose shapes the plan cannot know gives no note. Activations that the plan counts as another family's
    are no reason to refuse a run.
    """
    config = _as_it_runs(config, dtype, trains=lengths is not None)
    spec, hardware = adapter_spec(config), Hardware(nodes=1, gpus_per_node=world_size, hbm=gpu.total)
    try:
        shape = find_shape(str(folder))
        run = run_of(config, spec, shape, world_size, lengths=lengths or Lengths(1, 1))
    except ConfigError:
        return []
    memory, _ = bytes_per_rank(run)
    needed = memory["total"] if lengths is not None else sum(memory[kind] for kind in HELD)
    sentence = f"by `malora plan` a process needs {show_bytes(needed)} of GPU memory, and {gpu.name} has"
    guessed = memory["activations"] if lengths is not None and not shape.is_known_by_block else 0
    if needed - guessed > (1 + PLAN_ERROR) * gpu.total:
        advice = "Take more GPUs and parallel.zero_stage=3, or model.load_in_4bit=true."
        if lengths is not None:
            advice = " ".join(Report(config, spec, shape, hardware, lengths).advice[:2])
        raise ConfigError(f"{sentence} {show_bytes(gpu.total)}. {advice}")
    if needed > gpu.total:
        return [f"{sentence} {show_bytes(gpu.total)}: the run may not fit"]
    return [f"{sentence} {show_bytes(gpu.free)} free now"] if needed > gpu.free else []


def _as_it_runs(config: RunConfig, dtype: torch.dtype, *, trains: bool) -> RunConfig:
    """Return the recipe with the precision that `auto` means on this machine; evaluation does not spread experts."""
    model = config.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    parallel = config.parallel if trains else config.parallel.model_copy(update={"ep_size": 1})
    return config.model_copy(update={"model": model, "parallel": parallel})
