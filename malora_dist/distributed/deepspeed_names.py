"""Private names of DeepSpeed that this package depends on, looked up before the first of them is used.

Versions below 0.19.7 gave wrong numbers in tests; 0.19.8 is the first that waits for all of ZeRO-3's gathers over gloo.
`config.compatibility` says which version can do what.
"""

from importlib import import_module
from importlib.metadata import version
from types import CodeType
from typing import Any

from malora_dist.config.compatibility import SUPPORTED_VERSIONS
from malora_dist.errors import ConfigError

_PARTITION = "deepspeed.runtime.zero.partition_parameters"
_GROUPS = "deepspeed.utils.groups"
# For each feature the names it needs, as module:name, and of some functions the attributes of parameters they handle.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "parallel.zero_stage=3": {
        f"{_PARTITION}:PartitionedParamStatus.AVAILABLE": (),
        f"{_PARTITION}:Init._convert_to_deepspeed_param": (
            "ds_numel",
            "ds_process_group",
            "ds_zero_partition_process_group",
            "ds_zero_partition_rank",
            "ds_zero_partition_world_size",
            "aligned_size",
            "partition",
        ),
    },
    "parallel.ep_size above 1": {
        f"{_GROUPS}:_create_expert_and_data_parallel": (),
        f"{_GROUPS}:_get_expert_parallel_group": (),
        f"{_GROUPS}:_get_expert_data_parallel_group": (),
        "deepspeed.moe.layer:MoE.set_deepspeed_parallelism": (),
    },
}


def check_names(feature: str) -> None:
    """Check that the installed DeepSpeed has the private names that a feature needs.

    Args:
        feature: A key of `NAMES`, in the words of a recipe.

    Raises:
        ConfigError: A name is missing; the message says which versions have it.
    """
    for name, attributes in NAMES[feature].items():
        found = _find(name)
        known = set() if found is None or not attributes else _mentioned(found.__code__)
        missing = [name] if found is None else [attribute for attribute in attributes if attribute not in known]
        if missing:
            raise ConfigError(
                f"deepspeed {version('deepspeed')} has no {missing[0].replace(':', '.')}, which {feature} needs. "
                f"Supported is deepspeed {SUPPORTED_VERSIONS}"
            )


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _mentioned(code: CodeType) -> set[str]:
    """Return the attributes and texts in a function's code, nested functions included."""
    found = {*code.co_names, *code.co_varnames, *code.co_cellvars}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _mentioned(constant)
        elif isinstance(constant, str):
            found.add(constant)
    return found
