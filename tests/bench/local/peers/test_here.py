import sys
from collections.abc import Iterator

import pytest
import torch

from malora_dist.bench.local.peers.baselines import BASELINES
from malora_dist.bench.local.peers.here import taking_part
from malora_dist.errors import ConfigError
from malora_dist.ops.devices import missing_for_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRITON = "malora_grouped_triton"


@pytest.fixture(autouse=True)
def a_gpu_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    missing_for_triton.cache_clear()
    yield
    missing_for_triton.cache_clear()


def test_triton_takes_part_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(BASELINES)
    assert list(taking_part(None, names, GPU)) == names
    assert list(taking_part(None, names, CPU)) == [name for name in names if name != TRITON]
    assert list(taking_part("base,malora", names, CPU)) == ["base", "malora"]
    monkeypatch.setitem(sys.modules, "triton", None)
    missing_for_triton.cache_clear()
    assert TRITON not in taking_part(None, names, GPU)


def test_the_interpreter_takes_part_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TRITON not in taking_part(None, list(BASELINES), CPU)
    assert list(taking_part(TRITON, [], CPU)) == [TRITON]


def test_who_cannot_run_here_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapter.computation=grouped_triton needs a CUDA device, not 'cpu'"):
        taking_part(f"base,{TRITON}", [], CPU)
    with pytest.raises(ConfigError, match="nobody is not one of base"):
        taking_part(",", [], CPU)
