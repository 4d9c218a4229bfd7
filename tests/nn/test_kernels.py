from collections.abc import Iterator

import pytest
import torch

from malora_dist.errors import ConfigError
from malora_dist.functional.triton_ready import missing_for_triton
from malora_dist.nn.kernels import require_triton


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    missing_for_triton.cache_clear()
    yield
    missing_for_triton.cache_clear()


def test_the_error_names_the_setting_what_is_missing_and_a_way_out() -> None:
    require_triton(torch.device("cpu"))
    wanted = "adapter.computation=grouped_triton needs a CUDA device, not 'meta'; choose adapter.computation=auto"
    with pytest.raises(ConfigError) as error:
        require_triton(torch.device("meta"))
    assert str(error.value) == wanted
