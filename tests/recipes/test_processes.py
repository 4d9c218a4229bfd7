from pathlib import Path

import pytest
import torch

from malora_dist.config import load_config
from malora_dist.config.compatibility import suggest_world_sizes
from malora_dist.recipes import processes
from malora_dist.recipes.processes import demo_processes, main

LEGAL = suggest_world_sizes(load_config(Path(processes.__file__).with_name("demo.yaml")))


@pytest.mark.parametrize(
    ("gpus", "spread", "settings", "said"),
    [
        (0, False, {"NUM_PROCESSES": "2"}, "no GPU to use here: 2 processes on the CPU"),
        (0, True, {"NUM_PROCESSES": "2"}, "no GPU to use here"),
        (1, False, {"NUM_PROCESSES": "1"}, "GPUs to use here: 1; processes: 1"),
        (1, True, {"NUM_PROCESSES": "2", "DS_ACCELERATOR": "cpu"}, "there is one GPU here: all run on the CPU"),
        (
            3,
            True,
            {"NUM_PROCESSES": "2"},
            "here: 3; processes: 2 (the batch can be shared by 1, 2)",
        ),
        (8, False, {"NUM_PROCESSES": "2"}, "GPUs to use here: 8; processes: 2"),
    ],
)
def test_as_many_processes_as_gpus(gpus: int, spread: bool, settings: dict[str, str], said: str) -> None:
    found, sentence = demo_processes(gpus, LEGAL, spread=spread)
    assert found == settings and said in sentence


def test_the_command_prints_settings_for_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["--spread"], {}) == 0
    assert capsys.readouterr().out == "NUM_PROCESSES=2 DS_ACCELERATOR=cpu\n"
    assert main([], {}) == 0
    assert capsys.readouterr().out == "NUM_PROCESSES=1\n"
    assert main([], {"DS_ACCELERATOR": "cpu"}) == 0
    assert capsys.readouterr().out == "NUM_PROCESSES=2\n"
    assert main(["--other"], {}) == 2
