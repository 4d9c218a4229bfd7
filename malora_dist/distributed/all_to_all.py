"""All-to-all messages of expert parallelism, with gradients: each is the exact mirror of itself in backward.

Dispatch sends rows of D numbers with one gate per local expert of the receiver, in one message. Combine sends rows of
O numbers back; starting it and waiting for it are two autograd nodes, so that the base layer computed in between hides
the message, and that layer's backward hides the message of the gradient.
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
    """All-to-all messages over a group, counted in bytes.

    overlap: the message of a combine is under way while the base layer computes. Otherwise it ends first.
    sent_bytes: bytes sent to other ranks so far, by phase: counts, rows, returns, grad_returns, grad_rows (the names of
    `plan.communication.ExchangeBytes`).
    """

    group: dist.ProcessGroup
    overlap: bool = True
    sent_bytes: Counter[str] = field(default_factory=Counter)

    def start(self, rows: Tensor, sent: Sequence[int], received: Sequence[int], phase: str) -> tuple[Tensor, "Message"]:
        """Start to send rows.

        Args:
            rows: (sum(sent), ...), in the order of the ranks that they go to.
            sent: number of rows for each rank of the group.
            received: number of rows from each rank of the group.
            phase: what the bytes count as.

        Returns:
            A buffer (sum(received), ...), filled once the message's `wait` has returned, and the message.
        """
        rows = rows.contiguous()
        buffer = rows.new_empty(sum(received), *rows.shape[1:])
        self.count(phase, sent, rows[0:1].numel() * rows.element_size() if len(rows) else 0)
        with named(self.group, phase):
            handle = dist.all_to_all_single(buffer, rows, list(received), list(sent), group=self.group, async_op=True)
        return buffer, Message(handle, rows, self.group, phase)

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int], phase: str) -> Tensor:
        """Send rows as `start` does, and return those that were received."""
        buffer, message = self.start(rows, sent, received, phase)
        message.wait()
        return buffer

    @property
    def total_bytes(self) -> int:
        """Return the bytes sent so far, of all phases."""
        return sum(self.sent_bytes.values())

    def count(self, phase: str, sent: Sequence[int], row_bytes: int) -> None:
        """Add the bytes of the rows that go to other ranks."""
        own = dist.get_rank(self.group)
        self.sent_bytes[phase] += row_bytes * sum(rows for rank, rows in enumerate(sent) if rank != own)


class Message:
    """A message under way; keeps what is being sent alive until it has been received."""

    def __init__(self, handle: Any, rows: Tensor, group: dist.ProcessGroup, phase: str) -> None:
        self.handle, self.group, self.phase = handle, group, phase
        self.rows: Tensor | None = rows

    def wait(self) -> None:
        """Wait until the rows of all ranks have arrived."""
        with named(self.group, self.phase):
            self.handle.wait()
        self.handle = self.rows = None


@contextmanager
def named(group: dist.ProcessGroup, phase: str) -> Iterator[None]:
    """Add to a collective's error which group and which phase it was."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(f"expert-parallel group {dist.get_process_group_ranks(group)}, phase {phase}")
        raise


class DispatchRows(torch.autograd.Function):
    """Sends rows (N, D) with gates (N, E_local), in the order of the ranks that they go to.

    Returns rows and gates that were received. Both gradients come back in one message.
    """

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
    """Join two row-wise tensors of different dtype as bytes: one message has half the latency of two."""
    return torch.cat([_as_bytes(rows_ND), _as_bytes(gates_NE)], dim=1)


def _as_bytes(rows: Tensor) -> Tensor:
    # Flat in between: few rows may count as contiguous with strides that cannot be viewed as bytes.
    return rows.contiguous().view(-1).view(torch.uint8).view(len(rows), rows.shape[1] * rows.element_size())


def _unpack(message: Tensor, rows_ND: Tensor, gates_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Split what `_pack` joined, with widths and dtypes of the given tensors."""
    widths = [like.shape[1] * like.element_size() for like in (rows_ND, gates_NE)]
    # Copied whatever the strides say: a single row counts as contiguous, wherever in the message it starts.
    rows, gates = (part.clone(memory_format=torch.contiguous_format) for part in message.split(widths, dim=1))
    return rows.view(rows_ND.dtype), gates.view(gates_NE.dtype)


class AsyncCombine:
    """One message back to the tokens' ranks, forward and backward: start it, compute something else, wait for it."""

    def __init__(self, all_to_all: AllToAll, sent: list[int], received: list[int]) -> None:
        self.all_to_all, self.sent, self.received = all_to_all, sent, received
        self._buffer: Tensor | None = None
        self._message: Message | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Start to send rows (sum(sent), O). Returns a buffer for `wait`, which holds nothing yet."""
        buffer: Tensor = _StartCombine.apply(rows, self)
        return buffer

    def wait(self, buffer: Tensor) -> Tensor:
        """Wait for the message. Returns the rows received, (sum(received), O)."""
        rows: Tensor = _WaitCombine.apply(buffer, self)
        return rows

    def send(self, rows: Tensor, sent: list[int], received: list[int], phase: str) -> Tensor:
        """Start one direction of the message, and end it too unless it may overlap."""
        self._buffer, self._message = self.all_to_all.start(rows, sent, received, phase)
        if not self.all_to_all.overlap:
            self._message.wait()
        return self._buffer

    def receive(self) -> Tensor:
        """End the direction that was started, and return the rows received."""
        assert self._buffer is not None and self._message is not None, "nothing is under way"
        if self.all_to_all.overlap:
            self._message.wait()
        buffer, self._buffer, self._message = self._buffer, None, None
        return buffer


class _StartCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, combine: AsyncCombine) -> Tensor:
        ctx.combine = combine
        return combine.send(rows, combine.sent, combine.received, "returns")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        return ctx.combine.receive(), None


class _WaitCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, combine: AsyncCombine) -> Tensor:
        ctx.combine = combine
        combine.receive()
        return buffer.view_as(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.combine.send(grad, ctx.combine.received, ctx.combine.sent, "grad_returns")
        # The gradient of the rows on their experts' rank has another shape; _StartCombine returns it once it is here.
        return grad, None
