"""Private names of DeepSpeed that this package depends on, looked up before the first of them is used.

Versions below 0.19.7 gave wrong numbers in tests; 0.19.8 is the first that waits for all of ZeRO-3's gathers over gloo.
`config.compatibility` says which version can do what.
"""

from importlib import import_module
from importlib.metadata import version
from inspect import isfunction
from types import CodeType
from typing import Any

from malora_dist.config.compatibility import SUPPORTED_VERSIONS
from malora_dist.errors import ConfigError

_PARTITION = "deepspeed.runtime.zero.partition_parameters"
_STAGE3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_STAGES12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_FRAGMENT = "deepspeed.utils.tensor_fragment:tensor_fragment"
_GROUPS = "deepspeed.utils.groups"
_STAGE_1_AND_2 = {
    f"{_STAGES12}.__init__": (
        "bit16_groups",
        "contiguous_gradients",
        "expert_dp_process_group",
        "real_dp_process_group",
        "single_partition_of_fp32_groups",
    ),
    # Where a parameter is in the flat masters, of which the state that is saved and restored is.
    "deepspeed.utils.mixed_precision_linkage:_init_lp_to_hp_mapping": ("_dp_group", "_hp_mapping"),
    f"{_FRAGMENT}.get_hp_fragment_address": ("hp_fragment_address",),
    f"{_FRAGMENT}.__init__": ("lp_fragment_address",),
}
# For each feature the names it needs, as module:name, and of some functions the attributes of parameters they handle.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "parallel.zero_stage=1": _STAGE_1_AND_2,
    "parallel.zero_stage=2": _STAGE_1_AND_2,
    "parallel.zero_stage=3": {
        f"{_PARTITION}:PartitionedParamStatus.AVAILABLE": (),
        f"{_PARTITION}:Init._convert_to_deepspeed_param": (
            "ds_id",
            "ds_numel",
            "ds_process_group",
            "ds_shape",
            "ds_tensor",
            "ds_zero_partition_process_group",
            "ds_zero_partition_rank",
            "ds_zero_partition_world_size",
            "aligned_size",
            "partition",
        ),
        f"{_PARTITION}:Init._partition_param": ("ds_numel_aligned", "ds_tensor", "final_location", "status"),
        # Where a parameter is in the flat masters, of which the state that is saved and restored is.
        f"{_STAGE3}.__init__": ("fp32_partitioned_groups_flat", "grad_position", "swap_optimizer"),
        f"{_STAGE3}.get_param_id": (),
        "deepspeed.utils:safe_get_local_fp32_param": (),
        "deepspeed.utils:safe_set_local_fp32_param": (),
    },
    "parallel.ep_size above 1": {
        f"{_GROUPS}:_create_expert_and_data_parallel": (),
        f"{_GROUPS}:_get_expert_parallel_group": (),
        f"{_GROUPS}:_get_expert_data_parallel_group": (),
        "deepspeed.moe.layer:MoE.set_deepspeed_parallelism": (),
        f"{_ENGINE}._configure_distributed_model": ("expert_data_parallel_group", "has_moe_layers"),
        f"{_STAGE3}._autoep_expert_parallel_group": ("ds_zero_placement_family", "ds_zero_partition_group_name"),
    },
}


def check_names(feature: str) -> None:
    """Check that the installed DeepSpeed has the private names that a feature needs, before a weight is loaded.

    Args:
        feature: In the words of a recipe; one that is not a key of `NAMES` needs none.

    Raises:
        ConfigError: A name is missing; the message says which versions have it.
    """
    for name, attributes in NAMES.get(feature, {}).items():
        found = _find(name)
        known = set() if found is None or not attributes else _mentioned(_undecorated(found).__code__)
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


def _undecorated(function: Any) -> Any:
    """Return the function that a decorator of DeepSpeed's calls, which does not name it in `__wrapped__`."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return next((content for content in cells if isfunction(content)), function)


def _mentioned(code: CodeType) -> set[str]:
    """Return the attributes and texts in a function's code, nested functions included."""
    found = {*code.co_names, *code.co_varnames, *code.co_cellvars}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _mentioned(constant)
        elif isinstance(constant, str):
            found.add(constant)
    return found
