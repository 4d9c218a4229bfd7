"""What two real processes find out about groups and partitioned parameters, all in one launch."""

import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from malora_dist.adapters.adapted_layers import adapter_parameters, adapter_state_dict
from malora_dist.distributed.process_groups import (
    World,
    broadcast_object,
    gather_lists,
    max_over_processes,
    replicate,
    set_timeouts,
    sum_over_processes,
    wait_for_all,
)
from malora_dist.distributed.zero3 import check_partitioning, gathered_adapter_state, partition_at_once, resident_bytes
from malora_dist.errors import TopologyError
from malora_dist.models.load import build_empty_model, load_base_model
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.nf4_layout import nf4_bytes
from malora_dist.training.deepspeed_engine import build_engine
from tests.multiprocess import group_timeouts, run_distributed
from tests.training.workers import build_model, make_model

DTYPES = ["uint8", "bfloat16", "float32"]
TIMEOUT, OTHER_TIMEOUT = 5, 17
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "steps_per_print": 10**9,
    "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 0},
}


@cache
def results() -> list[dict[str, Any]]:
    """What `find_out` returned on rank 0 and on rank 1."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "tiny"))
        make_large_model(Path(folder, "large"))
        return run_distributed("tests.distributed.workers:find_out", 2, folder=folder)


def make_large_model(folder: Path) -> None:
    """A Llama whose 63 million weights are 125 MB in bfloat16 and 35 MB in 4 bits; the largest is 3 MB in bfloat16."""
    sizes = {"vocab_size": 512, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2)
    config.save_pretrained(folder)
    names = dict(build_empty_model(folder, dtype=torch.bfloat16).named_parameters())
    save_file(
        {name: torch.randn(p.shape).to(torch.bfloat16) for name, p in names.items()}, folder / "model.safetensors"
    )


def find_out(world: World, folder: str) -> dict[str, Any]:
    return {
        "memory": memory_of_loading(world, folder),
        "collectives": collectives(world),
        "replicated": [replicated(world, dtype) for dtype in DTYPES],
        "partitioned": [partitioned(world, dtype) for dtype in DTYPES],
        "refusals": refusals(world, f"{folder}/tiny"),
        **engine_of_adapters(world, f"{folder}/tiny"),
        "absent": absent_rank(world, Path(folder, "gave-up")),
    }


def memory_of_loading(world: World, folder: str) -> dict[str, int]:
    """Bytes by which this process's memory grew at its highest while it loaded the large model, ZeRO-3 and 4-bit."""
    place = partition_at_once(CONFIG)
    # Imports and first uses of kernels count too: the tiny model pays for them.
    load_base_model(Path(folder, "tiny"), reader=world.is_main, place=place)
    before = psutil.Process().memory_info().rss
    model = load_base_model(Path(folder, "large"), reader=world.is_main, place=place)
    growth = highest_memory() - before
    packed = sum(nf4_bytes(m.in_features * m.out_features) for m in model.modules() if isinstance(m, NF4Linear))
    return {"growth": growth, "part": resident_bytes(model)["base"], "whole": packed}


def highest_memory() -> int:
    """Most bytes this process held so far. `ru_maxrss` would count those of the process that started it."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def collectives(world: World) -> list[Any]:
    own = torch.tensor([world.rank + 1.0, -world.rank])
    return [
        sum_over_processes(own.clone()).tolist(),
        max_over_processes(own.clone()).tolist(),
        broadcast_object({"rank": world.rank}),
        gather_lists([world.rank] * (2 * world.rank + 1)),
    ]


def values(dtype: str, seed: int) -> Tensor:
    """(7, 11): an odd number of elements, which two processes cannot share equally. Any bit pattern of the dtype."""
    bits = torch.randint(256, (7, 11, getattr(torch, dtype).itemsize), generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.uint8).flatten(1).view(getattr(torch, dtype))


def same_bits(a: Tensor, b: Tensor) -> bool:
    a_bytes, b_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a_bytes, b_bytes)


def replicated(world: World, dtype: str) -> bool:
    """As it is, transposed, and a single number."""
    orders: list[Callable[[Tensor], Tensor]] = [torch.clone, lambda t: t.repeat(2, 1).T, lambda t: t.flatten()[0]]
    parameters = [nn.Parameter(order(values(dtype, world.rank)), requires_grad=False) for order in orders]
    replicate(parameters)
    return all(same_bits(p.data, order(values(dtype, 0))) for p, order in zip(parameters, orders, strict=True))


def partitioned(world: World, dtype: str) -> dict[str, Any]:
    import deepspeed

    parameter = nn.Parameter(values(dtype, world.rank), requires_grad=False)
    partition_at_once(CONFIG)([parameter])
    held, part = parameter.numel(), parameter.ds_tensor.numel()
    with deepspeed.zero.GatheredParameters([parameter]):
        same = same_bits(parameter.data, values(dtype, 0))
    return {"held": held, "part": part, "of": parameter.ds_numel, "same_as_main": same, "after": parameter.numel()}


def message_of(work: Callable[[], object]) -> str:
    try:
        work()
    except TopologyError as error:
        return str(error)
    return ""


def refusals(world: World, folder: str) -> dict[str, str]:
    whole, parts = nn.Linear(3, 5), nn.Linear(3, 5)
    partition_at_once(CONFIG)(list(parts.parameters()))
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    model = build_model(folder, {"zero_stage": 3, "whole_adapters": True}, world, CONFIG)
    astray = dict(adapter_parameters(model))["model.layers.1.mlp.up_proj.P"]
    astray.ds_zero_partition_process_group = alone
    return {
        "whole at 2": message_of(lambda: check_partitioning(whole, 2)),
        "parts at 3": message_of(lambda: check_partitioning(parts, 3)),
        "whole at 3": message_of(lambda: check_partitioning(whole, 3)),
        "parts at 2": message_of(lambda: check_partitioning(parts, 2)),
        "sub-group": message_of(lambda: build_engine(model, CONFIG, None, zero_stage=3, timeout_seconds=60)),
    }


def engine_of_adapters(world: World, folder: str) -> dict[str, Any]:
    """An engine's groups' timeouts, and whether its adapters come out as they were put in."""
    model = build_model(folder, {"zero_stage": 3, "whole_adapters": True}, world, CONFIG)
    for _, parameter in adapter_parameters(model):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    wanted = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    dist.new_group([0, 1])
    before = group_timeouts()
    engine = build_engine(model, CONFIG, None, zero_stage=3, timeout_seconds=OTHER_TIMEOUT)
    empty = all(parameter.numel() == 0 for _, parameter in adapter_parameters(engine.module))
    state = dict(gathered_adapter_state(engine.module))
    return {
        "timeouts": {"before": before, "after": group_timeouts()},
        "adapters": {
            "partitioned": empty,
            "names": list(state) == list(wanted),
            "same": all(same_bits(state[name], tensor) for name, tensor in wanted.items()),
        },
    }


def absent_rank(world: World, gave_up: Path) -> dict[str, Any]:
    """Rank 0 asks for a sum in a group of its own with rank 1, which stays alive and never joins."""
    group = dist.new_group([0, 1])
    set_timeouts(TIMEOUT)
    started, error = time.monotonic(), ""
    if world.is_main:
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as caught:
            error = str(caught)
        gave_up.touch()
    while not gave_up.exists() and time.monotonic() < started + 60:
        time.sleep(0.1)
    seconds = time.monotonic() - started
    set_timeouts(60)
    wait_for_all()
    return {"seconds": seconds, "error": error}
