"""`malora prepare RECIPE [--section.key value ...]`: do in advance what a run would fetch and compute at its start.

One process without GPU, launcher or DeepSpeed, on a machine that has the network: the model is downloaded or converted,
the tasks are tokenised, and the base is quantised. Runs of the recipe find all three, with or without network.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from malora_dist.config import RunConfig, load_config, split_arguments
from malora_dist.console.progress import Bar
from malora_dist.data.build import build_data
from malora_dist.models.config import read_model_config
from malora_dist.models.load import base_tensors, build_empty_model, load_tokenizer
from malora_dist.models.resolve import resolve_model
from malora_dist.models.vocabulary import check_tokens
from malora_dist.models.weights.checkpoint import CheckpointWeights
from malora_dist.models.weights.prepared import prepared_folder, write_prepared
from malora_dist.models.weights.ties import untie
from malora_dist.training.base_support import check_support
from malora_dist.training.sequence_lengths import position_notes


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare what the recipe names; return the exit code 0. Raises ConfigError or DataError for a mistake in it."""
    recipe, overrides = split_arguments(sys.argv[1:] if arguments is None else arguments)
    config = load_config(recipe, overrides)
    console = Console()

    def log(line: str, style: str = "") -> None:
        console.print(Text(line, style=style), soft_wrap=True, highlight=False)

    trusted = config.model.trust_remote_code
    folder = resolve_model(config.model.name_or_path, config.model.revision, trust_remote_code=trusted)
    log(f"model: {folder}")
    read_model_config(folder, trust_remote_code=trusted)
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    base = check_support(config, folder, tokenizer, prepared_dtype(config))
    for note in base.notes:
        log(f"note: {note}", style="yellow")
    data = build_data(config.data, tokenizer)
    check_tokens(data, base.spare_tokens)
    sizes = ", ".join(f"{name} {size}" for name, size in zip(data.task_names, data.train_sizes, strict=True))
    log(f"training samples, tokenised: {sizes}")
    samples = config.train.per_device_train_batch_size
    lengths = position_notes(data, folder, samples=samples, trust_remote_code=trusted)
    for warning in [*data.warnings(), *lengths]:
        log(f"note: {warning}", style="yellow")
    if not config.model.load_in_4bit:
        log("base: model.load_in_4bit=false, so runs read it as it is")
        return 0
    dtype = prepared_dtype(config)
    prepared, written = prepare_base(config, folder, dtype)
    size = sum(file.stat().st_size for file in prepared.iterdir()) / 2**30
    log(f"base: {prepared} ({size:.2f} GiB, {'written' if written else 'was there'})")
    if config.model.dtype == "auto":
        log(
            "note: model.dtype=auto was taken as bfloat16; where runs say that they compute in float32, prepare with "
            "--model.dtype float32",
            style="yellow",
        )
    return 0


def prepared_dtype(config: RunConfig) -> torch.dtype:
    """Return model.dtype; `auto` is bfloat16, as on GPUs, since this machine is not the one that will compute."""
    return torch.float32 if config.model.dtype == "float32" else torch.bfloat16


def prepare_base(config: RunConfig, folder: Path, dtype: torch.dtype) -> tuple[Path, bool]:
    """Quantise the base, unless that was done before.

    Args:
        config: the recipe.
        folder: of the model.
        dtype: in which runs will compute.

    Returns:
        The folder of the prepared 4-bit base, and whether it was written now.

    Raises:
        ConfigError: the model's weights are damaged, or stored in a format that is not read.
    """
    double_quant, trusted = config.model.bnb_4bit_use_double_quant, config.model.trust_remote_code
    model, weights = build_empty_model(folder, dtype=dtype, trust_remote_code=trusted), CheckpointWeights(folder)
    untied = weights.untied_names(model)
    untie(model, untied)
    named = base_tensors(model, weights.stored_names(model), load_in_4bit=True, double_quant=double_quant)
    tensors = dict.fromkeys(named.values())
    prepared, identity = prepared_folder(folder, dtype=dtype, double_quant=double_quant)
    with Bar("quantising the base", len(tensors)) as bar:
        written = write_prepared(prepared, identity, tensors, weights, untied=untied, advance=bar.advance)
    return prepared, written
