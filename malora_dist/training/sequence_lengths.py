"""Checks that samples are no longer than the positions that a base model was made for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from malora_dist.data.build import PreparedData
from malora_dist.errors import ConfigError
from malora_dist.models.config import read_model_config
from malora_dist.models.load import build_empty_model
from malora_dist.models.rotations import check_rotations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# OPT and its relatives leave the first two rows of their table unused.
ROWS_MORE = (0, 2)


def position_notes(data: PreparedData, folder: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Return a note on each task with samples longer than the model of the folder was made for.

    Raises:
        ConfigError: the model looks positions up in a table, which has none for such samples, or its rotations would
            depend on earlier samples.
    """
    config: Any = read_model_config(folder, trust_remote_code=trust_remote_code)
    check_rotations(config, data.longest)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return []
    notes = []
    for task in data.task_names:
        lengths = data.lengths(task)
        longer = int((lengths > limit).sum())
        if longer:
            notes.append(
                f"task {task}: {longer} of {len(lengths)} samples are longer than the {limit} tokens that the base was "
                f"made for (its max_position_embeddings), the longest {lengths.max()}; data.max_seq_length cuts them"
            )
    if notes and _has_table(build_empty_model(folder, dtype=torch.float32, trust_remote_code=trust_remote_code), limit):
        raise ConfigError("\n  ".join([*notes, f"This base has no other positions: set data.max_seq_length={limit}"]))
    return notes


def _has_table(model: "PreTrainedModel", limit: int) -> bool:
    words = model.get_input_embeddings()
    rows = [limit + more for more in ROWS_MORE]
    learned = (
        m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words and m.num_embeddings in rows
    )
    fixed = (b for name, b in model.named_buffers() if "pos" in name.lower() and b.dim() > 1 and b.shape[0] in rows)
    return any(True for _ in learned) or any(True for _ in fixed)
