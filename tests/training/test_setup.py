"""From recipe to settings."""

from pathlib import Path

import numpy as np
import torch

from malora_dist.config import load_config
from malora_dist.data.build import PreparedData
from malora_dist.data.encode import Sample
from malora_dist.data.loader import TrainLoader
from malora_dist.data.mixture import mixture_shares
from malora_dist.data.store import TrainStore
from malora_dist.distributed.process_groups import World
from malora_dist.models.resolve import native_dtype
from malora_dist.training.setup import balance_settings, engine_config, optimizer_settings, unseen_tasks
from tests.config.recipes import RECIPES
from tests.reference import coefficient_reference

RECIPE = RECIPES / "demo.yaml"


def test_warm_up_is_rounded_up_to_whole_steps() -> None:
    config = load_config(RECIPE, ["--train.warmup_ratio", "0.07"])
    assert optimizer_settings(config, 101).warmup_steps == 8
    assert optimizer_settings(config, 101).total_steps == 101


def test_the_balance_losses_weight_follows_its_schedule() -> None:
    for schedule in ("constant", "linear", "until"):
        ratio = [] if schedule == "constant" else ["--adapter.router_aux_loss_ratio=0.07"]
        changes = [f"--adapter.router_aux_loss_schedule={schedule}", "--adapter.router_aux_loss_coef=0.2", *ratio]
        settings = balance_settings(load_config(RECIPE, changes), 101)
        assert schedule == "constant" or settings.last_step == 8
        for step in range(1, 102):
            wanted = coefficient_reference(schedule, 0.2, step, 8)
            assert abs(settings.coefficient_at(step) - wanted) < 1e-15


def test_a_task_that_the_run_never_draws_is_named() -> None:
    samples = [Sample(i, int(i >= 200), np.array([5, 2], np.int32), 1) for i in range(203)]
    sizes = (200, 3)
    shares = mixture_shares(sizes, weights=(1.0, 0.1))
    loader = TrainLoader(samples, task_sizes=sizes, shares=shares, global_batch_size=4, micro_batch_size=2)
    data = PreparedData(("large", "small"), ("completion",) * 2, TrainStore([]), sizes, shares, {}, {}, "", {})

    def notes(steps: int) -> list[str]:
        return unseen_tasks(load_config(RECIPE, ["--train.max_steps", str(steps)]), data, loader)

    (note,) = notes(50)
    assert note.startswith("task small: none of its 3 samples is drawn in the 50 steps of this run, its share of the")
    assert notes(200) == []


def test_engine_runs_in_fp32_and_keeps_the_plain_linear() -> None:
    """DeepSpeed's memory-efficient linear does not survive non-reentrant recomputation."""
    world = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    settings = engine_config(load_config(RECIPE), world)
    assert "bf16" not in settings and "fp16" not in settings
    assert settings["zero_optimization"]["memory_efficient_linear"] is False
    assert settings["zero_optimization"]["stage"] == 3


def test_native_dtype_follows_the_processor() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    assert native_dtype(torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
