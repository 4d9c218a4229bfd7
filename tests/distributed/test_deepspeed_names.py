"""The installed DeepSpeed has every private name that is used; one that is missing is named with what to install."""

from typing import Any

import pytest

from malora_dist.distributed import deepspeed_names
from malora_dist.distributed.deepspeed_names import NAMES, check_names
from malora_dist.errors import ConfigError


@pytest.mark.parametrize("feature", NAMES)
def test_the_installed_version_has_all_names(feature: str) -> None:
    check_names(feature)


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.utils import groups

    monkeypatch.delattr(groups, "_get_expert_parallel_group")
    with pytest.raises(
        ConfigError, match=r"_get_expert_parallel_group, which parallel.ep_size .* >=0.19.7,<0.20, for ZeRO-3"
    ):
        check_names("parallel.ep_size above 1")


def test_a_function_that_ignores_a_mark_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        return lambda parameter: parameter.ds_numel

    monkeypatch.setattr(deepspeed_names, "_find", find)
    with pytest.raises(ConfigError, match="has no ds_process_group, which parallel.zero_stage=3 needs"):
        check_names("parallel.zero_stage=3")
