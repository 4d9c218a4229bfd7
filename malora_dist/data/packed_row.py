"""A row of tokens: sequences behind one another without padding, and some of the tokens to be predicted."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from malora_dist.data.mixture import Indices
from malora_dist.ops.devices import to_device


class Packing(Enum):
    """What may stand in one row of a model, so that each sequence gets what it gets alone. Each allows the last."""

    ALONE = 1  # one sequence
    SEQUENCES = 2  # several
    TREES = 3  # several, of which each may branch: choices behind one prompt


@dataclass(frozen=True, eq=False)
class PackedRow:
    """S sequences in one row of T tokens; N of the tokens are to be predicted."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) from 0 for each sequence
    target_index: Tensor  # (N,) place in the row whose logits predict a target
    targets: Tensor  # (N,) token ids
    token_sample: Tensor  # (T,) which sequence, 0..S-1, a token belongs to
    token_branch: Tensor | None  # (T,) in a tree: 0, which all of a sequence see, or a branch, which only it sees
    cu_seq_lens: Tensor  # (S+1,) int32, where each sequence begins, and T: what varlen attention kernels take
    max_length: int  # tokens of the longest sequence

    def to(self, device: torch.device | str) -> Self:
        """Return the same row with all tensors on a device; the host does not wait for the copies."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: to_device(v, device) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def cumulative_lengths(lengths: Sequence[int] | Indices) -> Tensor:
    """Return where each of S sequences of a row begins, and where the last one ends, (S+1,) int32."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
