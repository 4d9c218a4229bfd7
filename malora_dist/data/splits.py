"""Train, validation and test kept apart: cut by group, and cleaned of rows that an evaluation split repeats."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from malora_dist.data.example import Example
from malora_dist.data.similarity import NearDuplicateIndex, normalized
from malora_dist.data.watch import Watch, unwatched, watched
from malora_dist.errors import DataError

Size = int | float
REMOVED = ("shared_groups_removed", "leaked_duplicates_removed", "near_duplicates_removed")


@dataclass(frozen=True)
class Splits:
    """The three parts of a task's rows."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()


def comparison_text(example: Example) -> str:
    """Return the text that rows of the same question share: what is asked and, whatever their order, the choices."""
    return " ".join((example.question, *sorted(example.choices)))


def hash_order(key: str, seed: int) -> bytes:
    """Return a sort key for a random order that depends only on the key and the seed, not on other rows."""
    return hashlib.blake2b(f"{seed}\0{key}".encode(errors="surrogatepass"), digest_size=16).digest()


def group_key(example: Example) -> str:
    """Return the key of rows that a split keeps together: the same group or, without groups, the same question."""
    return normalized(example.question) if example.group is None else f"group {example.group}"


def cut_splits(
    examples: Sequence[Example],
    *,
    validation_size: Size | None = None,
    test_size: Size | None = None,
    seed: int = 0,
    watch: Watch = unwatched,
) -> Splits:
    """Cut validation and test from `examples` by whole groups, in an order hashed from the seed.

    A size below 1 is a fraction of the rows. A split may be a few rows short where no group of the right size is left.
    Raises DataError if nothing would be left to train on or no group fits.
    """
    if validation_size is None and test_size is None:
        return Splits(tuple(examples))
    groups: dict[str, list[Example]] = {}
    for example in watched("grouping rows", examples, watch):
        groups.setdefault(group_key(example), []).append(example)
    order = sorted(groups, key=lambda key: hash_order(key, seed))
    taken: dict[str, str] = {}
    for split, size in (("test", test_size), ("validation", validation_size)):
        if size is not None:
            rows = _number_of_rows(examples, size, split)
            taken |= dict.fromkeys(_fill(groups, [key for key in order if key not in taken], rows, split), split)
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in watched("cutting splits", examples, watch):
        parts[taken.get(group_key(example), "train")].append(example)
    if not parts["train"]:
        raise DataError(
            f"task {examples[0].task!r}: test_size={test_size} and validation_size={validation_size} leave none of the "
            f"{len(examples)} rows ({len(groups)} groups) to train on"
        )
    return Splits(*(tuple(parts[split]) for split in ("train", "validation", "test")))


def _number_of_rows(examples: Sequence[Example], size: Size, split: str) -> int:
    rows = max(1, round(size * len(examples))) if size < 1 else int(size)
    if rows >= len(examples):
        raise DataError(
            f"task {examples[0].task!r}: {split}_size={size} does not leave any of the {len(examples)} rows to train on"
        )
    return rows


def _fill(groups: dict[str, list[Example]], order: Iterable[str], rows: int, split: str) -> list[str]:
    chosen: list[str] = []
    room = rows
    for key in order:
        if len(groups[key]) <= room:
            chosen.append(key)
            room -= len(groups[key])
        if room == 0:
            break
    if not chosen:
        task = next(iter(groups.values()))[0].task
        raise DataError(
            f"task {task!r}: {split}_size: no group of at most {rows} rows is left; rows with the same prompt stay "
            "together, group_by names another field to group by"
        )
    return chosen


def drop_repeated(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Remove exact repetitions of rows (same question, choices and answer); the first of each stays."""
    first: dict[tuple[str, str], Example] = {}
    for example in examples:
        first.setdefault((_exact_text(example), example.response), example)
    return tuple(first.values())


def _exact_text(example: Example) -> str:
    return "\0".join((example.question, *sorted(example.choices)))


def remove_leaks(
    splits: Splits, *, near_duplicate_threshold: float | None, watch: Watch = unwatched
) -> tuple[Splits, dict[str, int]]:
    """Remove from train every row that validation or test repeats; they themselves stay as they are.

    Returns the splits and how many rows were removed: of a group that an evaluation split holds, exact duplicates, and
    near-duplicates (Jaccard similarity of word triples at or above the threshold; None: not looked for).
    """
    held_out = (*splits.validation, *splits.test)
    if not held_out:
        return splits, dict.fromkeys(REMOVED, 0)
    groups = {example.group for example in held_out if example.group is not None}
    texts = {normalized(comparison_text(row)) for row in watched("reading held-out rows", held_out, watch)}
    apart = [example for example in splits.train if example.group not in groups]
    unequal = [
        row
        for row in watched("comparing with held-out rows", apart, watch)
        if normalized(comparison_text(row)) not in texts
    ]
    kept = unequal
    if near_duplicate_threshold is not None:
        index = NearDuplicateIndex(sorted(texts), near_duplicate_threshold, watch)
        kept = [
            row
            for row in watched("looking for nearly the same among held-out rows", unequal, watch)
            if not index.similar(comparison_text(row))
        ]
    left = [len(splits.train), len(apart), len(unequal), len(kept)]
    counts = {name: before - after for name, before, after in zip(REMOVED, left, left[1:], strict=False)}
    return replace(splits, train=tuple(kept)), counts


def cap(examples: tuple[Example, ...], limit: int | None, seed: int) -> tuple[Example, ...]:
    """Keep at most `limit` rows, picked by a hash of their text, in their order."""
    if limit is None or len(examples) <= limit:
        return examples
    order = sorted(range(len(examples)), key=lambda i: (hash_order(_exact_text(examples[i]), seed), i))
    return tuple(examples[i] for i in sorted(order[:limit]))
