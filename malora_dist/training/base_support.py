"""Checks of a base before its weights are read: by its configuration, tokenizer and files' headers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from malora_dist.adapters.target_names import ALL_LINEAR
from malora_dist.adapters.targets import all_linear, check_targets, plain_names
from malora_dist.config import AdapterConfig, RunConfig
from malora_dist.config.summary import adapter_spec
from malora_dist.errors import ConfigError
from malora_dist.evaluation.packing import check_rows
from malora_dist.models.attention import choose_attention
from malora_dist.models.buffers import rebuild_buffers
from malora_dist.models.config import own_code, read_model_config
from malora_dist.models.load import build_empty_model, load_tokenizer, names_of_parameters
from malora_dist.models.resolve import local_model
from malora_dist.models.vocabulary import check_vocabulary, embedding_rows
from malora_dist.models.weights.checkpoint import CheckpointWeights
from malora_dist.models.weights.prequantized import check_stored_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 5


@dataclass(frozen=True)
class BaseFacts:
    """Findings of `check_support`: sentences for the log, and tokens for which the model has no row (`vocabulary`)."""

    notes: tuple[str, ...] = ()
    spare_tokens: dict[int, str] = field(default_factory=dict)


def check_support(
    config: RunConfig,
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype = torch.bfloat16,
    *,
    trains: bool = True,
) -> BaseFacts:
    """Check a base against what is supported, its files and its tokenizer, without reading a weight.

    Args:
        config: the recipe.
        folder: of the model.
        tokenizer: that of the model.
        dtype: in which the base will compute.
        trains: False for an evaluation, which needs less.

    Raises:
        ConfigError: the family is not supported, weights are missing, cut short, of another size or stored in a format
            that is not read, or tokens are beyond the embedding.
    """
    model, unwritten, unknown = _empty_base(config, folder, dtype, trains)
    unread = _check_weights(model, folder, unwritten)
    spare = check_vocabulary(tokenizer, embedding_rows(model))
    return BaseFacts((*_notes(config, folder, spare, unread), *unknown), spare)


def check_local_support(config: RunConfig) -> tuple[str, ...]:
    """Check as `check_support` what of the model is on this machine, and download nothing; return notes."""
    settings = config.model
    trusted = settings.trust_remote_code
    folder = local_model(settings.name_or_path, settings.revision, trust_remote_code=trusted)
    if folder is None or not (folder / "config.json").is_file():
        waits = Path(settings.name_or_path).is_file()
        note = f"{settings.name_or_path} is not prepared yet: adapter.target_modules was not checked against it"
        return (note,) if waits else ()
    read_model_config(folder, trust_remote_code=trusted)
    if not any(folder.glob("*.safetensors*")):
        _empty_base(config, folder, torch.bfloat16, trains=True)
        return ()
    return check_support(config, folder, load_tokenizer(folder, trust_remote_code=trusted)).notes


def family_targets(name_or_path: str) -> tuple[str, ...] | None:
    """Return the default targets where a model has all of them, else all linears but the head; None if it is not local.

    Nothing is downloaded, no weight is read. Raises ConfigError for a model that is not supported.
    """
    folder = local_model(name_or_path)
    if folder is None or not (folder / "config.json").is_file():
        return None
    model = build_empty_model(folder, dtype=torch.float32)
    names = all_linear(model)
    default: tuple[str, ...] = AdapterConfig.model_fields["target_modules"].default
    if {name.rpartition(".")[2] for name in names}.issuperset(default):
        return default
    found = plain_names(model, {ALL_LINEAR: names})
    # Whole names would be one line for each layer.
    return found if all("." not in name for name in found) else (ALL_LINEAR,)


def _empty_base(
    config: RunConfig, folder: Path, dtype: torch.dtype, trains: bool
) -> tuple["PreTrainedModel", set[str], list[str]]:
    """Return the base without weights, the buffers that a checkpoint must hold, and what is not known of its targets.

    Raises ConfigError for what is not supported, and for targets of adapters that it does not have.
    """
    settings = config.model
    model = build_empty_model(folder, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    unknown: list[str] = []
    if trains:
        _check_trainable(model)
        unknown = check_targets(model, config.adapter.target_modules, adapter_spec(config))
        check_rows(model.config, config.train.per_device_train_batch_size, config.data.max_seq_length)
        if config.train.gradient_checkpointing and not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"train.gradient_checkpointing=true must be false for {type(model).__name__}, which has none"
            )
    check_stored_format(folder, load_in_4bit=settings.load_in_4bit, double_quant=settings.bnb_4bit_use_double_quant)
    if settings.attn_implementation == "sdpa":
        choose_attention("sdpa", model.config, dtype.itemsize, None, flash_attn=False)
    return model, rebuild_buffers(model), unknown


def _check_trainable(model: "PreTrainedModel") -> None:
    """Raise ConfigError for layers that are reversed in backward, which draw at random in training and must."""
    reversible = next((type(module).__name__ for module in model.modules() if hasattr(module, "backward_pass")), None)
    if reversible is not None:
        raise ConfigError(
            f"model.name_or_path: {type(model).__name__} cannot be trained on: its {reversible} draws at random in "
            "training, so its losses cannot be reproduced"
        )


def _check_weights(model: "PreTrainedModel", folder: Path, unwritten: set[str]) -> list[str]:
    """Raise ConfigError for tensors of the model that the folder's files do not hold, or not of the size it has.

    Reads the files' headers alone. Returns the names in them that the model does not read.
    """
    weights = CheckpointWeights(folder)
    stored = weights.stored_names(model)
    missing = [own[0] for own in names_of_parameters(model).values() if not any(name in stored for name in own)]
    missing += sorted(name for name in unwritten if name not in stored)
    if missing:
        raise ConfigError(
            f"{folder} holds no weight for {len(missing)} of the model's tensors: {', '.join(missing[:SHOWN])}"
            f"{', ...' if len(missing) > SHOWN else ''}: do config and weights belong together?"
        )
    if mistakes := weights.mistakes(model):
        more = f"\n  and {len(mistakes) - SHOWN} more like these" if len(mistakes) > SHOWN else ""
        raise ConfigError("\n  ".join(mistakes[:SHOWN]) + more)
    return weights.unread(model)


def _notes(config: RunConfig, folder: Path, spare: dict[int, str], unread: Sequence[str]) -> list[str]:
    notes = []
    if config.model.trust_remote_code and (code := own_code(folder)):
        notes.append(f"model.trust_remote_code=true: code of {folder} is run ({', '.join(code)})")
    if spare:
        shown = ", ".join(list(spare.values())[:SHOWN])
        notes.append(f"the model has no row for {shown}; task rows that spell one of them out are refused")
    if unread:
        shown = ", ".join(unread[:SHOWN]) + (", ..." if len(unread) > SHOWN else "")
        notes.append(f"{len(unread)} of the tensors in the model's files are not used by its config.json: {shown}")
    return notes
