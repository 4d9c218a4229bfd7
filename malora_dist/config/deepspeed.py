"""DeepSpeed's configuration, made from the recipe and an optional file with DeepSpeed's own settings.

The recipe decides stage, batch sizes, accumulation and clipping. The file may say "auto" for them, or the same
value; another value is an error that names both. What this package cannot run, or DeepSpeed runs wrong, is refused.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from malora_dist.config.deepspeed_keys import (
    OFFLOAD_KEYS,
    REFUSED_KEYS,
    REFUSED_ZERO_KEYS,
    TOP_LEVEL_KEYS,
    ZERO_KEYS,
)
from malora_dist.config.schema import RunConfig
from malora_dist.config.topology import accumulation_steps
from malora_dist.errors import ConfigError, brief, short
from malora_dist.files.json_text import parse_json
from malora_dist.optimizers.registry import optimizer_spec

AUTO = "auto"
# DeepSpeed's own progress line would otherwise repeat what the trainer logs.
NEVER = 10**9


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`.

    The engine runs in fp32 whatever model.dtype is: adapters are fp32 and the frozen base is cast by autograd.
    Raises ConfigError if parallel.ds_config contradicts the recipe, TopologyError if the batch cannot be split.
    """
    given = read_ds_config(config.parallel.ds_config) if config.parallel.ds_config is not None else {}
    problems = list(ds_config_problems(config, world_size, given))
    if problems:
        raise ConfigError("\n".join(problems))
    decided = recipe_values(config, world_size)
    result = {key: value for key, value in _without_auto(given).items() if key not in ("bf16", "fp16")}
    zero = {**result.get("zero_optimization", {}), "stage": config.parallel.zero_stage}
    result |= decided | {"zero_optimization": zero}
    result.setdefault("steps_per_print", NEVER)
    result.setdefault("wall_clock_breakdown", False)
    if _offloads(zero, "offload_optimizer"):
        # Otherwise DeepSpeed insists on its own C++ Adam, compiled at start.
        result["zero_force_ds_cpu_optimizer"] = False
    if config.parallel.zero_stage > 0:
        result |= optimizer_spec(config.train.optim).deepspeed
    return result


def recipe_values(config: RunConfig, world_size: int) -> dict[str, int | float]:
    """Return DeepSpeed's batch and clipping keys, with the values the recipe gives them."""
    train = config.train
    accumulation = accumulation_steps(train.global_batch_size, train.per_device_train_batch_size, world_size)
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.max_grad_norm,
    }


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file. Raises ConfigError if it is missing, is no JSON object or holds a key twice."""

    try:
        data = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"parallel.ds_config={path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"parallel.ds_config={path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"parallel.ds_config={path} must hold a JSON object, not a {type(data).__name__}")
    return data


def ds_config_problems(config: RunConfig, world_size: int | None, given: dict[str, Any]) -> Iterator[str]:
    """Yield why `given` cannot be used, one sentence each. Without world_size, accumulation is not compared."""
    file = config.parallel.ds_config
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield f"{file}: zero_optimization={short(zero)} must be an object"
        zero = {}
    yield from _refused(file, given, zero)
    yield from _unknown(file, given, zero)
    yield from _contradictions(config, world_size, given, zero)
    yield from _offload_problems(config, zero)
    yield from _expert_problems(config, zero)


def _refused(file: str | None, given: dict[str, Any], zero: dict[str, Any]) -> Iterator[str]:
    for prefix, values, refusals in (("", given, REFUSED_KEYS), ("zero_optimization.", zero, REFUSED_ZERO_KEYS)):
        for key, (harmless, reason) in refusals.items():
            if key in values and values[key] not in (harmless, AUTO, None):
                yield f"{file}: {prefix}{key}={short(values[key])} is refused: {reason}"
    for block in ("bf16", "fp16"):
        value = given.get(block)
        enabled = value.get("enabled", False) if isinstance(value, dict) else value
        if enabled not in (False, None, AUTO):
            yield (
                f"{file}: {block}.enabled={short(enabled)} is refused: the engine runs in fp32, because adapters are "
                "fp32 and the frozen base is cast where it is used. Precision of the base is model.dtype"
            )


def _unknown(file: str | None, given: dict[str, Any], zero: dict[str, Any]) -> Iterator[str]:
    groups = [
        ("", given, TOP_LEVEL_KEYS | set(REFUSED_KEYS)),
        ("zero_optimization.", zero, ZERO_KEYS | set(REFUSED_ZERO_KEYS)),
    ]
    for block, keys in OFFLOAD_KEYS.items():
        if isinstance(zero.get(block), dict):
            groups.append((f"zero_optimization.{block}.", zero[block], keys))
    for prefix, values, known in groups:
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, sorted(known), n=1)
                advice = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
                yield f"{file}: {prefix}{brief(key)} is not a key this version passes to DeepSpeed; {advice}"


def _contradictions(
    config: RunConfig, world_size: int | None, given: dict[str, Any], zero: dict[str, Any]
) -> Iterator[str]:
    file, train = config.parallel.ds_config, config.train
    decided: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.per_device_train_batch_size", train.per_device_train_batch_size),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
    }
    if world_size is not None and train.global_batch_size % (train.per_device_train_batch_size * world_size) == 0:
        steps = train.global_batch_size // (train.per_device_train_batch_size * world_size)
        decided["gradient_accumulation_steps"] = ("the recipe's accumulation (derived)", steps)
    for key, (name, value) in decided.items():
        if given.get(key, AUTO) not in (AUTO, value):
            yield f'{name}={value} but {file}: {key}={short(given[key])}; make them equal or write "auto" in the file'
    stage = zero.get("stage", AUTO)
    if stage not in (AUTO, config.parallel.zero_stage) or isinstance(stage, bool):
        yield (
            f"parallel.zero_stage={config.parallel.zero_stage} but {file}: zero_optimization.stage={short(stage)}; "
            'make them equal or write "auto" in the file'
        )


def _offload_problems(config: RunConfig, zero: dict[str, Any]) -> Iterator[str]:
    needed = {"offload_optimizer": 1, "offload_param": 3}
    for block, lowest in needed.items():
        if _offloads(zero, block) and config.parallel.zero_stage < lowest:
            yield (
                f"parallel.zero_stage={config.parallel.zero_stage} but {config.parallel.ds_config}: "
                f"zero_optimization.{block} needs stage {lowest} or higher"
            )
    if _offloads(zero, "offload_optimizer") and zero["offload_optimizer"]["device"] == "nvme":
        yield (
            f"{config.parallel.ds_config}: zero_optimization.offload_optimizer.device=nvme is refused: the optimizer's "
            "state could not be saved. Nearest legal plan: cpu; moments of adapters are small"
        )


def _expert_problems(config: RunConfig, zero: dict[str, Any]) -> Iterator[str]:
    """Yield a problem for each setting of stages 1 and 2 that works only without expert parallelism."""
    if config.parallel.ep_size == 1 or config.parallel.zero_stage not in (1, 2):
        return
    reasons = {
        "contiguous_gradients": "without it DeepSpeed would mix gradients of different experts",
        "reduce_scatter": "without it DeepSpeed does not reduce experts over their own processes",
    }
    for key, reason in reasons.items():
        if zero.get(key, AUTO) not in (True, AUTO, None):
            yield (
                f"{config.parallel.ds_config}: zero_optimization.{key}={short(zero[key])} is refused with "
                f"parallel.ep_size={config.parallel.ep_size} at stage {config.parallel.zero_stage}: {reason}"
            )


def _offloads(zero: dict[str, Any], block: str) -> bool:
    value = zero.get(block)
    return isinstance(value, dict) and value.get("device", "none") not in ("none", AUTO)


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Drop "auto" and null entries: the recipe fills its own keys, DeepSpeed's defaults serve for the rest."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result[key] = _without_auto(value)
        elif value is not None and value != AUTO:
            result[key] = value
    return result
