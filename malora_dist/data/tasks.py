"""A task from its files to checked, clean, separate splits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from malora_dist.data.checks import DEFAULT_FIELDS, RowRules
from malora_dist.data.choices import Field
from malora_dist.data.example import COMPLETION, MULTIPLE_CHOICE, Example
from malora_dist.data.label import Label
from malora_dist.data.row import BadRow
from malora_dist.data.rows import find_files, read_rows
from malora_dist.data.splits import Size, Splits, cap, cut_splits, drop_repeated, remove_leaks
from malora_dist.data.watch import Watch, unwatched
from malora_dist.errors import DataError

__all__ = ["COMPLETION", "DEFAULT_FIELDS", "MULTIPLE_CHOICE", "Example", "TaskData", "load_task"]

MAX_PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class TaskData:
    """A task's checked rows. `counts` says how many rows were read, and what became of the others."""

    name: str
    kind: str
    scoring: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    counts: dict[str, int]


@dataclass
class _Reader:
    """Reads the files of one task; the kind is settled by its first usable row."""

    rules: RowRules
    kind: str | None
    skip_bad_rows: bool
    counts: Counter[str]
    labels: Counter[Label]
    watch: Watch
    most_choices: int = 0

    def read(self, patterns: Sequence[str] | None) -> tuple[Example, ...]:
        """Read all examples of the files. Raises DataError on the first bad rows, unless they are skipped."""
        if patterns is None:
            return ()
        examples: list[Example] = []
        problems: list[str] = []
        files = find_files(patterns, task=self.rules.task)
        for row in (row for path in files for row in read_rows(path)):
            self.watch("reading rows", self.counts["rows_read"], 0)
            self.counts["rows_read"] += 1
            try:
                kind = self.kind or self.rules.kind_of(row)
                example, label = self.rules.read(row, kind)
            except BadRow as problem:
                problems.append(str(problem))
                if not self.skip_bad_rows and len(problems) == MAX_PROBLEMS_SHOWN:
                    break
                continue
            self.kind = kind
            examples.append(example)
            self.most_choices = max(self.most_choices, len(example.choices))
            if label is not None:
                self.labels[label] += 1
        self._report(problems, examples, ", ".join(map(str, files)))
        return tuple(examples)

    def doubtful_labels(self) -> dict[str, int]:
        """Count the labels that may mean something else than they are read as; what does not occur is left out."""
        counted = [label for label in self.labels if label.counted and self.rules.first_label == 0]
        from_1 = counted and min(label.index for label in counted) == 1
        found = {
            # Numbers from 1 on, where none is 0.
            "labels_from_1": sum(self.labels[label] for label in counted) if from_1 else 0,
            "labels_of_two_meanings": sum(self.labels[label] for label in self.labels if label.two_meanings),
        }
        return {name: number for name, number in found.items() if number}

    def unused_fields(self) -> dict[str, int]:
        """Count the fields of `fields.choices` in which no row has a choice; left out if there is none."""
        names = self.rules.fields["choices"]
        unused = 0 if isinstance(names, str) or not self.most_choices else len(names) - self.most_choices
        return {"choice_fields_unused": unused} if unused and self.rules.choices is None else {}

    def _report(self, problems: list[str], examples: list[Example], files: str) -> None:
        if problems and not self.skip_bad_rows:
            lines = "\n  ".join(problems)
            number = f", the first {len(problems)}" if len(problems) == MAX_PROBLEMS_SHOWN else ""
            raise DataError(
                f"task {self.rules.task!r}: bad rows (on_bad_row: skip leaves them out){number}:\n  {lines}"
            )
        self.counts["bad_rows_skipped"] += len(problems)
        if not examples:
            why = f"all {len(problems)} rows are bad, the first: {problems[0]}" if problems else "no rows"
            raise DataError(f"task {self.rules.task!r}: {files}: {why}")


def load_task(
    *,
    name: str,
    train: str | Sequence[str],
    validation: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    validation_size: Size | None = None,
    test_size: Size | None = None,
    group_by: str | None = None,
    kind: str | None = None,
    scoring: str = "text",
    fields: Mapping[str, Field] = DEFAULT_FIELDS,
    template_fields: Sequence[str] = (),
    optional_fields: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    first_label: int = 0,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    on_bad_row: str = "error",
    near_duplicate_threshold: float | None = 0.8,
    split_seed: int = 0,
    watch: Watch = unwatched,
) -> TaskData:
    """Read, check and split one task; paths may be globs. `RowRules` says how a row is read.

    `kind` None is settled by the first row. Validation and test are files, or are cut from `train` by the sizes.
    Raises DataError naming file, line and field of bad rows (with on_bad_row="skip" they are counted instead),
    for missing or empty files, and when no row is left to train on.
    """
    counts: Counter[str] = Counter()
    rules = RowRules(name, fields, template_fields, optional_fields, group_by, choices, first_label)
    reader = _Reader(rules, kind, on_bad_row == "skip", counts, Counter(), watch)
    rows = reader.read(_as_list(train))
    unique = drop_repeated(rows)
    counts["duplicates_removed"] = len(rows) - len(unique)
    cut = cut_splits(unique, validation_size=validation_size, test_size=test_size, seed=split_seed, watch=watch)
    splits = Splits(
        cut.train,
        reader.read(_as_list(validation)) if validation is not None else cut.validation,
        reader.read(_as_list(test)) if test is not None else cut.test,
    )
    splits, removed = remove_leaks(splits, near_duplicate_threshold=near_duplicate_threshold, watch=watch)
    counts.update(removed)
    if not splits.train:
        raise DataError(f"task {name!r}: {_all_leaked(removed, near_duplicate_threshold)}")
    assert reader.kind is not None
    if scoring == "letter" and reader.kind == COMPLETION:
        raise DataError(f"task {name!r}: scoring=letter needs rows with choices; kind is {COMPLETION}")
    parts = {
        "train": cap(splits.train, max_train_samples, split_seed),
        "validation": cap(splits.validation, max_eval_samples, split_seed),
        "test": cap(splits.test, max_eval_samples, split_seed),
    }
    counts.update(reader.doubtful_labels() | reader.unused_fields())
    counts["over_the_cap"] = sum(len(getattr(splits, split)) - len(part) for split, part in parts.items())
    counts.update({split: len(part) for split, part in parts.items()})
    return TaskData(name=name, kind=reader.kind, scoring=scoring, counts=dict(counts), **parts)


def _all_leaked(removed: Mapping[str, int], near_duplicate_threshold: float | None) -> str:
    """Explain that no training row is left; `removed` counts them by the names of `remove_leaks`."""
    groups, equal, near = removed.values()
    found = {
        f"{equal} equal to one": equal,
        f"{near} nearly equal to one (data.near_duplicate_threshold={near_duplicate_threshold})": near,
        f"{groups} of a group that has one": groups,
    }
    reasons = ", ".join(text for text, number in found.items() if number)
    return f"evaluation rows repeat every training row: {reasons}; none is left. Are train and test the same file?"


def _as_list(paths: str | Sequence[str] | None) -> list[str] | None:
    return [paths] if isinstance(paths, str) else None if paths is None else list(paths)
