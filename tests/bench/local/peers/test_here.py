import sys

import pytest
import torch

from malora_dist.bench.local.peers.contestants import CONTESTANTS
from malora_dist.bench.local.peers.here import taking_part
from malora_dist.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRITON = "malora_grouped_triton"


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_triton_takes_part_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(CONTESTANTS)
    assert list(taking_part(None, names, GPU)) == names
    assert list(taking_part(None, names, CPU)) == [name for name in names if name != TRITON]
    assert list(taking_part("base,malora", names, CPU)) == ["base", "malora"]
    monkeypatch.setitem(sys.modules, "triton", None)
    assert TRITON not in taking_part(None, names, GPU)


def test_the_interpreter_takes_part_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TRITON not in taking_part(None, list(CONTESTANTS), CPU)
    assert list(taking_part(TRITON, [], CPU)) == [TRITON]


def test_who_cannot_run_here_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapter.computation=grouped_triton needs a CUDA device, not 'cpu'"):
        taking_part(f"base,{TRITON}", [], CPU)
    with pytest.raises(ConfigError, match="nobody is not one of base"):
        taking_part(",", [], CPU)
