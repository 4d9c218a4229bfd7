"""A one-expert adapter added into its base's weights: a model folder like any other."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.io.folder import AdapterTensors, open_adapter
from malora_dist.adapters.loading import put_adapter
from malora_dist.adapters.merge import merged_weight
from malora_dist.console.progress import tracked
from malora_dist.convert.job import Job, check_base
from malora_dist.convert.verify import logits_of, text_rows
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files.atomic import share_file
from malora_dist.files.durable import write_text
from malora_dist.files.json_text import parse_json
from malora_dist.files.tensor_file import read_header, write_tensors
from malora_dist.models.linears import is_conv1d
from malora_dist.models.load import build_empty_model
from malora_dist.models.weights.checkpoint import CheckpointWeights
from malora_dist.models.weights.reader import TensorReader, readable, weight_files
from malora_dist.models.weights.stored_names import stored_names
from malora_dist.models.weights.ties import untie

# What stands beside the weights in a model folder: config, tokenizer, templates, terms.
COPIED = re.compile(
    r"(?!adapter_config)[^.][^/]*\.(json|txt|model|jinja|tiktoken|spm|bpe)|(LICENSE|NOTICE|USE_POLICY)[^/]*"
)
TEMPLATES = "additional_chat_templates"


def to_merged(job: Job) -> None:
    """Write the base with W' = W + s B A (dora: its rows scaled to their magnitudes) in place of adapted weights.

    Reads and writes file by file, one tensor in memory; sums in float32, results in the dtype the base is stored in.
    Raises CheckpointError for a routed mixture, and for an adapter of another base.
    """
    adapter = _one_expert(job)
    base = job.base_folder(adapter.info)
    reader = TensorReader(base)
    model = build_empty_model(base, dtype=torch.float32, trust_remote_code=job.trusted)
    # As the loader does: what the configuration ties and the files hold apart is apart.
    untie(model, CheckpointWeights(base).untied_names(model))
    layers = _stored_layers(model, adapter, base, reader)
    transposed = {layer for layer in adapter.layers() if is_conv1d(model.get_submodule(layer))}
    _check_base(adapter, base, reader, layers, transposed)
    # Before all the work: it may find that the tokenizer and the base do not belong together.
    rows = text_rows(job, adapter.info) if job.options.verify else None
    merge = _Merge(adapter, reader, layers, transposed)
    files = weight_files(base)
    for file in files.names:
        if Path(file).name != file:
            raise ConfigError(f"{base / str(files.index)} names {file!r}, which is no file of its folder")
        merge.write_file(base / file, job.folder / file)
    _copy_others(base, job.folder, files.index, code=job.trusted)
    write_text(job.folder / "README.md", _card(adapter, job))
    write_text(job.folder / "merged.json", json.dumps(_origin(adapter), indent=2) + "\n")
    job.log(merge.summary())
    recipe = job.recipe()
    if recipe is not None and recipe.model.load_in_4bit:
        job.log(
            "note: it was trained on this base in 4 bits and is merged into its full weights, a slightly other model"
        )
    if rows is not None:
        _verify(job, adapter, merge, rows)


def _one_expert(job: Job) -> AdapterTensors:
    adapter = open_adapter(job.source)
    if adapter.info.spec.structure.routed:
        raise CheckpointError(
            f"{job.source} is a {adapter.info.spec.method} adapter: its gate weighs the experts anew for every token, "
            "so no one weight is equal to it. --to peft-tasks makes a static LoRA of it for each task"
        )
    return job.open_adapter()


def _stored_layers(model: Any, adapter: AdapterTensors, base: Path, reader: TensorReader) -> dict[str, str]:
    """Return the adapted layers by the names of their weights in the base's files.

    Raises ConfigError for a layer that the files hold as a part of another weight.
    """
    stored, modules = stored_names(model, reader.names()), dict(model.named_modules())
    layers = {}
    for layer in adapter.layers():
        if layer not in modules:
            raise CheckpointError(f"{base}: this base has no {layer}, which the adapter is for")
        others = [name for name, module in modules.items() if _is_tied(module, modules[layer])]
        if others:
            raise CheckpointError(f"{layer} of this base is tied to {others[0]}, which a merge would change too")
        place = stored.get(f"{layer}.weight")
        if place is not None and place.conversion is not None:
            raise ConfigError(f"{base} holds {layer}.weight as a part of {', '.join(place.names)}: not merged")
        layers[f"{layer}.weight" if place is None else place.names[0]] = layer
    return layers


def _is_tied(module: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules share one weight."""
    weights = module._parameters.get("weight"), other._parameters.get("weight")
    return module is not other and weights[0] is not None and weights[0] is weights[1]


def _check_base(
    adapter: AdapterTensors, base: Path, reader: TensorReader, layers: dict[str, str], transposed: set[str]
) -> None:
    """Raise CheckpointError unless the folder is the adapter's base, ConfigError if its weights cannot be added to."""
    with readable(base / "config.json"):
        config: dict[str, Any] = parse_json((base / "config.json").read_bytes(), lenient=True)
    if config.get("quantization_config"):
        raise ConfigError(f"{base} holds quantised weights; give the unquantised model with --base")
    check_base(adapter.checkpoint, base)
    for name, layer in layers.items():
        place = reader.place([name])
        shape = (adapter.shapes[f"{layer}.B"][1], adapter.shapes[f"{layer}.A"][2])
        shape = shape[::-1] if layer in transposed else shape
        if place.shape != shape or not place.dtype.is_floating_point:
            raise CheckpointError(
                f"{base}: {layer}.weight is {place.dtype} of shape {place.shape}, the adapter needs numbers of {shape}"
            )


class _Merge:
    """Writes files of the base anew, and sums up what the adapter changes and what rounding takes of it."""

    def __init__(
        self, adapter: AdapterTensors, reader: TensorReader, layers: dict[str, str], transposed: set[str]
    ) -> None:
        """Keep what the merge reads. `transposed` are the layers with (I, O) weights, as in transformers' Conv1D."""
        self.adapter, self.reader, self.layers, self.transposed = adapter, reader, layers, transposed
        self.dtypes: set[torch.dtype] = set()
        self.change = self.loss = 0.0

    def write_file(self, source: Path, target: Path) -> None:
        with readable(source):
            header = read_header(source)
        write_tensors(
            target, {name: (place.dtype, place.shape) for name, place in header.items()}, self._values(header)
        )
        share_file(target)

    def _values(self, names: Any) -> Iterator[Tensor]:
        for name in tracked("merging, tensors", names):
            value = self.reader.read([name])
            layer = self.layers.get(name)
            if layer is None:
                yield value
            elif layer in self.transposed:
                yield self._merged(value.T, layer).T
            else:
                yield self._merged(value, layer)

    def _merged(self, weight_OI: Tensor, layer: str) -> Tensor:
        exact_OI = merged_weight(
            weight_OI, self.adapter.read_layer(layer), self.adapter.info.spec.of_layer(layer).scaling
        )
        stored_OI = exact_OI.to(weight_OI.dtype)
        if not torch.isfinite(stored_OI).all():
            raise CheckpointError(f"{layer}.weight with the adapter is not finite in {weight_OI.dtype}")
        self.dtypes.add(weight_OI.dtype)
        self.change += float((exact_OI - weight_OI).square().sum(dtype=torch.float64))
        self.loss += float((stored_OI - exact_OI).square().sum(dtype=torch.float64))
        return stored_OI

    @property
    def epsilon(self) -> float:
        return max(torch.finfo(dtype).eps for dtype in self.dtypes)

    def summary(self) -> str:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
        lost = (self.loss / self.change) ** 0.5 if self.change else 0.0
        return f"merged {len(self.layers)} weights in {names}; rounding to it is {lost:.1e} of what the adapter changes"


def _copy_others(base: Path, folder: Path, index: str | None, *, code: bool) -> None:
    """Copy the files beside the weights; Python files only if the recipe allows their code, only the index in use."""
    if index is not None:
        shutil.copyfile(base / index, folder / index)
    for path in sorted(base.iterdir()):
        is_index = path.name.endswith(".index.json")
        wanted = (COPIED.fullmatch(path.name) and not is_index) or (code and path.suffix == ".py")
        if path.is_file() and wanted and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
            share_file(folder / path.name)
    if (base / TEMPLATES).is_dir():
        shutil.copytree(base / TEMPLATES, folder / TEMPLATES)


def _origin(adapter: AdapterTensors) -> dict[str, Any]:
    """Return what `malora inspect` prints about the folder."""
    spec, info = adapter.info.spec, adapter.info
    return {"base_model": info.base_model, "method": spec.method, "r": spec.r, "target_modules": [*info.target_modules]}


def _card(adapter: AdapterTensors, job: Job) -> str:
    info, tasks = adapter.info, job.task_names()
    trained = f", trained on {', '.join(tasks)}," if tasks else ""
    return (
        f"---\nbase_model: {info.base_model}\nlibrary_name: transformers\n---\n\n# {info.base_model}, tuned\n\n"
        f"A {info.spec.method} adapter of rank {info.spec.r} on {', '.join(info.target_modules)}{trained} merged into "
        "the base's weights.\n"
    )


def _verify(job: Job, adapter: AdapterTensors, merge: _Merge, rows: Sequence[Tensor]) -> None:
    """Compare the logits of the base with the adapter and of the merged folder, both computed in float32.

    They may differ by 1e-4 of the largest logit, and by 8 eps of the dtype the weights were rounded to where that is
    more. Raises CheckpointError beyond it.
    """
    model = job.load_base(adapter.info)
    put_adapter(model, adapter)
    wanted = torch.cat(logits_of(model, rows))
    del model
    found = torch.cat(logits_of(job.load_model(job.folder), rows))
    apart, limit = (found - wanted).abs().max().item(), max(1e-4, 8 * merge.epsilon) * wanted.abs().max().item()
    text = f"max |d logits| {apart:.1e} (tolerance {limit:.1e})"
    if not apart <= limit:
        raise CheckpointError(f"verification failed, {job.target} is not written: {text}")
    job.log(f"verified {text}")
