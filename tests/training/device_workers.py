"""Two processes of which one has a GPU that cannot do what the recipe asks; neither GPU is there."""

from dataclasses import replace
from typing import Any

import torch

from malora_dist.config import load_config
from malora_dist.distributed.process_groups import World
from malora_dist.errors import MaloraError
from malora_dist.plan import Lengths
from malora_dist.training import device_check
from malora_dist.training.device_check import check_device, check_memory
from malora_dist.training.gpu import Gpu
from tests.config.recipes import RECIPES

RECIPE = RECIPES / "llama2-7b-inter.yaml"
MODEL = RECIPES / "models" / "llama2-7b.json"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
GPUS = [
    Gpu("NVIDIA H100 80GB HBM3", (9, 0), True, 79 << 30, 78 << 30, ARCHITECTURES),
    Gpu("Tesla T4", (7, 5), False, 15 << 30, 14 << 30, ARCHITECTURES),
]


def find_out(world: World) -> list[str]:
    """What each check of a recipe in bfloat16 says on this process, as text."""
    mine = GPUS[world.rank]
    device_check.Gpu = lambda: None  # type: ignore[assignment, misc]
    device_check.Gpu.of = lambda _: mine  # type: ignore[method-assign]
    device_check.missing_for_triton = lambda _: "a C compiler"  # type: ignore[assignment]
    world = replace(world, device=torch.device("cuda", world.rank))
    whole = ["--model.load_in_4bit", "false", "--parallel.zero_stage", "0"]
    config = load_config(RECIPE, ["--model.dtype", "bfloat16", *whole])
    exact = load_config(RECIPE, ["--model.dtype", "float32"])
    return [
        _said(lambda: check_device(config, world)),
        _said(lambda: check_device(exact, world)),
        _said(lambda: check_memory(config, MODEL, world, Lengths(1024, 512))),
        _said(lambda: check_memory(config, MODEL, replace(world, device=torch.device("cpu")), Lengths(256, 128))),
    ]


def _said(work: Any) -> str:
    try:
        return f"notes: {work()}"
    except MaloraError as error:
        return f"{type(error).__name__}: {error}"
