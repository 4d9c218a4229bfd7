"""Communication volume of expert parallelism: bytes of the tokens that are dispatched, and of the sums combined.

Dispatch sends one row per token and expert rank, with D numbers (what an expert reads) and one gate per local expert of
that rank; combine returns one row of O numbers. Backward mirrors both: O numbers, then D numbers and one gate gradient
per local expert. Only what goes to another rank counts. Arithmetic only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

COUNT_BYTES = 8


@dataclass(frozen=True)
class ExchangeBytes:
    """Bytes that one rank sends for one adapted layer and micro-batch, by phase, recomputation included."""

    counts: int
    rows: int
    returns: int
    grad_returns: int
    grad_rows: int

    @property
    def total(self) -> int:
        """Return the bytes of all phases."""
        return self.counts + self.rows + self.returns + self.grad_returns + self.grad_rows


def exchange_bytes(
    sent_rows: Sequence[int],
    received_rows: Sequence[int],
    *,
    in_width: int,
    out_width: int,
    num_local_experts: int,
    itemsize: int,
    gate_itemsize: int = 4,
    backward: bool = True,
    recompute: bool = False,
) -> ExchangeBytes:
    """Count the bytes that a rank sends for one layer.

    Args:
        sent_rows, received_rows: rows to and from each *other* rank of the expert-parallel group.
        in_width: D (S_A's rank; the layer's inputs for methods without S_A).
        out_width: O.
        num_local_experts: of a rank.
        itemsize: bytes of a number that is sent (2 for bf16).
        gate_itemsize: bytes of a gate.
        backward: count that of backward too.
        recompute: activation checkpointing runs the forward phases a second time.
    """
    sent, received = sum(sent_rows), sum(received_rows)
    row = in_width * itemsize + num_local_experts * gate_itemsize
    forwards = 2 if recompute and backward else 1
    return ExchangeBytes(
        counts=forwards * COUNT_BYTES * len(sent_rows),
        rows=forwards * sent * row,
        returns=forwards * received * out_width * itemsize,
        grad_returns=sent * out_width * itemsize if backward else 0,
        grad_rows=received * row if backward else 0,
    )


def rows_per_token(num_experts: int, top_k: int, ep_size: int) -> float:
    """Return the expected number of ranks that hold an expert of a token, if every set of experts is equally likely.

    Each of ep_size ranks holds N / W experts and is missed with probability C(N - N/W, k) / C(N, k).

    >>> [round(rows_per_token(8, 2, ep_size), 2) for ep_size in (1, 2, 4, 8)]
    [1.0, 1.57, 1.86, 2.0]
    """
    others = num_experts - num_experts // ep_size
    return ep_size * (1 - comb(others, top_k) / comb(num_experts, top_k))
