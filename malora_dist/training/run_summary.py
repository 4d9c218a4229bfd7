"""What a run logs about itself: adapted modules, memory and steps before the first step, and its files at the end."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from malora_dist.adapters.inject import InjectionReport
from malora_dist.config import RunConfig
from malora_dist.models.config import KEY


def injection_lines(report: InjectionReport) -> Iterator[str]:
    """Return lines on the adapted modules, and on how much of the base is quantised and adapted."""
    for row in report.rows:
        yield (
            f"adapted {row.modules:3d} x {row.target:<10s} {row.in_features:5d} -> {row.out_features:<5d}  "
            f"{row.trainable_parameters:>11,} trainable"
        )
    base = report.base_parameters
    yield (
        f"trainable {report.trainable_parameters:,} of {base:,} base parameters "
        f"({100 * report.trainable_parameters / base:.2f} %); "
        f"4-bit: {100 * report.quantized_parameters / base:.1f} % of the base, "
        f"adapted: {100 * report.adapted_parameters / base:.1f} %"
    )
    if report.fused_experts:
        yield (
            f"not adapted: experts that are stored as one parameter, not as linear layers, {report.fused_experts[0]} "
            f"and {len(report.fused_experts) - 1} more"
        )


def placement_lines(
    config: RunConfig, resident: Mapping[str, int], steps: int, steps_per_epoch: float
) -> Iterator[str]:
    """Return lines on what this process holds once DeepSpeed has placed everything, and on the length of the run.

    Args:
        config: the recipe.
        resident: bytes of `base` and `adapter` weights on this process.
        steps: optimizer steps of the whole run.
        steps_per_epoch: of one epoch.
    """
    yield (
        f"ZeRO-{config.parallel.zero_stage}: this process keeps {resident['base'] / 2**20:.1f} MiB of base and "
        f"{resident['adapter'] / 2**20:.1f} MiB of adapter weights"
    )
    experts, ep_size = config.adapter.num_experts, config.parallel.ep_size
    if ep_size > 1:
        yield (
            f"expert parallelism: groups of {ep_size} processes exchange tokens, each holds {experts // ep_size} of "
            f"{experts} experts of a layer"
        )
    yield f"training for {steps} steps, {steps_per_epoch:.1f} steps an epoch"


def next_steps(folder: Path, *, trust_remote_code: bool) -> str:
    """Return what to look at in the folder of a finished run."""
    trust = f" --{KEY} true" if trust_remote_code else ""
    return (
        "\nResults\n"
        f"  {folder}/report/index.html   charts: losses, accuracies, routing of tasks to experts\n"
        f"  {folder}/adapter/            the adapter, {folder}/metrics.jsonl the numbers\n"
        f"  malora evaluate {folder}{trust}     evaluates it again, on any number of processes"
    )
