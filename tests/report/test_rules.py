"""Files of a run folder whose values are not what they should be, one value after another."""

import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from malora_dist.errors import MaloraError
from malora_dist.report import write_report
from malora_dist.report.facts import key_facts, run_facts
from malora_dist.report.inputs import read_run
from malora_dist.report.results import headline, improvements, read_results
from malora_dist.report.rules import clean
from malora_dist.report.tables import counts_table, loss_table, results_table
from tests.fuzz.mutate import safetensors_file
from tests.report.run_folder import write_run

HOSTILE = "<script>alert(1)</script>'\"{{7*7}}&<b "
FILES = ("config.yaml", "data.json", "eval.json", "adapter/adapter_config.json", "metrics.jsonl")
Place = tuple[str | int, ...]


class Tags(HTMLParser):
    """The tags and attributes of a page, which none of its texts may add to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(name for name, _ in attrs)}

    handle_startendtag = handle_starttag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("hostile") / "run", tasks=["a", "b"], steps=20, layers=1)


@pytest.fixture(scope="module")
def tags(folder: Path) -> set[str]:
    return Tags(write_report(folder).read_text()).found


def load(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())


def store(path: Path, value: Any) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
    else:
        path.write_text(yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value))


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every place in a value, of long lists only the beginning."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    if isinstance(value, list):
        for index, item in enumerate(value[:3]):
            yield from places(item, (*at, index))


def changed(value: Any, at: Place, new: Any, *, key: bool) -> Any:
    """A copy with another value at a place, or with another key for it."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for part in at[:-1]:
        inner = inner[part]
    if key:
        inner[new] = inner.pop(at[-1], 0)
    else:
        inner[at[-1]] = new
    return copy


def is_read(folder: Path) -> bool:
    """Whether the folder is read, and all but its pictures can then be shown; what is not is damage, in words."""
    try:
        run = read_run(folder)
    except MaloraError as error:
        assert "damaged" in str(error)
        return False
    results = read_results(run.evaluations, run.tasks)
    shown = [key_facts(run), run_facts(run), headline(results), improvements(results)]
    assert [*shown, results_table(results), loss_table(results), counts_table(run.counts)]
    return True


def check_everywhere(path: Path, value: Any, folder: Path, tags: set[str]) -> int:
    """Put a value into every place of a file in turn, and all that are read so into one page; how many these are."""
    before, taken = load(path), list[tuple[Place, bool]]()
    for at in places(before):
        for key in (False, True)[: 1 + (isinstance(value, str) and isinstance(at[-1], str))]:
            store(path, changed(before, at, value, key=key))
            if is_read(folder):
                taken.append((at, key))
    together = before
    # The innermost first, keys last: what lies within a place that is changed too goes with it.
    for number, (at, key) in enumerate(sorted(taken, key=lambda place: (place[1], -len(place[0])))):
        if not any(at == other[: len(at)] and at != other for other, _ in taken) or key:
            together = changed(together, at, f"{value}{number}" if key else value, key=key)
    store(path, together)
    try:
        page = write_report(folder).read_text(encoding="utf-8")
        assert Tags(page).found <= tags and "<b " not in page
    finally:
        store(path, before)
    return len(taken)


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_text_in_every_field_is_text_or_damage(name: str, folder: Path, tags: set[str]) -> None:
    assert check_everywhere(folder / name, HOSTILE, folder, tags) > 5, "most of them are shown"
    assert "49&amp;&lt;b" not in (folder / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "value",
    [None, True, [], {"n": {}}, 1e308, math.nan, -math.inf, 10**400, "\ud83d\0\ufffe"],
    ids=lambda value: repr(value)[:9],
)
@pytest.mark.parametrize("name", FILES)
def test_a_value_of_another_kind_is_shown_or_damage(name: str, value: Any, folder: Path, tags: set[str]) -> None:
    check_everywhere(folder / name, value, folder, tags)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"[" * 99_999, b"\xff\xfe", b"null", b"{}\n", b'{"a": NaN}', b"2024-13-45"])
def test_files_of_something_else_are_damage_or_empty(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / name).write_bytes(content)
    try:
        assert "<!DOCTYPE html>" in write_report(tmp_path).read_text()
    except MaloraError as error:
        assert name in str(error) and "damaged" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "train: {seed: !!bool maybe}",
        'train: {seed: !!int ""}',
        'train: {seed: !!float ""}',
        "train: {seed: !!timestamp x}",
        "train: {seed: 1, seed: 2}",
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)),
    ],
)
def test_a_config_is_read_as_a_recipe_is(text: str, tmp_path: Path) -> None:
    """With its words and its limits: what no run has written is damage, and takes no time."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(MaloraError, match="config.yaml is damaged: line "):
        write_report(tmp_path)


@pytest.mark.parametrize("shape", [[10**4000, 10**4000], [-1], [1.5], ["3"], "33", [2**60, 2**60]])
def test_a_header_that_no_file_has_is_damage(shape: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(safetensors_file({"a": {"shape": shape}}, b""))
    with pytest.raises(MaloraError, match="adapter_model.safetensors is damaged: its header"):
        write_report(tmp_path)


def test_what_no_page_can_hold_is_replaced() -> None:
    assert clean({"a\0": ["b\ud83d", "\ufffec\x85", "grün\n\t😀", 1]}) == {
        "a\ufffd": ["b\ufffd", "\ufffdc\ufffd", "grün\n\t😀", 1]
    }
