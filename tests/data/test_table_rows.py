"""Tables in text and in Parquet: rows, or file, row and column of what is wrong."""

import csv
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from malora_dist.data.tasks import load_task


def test_a_table_as_pandas_writes_it(tmp_path: Path) -> None:
    """Its first column has no name and holds the row's number."""
    path = tmp_path / "t.csv"
    path.write_text(',prompt,response\n0,Spell 0,0 0\n1,"a, b",1 1\n\n2,Spell 2,2 2\n')
    rows = load_task(name="t", train=str(path)).train
    assert [(row.prompt, row.response) for row in rows] == [("Spell 0", "0 0"), ("a, b", "1 1"), ("Spell 2", "2 2")]
    assert rows[2].source == f"{path}: row 3"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (",,,\n,,,\n", ":1: the first line must name the columns, all its 4 cells are empty"),
        ("prompt,response,prompt\na,b,c\n", ": two columns have the name 'prompt'"),
        ("prompt,response\n", ": no rows"),
        ("prompt,response\na,b\nc,d,e\n", ": row 2: has 3 cells where the first line names 2 columns"),
        ("prompt,response\na,b\nc\n", ": row 2: has 1 cells where the first line names 2 columns"),
        ("prompt,response\n,\n", ": row 1: field 'prompt' is empty"),
        ('prompt,response\na,b\n"c,d\ne,f\n', ": row 2: cannot be read, from line 3 on: unexpected end of data"),
        ('prompt,response\n"a"x,b\n', ": row 1: cannot be read, from line 2 on: ',' expected after '\"'"),
        (
            "question;answer\na;b\n",
            ": row 1: field 'prompt' is missing; the row has ['question;answer'] (`fields: {prompt",
        ),
    ],
)
def test_a_table_that_is_none(tmp_path: Path, text: str, why: str, refusal: Any) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert f"{path}{why}" in refusal(path)


def test_a_cell_may_be_long_and_hold_anything(tmp_path: Path) -> None:
    path, long = tmp_path / "t.tsv", "x" * 200_000
    path.write_text(f'prompt\tresponse\n{long}\t"tab\tand\nline"\n')
    (row,) = load_task(name="t", train=str(path)).train
    assert (row.prompt, row.response) == (long, "tab\tand\nline") and csv.field_size_limit() == 131_072


def test_a_column_of_parquet_with_a_number_missing(tmp_path: Path, refusal: Any) -> None:
    path = tmp_path / "t.parquet"
    columns = {"prompt": ["p", "q", "r"], "A": ["a"] * 3, "B": ["b"] * 3, "C": ["c", None, ""]}
    for missing in (None, float("nan")):
        table = pyarrow.table({**columns, "label": pyarrow.array([1.0, missing, 0.0], from_pandas=missing is None)})
        parquet.write_table(table, path)
        fields = {"prompt": "prompt", "choices": ("A", "B", "C"), "label": "label", "response": "response"}
        assert f"{path}: row 2: field 'label' is null" in refusal(path, fields=fields)
        rows = load_task(name="t", train=str(path), fields=fields, on_bad_row="skip").train
        assert [(row.label, row.choices) for row in rows] == [(1, ("a", "b", "c")), (0, ("a", "b"))]


def test_a_value_of_parquet_that_python_cannot_hold_is_a_bad_row(tmp_path: Path, refusal: Any) -> None:
    path = tmp_path / "t.parquet"
    broken = pyarrow.array([b"fine", b"b\xff", b"fine too"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": broken, "response": ["r"] * 3}), path)
    assert f"{path}: row 2: field 'prompt' must be text, is invalid UTF-8" in refusal(path)
    parquet.write_table(pyarrow.table([["p"], ["q"]], names=["prompt", "prompt"]), path)
    assert f"{path}: two columns have the name 'prompt'" in refusal(path)


def test_what_nobody_reads_in_parquet_may_be_anything(tmp_path: Path, refusal: Any) -> None:
    path = tmp_path / "t.parquet"
    texts = pyarrow.array(["a", "b"])
    late = pyarrow.array([253402300800000, 2], pyarrow.timestamp("ms"))
    counts = pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    broken = pyarrow.array([b"\xff", b"fine"]).view(pyarrow.string())
    columns = {"prompt": texts, "a.b": texts, "response": texts.dictionary_encode(), "text": texts.cast("string_view")}
    for more in ({"late": late}, {"counts": counts}, {"broken": broken}, {"late": late, "counts": counts}):
        parquet.write_table(pyarrow.table(columns | more), path)
        rows = load_task(name="t", train=str(path), template_fields=("a.b", "text")).train
        assert [(row.prompt, row.response, row.extra["text"], row.extra["a.b"]) for row in rows] == [
            ("a", "a", "a", "a"), ("b", "b", "b", "b")
        ]  # fmt: skip
    needed = {"template_fields": ("late",)}
    assert f"{path}: row 1: field 'late' must be text, is a timestamp[ms] that Python cannot" in refusal(path, **needed)
    needed = {"template_fields": ("counts",)}
    assert f"{path}: row 1: field 'counts' must be text, is a value of Arrow's type map" in refusal(path, **needed)


def test_parquet_without_rows_says_so_and_nothing_else(
    tmp_path: Path, refusal: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["p"], "response": ["r"]}).slice(0, 0), path)
    assert f"{path}: no rows" in refusal(path)
    assert capfd.readouterr() == ("", "")
