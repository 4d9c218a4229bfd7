"""A whole run on the GPU gives the losses of the same run on the CPU."""

import subprocess
from pathlib import Path

import pytest

from tests.gpu.runs import SMALL, environment, make_run_folder, records, train_command

pytestmark = pytest.mark.gpu
CHANGES = {
    "train": {"max_steps": 4, "logging_steps": 1, "eval_steps": 2, "save_steps": None, "gradient_checkpointing": True},
    "evaluation": {"base": False, "tuned": False, "batch_tokens": 256},
}


def test_a_run_of_fp32_on_4_bits(tmp_path: Path) -> None:
    """ZeRO-3, dropout, recomputation and validations; the base is quantised on each device."""
    folder = make_run_folder(tmp_path, SMALL, CHANGES)
    devices = {"gpu": True, "cpu": False}
    started = {
        name: subprocess.Popen(
            train_command(f"runs/{name}"),
            cwd=folder,
            env=environment(gpu=gpu),
            stdout=(folder / f"{name}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        for name, gpu in devices.items()
    }
    codes = {name: process.wait(240) for name, process in started.items()}
    assert codes == dict.fromkeys(devices, 0), "\n".join((folder / f"{name}.log").read_text() for name in devices)
    for kind in ("train", "eval"):
        here, there = (records(folder / "runs" / name, kind) for name in devices)
        assert len(here) == len(there) > 0
        for found, wanted in zip(here, there, strict=True):
            losses = {key: value for key, value in wanted.items() if key.endswith(("loss", "grad_norm"))}
            assert {key: found[key] for key in losses} == pytest.approx(losses, rel=1e-4, abs=1e-5)
