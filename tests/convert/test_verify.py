"""--verify finds a result that is wrong, and says which text it needs."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.io.folder import open_adapter
from malora_dist.adapters.loading import load_adapter
from malora_dist.adapters.methods import mixture_spec
from malora_dist.convert.gates import Replay, deciding
from malora_dist.convert.job import convert
from malora_dist.convert.kinds import ConvertOptions
from malora_dist.convert.verify import TOKENS, difference, judge, text_rows, verify_routed
from malora_dist.errors import CheckpointError, ConfigError, DataError
from tests.adapter_samples import edit_weights
from tests.convert.made import base, job_of, logits, run_kind, token_rows
from tests.tiny_models import byte_tokenizer, tiny_llama

SOURCE = Path("runs") / "malora"


def test_a_wrong_weight_or_logit_fails(workspace: Path, tmp_path: Path) -> None:
    """One entry of one B is off by a hundredth of the largest."""
    source = workspace / SOURCE
    shutil.copytree(source / "adapter", tmp_path / "wrong")

    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith(".B"))
        tensors[key][2, 5, 1] += 0.01 * tensors[key].abs().max()

    edit_weights(tmp_path / "wrong", change)
    job = job_of("adapter", source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"verification failed, .*/out is not written: max \|d logits\|"):
        verify_routed(job, open_adapter(source), open_adapter(tmp_path / "wrong"))
    one = torch.ones(3, 4)
    judge(job, "", [(one, one + 9e-5)], [(0.0, 1.0)])
    for logit_pair, weight in [((one, one + 1.1e-4), (0.0, 1.0)), ((one, one), (1.1e-5, 1.0))]:
        with pytest.raises(CheckpointError, match="verification failed"):
            judge(job, "", [logit_pair], [weight])
    assert difference((one, None), (one * math.nan, None))[0] == math.inf
    long = torch.randn(5000, 3)
    other = long.clone()
    other[4321, 1] += 1
    assert difference((long, torch.ones(3, 2)), (other, torch.ones(3, 2)))[0] == pytest.approx(1, abs=1e-4)


def test_a_failed_verification_leaves_nothing(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("malora_dist.convert.verify.WEIGHTS_TOLERANCE", 0.0)
    with pytest.raises(CheckpointError, match=r"verification failed, .*: expert-0: max \|d logits\|"):
        run_kind("peft-experts", workspace / SOURCE, tmp_path / "out", verify=True)
    assert not list(tmp_path.iterdir())


def test_text_of_a_file_and_of_the_tasks(workspace: Path, tmp_path: Path) -> None:
    source = workspace / SOURCE
    info = open_adapter(source).info
    rows = text_rows(job_of("adapter", source, tmp_path), info)
    assert len(rows) == 8 and len({tuple(row.tolist()) for row in rows}) == 8
    text = tmp_path / "text.txt"
    text.write_text("A horse and a bee came to the gate. " * 50)
    pieces = text_rows(job_of("adapter", source, tmp_path, text=text), info)
    assert [len(row) for row in pieces[:-1]] == [TOKENS] * (len(pieces) - 1) and 1 < len(pieces[-1]) <= TOKENS
    shutil.copytree(source / "adapter", tmp_path / "alone")
    said = run_kind("molora", tmp_path / "alone", tmp_path / "out", verify=True, text=text)
    assert said[0].startswith("verified max |d logits|")
    with pytest.raises(ConfigError, match="names no tasks, so give --text FILE or --recipe"):
        run_kind("molora", tmp_path / "alone", tmp_path / "other", verify=True)
    with pytest.raises(ConfigError, match="no.txt cannot be read as UTF-8 text"):
        run_kind("molora", tmp_path / "alone", tmp_path / "other", verify=True, text=tmp_path / "no.txt")
    text.write_text("")
    with pytest.raises(ConfigError, match="holds no text"):
        run_kind("molora", tmp_path / "alone", tmp_path / "other", verify=True, text=text)
    recipe = workspace / SOURCE / "config.yaml"
    assert run_kind("molora", tmp_path / "alone", tmp_path / "other", verify=True, recipe=recipe)


def test_tokens_and_positions_that_the_base_has_not(tmp_path: Path) -> None:
    """A word that was added to the tokenizer alone is refused before the work; rows end where positions do."""
    tokenizer, model = byte_tokenizer(), tiny_llama(vocab_size=259, max_position_embeddings=7)
    model.save_pretrained(tmp_path / "base")
    inject_adapters(model, mixture_spec("lora", r=2), ["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    text, options = tmp_path / "text.txt", {"base": str(tmp_path / "base"), "verify": True}
    text.write_text("hello world")
    tokenizer.save_pretrained(tmp_path / "base")
    job = job_of("merged", tmp_path / "adapter", tmp_path, text=text, **options)
    info = open_adapter(tmp_path / "adapter").info
    assert [len(row) for row in text_rows(job, info)] == [7, 4]
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "base")
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"the tokenizer has 1 token for which the model has no row \(<new> 259\)"):
        convert("merged", (tmp_path / "adapter",), tmp_path / "out", ConvertOptions(text=text, **options), said.append)
    assert said == [] and not (tmp_path / "out").exists()
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "base")
    text.write_text("hello <pad>")
    with pytest.raises(DataError, match="text.txt holds <pad>, for which the model has no row"):
        text_rows(job_of("merged", tmp_path / "adapter", tmp_path, text=text, **options), info)


def test_replay_gives_the_routings_again(workspace: Path) -> None:
    """A model with other routers, made to route as the first, is the first."""
    one, other = base(workspace), base(workspace)
    load_adapter(one, workspace / SOURCE)
    load_adapter(other, workspace / SOURCE)
    for name, parameter in other.named_parameters():
        if name.endswith("gate"):
            parameter.data.neg_()
    replay, rows = Replay(), token_rows()
    with deciding(one, replay.record):
        wanted = logits(one, rows)
    assert not torch.allclose(logits(other, rows), wanted, atol=1e-3)
    with deciding(other, replay.repeat):
        assert torch.equal(logits(other, rows), wanted)
    assert not replay.routings and torch.equal(logits(one, rows), wanted)
