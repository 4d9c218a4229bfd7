"""What was measured, and the numbers that compare variants. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median, quantiles
from typing import Any

from malora_dist.bench.variants import Comparison, Selection, Variant


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of one variant.

    seconds: of the slowest process. waiting_seconds: in which a process stood still inside the exchange, on average.
    cpu_seconds: processor time of a process with all its threads, on average.
    sent_bytes by phase, and uniform_bytes, what uniform routing would make of them: of all processes together.
    tokens: of the global batch.
    """

    seconds: float
    waiting_seconds: float
    cpu_seconds: float
    sent_bytes: dict[str, int]
    uniform_bytes: dict[str, int]
    loss: float
    tokens: int


@dataclass(frozen=True)
class Row:
    """A variant against the first of its comparison.

    ratio, cpu_ratio: median over steps of its seconds / those of the first variant in the same step; of the one with
    its quartiles. waiting_share: of a step's seconds. sent_bytes and uniform_bytes: by phase, of one process in one
    step. kept_bytes: of the parameters it holds between steps. loss_difference: the largest over all steps.
    """

    variant: str
    step_seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    cpu_ratio: float
    waiting_share: float
    sent_bytes: dict[str, float]
    uniform_bytes: dict[str, float]
    kept_bytes: float
    loss_difference: float


@dataclass(frozen=True)
class Result:
    """A whole measurement; of each variant's records, the first `warmup` count for the losses only."""

    facts: Mapping[str, Any]
    world_size: int
    warmup: int
    selection: Selection
    records: Mapping[Variant, Sequence[StepRecord]]
    kept_bytes: Mapping[Variant, float]

    def rows(self, comparison: Comparison) -> list[Row]:
        """Return one row for each variant of the comparison."""
        return [self._row(variant, comparison.variants[0]) for variant in comparison.variants]

    def _row(self, variant: Variant, first: Variant) -> Row:
        timed, against = self.records[variant][self.warmup :], self.records[first][self.warmup :]
        timed_pairs = list(zip(timed, against, strict=True))
        ratios = [record.seconds / other.seconds for record, other in timed_pairs]
        pairs = zip(self.records[variant], self.records[first], strict=True)
        return Row(
            variant=variant.name,
            step_seconds=median(record.seconds for record in timed),
            ratio=median(ratios),
            ratio_quartiles=quartiles(ratios),
            cpu_ratio=median(record.cpu_seconds / other.cpu_seconds for record, other in timed_pairs),
            waiting_share=median(record.waiting_seconds / record.seconds for record in timed),
            sent_bytes=self._by_phase([record.sent_bytes for record in timed]),
            uniform_bytes=self._by_phase([record.uniform_bytes for record in timed]),
            kept_bytes=self.kept_bytes[variant],
            loss_difference=max(abs(record.loss - other.loss) for record, other in pairs),
        )

    def _by_phase(self, steps: Sequence[dict[str, int]]) -> dict[str, float]:
        phases = dict.fromkeys(phase for step in steps for phase in step)
        return {phase: mean(step.get(phase, 0) for step in steps) / self.world_size for phase in phases}

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: every record of every variant, and every row."""
        return {
            "facts": dict(self.facts),
            "world_size": self.world_size,
            "warmup": self.warmup,
            "left_out": list(self.selection.left_out),
            "variants": {
                variant.name: {**asdict(variant), "records": [asdict(record) for record in records]}
                for variant, records in self.records.items()
            },
            "comparisons": [
                {"topic": comparison.topic, "rows": [asdict(row) for row in self.rows(comparison)]}
                for comparison in self.selection.comparisons
            ],
        }


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile; of one value twice that."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high
