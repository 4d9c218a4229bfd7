"""Each task is tokenised once: the first process builds a cached folder, the others wait on a file lock and load it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from malora_dist.config import data_schema
from malora_dist.data.encode import Encoder
from malora_dist.data.example import MULTIPLE_CHOICE
from malora_dist.data.rows import find_files
from malora_dist.data.store import (
    FORMAT_VERSION,
    TaskTokens,
    read_choice_items,
    read_samples,
    read_summary,
    split_digest,
    write_choice_items,
    write_samples,
    write_summary,
)
from malora_dist.data.tasks import TaskData, load_task
from malora_dist.data.templates import template_fields
from malora_dist.data.watch import READING_FILES, Watch
from malora_dist.errors import DataError
from malora_dist.files import json_text
from malora_dist.files.cache import build_once

EVALUATION_SPLITS = ("validation", "test")
SPLITS = ("train", *EVALUATION_SPLITS)
BYTES_AT_ONCE = 2**20
# What a value of a row is, and which fields a template names.
USED = (json_text, data_schema)
PROBE = "  A  Probe\n\tof 1234,5 \u00c9e\u0301 \U0001f600"


def prepare_task(
    settings: Mapping[str, Any], encoder: Encoder, cache_dir: Path, *, tokenizer_key: str
) -> tuple[Path, str]:
    """Tokenise a task unless the cache has it; return its folder and key. `settings` are arguments of `load_task`.

    `tokenizer_key` is the `tokenizer_fingerprint` of the encoder's tokenizer, which is slow to take anew for each task.

    The key is a hash of all that the result depends on: the bytes of the task's files, the settings, the templates,
    the tokenizer, the length, and this code. Raises DataError as `load_task` does, and if a file of the task cannot be
    read or the cache cannot be written.
    """
    fields = [*template_fields(encoder.prompt_template), *template_fields(encoder.response_template)]
    extra = tuple(sorted(set(fields) - {"prompt", "response"}))
    settings = {**settings, "template_fields": extra, "scoring": encoder.scoring}
    with _readable(settings["name"]):
        key = content_key(settings, encoder, tokenizer_key)
    folder = cache_dir / "data" / f"{settings['name']}-{key[:20]}"

    def build(target: Path) -> None:
        with _readable(settings["name"]):
            task = load_task(**settings, watch=encoder.watch)
        _write_task(target, task, encoder)

    try:
        build_once(folder, build, lambda: encoder.watch("waiting for the process that prepares it", 0, 0))
    except OSError as error:
        raise DataError(f"data.cache_dir: {folder.parent} cannot be written: {error}") from error
    return folder, key


def read_task(folder: Path, *, task_id: int, first_id: int) -> TaskTokens:
    """Read a prepared task; its training samples are numbered from `first_id`.

    Raises DataError, naming the folder, if a file of it is missing or damaged.
    """
    try:
        return _read_task(folder, task_id, first_id)
    except (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise DataError(
            f"{folder} of the cache (data.cache_dir) is damaged: {error!r}; remove that folder, and the task is "
            "prepared again"
        ) from error


def _read_task(folder: Path, task_id: int, first_id: int) -> TaskTokens:
    summary = read_summary(folder)
    evaluation: dict[str, Any] = {}
    for split in EVALUATION_SPLITS:
        if summary["kind"] == MULTIPLE_CHOICE:
            evaluation[split] = read_choice_items(folder, split, task_id=task_id)
        else:
            evaluation[split] = list(read_samples(folder, split, task_id=task_id))
    train = read_samples(folder, "train", task_id=task_id, first_id=first_id)
    return TaskTokens(summary["kind"], summary["scoring"], train, evaluation, summary["counts"], summary["digests"])


@contextmanager
def _readable(task: str) -> Iterator[None]:
    """Turn an OSError of a task's own files into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"task {task}: {error.filename or 'its file'} cannot be read: {error.strerror or error}"
        ) from error


def _write_task(folder: Path, task: TaskData, encoder: Encoder) -> None:
    counts = Counter(task.counts)
    for split in SPLITS:
        examples = getattr(task, split)
        if task.kind == MULTIPLE_CHOICE and split != "train":
            items = encoder.choice_items(examples, 0, counts)
            write_choice_items(folder, split, items)
            counts[split] = len(items)
        else:
            samples = encoder.samples(examples, 0, counts)
            write_samples(folder, split, samples)
            counts[split] = len(samples)
    digests = {split: split_digest(folder, split) for split in SPLITS}
    write_summary(folder, kind=task.kind, scoring=task.scoring, counts=dict(counts), digests=digests)


def content_key(settings: Mapping[str, Any], encoder: Encoder, tokenizer_key: str) -> str:
    """Hash the content of a task's files, the settings other than their names, the encoder and this code."""
    files = {
        split: [_file_hash(path, encoder.watch) for path in find_files(_paths(settings[split]), task=settings["name"])]
        for split in SPLITS
        if settings.get(split) is not None
    }
    parts = {
        "format": FORMAT_VERSION,
        "code": _code_hash(),
        "files": files,
        "settings": {name: value for name, value in settings.items() if name not in SPLITS},
        "tokenizer": tokenizer_key,
        "start_of_text": encoder.start_of_text,
        "end_of_text": encoder.end_of_text,
        "templates": [encoder.prompt_template, encoder.response_template],
        "max_seq_length": encoder.max_seq_length,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's rules and vocabulary, wherever it was loaded from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        # State of the last call, not of the tokenizer.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    # Some settings are the wrapper's, and in no rules: what it makes of blanks, cases and special tokens shows them.
    text = " ".join([PROBE, *map(str, tokenizer.all_special_tokens)])
    probe = tokenizer(text, add_special_tokens=False)["input_ids"]
    return hashlib.sha256(json.dumps([rules, probe], sort_keys=True).encode()).hexdigest()


def _paths(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _file_hash(path: Path, watch: Watch) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while part := file.read(BYTES_AT_ONCE):
            watch(READING_FILES, file.tell(), size)
            digest.update(part)
    # The format is part of the content: .csv and .tsv read the same bytes differently.
    return path.suffix.lower() + digest.hexdigest()


def _code_hash() -> str:
    """Hash the code that makes samples of rows: this folder, and what it takes from others for that."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), *(Path(str(module.__file__)) for module in USED)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
