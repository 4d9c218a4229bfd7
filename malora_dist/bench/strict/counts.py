"""What is counted on the device, with the places in the source that caused it."""

import sys
from collections import Counter
from dataclasses import dataclass, field

import torch

KINDS = ("launches", "waits", "atomics")


@dataclass
class Counts:
    """Counters by name of the operation.

    launches: operations that start a kernel or a copy; views and allocations are free. waits: those in which the host
    waits for the device. atomics: those that add numbers up without an order. nbytes: numbers read and written once
    each, in bytes. places: (kind, operation, file:line) of each, the innermost frame in a file whose path holds
    `watch`, or, in brackets, outside of torch.
    """

    watch: str = "malora_dist"
    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    atomics: Counter[str] = field(default_factory=Counter)
    nbytes: Counter[str] = field(default_factory=Counter)
    places: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def note(self, kind: str, name: str, number: int = 1) -> None:
        """Count `number` of a kind, for this operation."""
        getattr(self, kind)[name] += number
        if kind in KINDS:
            self.places[kind, name, _place(self.watch)] += number

    def reset(self) -> None:
        """Forget all counts."""
        for counter in (self.launches, self.waits, self.atomics, self.nbytes, self.places):
            counter.clear()

    def totals(self) -> dict[str, int]:
        """Return the sum of each kind."""
        return {kind: sum(getattr(self, kind).values()) for kind in (*KINDS, "nbytes")}

    def report(self, most: int = 12) -> str:
        """Return the counts as text, the most frequent first."""
        lines = []
        for kind in KINDS:
            counter: Counter[str] = getattr(self, kind)
            lines.append(f"{kind}: {sum(counter.values())}")
            lines += [f"  {number:6d}  {name}" for name, number in counter.most_common(most)]
            at = Counter({place[1:]: number for place, number in self.places.items() if place[0] == kind})
            lines += [f"  {number:6d}  {name} at {place}" for (name, place), number in at.most_common(most)]
        return "\n".join(lines)


def _place(watch: str) -> str:
    own, of_torch = __file__.rpartition("/")[0] + "/", torch.__file__.rpartition("/")[0] + "/"
    frame, other = sys._getframe(1), None
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((own, of_torch, "<")):
            if watch in path:
                return f"{path.rpartition(watch)[2].lstrip('/')}:{frame.f_lineno}"
            other = other or f"[{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}]"
        frame = frame.f_back  # type: ignore[assignment]
    return other or "elsewhere"
