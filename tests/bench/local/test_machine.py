import json

import pytest
import torch

from malora_dist.bench.local.machine import describe, ready_device
from malora_dist.errors import ConfigError


def test_versions_and_threads_of_this_machine() -> None:
    facts = json.loads(json.dumps(describe("cpu")))
    assert facts["torch"] == torch.__version__ and facts["threads used"] == torch.get_num_threads()
    assert {"CPU", "cores", "load average before", "peft", "transformers"} <= set(facts)


def test_devices() -> None:
    assert ready_device("cpu", torch.get_num_threads()) == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device 'tpu' must be cpu or cuda"):
        ready_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no GPU"):
            ready_device("cuda")
