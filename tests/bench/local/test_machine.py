import json
from dataclasses import replace

import pytest
import torch

from malora_dist.bench.local.machine import describe, ready_device
from malora_dist.errors import ConfigError
from malora_dist.training.gpu import Gpu

T4 = Gpu("Tesla T4", (7, 5), False, 15 << 30, 14 << 30, ("sm_75", "sm_80"))


def test_versions_and_threads_of_this_machine() -> None:
    facts = json.loads(json.dumps(describe("cpu")))
    assert facts["torch"] == torch.__version__ and facts["threads used"] == torch.get_num_threads()
    assert {"CPU", "cores", "load average before", "peft", "transformers"} <= set(facts)


def test_devices() -> None:
    assert ready_device("cpu", torch.get_num_threads()) == torch.device("cpu")
    for wrong in ("tpu", "meta", "cpu:1", "cuda:x", ""):
        with pytest.raises(ConfigError, match=f"--device '{wrong}' must be cpu, cuda or cuda:NUMBER"):
            ready_device(wrong)
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:9"):
            with pytest.raises(ConfigError, match=f"--device '{name}' must be cpu: torch .* sees no GPU here"):
                ready_device(name)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Gpu, "of", lambda _: T4)
    assert ready_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="--device 'cuda:9' must be one of cuda:0, cuda:1"):
        ready_device("cuda:9")
    with pytest.raises(ConfigError, match="--dtype bf16: Tesla T4 has compute capability 7.5 .* set --dtype fp32"):
        ready_device("cuda:1", dtype="bf16")
    monkeypatch.setattr(Gpu, "of", lambda _: replace(T4, capability=(7, 0)))
    with pytest.raises(ConfigError, match="Tesla T4 has the architecture sm_70, for which torch .* was not built"):
        ready_device("cuda:1", dtype="fp32")
