"""Blocks of Python that are marked so run as they stand, on a tiny model."""

from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ALL_BLOCKS, Block
from tests.tiny_models import byte_tokenizer, tiny_llama

RUN = [block for block in ALL_BLOCKS if block.language == "python" and block.mark == "run"]
# Of several lengths, as texts are.
ROWS = [{"input_ids": list(range(length)), "labels": list(range(length))} for length in range(5, 13)]


@pytest.mark.parametrize("block", RUN, ids=str)
def test_marked_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def tiny(*_: Any, **settings: Any) -> Any:
        assert not settings, "the tiny model has none of these"
        return tiny_llama()

    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", tiny)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: tokenizer)
    exec(compile(block.text, str(block), "exec"), {"rows": ROWS})
    assert list(tmp_path.rglob("adapter_model.safetensors"))


def test_the_readme_begins_with_python_that_runs() -> None:
    assert [block.page.name for block in RUN][:1] == ["README.md"]
