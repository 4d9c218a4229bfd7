"""Names, and a manifest that comes back as it was or is refused by key, value and rule."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from malora_dist.checkpoint.layout import MANIFEST, FileRecord, Manifest, checkpoint_name, seal, shard_name, step_of
from malora_dist.errors import CheckpointError
from tests.checkpoint.samples import manifest_of

RECORD = FileRecord(12, "ab" * 32)
MANIFEST_7 = manifest_of(
    7,
    {"adapter_config.json": RECORD, "a.safetensors": RECORD},
    {"adapter": {"layer.B": "a.safetensors"}, "optimizer": {}, "rng": {}},
)


def test_names() -> None:
    assert [checkpoint_name(step) for step in (0, 7, 123456, 1234567)] == [
        "step-000000",
        "step-000007",
        "step-123456",
        "step-1234567",
    ]
    assert [step_of(checkpoint_name(step)) for step in (0, 7, 1234567)] == [0, 7, 1234567]
    odd = [
        "step-7",
        "step-0000007",
        ".step-000007.partial",
        "step-000007\n",
        "step--00007",
        "../step-000007",
        "",
        "step-",
    ]
    assert [step_of(name) for name in odd] == [None] * len(odd)
    assert shard_name("adapter", 1, 2) == "adapter-00001-of-00002.safetensors"


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    MANIFEST_7.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST_7
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]
    assert (tmp_path / MANIFEST).stat().st_mode & 0o777 == 0o644
    document = json.loads((tmp_path / MANIFEST).read_text())
    assert list(document) == [
        *("format_version", "malora_dist", "torch", "deepspeed", "transformers", "step", "topology", "config", "base"),
        *("state", "files", "tensors", "manifest_sha256"),
    ]
    assert document["files"]["a.safetensors"] == {"bytes": 12, "sha256": "ab" * 32}


def test_the_seal_is_of_the_bytes_before_it(tmp_path: Path) -> None:
    MANIFEST_7.write(tmp_path)
    content = (tmp_path / MANIFEST).read_bytes()
    assert content[-68:-4].decode() == hashlib.sha256(content[:-68]).hexdigest()


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    MANIFEST_7.write(tmp_path)
    content = (tmp_path / MANIFEST).read_bytes()
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << index % 8
        (tmp_path / MANIFEST).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=MANIFEST):
            Manifest.read(tmp_path)
    for size in range(0, len(content), 13):
        (tmp_path / MANIFEST).write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=MANIFEST):
            Manifest.read(tmp_path)


def changed(*keys: str, to: Any) -> Callable[[dict[str, Any]], object]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], list[str]]] = {
    "newer": (changed("format_version", to=2), ["format_version=2", "newer than 1", "malora_dist 0.3.0"]),
    "version 0": (changed("format_version", to=0), ["format_version=0", "at least 1"]),
    "version as text": (changed("format_version", to="1"), ["format_version='1'", "an integer"]),
    "version as a flag": (changed("format_version", to=True), ["format_version=True", "an integer"]),
    "no version": (lambda document: document.pop("format_version"), ["format_version is missing"]),
    "no key": (lambda document: document.pop("state"), ["state is missing", "an object"]),
    "no key inside": (lambda document: document["base"].pop("dtype"), ["base.dtype is missing", "a string"]),
    "unknown key": (changed("sate", to={}), ["sate is not a key", "state"]),
    "unknown key inside": (changed("topology", "tp_size", to=1), ["topology.tp_size", "ep_size"]),
    "step": (changed("step", to=-1), ["step=-1", "at least 0"]),
    "step as text": (changed("step", to="7"), ["step='7'", "an integer"]),
    "step as float": (changed("step", to=7.0), ["step=7.0", "an integer"]),
    "torch": (changed("torch", to=2), ["torch=2", "a string"]),
    "world_size": (changed("topology", "world_size", to=0), ["topology.world_size=0", "at least 1"]),
    "config": (changed("config", to=[]), ["config=[]", "an object"]),
    "revision": (changed("base", "revision", to=1), ["base.revision=1", "null"]),
    "bytes": (changed("files", "a.safetensors", "bytes", to=None), ["files['a.safetensors'].bytes=None", "an integer"]),
    "digest": (changed("files", "a.safetensors", "sha256", to="AB" * 32), ["sha256='ABAB", "hex digits"]),
    "record": (changed("files", "a.safetensors", to="x"), ["files['a.safetensors']='x'", "an object"]),
    "path upwards": (changed("files", "../a", to={}), ["'../a'", "plain name"]),
    "absolute path": (changed("files", "/etc/passwd", to={}), ["'/etc/passwd'", "plain name"]),
    "path below": (changed("files", "b/a", to={}), ["'b/a'", "plain name"]),
    "hidden file": (changed("files", ".a", to={}), ["'.a'", "plain name"]),
    "no name": (changed("files", "", to={}), ["''", "plain name"]),
    "itself": (changed("files", MANIFEST, to={}), ["another file"]),
    "unknown kind": (changed("tensors", "masters", to={}), ["tensors.masters", "rng"]),
    "no kind": (lambda document: document["tensors"].pop("rng"), ["tensors.rng is missing"]),
    "kind": (changed("tensors", "rng", to=[]), ["tensors.rng=[]", "an object"]),
    "file not listed": (changed("tensors", "adapter", "x", to="b"), ["tensors.adapter['x']='b'", "`files`"]),
    "file as list": (changed("tensors", "adapter", "x", to=["a"]), ["tensors.adapter['x']=['a']", "`files`"]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_breaks_a_rule_is_refused(tmp_path: Path, name: str) -> None:
    change, words = BAD[name]
    MANIFEST_7.write(tmp_path)
    document = json.loads((tmp_path / MANIFEST).read_text())
    del document["manifest_sha256"]
    change(document)
    (tmp_path / MANIFEST).write_text(seal(document))
    with pytest.raises(CheckpointError) as caught:
        Manifest.read(tmp_path)
    assert all(word in str(caught.value) for word in [str(tmp_path / MANIFEST), *words]), caught.value


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    with pytest.raises(CheckpointError, match=f"{path} cannot be read: No such file"):
        Manifest.read(tmp_path)
    for text, word in {
        "[1]": "a JSON object",
        "{": "damaged",
        "\x00": "damaged",
        '{"format_version": 1}': "end in",
    }.items():
        path.write_text(text)
        with pytest.raises(CheckpointError, match=word):
            Manifest.read(tmp_path)
    path.unlink()
    MANIFEST_7.write(tmp_path)
    path.rename(tmp_path / "elsewhere")
    os.symlink("elsewhere", path)
    with pytest.raises(CheckpointError, match="symbolic link"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), {1, 2}])
def test_what_json_lacks_is_not_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match="plain JSON"):
        dataclasses.replace(MANIFEST_7, state={"loss": value}).write(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": {1: 2}}], ids=["tuple", "number as key"])
def test_what_would_come_back_as_something_else_is_not_written(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="string keys"):
        dataclasses.replace(MANIFEST_7, state=state).write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_manifest_against_the_rules_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="plain name"):
        dataclasses.replace(MANIFEST_7, files=MANIFEST_7.files | {"../x": RECORD}).write(tmp_path)
    assert not list(tmp_path.iterdir())
