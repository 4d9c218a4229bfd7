"""Folders that are not an adapter alone: runs, checkpoints, models, and those of DeepSpeed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from malora_dist.adapters.io.folder import open_adapter
from malora_dist.checkpoint.layout import CHECKPOINTS, MANIFEST, Manifest, step_of
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.cli.inspect.adapters import Facts, adapter_facts, routing_shares
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files import run_files
from malora_dist.files.json_text import parse_json
from malora_dist.files.tensor_file import TensorPlace, read_header
from malora_dist.models.weights.reader import weight_files

OF_DEEPSPEED = re.compile(
    r"global_step\d+|(bf16_)?zero_pp_rank_\d+_.*|mp_rank_\d+_model_states\.pt|layer_\d+_expert_.*"
)


def checkpoint_facts(folder: Path) -> Facts:
    """Return step, topology, versions, and the adapter; compares every file with its checksum."""
    facts: Facts = {"kind": "checkpoint", "damaged": []}
    try:
        facts |= _manifest_facts(Manifest.read(folder))
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        return facts | {"damaged": [str(error)]}
    for name in checkpoint.manifest.files:
        try:
            checkpoint.verify([name])
        except CheckpointError as error:
            facts["damaged"].append(str(error))
    if facts["damaged"]:
        return facts
    shares = routing_shares(folder.parent.parent / run_files.METRICS, checkpoint.manifest.step)
    try:
        return facts | adapter_facts(open_adapter(folder), shares)
    except CheckpointError as error:
        return facts | {"damaged": [str(error)]}


def _manifest_facts(manifest: Manifest) -> Facts:
    return {
        "step": manifest.step,
        "topology": manifest.topology,
        "versions": {name: getattr(manifest, name) for name in ("malora_dist", "torch", "deepspeed", "transformers")},
        "base": manifest.base,
        "files": len(manifest.files),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "tensors_by_kind": {kind: len(names) for kind, names in manifest.tensors.items()},
    }


def run_facts(folder: Path) -> Facts:
    """Return a run's checkpoints, how it ended, and its adapter: the exported one, else the newest checkpoint's."""
    facts: Facts = {"kind": "run", "damaged": [], "checkpoints": []}
    if (folder / CHECKPOINTS).is_dir():
        facts |= checkpoints_facts(folder / CHECKPOINTS) | {"kind": "run"}
    if (folder / run_files.EXIT).is_file():
        try:
            facts["exit"] = parse_json((folder / run_files.EXIT).read_bytes())
        except (OSError, ValueError) as error:
            facts["damaged"].append(f"{folder / 'exit.json'} cannot be read: {error}")
    try:
        adapter = open_adapter(folder)
        step = None if adapter.checkpoint is None else adapter.checkpoint.manifest.step
        found = adapter_facts(adapter, routing_shares(folder / run_files.METRICS, step))
    except CheckpointError as error:
        return facts | {"damaged": [*facts["damaged"], str(error)]}
    return facts | found | {"adapter": str(adapter.path), "damaged": facts["damaged"] + found["damaged"]}


def checkpoints_facts(folder: Path) -> Facts:
    """Return the steps of finished checkpoints, which is the newest and which the best; unfinished ones by name."""
    store = CheckpointStore(folder)
    latest, best = store.latest(), store.best()
    return {
        "kind": "folder of checkpoints",
        "damaged": [],
        "checkpoints": store.steps(),
        "latest": None if latest is None else latest.name,
        "best": None if best is None else best.name,
        "unfinished": sorted(path.name for path in folder.glob(".*.partial")),
    }


def model_facts(folder: Path) -> Facts:
    """Return architecture, dtypes and counts of a model folder, from config.json and the headers of its files."""
    facts: Facts = {"kind": "model", "damaged": []}
    try:
        config = parse_json((folder / "config.json").read_bytes())
        facts |= {name: config.get(name) for name in ("model_type", "architectures")}
        if config.get("quantization_config"):
            facts["quantization"] = config["quantization_config"].get("quant_method", "given")
    except (OSError, ValueError, AttributeError) as error:
        facts["damaged"].append(f"{folder / 'config.json'} cannot be read: {error}")
    merged = folder / "merged.json"
    if merged.is_file():
        facts |= {"kind": "model with a merged adapter", "merged": _json_or_none(merged)}
    places = _headers(folder, facts["damaged"])
    return facts | {
        "tensors": len(places),
        "parameters": sum(place.numel for place in places.values()),
        "dtypes": sorted({str(place.dtype).removeprefix("torch.") for place in places.values()}),
        "bytes": sum(place.numel * place.dtype.itemsize for place in places.values()),
    }


def _json_or_none(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _headers(folder: Path, damaged: list[str]) -> Mapping[str, TensorPlace]:
    """Read the tensors of all files; what is missing or damaged is added to `damaged`."""
    try:
        files = weight_files(folder)
    except ConfigError as error:
        damaged.append(str(error))
        return {}
    places: dict[str, TensorPlace] = {}
    others: dict[str, str] = {}
    for file in files.names:
        try:
            places |= read_header(folder / file, others)
        except (OSError, ValueError) as error:
            damaged.append(f"{folder / file} is missing or damaged: {error}")
    lacking = [
        name for name, file in files.file_of.items() if name not in places | others and (folder / file).is_file()
    ]
    if lacking and not damaged:
        damaged.append(f"{folder / str(files.index)} names {lacking[0]}, which no file holds")
    return places


def is_deepspeed(folder: Path) -> bool:
    """Return whether names in the folder are those DeepSpeed's save_checkpoint gives."""
    return any(OF_DEEPSPEED.fullmatch(path.name) for path in folder.iterdir())


def deepspeed_facts(folder: Path) -> Facts:
    """Return what file names and sizes show of DeepSpeed's own checkpoints; no pickle is opened."""
    tags = sorted(path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"global_step\d+", path.name))
    files = [path for place in (tags or [folder]) for path in place.iterdir() if path.suffix == ".pt"]
    experts = [path for path in files if "_expert_" in path.name or path.name.startswith("expp_rank_")]
    return {
        "kind": "checkpoint of DeepSpeed",
        "damaged": [],
        "tags": [path.name for path in tags],
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "expert_files": len(experts),
        "zero_stage_3": any(
            re.match(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states", path.name) for path in files
        ),
    }


def is_run(folder: Path) -> bool:
    """Return whether this is the output folder of a run."""
    parts = (run_files.CHECKPOINTS, run_files.ADAPTER, run_files.METRICS)
    return (folder / run_files.CONFIG).is_file() and any((folder / part).exists() for part in parts)


def is_checkpoint(folder: Path) -> bool:
    """Return whether this is a checkpoint, by its manifest or its name."""
    return (folder / MANIFEST).is_file() or step_of(folder.name) is not None


def holds_checkpoints(folder: Path) -> bool:
    """Return whether a folder in it has the name of a checkpoint."""
    return any(step_of(path.name) is not None for path in folder.iterdir())
