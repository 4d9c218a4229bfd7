"""Built once, whole or not at all; and built again exactly when its content changes."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from malora_dist.data import tokenize
from malora_dist.data.encode import Encoder
from malora_dist.data.tokenize import USED, content_key, prepare_task, read_task, tokenizer_fingerprint
from malora_dist.errors import DataError

ROWS = [{"prompt": f"p {i} of many", "choices": ["no", "yes it is"], "label": i % 2} for i in range(20)]


def prepare(settings: dict[str, Any], encoder: Encoder, cache: Path) -> tuple[Path, str]:
    return prepare_task(settings, encoder, cache, tokenizer_key=tokenizer_fingerprint(encoder.tokenizer))


def settings(path: str, **more: Any) -> dict[str, Any]:
    return {"name": "t", "train": path, "validation_size": 5, **more}


def test_what_is_read_back_is_what_was_encoded(
    write_jsonl: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    encoder = Encoder(tokenizer, 28)
    folder, _ = prepare(settings(write_jsonl("t.jsonl", ROWS)), encoder, tmp_path)
    tokens = read_task(folder, task_id=4, first_id=100)
    assert (tokens.kind, len(tokens.train), len(tokens.evaluation["validation"])) == ("multiple_choice", 15, 5)
    assert tokens.evaluation["test"] == []
    assert tokens.counts["prompts_cut"] == 20 and tokens.counts["train"] == 15
    sample = tokens.train[-1]
    assert (sample.sample_id, sample.task_id) == (114, 4)
    assert tokenizer.decode(sample.input_ids) == "on: p 18 of many\nAnswer: no</s>"
    assert tokenizer.decode(sample.input_ids[sample.prompt_length :]) == " no</s>"
    item = tokens.evaluation["validation"][0]
    assert [tokenizer.decode(ids) for ids in item.choice_ids] == [" no", " yes it is"]  # type: ignore[union-attr]
    assert item.task_id == 4


def test_completions_keep_samples_for_evaluation(
    write_jsonl: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl("t.jsonl", [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(20)])
    folder, _ = prepare(settings(path), Encoder(tokenizer, 64), tmp_path)
    held = read_task(folder, task_id=0, first_id=0).evaluation["validation"]
    texts = [tokenizer.decode(s.input_ids) for s in held]  # type: ignore[union-attr]
    assert len(texts) == 5 and all(t.startswith("Question: p") and t.endswith("</s>") for t in texts)


def test_the_key_follows_the_content(write_jsonl: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def key(path: str, encoder: Encoder, **more: Any) -> str:
        return prepare(settings(path, **more), encoder, tmp_path / "cache")[1]

    path = write_jsonl("t.jsonl", ROWS)
    base = key(path, Encoder(tokenizer, 64))
    assert key(write_jsonl("other_name.jsonl", ROWS), Encoder(tokenizer, 64)) == base
    others = [
        key(path, Encoder(tokenizer, 65)),
        key(path, Encoder(tokenizer, 64, prompt_template="{prompt}")),
        key(path, Encoder(tokenizer, 64, scoring="letter")),
        key(path, Encoder(tokenizer, 64), split_seed=1),
        key(write_jsonl("t.jsonl", ROWS[1:]), Encoder(tokenizer, 64)),
    ]
    assert len({base, *others}) == 6


def test_files_are_hashed_in_parts_between_looks(
    write_jsonl: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start of every process reads all of them, prepared or not."""
    path = write_jsonl("t.jsonl", ROWS)
    before = prepare(settings(path), Encoder(tokenizer, 64), tmp_path)
    monkeypatch.setattr(tokenize, "BYTES_AT_ONCE", 100)
    seen: list[tuple[int, int]] = []
    watch = lambda work, *how_far: seen.append(how_far)  # noqa: E731
    assert prepare(settings(path), Encoder(tokenizer, 64, watch=watch), tmp_path) == before
    size = Path(path).stat().st_size
    assert len(seen) > 5 and seen[-1] == (size, size) and seen[:2] == [(100, size), (200, size)]


def test_the_fingerprint_follows_the_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    same, other = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    same("a text", truncation=True, max_length=3)
    other.add_tokens(["<new>"])
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)


def test_the_fingerprint_follows_what_the_wrapper_makes_of_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """A setting that is in no rules: special tokens in a text are read as plain letters."""
    other = copy.deepcopy(tokenizer)
    other.split_special_tokens = True
    assert other("</s>")["input_ids"] != tokenizer("</s>")["input_ids"]
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_a_failed_build_leaves_nothing_behind(
    write_jsonl: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl("t.jsonl", [*ROWS, {"prompt": "no choices"}])
    with pytest.raises(DataError, match="choices"):
        prepare(settings(path), Encoder(tokenizer, 64), tmp_path / "cache")
    assert [found.suffix for found in (tmp_path / "cache" / "data").iterdir()] == [".lock"]


def change_every_module_in_turn(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each module that rows pass through, with other bytes."""
    read, sources = (
        Path.read_bytes,
        [*Path(tokenize.__file__).parent.glob("*.py"), *(Path(str(m.__file__)) for m in USED)],
    )
    for changed in sources:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, changed=changed: read(path) + b"#" * (path == changed))
            yield changed.name


def test_the_key_follows_the_code(
    write_jsonl: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fingerprint = write_jsonl("t.jsonl", ROWS), tokenizer_fingerprint(tokenizer)
    key = lambda: content_key(settings(path), Encoder(tokenizer, 64), fingerprint)  # noqa: E731
    keys = {name: key() for name in change_every_module_in_turn(monkeypatch)}
    assert {"tokenize.py", "json_text.py", "data_schema.py"} <= keys.keys()
    assert len({key(), *keys.values()}) == len(keys) + 1


def test_a_damaged_folder_of_the_cache_is_named(
    write_jsonl: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Any file of it: missing, empty or cut, as a full disk or a cleaner of /tmp leaves it."""
    folder, _ = prepare(settings(write_jsonl("t.jsonl", ROWS)), Encoder(tokenizer, 64), tmp_path)
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("test."))
    for path in files:
        content = path.read_bytes()
        for left in (None, b"", content[: len(content) // 2], content[:-1]):
            path.unlink()
            if left is not None:
                path.write_bytes(left)
            with pytest.raises(DataError, match=f"{folder} of the cache .* is damaged: .*; remove that folder"):
                read_task(folder, task_id=0, first_id=0)
            path.write_bytes(content)
    assert len(files) > 5 and read_task(folder, task_id=0, first_id=0).kind == "multiple_choice"


def test_a_row_file_that_cannot_be_read_is_named(
    write_jsonl: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not the cache that is at fault."""

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error", "rows.jsonl")

    path = write_jsonl("t.jsonl", ROWS)
    for name in ("load_task", "content_key"):
        with monkeypatch.context() as patch:
            patch.setattr(tokenize, name, broken)
            with pytest.raises(DataError, match="task t: rows.jsonl cannot be read: Input/output error"):
                prepare(settings(path), Encoder(tokenizer, 64), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(
    write_jsonl: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir: .* cannot be written"):
        prepare(settings(write_jsonl("t.jsonl", ROWS)), Encoder(tokenizer, 64), tmp_path / "file")
