"""The installed DeepSpeed has every private name that is used; one that is missing is named with what to install."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from malora_dist.config import load_config
from malora_dist.distributed import deepspeed_names
from malora_dist.distributed.deepspeed_names import NAMES, check_names
from malora_dist.distributed.process_groups import World
from malora_dist.errors import ConfigError
from malora_dist.training.setup import engine_config
from tests.config.recipes import RECIPES

PACKAGE = Path(deepspeed_names.__file__).parents[1]


@pytest.mark.parametrize("feature", NAMES)
def test_the_installed_version_has_all_names(feature: str) -> None:
    check_names(feature)


# Where attributes that DeepSpeed gives parameters and optimizers may be read; what they are is in NAMES.
READERS = {"ops/partitioned.py", *(f"distributed/{name}.py" for name in ("zero3", "zero012", "expert_groups"))}
PRIVATE = re.compile(
    r"\b(ds_(?!config)\w+|_dp_group|_hp_mapping|[hl]p_fragment_address|bit16_groups|real_dp_process_group|"
    r"expert_dp_process_group|expert_data_parallel_group|has_moe_layers|single_partition_of_fp32_groups|grad_position|"
    r"get_param_id|fp32_partitioned_groups_flat|_create_expert_and_data_parallel|_get_expert\w*_group|"
    r"_convert_to_deepspeed_param)\b"
)


def private_names(source: str) -> set[str]:
    """The private names of DeepSpeed among the names, attributes and texts of a module's code."""
    words: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        words |= {
            getattr(node, field)
            for field in ("id", "attr", "value", "arg")
            if isinstance(getattr(node, field, None), str)
        }
    return {word for word in words if PRIVATE.fullmatch(word)}


def test_private_names_are_read_in_few_places_and_all_are_checked() -> None:
    found = {str(path.relative_to(PACKAGE)): private_names(path.read_text()) for path in PACKAGE.rglob("*.py")}
    users = {name for name, names in found.items() if names} - {"distributed/deepspeed_names.py"}
    assert users == READERS
    checked = {word for names in NAMES.values() for name, words in names.items() for word in (*name.split("."), *words)}
    checked = {word.rpartition(":")[2] for word in checked}
    # What this package itself gives to parameters, for DeepSpeed to read.
    given = {"ds_zero_partition_process_group"}
    assert set().union(*(found[name] for name in READERS)) - given <= checked


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.utils import groups

    monkeypatch.delattr(groups, "_get_expert_parallel_group")
    with pytest.raises(
        ConfigError, match=r"_get_expert_parallel_group, which parallel.ep_size .* >=0.19.7,<0.20, for ZeRO-3"
    ):
        check_names("parallel.ep_size above 1")


@pytest.mark.parametrize(
    ("stage", "name"),
    [(1, "mixed_precision_linkage:_init_lp_to_hp_mapping"), (2, "tensor_fragment.get_hp"), (3, "stage3:")],
)
def test_a_run_whose_state_could_not_be_saved_is_refused_at_its_start(
    stage: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not hours later, at its first checkpoint."""
    find = deepspeed_names._find
    monkeypatch.setattr(deepspeed_names, "_find", lambda wanted: None if name in wanted else find(wanted))
    config = load_config(RECIPES / "demo.yaml", [f"--parallel.zero_stage={stage}"])
    world = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match=f"which parallel.zero_stage={stage} needs"):
        engine_config(config, world)
    engine_config(load_config(RECIPES / "demo.yaml", ["--parallel.zero_stage=0"]), world)


def test_a_function_that_ignores_a_mark_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        return lambda parameter: parameter.ds_numel

    monkeypatch.setattr(deepspeed_names, "_find", find)
    with pytest.raises(ConfigError, match="has no ds_id, which parallel.zero_stage=3 needs"):
        check_names("parallel.zero_stage=3")
