"""What looks on while the data are made."""

from collections.abc import Callable

# Called often with what is being done, how much of it is done, and how much there is (0: not known). It may raise to
# end the work.
Watch = Callable[[str, int, int], None]


def unwatched(work: str, done: int, total: int) -> None:
    """Look at nothing."""
