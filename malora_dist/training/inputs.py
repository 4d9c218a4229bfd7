"""What a run reads before any weight: the folder and configuration of its base model, and the data of its tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from malora_dist.config import RunConfig
from malora_dist.data.build import PreparedData, build_data
from malora_dist.models.attention import attention_for
from malora_dist.models.config import read_model_config
from malora_dist.models.load import load_tokenizer
from malora_dist.models.resolve import resolve_model
from malora_dist.models.vocabulary import check_tokens
from malora_dist.training.base_support import check_support
from malora_dist.training.sequence_lengths import position_notes


@dataclass(frozen=True)
class Inputs:
    """The folder of the base model, and the data; with notes for the log on the base, and on the data."""

    folder: Path
    data: PreparedData
    notes: tuple[str, ...]
    data_notes: tuple[str, ...]


def open_inputs(
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device | None,
    poll: Callable[[], None] = lambda: None,
    *,
    trains: bool = True,
) -> Inputs:
    """Find and check the base model, and prepare the data; download, convert and tokenise what is not there yet.

    Args:
        config: the recipe.
        dtype: in which the base will compute.
        device: where it will; None if that is not known on this machine.
        poll: called often; what it raises ends the work.
        trains: False for an evaluation, which needs less.

    Raises:
        ConfigError: the base is not there, or not supported.
        DataError: a task's file or a row of it is wrong.
    """
    trusted = config.model.trust_remote_code
    folder = resolve_model(config.model.name_or_path, config.model.revision, trust_remote_code=trusted, poll=poll)
    model_config = read_model_config(folder, trust_remote_code=trusted)
    if device is not None:
        attention_for(config.model.attn_implementation, model_config, dtype, device)
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    base = check_support(config, folder, tokenizer, dtype, trains=trains)
    data = build_data(config.data, tokenizer, poll)
    check_tokens(data, base.spare_tokens)
    samples = config.train.per_device_train_batch_size if trains else 1
    lengths = position_notes(data, folder, samples=samples, trust_remote_code=trusted)
    return Inputs(folder, data, base.notes, tuple(lengths))
