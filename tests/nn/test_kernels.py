import sys

import pytest
import torch

from malora_dist.errors import ConfigError
from malora_dist.functional.grouped_triton import triton_available
from malora_dist.nn.kernels import require_triton


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_cuda_has_the_kernels_and_the_cpu_only_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    require_triton(torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="adapter.computation=grouped_triton needs a CUDA device, not 'cpu'"):
        require_triton(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    require_triton(torch.device("cpu"))
    assert not triton_available(torch.device("meta"))


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not triton_available(torch.device("cuda"))
    with pytest.raises(
        ConfigError, match=r"adapter.computation=grouped_triton needs triton, .*pip install \"malora_dist\[kernels\]\""
    ):
        require_triton(torch.device("cuda"))
