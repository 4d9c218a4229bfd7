"""A tiny model with tasks, and runs on it whose adapters look trained: what conversions are tried on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters, adapter_state_dict
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.io.folder import AdapterInfo, open_adapter, save_adapter
from malora_dist.adapters.io.info import CONFIG, adapter_config
from malora_dist.checkpoint.layout import Manifest, shard_name
from malora_dist.checkpoint.shards import file_record, write_shard
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.config import load_config
from malora_dist.config.summary import adapter_spec
from malora_dist.convert.job import Job, convert
from malora_dist.convert.kinds import ConvertOptions
from malora_dist.files.durable import write_text
from malora_dist.models.load import load_base_model
from malora_dist.models.weights.fingerprint import base_fingerprint
from tests.e2e import RECIPE, make_folder

TARGETS = ["q_proj", "v_proj", "down_proj"]


def make_workspace(folder: Path) -> Path:
    """`model`, `data`, and the runs of `make_run` for each method, under absolute paths."""
    make_folder(folder)
    for method, changes in {
        "malora": {"r": 4, "shared_r": 6},
        "molora": {"r": 3, "normalize_gates": True, "scaling": "gate_norm"},
        "hydralora": {"r": 4, "use_rslora": True, "router_input": "h"},
        "lora": {"r": 4},
        "dora": {"r": 3, "use_rslora": True},
    }.items():
        experts = {} if method in ("lora", "dora") else {"num_experts": 4}
        make_run(folder, method, {"method": method, "lora_alpha": 6.0, **experts, **changes})
    return folder


def make_run(folder: Path, name: str, adapter: dict[str, Any]) -> Path:
    """runs/NAME with config.yaml and adapter/; no tensor is zero, and experts differ in size."""
    recipe = {**RECIPE, "adapter": {**adapter, "target_modules": TARGETS}, "output_dir": str(folder / "runs" / name)}
    recipe["model"] = {**RECIPE["model"], "name_or_path": str(folder / "model")}
    tasks = [
        {key: value if key == "name" else str(folder / value) for key, value in task.items()}
        for task in RECIPE["data"]["tasks"]
    ]
    recipe["data"] = {**RECIPE["data"], "tasks": tasks, "cache_dir": str(folder / "cache")}
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    config = load_config(run / "config.yaml")
    info = AdapterInfo(
        spec=adapter_spec(config), target_modules=tuple(TARGETS), base_model=str(folder / "model"), lora_dropout=0.1
    )
    model = base(folder)
    inject_adapters(model, info.spec, info.target_modules, lora_dropout=0.1)
    for number, (parameter_name, parameter) in enumerate(adapter_parameters(model)):
        generator = torch.Generator().manual_seed(number)
        if parameter_name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3, generator=generator)
        elif parameter_name.endswith(".gate"):
            nn.init.normal_(parameter, std=0.3, generator=generator)
        elif parameter_name.endswith(".magnitude"):
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(run / "adapter", info, adapter_state_dict(model), "# the card of the run\n")
    return run


def make_checkpoint(run: Path, step: int = 7) -> Path:
    """A checkpoint of the run's adapter, in one shard of each kind."""
    adapter = open_adapter(run / "adapter")
    tensors = {name: adapter.read(name) for name in adapter.shapes}
    moments = {f"{kind}.{name}": tensor.abs() for kind in ("exp_avg", "exp_avg_sq") for name, tensor in tensors.items()}
    store = CheckpointStore(run / "checkpoints")
    partial = store.begin(step)
    write_text(partial / CONFIG, json.dumps(adapter_config(adapter.info)))
    files, places = {CONFIG: file_record(partial / CONFIG)}, {}
    for kind, values in (("adapter", tensors), ("optimizer", moments), ("rng", {"0.torch": torch.arange(3)})):
        file = "rng.safetensors" if kind == "rng" else shard_name(kind, 1, 1)
        files[file] = write_shard(partial / file, values)
        places[kind] = dict.fromkeys(values, file)
    manifest = Manifest(
        malora_dist="0",
        torch="0",
        deepspeed="0",
        transformers="0",
        step=step,
        topology={"world_size": 2, "ep_size": 2, "zero_stage": 3},
        config=yaml.safe_load((run / "config.yaml").read_text()),
        base={
            "name": adapter.info.base_model,
            "revision": None,
            "fingerprint": base_fingerprint(Path(adapter.info.base_model)),
            "dtype": "float32",
        },
        state={},
        files=files,
        tensors=places,
    )
    return store.commit(step, manifest)


def base(folder: Path) -> Any:
    return load_base_model(folder / "model", dtype=torch.float32, load_in_4bit=False)


def run_kind(kind: str, source: Path, target: Path, **options: Any) -> list[str]:
    """Convert in this process; what it said."""
    said: list[str] = []
    convert(kind, (source,), target, ConvertOptions(**options), said.append)
    return said


def job_of(kind: str, source: Path, folder: Path, **options: Any) -> Job:
    return Job(kind=kind, sources=(source,), target=folder, folder=folder, options=ConvertOptions(**options))


@torch.no_grad()
def logits(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0].float() for row in rows])


def token_rows(count: int = 3, length: int = 30) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(40000, (length - number,), generator=generator) for number in range(count)]
