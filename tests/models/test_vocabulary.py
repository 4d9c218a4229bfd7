"""Tokens beyond the embedding: refused by name, but for those that only a row that spells them out can give."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from malora_dist.data.encode import ChoiceItem, Sample
from malora_dist.errors import ConfigError, DataError
from malora_dist.models.load import load_tokenizer
from malora_dist.models.vocabulary import check_tokens, check_vocabulary, embedding_rows
from tests.families import family_model
from tests.tiny_models import byte_tokenizer, tiny_llama

ROWS = 259


def test_all_tokens_have_a_row() -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == ROWS and check_vocabulary(tokenizer, ROWS) == {}


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_without_a_row_are_named(special: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    message = rf"2 tokens for which the model has no row \(<think> 259, </think> 260\): its embedding has {ROWS}"
    with pytest.raises(ConfigError, match=message):
        check_vocabulary(tokenizer, ROWS)
    assert check_vocabulary(tokenizer, ROWS + 2) == {}


def test_ids_count_and_not_only_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokenizers leave ids out."""
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"a": 5, "b": 700})
    with pytest.raises(ConfigError, match=r"1 token .* \(b 700\)"):
        check_vocabulary(tokenizer, 512)


@pytest.mark.parametrize("named", ["pad_token", "image_token"])
def test_padding_and_places_of_pictures_may_lie_beyond(tmp_path: Path, named: str) -> None:
    """Gemma 3 of 1B has a token for pictures and no row for it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<soft>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {named: "<soft>"}))
    assert check_vocabulary(load_tokenizer(tmp_path), ROWS) == {ROWS: "<soft>"}


def _data(*ids: int) -> Any:
    sample = Sample(0, 0, np.array(ids, dtype=np.int32), 1)
    item = ChoiceItem(1, ids[:1], (ids,), (1,), 0)
    return [
        SimpleNamespace(task_names=("a", "b"), train=train, evaluation={"test": {"b": items}})
        for train, items in (([sample], []), ([], [item]), ([], [sample]))
    ]


def test_rows_that_spell_them_out_are_refused_by_task() -> None:
    beyond = {ROWS: "[PAD]"}
    for data in _data(3, 8, ROWS - 1):
        check_tokens(data, beyond)
    for data, task in zip(_data(3, ROWS, 8), "abb", strict=True):
        check_tokens(data, {})
        with pytest.raises(DataError, match=rf"task {task}: a row holds \[PAD\], for which the model has no row"):
            check_tokens(data, beyond)


def test_the_rows_of_a_model() -> None:
    assert embedding_rows(tiny_llama()) == 61
    assert embedding_rows(family_model("gpt2")) == 64
