"""What a benchmark of one process found, as JSON and as tables. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from malora_dist.bench.table import Sheet

NOTES = (
    "seconds: median over the rounds. ratio: median over pairs of the same round, beside it their quartiles. Everyone "
    "takes turns on the same work, once a round, in random order. Ratios of one run can be compared; seconds "
    "of two runs cannot.",
)


@dataclass(frozen=True)
class Measurement:
    """One baseline in one case.

    median_s: seconds of one repeat. peak_bytes: memory of one repeat, above what was there before it or whole, as the
    benchmark says. ratio: to `against`, with its quartiles. facts: what else was found or must be equal for everyone,
    as plain values.
    """

    name: str
    case: str
    median_s: float | None = None
    peak_bytes: int | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    against: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without those that were not measured."""
        return {key: value for key, value in asdict(self).items() if value is not None and value != {}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Measurement":
        """Return the record of `as_dict`, with JSON's lists as tuples again."""
        quartiles = values.get("ratio_quartiles")
        return cls(**{**values, "ratio_quartiles": None if quartiles is None else (quartiles[0], quartiles[1])})


@dataclass(frozen=True)
class Report:
    """A whole run of a benchmark: where, how to run it again, what came out, and what its columns mean."""

    machine: dict[str, Any]
    command: str
    records: list[Measurement]
    notes: tuple[str, ...] = NOTES

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        records = [record.as_dict() for record in self.records]
        return {"machine": self.machine, "command": self.command, "records": records}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Return the report of `as_dict`."""
        return cls(
            values["machine"], values["command"], [Measurement.from_dict(record) for record in values["records"]]
        )

    def sheets(self) -> list[Sheet]:
        """Return one table for each case, in the order of the records."""
        cases = dict.fromkeys(record.case for record in self.records)
        return [_sheet(case, [record for record in self.records if record.case == case]) for case in cases]

    def markdown(self) -> str:
        """Render the command, the machine and the tables."""
        machine = [f"- {name}: {value}" for name, value in self.machine.items()]
        tables = [sheet.as_markdown() for sheet in self.sheets()]
        return "\n".join([f"    {self.command}", "", *machine, "", *tables, "\n\n".join(self.notes)]) + "\n"


def _sheet(case: str, records: list[Measurement]) -> Sheet:
    """Return the table of a case, without empty columns; values that all records share are in the title or a header."""
    against = list(dict.fromkeys(record.against for record in records if record.against is not None))
    of_whom = f"ratio to {against[0]}" if len(against) == 1 else "ratio"
    columns = {
        "seconds": [seconds_text(record.median_s) for record in records],
        of_whom: ["" if record.ratio is None else f"{record.ratio:.3f}" for record in records],
        "quartiles": [_quartiles(record) for record in records],
        "against": [record.against or "" for record in records] if len(against) > 1 else [],
        "MiB peak": ["" if record.peak_bytes is None else f"{record.peak_bytes / 2**20:.1f}" for record in records],
    }
    shared = _shared_facts(records)
    for name in dict.fromkeys(name for record in records for name in record.facts):
        if name not in shared:
            columns[name] = [fact_text(record.facts.get(name)) for record in records]
    filled = {header: cells for header, cells in columns.items() if any(cells)}
    rows = zip((record.name for record in records), *filled.values(), strict=True)
    title = ", ".join([case, *(f"{name} {fact_text(value)}" for name, value in shared.items())])
    return Sheet(title, ("name", *filled), tuple(rows))


def _shared_facts(records: Sequence[Measurement]) -> dict[str, Any]:
    """Return the facts that several records have, all with the same value."""
    values: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.facts.items():
            values.setdefault(name, []).append(value)
    return {name: found[0] for name, found in values.items() if len(found) > 1 and found.count(found[0]) == len(found)}


def _quartiles(record: Measurement) -> str:
    return "" if record.ratio_quartiles is None else "-".join(f"{value:.3f}" for value in record.ratio_quartiles)


def seconds_text(seconds: float | None) -> str:
    """Format seconds, as milliseconds below a second."""
    if seconds is None:
        return ""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def fact_text(value: Any) -> str:
    """Format a fact for a cell: large integers in groups of three digits, other numbers to four digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
