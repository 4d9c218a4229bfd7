"""Reading tensors and parts of them, to the byte, and naming what is damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from malora_dist.errors import ConfigError
from malora_dist.models.weights.reader import INDEX, TensorReader, weight_files
from tests.tiny_models import save_tiny_llama, tiny_llama


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_each_tensor_is_found_in_its_file(tmp_path: Path, shard_size: str) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    reader = TensorReader(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.read([name]), parameter)
        flat, middle = parameter.flatten(), parameter.numel() // 3
        assert torch.equal(reader.read_part([name], middle, parameter.numel() - 1), flat[middle:-1])
    name, parameter = next(model.named_parameters())
    assert torch.equal(reader.read(["an.older.name", name]), parameter)
    with pytest.raises(ConfigError) as caught:
        reader.read(["model.gone.weight", "gone.too"])
    assert all(part in str(caught.value) for part in ("model.gone.weight or gone.too", str(tmp_path)))


def test_only_the_bytes_asked_for_leave_the_disk(tmp_path: Path) -> None:
    """The kernel's own count of bytes read, and the reader's."""
    save_tiny_llama(tmp_path, dtype=torch.bfloat16, vocab_size=500_000)

    def bytes_of_process() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    reader = TensorReader(tmp_path)
    before, counted = bytes_of_process(), reader.bytes_read
    whole = reader.read_part(["lm_head.weight"], 1_000_000, 2_000_000)
    assert whole.dtype == torch.bfloat16 and reader.bytes_read - counted == 2_000_000
    assert 2_000_000 <= bytes_of_process() - before < 2_100_000


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        TensorReader(tmp_path)
    assert str(tmp_path) in str(caught.value) and "model.safetensors" in str(caught.value)


def _header(entry: str) -> bytes:
    text = f'{{"a": {entry}}}'.encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("model.safetensors", b"junk", id="junk"),
        pytest.param("model.safetensors", b"\xff" * 64, id="endless-header"),
        pytest.param("model.safetensors", _header("{}"), id="no-dtype"),
        pytest.param("model.safetensors", _header("[]"), id="no-object"),
        pytest.param(
            "model.safetensors",
            _header('{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}') + b"1234567",
            id="cut",
        ),
        pytest.param(
            "model.safetensors",
            _header('{"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}') + b"12345678",
            id="size",
        ),
        pytest.param("model.safetensors.index.json", b"{}", id="index-without-map"),
        pytest.param("model.safetensors.index.json", b"{", id="broken-index"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is missing or damaged"):
        TensorReader(tmp_path)


def test_a_dtype_that_is_not_read_matters_where_it_is_asked_for(tmp_path: Path) -> None:
    """Old files hold masks of booleans, or scales of formats that other tools know."""
    header = (
        b'{"mask": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]},'
        b' "scale": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [2, 3]},'
        b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [3, 4]}}'
    )
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x00\x01\x02\x03")
    reader = TensorReader(tmp_path)
    assert reader.names() == ["mask", "a", "scale"]
    assert reader.read(["mask"]).tolist() == [False, True] and reader.read(["a"]).tolist() == [3]
    with pytest.raises(ConfigError, match="model.safetensors: scale has dtype F8_E8M0; those read are F64"):
        reader.read(["scale"])


def _two_models(folder: Path) -> None:
    """A sharded model, and another one in one file beside it."""
    model = tiny_llama()
    model.save_pretrained(folder, max_shard_size="20KB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("named", [None, "model.safetensors.index.json", "model.safetensors", "other.safetensors"])
def test_of_several_models_in_a_folder_that_of_transformers_is_read(tmp_path: Path, named: str | None) -> None:
    """One file goes before an index, and what config.json names before both."""
    from transformers import AutoModelForCausalLM

    _two_models(tmp_path)
    if named == "other.safetensors":
        (tmp_path / "model.safetensors").rename(tmp_path / named)
    if named is not None:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    theirs, reader = AutoModelForCausalLM.from_pretrained(tmp_path), TensorReader(tmp_path)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(reader.read([name]), parameter), name


@pytest.mark.parametrize("named", ["gone.safetensors", "../model.safetensors", "model.bin", 5])
def test_a_file_that_config_json_names_and_that_is_none_is_refused(tmp_path: Path, named: object) -> None:
    _two_models(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}))
    with pytest.raises(ConfigError, match="transformers_weights"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("weight_map", ["[]", '"x"', '{"a": 5}', '{"a": null}', "null", "[" * 100_000])
def test_an_index_that_is_none_is_named(tmp_path: Path, weight_map: str) -> None:
    (tmp_path / INDEX).write_text(f'{{"weight_map": {weight_map}}}')
    for read in (TensorReader, weight_files):
        with pytest.raises(ConfigError, match="index.json is missing or damaged"):
            read(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "a/../../x.safetensors", "/x.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, file: str) -> None:
    """As one from a hub might, to a file that is its reader's alone."""
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(
        ConfigError, match=f"{INDEX} is missing or damaged: .* '{file}', which is no file of its folder"
    ):
        weight_files(tmp_path)


def test_a_shard_that_is_missing_or_holds_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ConfigError, match="gone.safetensors is missing or damaged"):
        TensorReader(tmp_path).read(["a"])
    (tmp_path / "gone.safetensors").write_bytes(
        _header('{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}').replace(b'"a"', b'"b"') + b"1"
    )
    with pytest.raises(ConfigError, match="gone.safetensors is missing or damaged: it holds no a"):
        TensorReader(tmp_path).read(["a"])
