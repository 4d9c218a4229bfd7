import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from malora_dist.data.tasks import load_task
from malora_dist.errors import DataError
from tests.tiny_models import byte_tokenizer, smollm2_file


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    file = smollm2_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="session")
def refusal() -> Callable[..., str]:
    """What a task of one file, which cannot be used, is refused with."""

    def message(path: Path, **options: Any) -> str:
        with pytest.raises(DataError) as error:
            load_task(name="t", train=str(path), **options)
        return str(error.value)

    return message


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Iterable[Any]], str]:
    def write(name: str, rows: Iterable[Any]) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
