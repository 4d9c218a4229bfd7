"""What real GPUs and real builds of torch say of themselves, and what is made of it."""

from pathlib import Path

import pytest
import torch

from malora_dist.training import gpu
from malora_dist.training.gpu import Gpu, architecture_problem, bfloat16_problem, runs_on, why_no_gpu

# torch.cuda.get_arch_list() of builds for CUDA 11.8, 12.4, 12.8, 13.0 and for ROCm.
CU118 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_37", "sm_90")
CU124 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = CU128 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
ROCM = ("gfx90a", "gfx942")
V100 = Gpu("Tesla V100-SXM2-32GB", (7, 0), False, 32 << 30, 31 << 30, CU130)
T4 = Gpu("Tesla T4", (7, 5), False, 15 << 30, 14 << 30, CU130)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), True, 79 << 30, 78 << 30, CU130)
RTX5090 = Gpu("NVIDIA GeForce RTX 5090", (12, 0), True, 31 << 30, 30 << 30, CU124)


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        pytest.param(CU130, (7, 0), False, id="V100, CUDA 13"),
        pytest.param(CU118, (7, 0), True, id="V100, CUDA 11.8"),
        pytest.param(CU130, (7, 5), True, id="T4"),
        pytest.param(CU130, (8, 9), True, id="L40S runs the code of sm_86"),
        pytest.param(CU124, (9, 0), True, id="H100"),
        pytest.param(CU124, (12, 0), False, id="RTX 5090, CUDA 12.4"),
        pytest.param(CU128, (12, 0), True, id="RTX 5090, CUDA 12.8"),
        pytest.param(CU128, (12, 1), True, id="GB10 runs the code of sm_120"),
        pytest.param(CU128, (10, 3), True, id="B300 runs the code of sm_100"),
        pytest.param(("sm_80", "compute_90"), (10, 0), True, id="compiled at run time"),
        pytest.param(("sm_80", "compute_90"), (8, 9), True, id="older than what is compiled"),
        pytest.param(("sm_90a",), (9, 0), True, id="that very GPU"),
        pytest.param(("sm_100a", "compute_100a"), (10, 3), False, id="no other than that very GPU"),
        pytest.param(("sm_100f", "compute_100f"), (10, 3), True, id="of one family"),
        pytest.param(("compute_100f",), (12, 0), False, id="of another family"),
        pytest.param(ROCM, (9, 4), True, id="not judged"),
        pytest.param((), (9, 0), True, id="nothing known"),
    ],
)
def test_code_for_an_architecture(built_for: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(built_for, capability) is runs


def test_a_gpu_without_code_is_named_with_what_torch_has() -> None:
    said = architecture_problem(V100)
    assert said is not None and said.startswith("Tesla V100-SXM2-32GB has the architecture sm_70, for which torch ")
    assert "it has sm_75, sm_80, sm_86, sm_90, sm_100, sm_120, compute_120; install" in said
    assert "sm_120, for which" in str(architecture_problem(RTX5090))
    assert architecture_problem(T4) is architecture_problem(H100) is None


def test_bfloat16_needs_capability_8() -> None:
    wanted = "model.dtype=bfloat16: Tesla T4 has compute capability 7.5 and does not support bfloat16 matrix products"
    assert str(bfloat16_problem(T4, "model.dtype=bfloat16", "model.dtype=float32")).startswith(wanted)
    assert str(bfloat16_problem(T4, "--dtype bf16", "--dtype fp32")).endswith("set --dtype fp32")
    assert bfloat16_problem(H100, "model.dtype=bfloat16", "") is None


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with an NVIDIA GPU that nothing hides."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(gpu, "NVIDIA_DEVICE", tmp_path / "nvidiactl")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_build_for_the_cpu_on_a_machine_with_a_gpu(nvidia: pytest.MonkeyPatch) -> None:
    nvidia.setattr(torch.version, "cuda", None)
    assert f"torch {torch.__version__} is a build for the CPU" in str(why_no_gpu())


def test_torchs_own_reason_is_handed_on(nvidia: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it")

    nvidia.setattr(torch.version, "cuda", "13.0")
    nvidia.setattr(torch.cuda, "init", init)
    assert str(why_no_gpu()).endswith(
        "cannot use it: The NVIDIA driver on your system is too old (found version 11040)."
    )
    nvidia.setattr(torch.cuda, "init", lambda: None)
    assert why_no_gpu() is None


@pytest.mark.parametrize(("name", "value"), [("CUDA_VISIBLE_DEVICES", "-1"), ("DS_ACCELERATOR", "cpu")])
def test_nothing_is_said_where_gpus_are_not_wanted_or_not_there(
    nvidia: pytest.MonkeyPatch, name: str, value: str
) -> None:
    nvidia.setattr(torch.version, "cuda", None)
    assert why_no_gpu() is not None
    nvidia.setenv(name, value)
    assert why_no_gpu() is None
    nvidia.delenv(name)
    gpu.NVIDIA_DEVICE.unlink()
    assert why_no_gpu() is None
