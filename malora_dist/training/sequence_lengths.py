"""Checks that samples are no longer than the positions that a base model was made for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from malora_dist.data.build import PreparedData
from malora_dist.errors import ConfigError
from malora_dist.models.config import read_model_config
from malora_dist.models.load import build_empty_model
from malora_dist.models.packed_attention import longest_row
from malora_dist.models.rotations import check_rotations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# By these names configurations count the positions of text.
LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
# OPT and its relatives leave the first two rows of their table unused.
ROWS_MORE = (0, 2)
TABLES = ("pos", "wpe")
# These have distances up to their limit alone, and no table.
FIXED_DISTANCES = ("mpt",)


def position_notes(data: PreparedData, folder: Path, *, samples: int = 1, trust_remote_code: bool = False) -> list[str]:
    """Return a note on each task with samples longer than the model of the folder was made for.

    samples: how many are trained in one row.

    Raises:
        ConfigError: the model looks positions up in a table, which has none for such samples, or its rotations would
            depend on earlier samples, or it does not take rows that are so long.
    """
    config: Any = read_model_config(folder, trust_remote_code=trust_remote_code)
    check_rotations(config, data.longest)
    _check_row(config, samples, max(int(data.train.lengths(task).max(initial=0)) for task in range(len(data.kinds))))
    text = config.get_text_config()
    key = next((name for name in LIMITS if isinstance(getattr(text, name, None), int)), None)
    if key is None:
        return []
    limit = getattr(text, key)
    notes = []
    for task in data.task_names:
        lengths = data.lengths(task)
        longer = int((lengths > limit).sum())
        if longer:
            notes.append(
                f"task {task}: {longer} of {len(lengths)} samples are longer than the {limit} tokens that the base was "
                f"made for (its {key}), the longest {lengths.max()}; data.max_seq_length cuts them"
            )
    if notes and _has_table(build_empty_model(folder, dtype=torch.float32, trust_remote_code=trust_remote_code), limit):
        raise ConfigError("\n  ".join([*notes, f"This base has no other positions: set data.max_seq_length={limit}"]))
    return notes


def _check_row(config: Any, samples: int, longest: int) -> None:
    """Raise ConfigError if `samples` samples of up to `longest` tokens may be more than a row can have."""
    most = longest_row(config)
    if most is not None and samples > 1 and samples * longest > most:
        raise ConfigError(
            f"train.per_device_train_batch_size={samples} must be at most {max(1, most // longest)} for this "
            f"{config.model_type}, or data.max_seq_length at most {most // samples}: a row of it takes {most} tokens, "
            f"and the longest training sample has {longest}; the global batch may stay as it is"
        )


def _has_table(model: "PreTrainedModel", limit: int) -> bool:
    if model.config.model_type in FIXED_DISTANCES:
        return True
    words, rows = model.get_input_embeddings(), [limit + more for more in ROWS_MORE]
    for name, module in model.named_modules():
        # XGLM and its relatives compute more rows where they need them.
        if module is words or hasattr(module, "make_weights"):
            continue
        tables = {f"{name}.{leaf}": buffer for leaf, buffer in module.named_buffers(recurse=False) if buffer.dim() > 1}
        if isinstance(module, nn.Embedding):
            tables[name] = module.weight
        if any(table.shape[0] in rows and _is_of_positions(each) for each, table in tables.items()):
            return True
    return False


def _is_of_positions(name: str) -> bool:
    return any(word in name.lower() for word in TABLES)
