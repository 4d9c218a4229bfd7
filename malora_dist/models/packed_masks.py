"""Masks of packed rows, made where transformers makes its masks, so that windows and chunks stay the model's own.

Every model of transformers asks a function, by the name of its attention, for the mask of each kind of its layers, and
says by a rule of places what a token may see: all before it, a window, a chunk. Inside `packed_row` the functions of
this file answer: the rule, applied to positions instead of places in the row, and within a token's own sample.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

# Which keys a query sees, (batch, head, query, key) as integer tensors that broadcast -> bool.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# (T,T) of what is seen, and the dtype of scores -> a mask as an attention takes it
Form = Callable[[Tensor, torch.dtype], Tensor]


class Row(Protocol):
    """What attention must know of a packed row; `data.packed_row.PackedRow` is one.

    position_ids: (1, T), within each sample.
    token_sample: (T,), the sample of each token.
    token_branch: (T,), 0 for what all branches see; None where there are none.
    cu_seq_lens: (S + 1,), where samples begin and the last ends.
    max_length: of the longest sample.
    """

    @property
    def position_ids(self) -> Tensor: ...

    @property
    def token_sample(self) -> Tensor: ...

    @property
    def token_branch(self) -> Tensor | None: ...

    @property
    def cu_seq_lens(self) -> Tensor: ...

    @property
    def max_length(self) -> int: ...


# Mask functions get no row as an argument; this is set for the length of one forward.
_ROW: ContextVar[Row | None] = ContextVar("row", default=None)


@contextmanager
def packed_row(row: Row) -> Iterator[None]:
    """Make masks for this row within the block."""
    register_masks()
    token = _ROW.set(row)
    try:
        yield
    finally:
        _ROW.reset(token)


@dataclass(frozen=True)
class Window:
    """In place of a mask, for kernels that take none: a token sees so many, itself among them."""

    tokens: int


def register_masks(*without: str) -> None:
    """Register the functions of this file for transformers' masks; outside `packed_row` they call its own.

    Args:
        without: names of attentions that take no masks.
    """
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    AttentionMaskInterface.register("sdpa", partial(row_mask, sdpa_mask, as_aligned_numbers))
    AttentionMaskInterface.register("eager", partial(row_mask, eager_mask, as_numbers))
    for name in without:
        AttentionMaskInterface.register(name, row_window)


def row_window(*, local_size: int | None = None, **_: Any) -> Window | None:
    """Return the window that a model asks a mask for, if it has one that limits a token of the row."""
    row = _ROW.get()
    if local_size is None or (row is not None and row.max_length <= local_size):
        return None
    return Window(local_size)


def row_mask(
    otherwise: Callable[..., Any],
    form: Form,
    *,
    q_length: int,
    kv_length: int,
    mask_function: Rule,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> Any:
    """Return the mask that a model asks for, (1, 1, T, T), or None where causality alone says it.

    `otherwise` is transformers' own function. It also answers for what is not the row, and for rules of other things
    than places (`use_vmap`), as models of pictures have.
    """
    row = _ROW.get()
    if row is None or use_vmap or (q_length, kv_length) != (row.position_ids.shape[1],) * 2:
        options = {"local_size": local_size, "allow_is_causal_skip": allow_is_causal_skip, "use_vmap": use_vmap}
        lengths = {"q_length": q_length, "kv_length": kv_length}
        return otherwise(mask_function=mask_function, dtype=dtype, **lengths, **options, **others)
    if form is not as_numbers and allow_is_causal_skip and _is_plain(row, mask_function, local_size):
        return None
    return form(seen_in_row(row, mask_function), dtype)[None, None]


def _is_plain(row: Row, rule: Rule, local_size: int | None) -> bool:
    """Return whether each token of the row sees all before it. A window that reaches over the sample limits nothing."""
    from transformers.masking_utils import causal_mask_function

    if row.token_branch is not None or len(row.cu_seq_lens) > 2:
        return False
    return rule is causal_mask_function if local_size is None else row.max_length <= local_size


def seen_in_row(row: Row, rule: Rule) -> Tensor:
    """Return which token (its line) sees which, (T, T) bool: by the rule of positions, in its sample and branch."""
    position_T, sample_T, branch_T = row.position_ids[0], row.token_sample, row.token_branch
    first = position_T.new_zeros(1, 1, 1, 1)
    seen = rule(first, first, position_T[None, None, :, None], position_T[None, None, None, :])
    seen = seen[0, 0] & (sample_T[:, None] == sample_T)
    if branch_T is not None:
        seen &= (branch_T == 0) | (branch_T[:, None] == branch_T)
    return seen


def as_numbers(seen_TT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what eager attention adds to scores: 0, or the least number, as transformers has it."""
    return torch.zeros_like(seen_TT, dtype=dtype).masked_fill_(~seen_TT, torch.finfo(dtype).min)


def as_aligned_numbers(seen_TT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what SDPA adds to scores: 0, or -inf.

    Kernels that convert or copy masks would do it in every layer: so it has the dtype of the scores, and rows that
    begin at multiples of 16 numbers.
    """
    T = len(seen_TT)
    mask = torch.zeros(T, -(-T // 16) * 16, dtype=dtype, device=seen_TT.device)[:, :T]
    return mask.masked_fill_(~seen_TT, float("-inf"))
