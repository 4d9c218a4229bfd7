import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from malora_dist.config import RunConfig, load_config
from malora_dist.config.summary import adapter_spec
from malora_dist.data.encode import Sample
from malora_dist.data.loader import TrainLoader
from malora_dist.errors import ConfigError, TopologyError
from malora_dist.plan import Lengths, find_shape
from malora_dist.plan.memory import bytes_per_rank
from malora_dist.plan.run import run_of
from malora_dist.training.device_check import first_lengths, gpu_problems, memory_notes, uses_triton
from tests.multiprocess import run_distributed
from tests.training.device_workers import GPUS, MODEL, RECIPE

H100, T4 = GPUS
BF16 = torch.bfloat16
SHORT = Lengths(256, 128)


@pytest.fixture
def config() -> RunConfig:
    return load_config(RECIPE, ["--train.per_device_train_batch_size", "2"])


def test_a_gpu_too_old_for_bfloat16() -> None:
    assert gpu_problems(H100, "bfloat16", BF16) == gpu_problems(T4, "float32", torch.float32) == []
    (said,) = gpu_problems(T4, "bfloat16", BF16)
    assert said.startswith("model.dtype=bfloat16: Tesla T4 ") and said.endswith("set model.dtype=float32")
    # The first process's GPU multiplies it, this one's does not.
    (said,) = gpu_problems(T4, "auto", BF16)
    assert said.startswith("model.dtype=auto, bfloat16 by the first process's GPU: Tesla T4 ")


def test_everything_that_is_wrong_with_a_gpu_is_said_at_once() -> None:
    volta = replace(T4, name="Tesla V100-SXM2-32GB", capability=(7, 0))
    assert [said.split()[0] for said in gpu_problems(volta, "bfloat16", BF16)] == ["Tesla", "model.dtype=bfloat16:"]


def test_memory_by_the_plan(config: RunConfig) -> None:
    """LLaMA-2 7B in 4 bits: 4 GiB and more; on an H100 it fits, on 4 GiB it cannot, on a GPU in use it may not."""
    assert memory_notes(config, MODEL, 4, BF16, H100, SHORT) == []
    small = replace(H100, name="a small GPU", total=2 << 30, free=2 << 30)
    with pytest.raises(ConfigError) as error:
        memory_notes(config, MODEL, 4, BF16, small, SHORT)
    said = str(error.value)
    assert said.startswith("by `malora plan` a process needs ") and "and a small GPU has 2 GiB. It does not fit" in said
    assert "\n" not in said and "most are reduce_bucket" in said
    (note,) = memory_notes(config, MODEL, 4, BF16, replace(H100, free=1 << 30), SHORT)
    assert note.endswith("of GPU memory, and NVIDIA H100 80GB HBM3 has 1 GiB free now")
    # What the plan may be too high by is no reason to refuse a run.
    needed = float(note.split("needs ")[1].split(" GiB")[0]) * 2**30
    tight, tighter = (replace(H100, total=int(needed / part), free=0) for part in (1.1, 1.2))
    assert len(memory_notes(config, MODEL, 4, BF16, tight, SHORT)) == 1
    with pytest.raises(ConfigError):
        memory_notes(config, MODEL, 4, BF16, tighter, SHORT)


def test_evaluation_needs_no_more_than_weights(config: RunConfig) -> None:
    gpu = replace(H100, total=6 << 30, free=6 << 30)
    large = config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": False})})
    with pytest.raises(ConfigError):
        memory_notes(large, MODEL, 4, BF16, gpu, Lengths(4096, 4096))
    assert memory_notes(large, MODEL, 4, BF16, gpu, None) == []
    with pytest.raises(ConfigError, match="Take more GPUs and parallel.zero_stage=3, or model.load_in_4bit=true"):
        memory_notes(large, MODEL, 4, BF16, replace(gpu, total=1 << 28), None)


def test_evaluation_spreads_no_experts(config: RunConfig) -> None:
    """A recipe for expert groups of four is evaluated on one process."""
    spread = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ep_size": 4})})
    with pytest.raises(TopologyError):
        memory_notes(spread, MODEL, 1, BF16, H100, SHORT)
    assert memory_notes(spread, MODEL, 1, BF16, H100, None) == []


def test_a_base_in_float32_is_counted_so(config: RunConfig) -> None:
    whole = config.model_copy(update={"model": config.model.model_copy(update={"load_in_4bit": False})})
    replicated = whole.model_copy(update={"parallel": whole.parallel.model_copy(update={"zero_stage": 0})})
    gpu = replace(H100, total=20 << 30, free=20 << 30)
    assert memory_notes(replicated, MODEL, 4, BF16, gpu, None) == []
    with pytest.raises(ConfigError, match="needs 25"):
        memory_notes(replicated, MODEL, 4, torch.float32, gpu, None)


def test_nothing_is_said_of_a_model_that_the_plan_does_not_know(config: RunConfig, tmp_path: Path) -> None:
    """Nor of targets that it does not have, which are named where they are checked."""
    for model_type in ("nobodys", "gpt2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert memory_notes(config, tmp_path, 4, BF16, replace(H100, total=1), SHORT) == []
    adapter = config.adapter.model_copy(update={"target_modules": ("c_attn",)})
    with pytest.raises(ConfigError, match="a process needs"):
        memory_notes(config.model_copy(update={"adapter": adapter}), tmp_path, 4, BF16, replace(H100, total=1), SHORT)


def test_activations_that_are_a_guess_are_no_reason_to_refuse(config: RunConfig, tmp_path: Path) -> None:
    """Those of a Llama are known; for another family with the same numbers a note is all."""
    long, sizes = Lengths(65536, 1), {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    for kind in ("llama", "phi"):
        content = {"model_type": kind, "vocab_size": 512, "intermediate_size": 512, "num_key_value_heads": 8, **sizes}
        (tmp_path / "config.json").write_text(json.dumps(content))
        changes = {"target_modules": ("q_proj",)}
        recipe = config.model_copy(update={"adapter": config.adapter.model_copy(update=changes)})
        rest = bytes_per_rank(run_of(recipe, adapter_spec(recipe), find_shape(str(tmp_path)), 4, lengths=long))[0]
        gpu = replace(H100, total=rest["total"] - rest["activations"])
        assert rest["activations"] > gpu.total / 4
        with pytest.raises(ConfigError, match="does not fit") if kind == "llama" else nullcontext():
            (note,) = memory_notes(recipe, tmp_path, 4, BF16, gpu, long)
            assert note.endswith("the run may not fit")


def test_lengths_are_those_of_the_first_batch() -> None:
    ids = torch.arange(100).numpy()
    samples = [Sample(number, 0, ids[: 10 + number], 4) for number in range(4)]
    loader = TrainLoader(samples, task_sizes=[4], global_batch_size=4, micro_batch_size=2)
    assert first_lengths(loader, samples) == Lengths(11, 7)


def test_kernels_that_are_named(config: RunConfig) -> None:
    assert not uses_triton(config)
    named = load_config(RECIPE, ["--adapter.computation", "grouped_triton"])
    assert uses_triton(named)


@pytest.mark.distributed
def test_the_error_of_one_process_is_that_of_all() -> None:
    first, second = run_distributed("tests.training.device_workers:find_out", 2)
    assert first == second
    device, exact, memory, on_cpu = first
    assert exact.startswith("notes: ['fused Triton kernels are disabled") and "needs a C compiler" in exact
    assert device.startswith("ConfigError: model.dtype=bfloat16: Tesla T4 ")
    assert memory.startswith("ConfigError: by `malora plan` a process needs") and "Tesla T4 has 15 GiB" in memory
    assert on_cpu == "notes: []"
