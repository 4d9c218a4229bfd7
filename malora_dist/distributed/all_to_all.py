"""The two ways between tokens and their owners, each the exact mirror of itself in backward.

Out: rows of D numbers with one gate per local expert of the owner, in one message. Home: rows of O numbers, launched
and awaited by separate autograd nodes, so that a base layer computed in between hides the flight, and that layer's
backward hides the flight of the gradient.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class AllToAll:
    """A group's messages: whether the home phase flies during other work, and the bytes sent to other ranks so far.

    `sent_bytes` counts by phase: counts, rows, returns, grad_returns, grad_rows (the names of `traffic.ExchangeBytes`).
    """

    group: dist.ProcessGroup
    overlap: bool = True
    sent_bytes: Counter[str] = field(default_factory=Counter)

    def start(self, rows: Tensor, sent: Sequence[int], received: Sequence[int], phase: str) -> tuple[Tensor, Any]:
        """Rows (sum(sent), ...), by destination, on their way: a buffer (sum(received), ...) and its handle."""
        rows = rows.contiguous()
        buffer = rows.new_empty(sum(received), *rows.shape[1:])
        self.count(phase, sent, rows[0:1].numel() * rows.element_size() if len(rows) else 0)
        with named(self.group, phase):
            handle = dist.all_to_all_single(buffer, rows, list(received), list(sent), group=self.group, async_op=True)
        return buffer, _Flight(handle, rows, self.group, phase)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int], phase: str) -> Tensor:
        """The rows the others sent here."""
        buffer, flight = self.start(rows, sent, received, phase)
        flight.wait()
        return buffer

    @property
    def total_bytes(self) -> int:
        return sum(self.sent_bytes.values())

    def count(self, phase: str, sent: Sequence[int], row_bytes: int) -> None:
        own = dist.get_rank(self.group)
        self.sent_bytes[phase] += row_bytes * sum(rows for rank, rows in enumerate(sent) if rank != own)


class _Flight:
    """A message under way; keeps what is being sent alive until it has arrived."""

    def __init__(self, handle: Any, rows: Tensor, group: dist.ProcessGroup, phase: str) -> None:
        self.handle, self.group, self.phase = handle, group, phase
        self.rows: Tensor | None = rows

    def wait(self) -> None:
        with named(self.group, self.phase):
            self.handle.wait()
        self.handle = self.rows = None


@contextmanager
def named(group: dist.ProcessGroup, phase: str) -> Iterator[None]:
    """Give a collective's error a note of which group and which phase it was."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(f"expert-parallel group {dist.get_process_group_ranks(group)}, phase {phase}")
        raise


def sum_slots(rows_ND: Tensor, slots_TQ: Tensor, base_TD: Tensor | None = None) -> Tensor:
    """(T, D): the base plus each token's rows in the order of its slots, in fp32 at least; slot N stands for no row."""
    dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    num_rows = len(rows_ND)
    total = rows_ND[slots_TQ[:, 0]].to(dtype)
    if base_TD is not None:
        total = base_TD.to(dtype) + total
    for slot_T in slots_TQ.unbind(dim=1)[1:]:
        rows_TD = rows_ND[slot_T.clamp(max=num_rows - 1)].to(dtype)
        total += rows_TD.masked_fill((slot_T == num_rows)[:, None], 0)
    return total.to(rows_ND.dtype)


class Spread(torch.autograd.Function):
    """x (T, D) -> its rows (N, D); the gradient of a token is the sum over its rows, in fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, slots_TQ: Tensor) -> Tensor:
        ctx.save_for_backward(slots_TQ)
        return x_TD[token_N]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        return sum_slots(grad_ND, *ctx.saved_tensors), None, None


class Combine(torch.autograd.Function):
    """base (T, O) and rows (N, O) -> base plus each token's rows, added in fp32; the mirror image of Spread."""

    @staticmethod
    def forward(ctx: Any, base_TO: Tensor, rows_NO: Tensor, token_N: Tensor, slots_TQ: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        return sum_slots(rows_NO, slots_TQ, base_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (token_N,) = ctx.saved_tensors
        return grad_TO, grad_TO[token_N], None, None


class SendRows(torch.autograd.Function):
    """Rows (N, D) with gates (N, E_local), by destination -> those sent here. Both gradients come back together."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, gates_NE: Tensor, all_to_all: AllToAll, sent: list[int], received: list[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.all_to_all, ctx.sent, ctx.received = all_to_all, sent, received
        return _unpack(all_to_all.exchange(_pack(rows_ND, gates_NE), sent, received, "rows"), rows_ND, gates_NE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_gates: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        message = ctx.all_to_all.exchange(_pack(grad_rows, grad_gates), ctx.received, ctx.sent, "grad_rows")
        return *_unpack(message, grad_rows, grad_gates), None, None, None


def _pack(rows_ND: Tensor, gates_NE: Tensor) -> Tensor:
    """Two row-wise tensors of different dtype as one of bytes: one message has half the latency of two."""
    return torch.cat([_as_bytes(rows_ND), _as_bytes(gates_NE)], dim=1)


def _as_bytes(rows: Tensor) -> Tensor:
    # Flat in between: few rows may count as contiguous with strides that cannot be viewed as bytes.
    return rows.contiguous().view(-1).view(torch.uint8).view(len(rows), rows.shape[1] * rows.element_size())


def _unpack(message: Tensor, rows_ND: Tensor, gates_NE: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_pack`, with widths and dtypes of the given tensors."""
    widths = [like.shape[1] * like.element_size() for like in (rows_ND, gates_NE)]
    # Copied whatever the strides say: a single row counts as contiguous, wherever in the message it starts.
    rows, gates = (part.clone(memory_format=torch.contiguous_format) for part in message.split(widths, dim=1))
    return rows.view(rows_ND.dtype), gates.view(gates_NE.dtype)


class Homeward:
    """One flight home, forward and backward: launch, compute something else, land."""

    def __init__(self, all_to_all: AllToAll, sent: list[int], received: list[int]) -> None:
        self.all_to_all, self.sent, self.received = all_to_all, sent, received
        self._buffer: Tensor | None = None
        self._flight: _Flight | None = None

    def launch(self, rows: Tensor) -> Tensor:
        """Send rows (sum(sent), O); the result is filled once it has gone through `land`."""
        buffer: Tensor = _Launch.apply(rows, self)
        return buffer

    def land(self, buffer: Tensor) -> Tensor:
        """The rows (sum(received), O), arrived."""
        rows: Tensor = _Land.apply(buffer, self)
        return rows

    def depart(self, rows: Tensor, sent: list[int], received: list[int], phase: str) -> Tensor:
        self._buffer, self._flight = self.all_to_all.start(rows, sent, received, phase)
        if not self.all_to_all.overlap:
            self._flight.wait()
        return self._buffer

    def arrive(self) -> Tensor:
        assert self._buffer is not None and self._flight is not None, "nothing is under way"
        if self.all_to_all.overlap:
            self._flight.wait()
        buffer, self._buffer, self._flight = self._buffer, None, None
        return buffer


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Homeward) -> Tensor:
        ctx.way = way
        return way.depart(rows, way.sent, way.received, "returns")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        return ctx.way.arrive(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, way: Homeward) -> Tensor:
        ctx.way = way
        way.arrive()
        return buffer.view_as(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.way.depart(grad, ctx.way.received, ctx.way.sent, "grad_returns")
        # The gradient of the rows at their owner has another shape and comes out of _Launch, where it arrives.
        return grad, None
