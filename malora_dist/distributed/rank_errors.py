"""Errors of single ranks, raised on all of them: a rank that ends alone leaves the others waiting in a collective."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from malora_dist.distributed.process_groups import World, broadcast_object, gather_lists, this_rank
from malora_dist.errors import MaloraError, TrainingError

Result = TypeVar("Result")


def run_on_rank0(work: Callable[[], Result], world: World) -> Result:
    """Run `work` on rank 0, and return what it returned on all ranks.

    Raises:
        Exception: what `work` raised; on the other ranks as a MaloraError (`shared_error`).
    """
    value, error = None, None
    if world.is_main:
        try:
            value = work()
        except Exception as caught:
            error = caught
    value, shared = broadcast_object((value, shared_error(error, 0)), world.control)
    if error is not None:
        raise error
    if shared is not None:
        raise shared
    result: Result = value
    return result


@contextmanager
def sharing_errors(world: World) -> Iterator[None]:
    """Raise on all ranks what the block, which must not communicate, raises on one.

    Every rank must enter; each leaves once all have come to the end.

    Raises:
        Exception: see `raise_on_all_ranks`.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, world.control)


def raise_on_all_ranks(error: Exception | None, group: Any = None) -> None:
    """Raise the error that a rank has met on all ranks; None is no error. Every rank must call.

    Args:
        error: that of this rank.
        group: to send it over; None is the default group.

    Raises:
        Exception: `error` itself, if it is that of the lowest rank with one, or has a traceback worth reading, as it
            is no MaloraError; otherwise the `shared_error` of the lowest rank with one. Where this rank has met none, a
            note names that rank.
    """
    rank = this_rank()
    try:
        found = [one for one in gather_lists([(rank, shared_error(error, rank))], group) if one[1] is not None]
    except RuntimeError:
        if error is None:
            raise
        # The others are gone, or come too late: the error of this rank is then the one to show.
        found = [(rank, error)]
    if error is not None and (found[0][0] == rank or not isinstance(error, MaloraError)):
        raise error
    if found:
        origin, shared = found[0]
        if error is None:
            shared.add_note(f"met by rank {origin}")
        raise shared


def shared_error(error: Exception | None, rank: int) -> MaloraError | None:
    """Return the error as other ranks raise it: a MaloraError as it is, another as a TrainingError that names it."""
    if error is None or isinstance(error, MaloraError):
        return error
    return TrainingError(f"rank {rank}: {type(error).__name__}: {error}")
