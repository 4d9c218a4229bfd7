"""What real processes find out about reading a base model: in parts, and one reader for each node."""

import itertools
import json
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from malora_dist.config import load_config
from malora_dist.distributed.nodes import this_node
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.zero3 import check_partitioning, partition_at_once, partition_parts, resident_bytes
from malora_dist.models.load import base_tensors, build_empty_model, load_base_model
from malora_dist.models.weights.base_tensor import Weights
from malora_dist.models.weights.checkpoint import CheckpointWeights
from malora_dist.models.weights.prepared import PreparedWeights, prepared_folder, write_prepared
from malora_dist.models.weights.reader import INDEX
from malora_dist.models.weights.ties import untie
from malora_dist.training.base_model import base_model
from malora_dist.training.run_context import RunContext
from malora_dist.training.setup import engine_config
from malora_dist.training.watchdog import Watchdog
from tests.config.recipes import RECIPES
from tests.distributed.workers import CONFIG, DTYPES, highest_memory, make_large_model, same_bits, values
from tests.multiprocess import group_timeouts, run_distributed
from tests.tiny_models import save_tiny_llama

IDS = torch.tensor([[3, 60, 17, 0, 5, 5, 41, 8, 9, 33]])
NODE_TIMEOUT = 41
# Numbers of elements that two and four processes cannot share equally, and fewer elements than processes.
SHAPES = [(7, 11), (5,), (3,), (1,), (2, 1)]
OFFLOAD = {"offload_param": {"device": "cpu", "pin_memory": True}}
OFFLOADED = {**CONFIG, "zero_optimization": {**CONFIG["zero_optimization"], **OFFLOAD}}
TIED, OWN_HEAD = "tiny", "own_head"
CASES: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4, double": {"double_quant": True},
    "nf4, double, fp32": {"double_quant": True, "dtype": torch.float32},
    "as it is": {"load_in_4bit": False},
    "nf4, a head of its own": {"model": OWN_HEAD},
    "as it is, a head of its own": {"model": OWN_HEAD, "load_in_4bit": False},
}


@cache
def results(world_size: int) -> list[dict[str, Any]]:
    """What `find_out` returned on each rank. The large model is read by two."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "prepared")
        make_odd_model(folder / TIED)
        make_odd_model(folder / OWN_HEAD)
        give_own_head(folder / OWN_HEAD)
        for case in CASES.values():
            prepare(**model_and_options(folder, case))
        if world_size == 2:
            make_large_model(folder / "large")
            prepare(folder / "large")
        return run_distributed("tests.distributed.loading_workers:find_out", world_size, folder=str(folder))


def make_odd_model(folder: Path) -> None:
    """A Llama with biases, tied embeddings and sizes that divide badly, in two files."""
    sizes = {"vocab_size": 61, "hidden_size": 34, "intermediate_size": 51, "head_dim": 18}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True}
    save_tiny_llama(folder, **sizes, **heads, max_shard_size="40KB")


def give_own_head(folder: Path) -> None:
    """Store a head that is not the embedding, as a merge leaves it, though the configuration ties both."""
    index = json.loads((folder / INDEX).read_text())
    embedding = load_file(folder / index["weight_map"]["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    save_file({"lm_head.weight": embedding.flip(0).contiguous()}, folder / "head.safetensors", {"format": "pt"})
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def model_and_options(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    return {**case, "model": folder / case.get("model", TIED)}


def prepare(model: Path, **case: Any) -> Path:
    """The prepared base of a case, in `prepared` beside the model; only where it is to be quantised."""
    options = {"dtype": torch.bfloat16, "double_quant": False, **case}
    if options.pop("load_in_4bit", True):
        folder, identity = prepared_folder(model, cache_dir=model.parent, **options)
        empty, weights = build_empty_model(model, dtype=options["dtype"]), CheckpointWeights(model)
        untied = weights.untied_names(empty)
        untie(empty, untied)
        named = base_tensors(
            empty, weights.stored_names(empty), load_in_4bit=True, double_quant=options["double_quant"]
        )
        write_prepared(folder, identity, dict.fromkeys(named.values()), weights, untied=untied, file_bytes=2**24)
        return folder
    return model


def find_out(world: World, folder: str) -> dict[str, Any]:
    return {
        "parts": [
            same_parts(world, shape, dtype, config)
            for shape, dtype, config in itertools.product(SHAPES, DTYPES, (CONFIG, OFFLOADED))
        ],
        "models": {name: same_model(**model_and_options(Path(folder), case)) for name, case in CASES.items()},
        "engine": base_of_a_run(world, Path(folder, TIED), Path(folder), Path(folder, "empty")),
        "own head": base_of_a_run(world, Path(folder, OWN_HEAD), Path(folder, "empty too")),
        "nodes": nodes(world, Path(folder, "tiny")) if world.size == 4 else None,
        "large": large(world, Path(folder, "large")) if world.size == 2 else None,
    }


def same_parts(world: World, shape: tuple[int, ...], dtype: str, config: dict[str, Any]) -> bool:
    """DeepSpeed's own way to partition a tensor, and ours, which sees a part only."""
    whole = values(dtype, 3).flatten()[: torch.Size(shape).numel()].view(shape)
    theirs: Any = nn.Parameter(whole.clone(), requires_grad=False)
    import deepspeed

    deepspeed.zero.Init(module=nn.ParameterList([theirs]), config_dict_or_path=config)
    asked: list[tuple[int, int]] = []

    def read_part(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return whole.flatten()[start:stop]

    ours: Any = partition_parts(config)(shape, whole.dtype, read_part)
    names = ("ds_shape", "ds_numel", "ds_numel_aligned", "ds_status", "ds_persist", "ds_process_group", "requires_grad")
    alike = all(getattr(ours, name) == getattr(theirs, name) for name in (*names, "shape", "dtype", "device"))
    parts = (ours.ds_tensor, theirs.ds_tensor)
    names = ("shape", "dtype", "device", "ds_numel", "status", "final_location", "requires_grad")
    alike = alike and all(getattr(parts[0], name) == getattr(parts[1], name) for name in names)
    size = -(-whole.numel() // world.size)
    edges = tuple(min(edge * size, whole.numel()) for edge in (world.rank, world.rank + 1))
    with deepspeed.zero.GatheredParameters([ours]):
        gathered = ours.data.clone()
    return alike and asked == [edges] and same_bits(gathered, whole) and ours.numel() == 0


def same_model(model: Path, **case: Any) -> dict[str, bool]:
    """The model read in parts against the one that this process reads, quantises and keeps whole."""
    import deepspeed

    options = {"dtype": torch.bfloat16, "load_in_4bit": True, "double_quant": False, **case}
    folder, wanted = model, load_base_model(model, **options)
    prepared = prepare(folder, **case)
    weights: Weights = PreparedWeights(prepared) if options["load_in_4bit"] else CheckpointWeights(folder)
    found = load_base_model(folder, weights=weights, place_part=partition_parts(CONFIG), **options)
    check_partitioning(found, 3)
    parameters = dict(found.named_parameters(remove_duplicate=False))
    expected = dict(wanted.named_parameters(remove_duplicate=False))
    empty = all(parameter.numel() == 0 for parameter in parameters.values())
    with deepspeed.zero.GatheredParameters(list(found.parameters())), torch.no_grad():
        same = all(same_bits(parameters[name].data, expected[name].data) for name in expected)
        logits = torch.equal(found(IDS).logits, wanted(IDS).logits)
    return {
        "names": parameters.keys() == expected.keys(),
        "partitioned": empty,
        "same bits": same,
        "same logits": logits,
        "tied": (found.lm_head.weight is found.model.embed_tokens.weight) == (folder.name == TIED),
    }


def nodes(world: World, folder: Path) -> dict[str, Any]:
    """Two nodes of two processes whose readers have different values: each node keeps its own reader's."""
    found: dict[str, Any] = {}
    for name, assignment in {"blocks": "aabb", "turns": "abab"}.items():
        node = this_node(world, NODE_TIMEOUT, list(assignment))
        wanted = values("float32", node.reader_rank)
        parameter: Any = nn.Parameter(values("float32", world.rank), requires_grad=False)
        partition_at_once(CONFIG, node.share)([parameter])
        part = wanted.flatten()[20 * world.rank : 20 * (world.rank + 1)]
        found[name] = {"ranks": node.ranks, "own part": same_bits(parameter.ds_tensor[: part.numel()], part)}
    found["timeouts"] = sorted(set(group_timeouts()))
    found["alone"] = this_node(world, NODE_TIMEOUT).ranks
    found["model"] = model_read_by_nodes(world, folder)
    return found


def model_read_by_nodes(world: World, folder: Path) -> dict[str, Any]:
    """Readers have the files, the others a folder with the config alone."""
    import deepspeed

    node = this_node(world, NODE_TIMEOUT, list("aabb"))
    reads = world.rank == node.reader_rank
    wanted = load_base_model(folder)
    config_only = folder.parent / f"config-{world.rank}"
    config_only.mkdir()
    (config_only / "config.json").write_bytes((folder / "config.json").read_bytes())
    place = partition_at_once(CONFIG, node.share)
    model = load_base_model(folder if reads else config_only, reader=reads, place=place)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        pairs = zip(model.parameters(), wanted.parameters(), strict=True)
        return {"reads": reads, "same bits": all(same_bits(a.data, b.data) for a, b in pairs)}


def base_of_a_run(world: World, folder: Path, *cache_dirs: Path) -> dict[str, Any]:
    """The base as a run gets it, by ZeRO stage and cache: has it one process's bits, and what the run says of it."""
    import deepspeed

    log = logging.getLogger("malora_dist")
    log.setLevel(logging.INFO)
    log.addHandler(said := Remember())
    wanted = load_base_model(folder)
    found: dict[str, Any] = {}
    for stage, cache_dir in itertools.product((2, 3), cache_dirs):
        os.environ["MALORA_CACHE"] = str(cache_dir)
        options = {"model.name_or_path": folder, "model.dtype": "bfloat16", "parallel.zero_stage": stage}
        options["train.per_device_train_batch_size"] = 1
        config = load_config(RECIPES / "demo.yaml", [f"{key}={value}" for key, value in options.items()])
        context = RunContext(config, world, Watchdog(world.rank))
        model = base_model(context, folder, engine_config(config, world))
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            pairs = zip(model.parameters(), wanted.parameters(), strict=True)
            same = all(same_bits(a.data, b.data) for a, b in pairs)
        where = next(line for line in reversed(said.lines) if line.startswith("base model: "))
        found[f"{stage} {cache_dir.name}"] = {"same bits": same, "said": where}
    log.removeHandler(said)
    return found


class Remember(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def large(world: World, folder: Path) -> dict[str, Any]:
    """Bytes read from files, by our count and the kernel's, and growth of memory, for a prepared base under ZeRO-3."""
    place = partition_parts(CONFIG)
    prepared = prepare(folder)
    # The first load pays for imports and first uses.
    load_base_model(folder.parent / "tiny", weights=PreparedWeights(prepare(folder.parent / "tiny")), place_part=place)
    dist.barrier()
    before, read_before = psutil.Process().memory_info().rss, kernel_bytes_read()
    weights = PreparedWeights(prepared)
    model = load_base_model(folder, weights=weights, place_part=place)
    found = {
        "growth": highest_memory() - before,
        "kernel": kernel_bytes_read() - read_before,
        "read": weights.bytes_read,
        "part": resident_bytes(model)["base"],
        "whole": sum(file.stat().st_size for file in prepared.glob("*.safetensors")),
    }
    return {**found, "engine": base_of_a_run(world, folder, folder.parent)}


def kernel_bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])
