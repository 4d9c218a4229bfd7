"""Finding a model's folder, and converting a GGUF file."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as progress

from malora_dist.distributed.process_groups import World
from malora_dist.errors import ConfigError
from malora_dist.files.cache import default_cache_dir
from malora_dist.files.locks import lock_at
from malora_dist.models.resolve import _converted_folder, local_model, resolve_model, stored_tensors
from malora_dist.plan.find_shape import local_config
from tests.families import family_model
from tests.hub import local_hub
from tests.multiprocess import run_distributed
from tests.tiny_models import smollm2_file

BLOCKS, MERGES = 2, 1000


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["{tmp}/gone", "./gone", "a/b/c", "{tmp}/gone.gguf"])
def test_a_missing_path_is_named_and_never_looked_up_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("malora_dist.models.resolve._download", lambda *_: pytest.fail("took a path for a hub id"))
    name = name.format(tmp=tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve_model(name, cache_dir=tmp_path)
    assert name in str(caught.value) and "there is no such" in str(caught.value)


@pytest.mark.parametrize("name", ["~nobodys-home/x", "a\0b", "x" * 5000, "y" * 5000 + ".gguf"])
def test_what_is_no_name_of_a_model_is_refused_in_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="model.name_or_path='.*(neither a local folder nor|there is no such)"):
        resolve_model(name)
    assert local_model(name) is None and local_config(name) is None


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_folder_one_stands_in(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="the base model has no name: say which"):
        resolve_model(name)
    assert local_model(name) is None


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="model.name_or_path='nobody/no-such-model' .* HF_HUB_OFFLINE=1 forbids"):
        resolve_model("nobody/no-such-model")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "big/gated",
            "model.name_or_path='big/gated' is gated: accept its terms at {url}/big/gated, then set HF_TOKEN",
        ),
        (
            "nobody/private",
            "'nobody/private' is neither a local folder nor a model at {url}.*; a private one needs HF_TOKEN",
        ),
    ],
)
def test_a_model_that_needs_a_token_says_so(monkeypatch: pytest.MonkeyPatch, model: str, message: str) -> None:
    with local_hub({"big/gated": None}) as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        with pytest.raises(ConfigError, match=message.format(url=url)):
            resolve_model(model)


@pytest.mark.parametrize("code", [False, True])
def test_what_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bool) -> None:
    """All that tokenizers and chat templates need; pickles never, code only where the recipe wants it."""
    wanted = {"config.json", "model.safetensors", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja"}
    wanted |= {"tokenizer.model", "qwen.tiktoken", "target.spm", "tokenizer_config.json"}
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in (*wanted, "modeling_own.py", "tokenizer_own.py", "pytorch_model.bin", "tokenizer.pkl", "README.md"):
        (repository / name).write_text(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with local_hub({"org/tiny": repository}) as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert local_model("org/tiny") is None
        folder = resolve_model("org/tiny", trust_remote_code=code)
    assert {file.name for file in folder.iterdir()} == wanted | (
        {"modeling_own.py", "tokenizer_own.py"} if code else set()
    )
    assert local_model("org/tiny", trust_remote_code=code) == folder


def test_a_gguf_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ConfigError, match=f"model.name_or_path='{file}': transformers cannot read this GGUF file"):
        resolve_model(str(file), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("gguf/m-*[0-9a-f]"))


def test_a_cache_for_conversions_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"MALORA_CACHE: {tmp_path / 'file'}/gguf cannot be written: "):
        resolve_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "file")


def test_whoever_waits_for_a_conversion_polls(tmp_path: Path) -> None:
    """So that a process which is told to stop does not wait for it."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    folder = _converted_folder(tmp_path / "m.gguf", tmp_path)
    folder.parent.mkdir(parents=True)

    def stop() -> None:
        raise KeyboardInterrupt

    with lock_at(Path(f"{folder}.lock")), pytest.raises(KeyboardInterrupt):
        resolve_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path, poll=stop)


@pytest.mark.parametrize("shown", [True, False])
def test_a_conversion_leaves_progress_bars_as_they_were(shown: bool, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(60))
    (progress.enable_progress_bar if shown else progress.disable_progress_bar)()
    try:
        with pytest.raises(ConfigError, match="cannot read this GGUF file"):
            resolve_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path)
        assert progress.is_progress_bar_enabled() == shown
    finally:
        progress.enable_progress_bar()


def test_a_gguf_file_asks_for_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r'a GGUF file needs the package gguf: pip install "malora_dist\[gguf\]"'):
        resolve_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax", "gpt2", "llama"])
def test_what_is_stored_of_a_model_is_all_of_it(family: str) -> None:
    """Routers have biases that are no parameters."""
    model = family_model(family)
    held, state = stored_tensors(model), model.state_dict()
    again = family_model(family, noise=0.0, scale=1.0)
    again.load_state_dict(held, strict=False)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_model_that_is_here(tmp_path: Path) -> None:
    assert local_model(str(tmp_path)) == tmp_path
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert local_model(str(tmp_path / "m.gguf"), cache_dir=tmp_path) is None
    assert local_model(str(tmp_path / "gone.gguf")) is None
    assert local_model("a/b/c") is None


def test_a_gguf_file_is_known_again_without_reading_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 GB take a minute to read; a file that was changed, in its name or in place, is another one."""
    file, other = tmp_path / "m.gguf", tmp_path / "o.gguf"
    file.write_bytes(b"GGUF" + bytes(2**16))
    monkeypatch.setattr("malora_dist.models.resolve._write_converted", lambda path, target: None)
    folder = resolve_model(str(file), cache_dir=tmp_path)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read all of it"))
    assert local_model(str(file), cache_dir=tmp_path) == folder
    other.write_bytes(b"GGUF" + bytes(2**16 + 1))
    other.replace(file)
    assert local_model(str(file), cache_dir=tmp_path) is None


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALORA_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("MALORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "malora_dist"


def convert_on_rank_1(world: World, gguf: str, cache_dir: str) -> str:
    """Not the main process: transformers' own writing would leave the weights out there."""
    return str(resolve_model(gguf, cache_dir=Path(cache_dir))) if world.rank == 1 else ""


def write_first_blocks(source: Path, target: Path) -> None:
    """Write a GGUF file of the first blocks and the first words of another: reading 49,152 words takes long."""
    from gguf import GGUFReader, GGUFWriter

    whole, part = GGUFReader(source), GGUFWriter(target, "llama")
    fields = {name: field for name, field in whole.fields.items() if not name.startswith("GGUF.")}
    del fields["general.architecture"]
    known = {name: field.contents() for name, field in fields.items()}
    words = len(known["tokenizer.ggml.tokens"]) - len(known["tokenizer.ggml.merges"]) + MERGES
    lengths = {"tokens": words, "token_type": words, "merges": MERGES}
    known |= {f"tokenizer.ggml.{name}": known[f"tokenizer.ggml.{name}"][:length] for name, length in lengths.items()}
    known |= {"llama.block_count": BLOCKS, "llama.vocab_size": words}
    for name, field in fields.items():
        part.add_key_value(name, known[name], field.types[0], field.types[-1])
    for tensor in whole.tensors:
        if tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= BLOCKS:
            continue
        data = tensor.data[:words] if tensor.name == "token_embd.weight" else tensor.data
        part.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    part.write_header_to_file()
    part.write_kv_data_to_file()
    part.write_tensors_to_file()
    part.close()


@pytest.mark.distributed
def test_gguf_is_converted_once_and_to_what_transformers_reads(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """A part of the real model's file; all of it in the long form."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = smollm2_file()
    if not pytestconfig.getoption("soak"):
        gguf = tmp_path / "small.gguf"
        write_first_blocks(smollm2_file(), gguf)
    cache = tmp_path / "cache"
    results = run_distributed("tests.models.test_resolve:convert_on_rank_1", 2, gguf=str(gguf), cache_dir=str(cache))
    folder = Path(results[1])
    assert folder.is_relative_to(cache)
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert resolve_model(str(gguf), cache_dir=cache) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = AutoTokenizer.from_pretrained(folder)
    text = "Question: 12 apples and 30 pears?\nAnswer: 42 fruits."
    ids = torch.tensor([theirs(text).input_ids])
    assert ours(text).input_ids == ids[0].tolist() and ours.eos_token_id == theirs.eos_token_id
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)(ids)
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.equal(logits, expected.logits)
