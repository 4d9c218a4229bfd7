import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from malora_dist.adapters.layer import require_triton
from malora_dist.errors import ConfigError
from malora_dist.ops.devices import missing_for_c, missing_for_triton, triton_ready

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder that alone is in PATH and holds gcc, an H100, and no interpreter."""
    compiler = tmp_path / "gcc"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    show_gpu(monkeypatch, "NVIDIA H100 80GB HBM3", (9, 0))
    missing_for_triton.cache_clear()
    yield tmp_path
    missing_for_triton.cache_clear()


def show_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def test_a_gpu_has_the_kernels_and_the_cpu_only_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_for_triton(GPU) is None and triton_ready(GPU)
    assert missing_for_triton(CPU) == "a CUDA device, not 'cpu'" and not triton_ready(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    missing_for_triton.cache_clear()
    assert triton_ready(CPU)
    assert not triton_ready(torch.device("meta"))


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpu(monkeypatch, "Tesla V100-SXM2-16GB", (7, 0))
    wanted = "a GPU of compute capability 8.0 or higher, and Tesla V100-SXM2-16GB has 7.0"
    assert missing_for_triton(GPU) == wanted and not triton_ready(GPU)


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed: pip install" in str(missing_for_triton(GPU)) and not triton_ready(GPU)


def test_the_launchers_need_a_c_compiler(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    assert missing_for_c() is None
    monkeypatch.setenv("CC", "icc")
    assert "CC=icc is not a program" in str(missing_for_c())
    monkeypatch.setenv("CC", str(machine / "gcc"))
    assert missing_for_c() is None
    monkeypatch.delenv("CC")
    (machine / "gcc").rename(machine / "clang")
    assert missing_for_c() is None
    (machine / "clang").unlink()
    assert "neither gcc nor clang is in PATH" in str(missing_for_triton(GPU)) and not triton_ready(GPU)


def test_the_launchers_need_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("malora_dist.ops.devices._python_headers", lambda: tmp_path)
    assert f"there is no {tmp_path / 'Python.h'}" in str(missing_for_triton(GPU))


def test_the_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_ready(GPU)
    monkeypatch.setitem(os.environ, "PATH", "")
    assert triton_ready(GPU)


def test_a_compiled_graph_takes_the_plain_form() -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if triton_ready(GPU) else x - 1

    x = torch.zeros(3)
    assert torch.equal(chosen(x), x + 1)
    assert torch.equal(torch.compile(chosen, fullgraph=True, backend="eager")(x), x - 1)


def test_the_error_names_the_setting_what_is_missing_and_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    require_triton(torch.device("cpu"))
    wanted = "computation=grouped_triton needs a CUDA device, not 'meta'; choose computation=auto"
    with pytest.raises(ConfigError) as error:
        require_triton(torch.device("meta"))
    with pytest.raises(ConfigError, match="choose adapter.computation=auto"):
        require_triton(torch.device("meta"), "adapter.computation")
    assert str(error.value) == wanted
    with pytest.raises(ConfigError, match="choose adapter.computation=auto"):
        require_triton(torch.device("meta"), "adapter.computation")
