"""The checkpoint on disk, format_version 1: names of folders and files, and the manifest.

`docs/checkpoints.md` describes the format for other readers.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from malora_dist.errors import CheckpointError
from malora_dist.files import run_files
from malora_dist.files.durable import reading, write_text
from malora_dist.files.folder import is_cached
from malora_dist.files.json_rules import check_document
from malora_dist.files.json_text import parse_json

FORMAT_VERSION = 1
CHECKPOINTS = run_files.CHECKPOINTS
MANIFEST = "manifest.json"
ADAPTER_CONFIG = "adapter_config.json"
RNG_FILE = "rng.safetensors"
LATEST, BEST = "latest", "best"
# What stands in the file before and after the manifest's own checksum.
SEAL, SEAL_END = ',\n "manifest_sha256": "', '"\n}\n'
DIGEST_CHARACTERS = 64


def checkpoint_name(step: int) -> str:
    """Return `step-000123`; steps of more than six digits take more."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """Return the step of a finished checkpoint's folder name, None for any other name."""
    match = re.fullmatch(r"step-(\d{6,})", name, flags=re.ASCII)
    return int(match[1]) if match and checkpoint_name(int(match[1])) == name else None


def pointed_at(path: Path) -> Path:
    """Return the checkpoint that a file `latest` or `best` names; any other path as it is."""
    if path.name not in (LATEST, BEST) or not path.is_file():
        return path
    name = path.read_bytes()[:64].decode("utf-8", "replace").strip()
    return path if step_of(name) is None else path.with_name(name)


def is_of_run(checkpoint: Path, run: Path) -> bool:
    """Return whether a checkpoint is one of the run in a folder, which has done that work itself."""
    return checkpoint.resolve().parent == (run / CHECKPOINTS).resolve()


def removed_name(name: str) -> str:
    """Return the name under which the folder `name` is deleted."""
    return f".{name}.removed"


def shard_name(kind: str, number: int, count: int) -> str:
    """Return `adapter-00001-of-00002.safetensors`; numbers start at 1."""
    assert 1 <= number <= count
    return f"{kind}-{number:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True)
class FileRecord:
    """Size of a file and the SHA-256 of its content, as 64 lower-case hex digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json: what a checkpoint is, and what it consists of.

    malora_dist, torch, deepspeed, transformers: version strings of the writer.
    topology: `world_size`, `ep_size`, `zero_stage` of the run; nothing in the files depends on them.
    config, state: the run's config and the engine's state. Plain JSON: string keys, lists, no NaN.
    base: `name`, `revision` (None for a folder), `fingerprint`, `dtype` of the base model.
    files: every other file of the folder by name.
    tensors: file of each tensor by kind (`adapter`, `optimizer`, `rng`) and name.
    """

    format_version: int = field(default=FORMAT_VERSION, init=False)
    malora_dist: str
    torch: str
    deepspeed: str
    transformers: str
    step: int
    topology: dict[str, int]
    config: dict[str, Any]
    base: dict[str, str | None]
    state: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, dict[str, str]]

    def write(self, folder: Path) -> None:
        """Write `folder`/manifest.json durably. Raises CheckpointError if it breaks a rule or cannot be written."""
        path = folder / MANIFEST
        document = asdict(self)
        try:
            text = seal(document)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the manifest is not plain JSON: {error}") from error
        read_back = json.loads(text)
        del read_back["manifest_sha256"]
        assert read_back == document, "config and state must have string keys, and lists instead of tuples"
        check_document(path, read_back)
        write_text(path, text)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder`/manifest.json.

        Raises CheckpointError if it is missing, a link, damaged, of another format_version, or if a key is missing,
        unknown or against its rule.
        """
        path = folder / MANIFEST
        if path.is_symlink() and not is_cached(path):
            raise CheckpointError(f"{path} is a symbolic link; a checkpoint's files must lie in its folder")
        with reading(path):
            content = path.read_bytes()
        document = _parse(path, content)
        _check_version(path, document)
        _check_seal(path, content)
        document.pop("manifest_sha256", None)
        check_document(path, document)
        del document["format_version"]
        files = {name: FileRecord(**record) for name, record in document.pop("files").items()}
        return cls(files=files, **document)


def seal(document: dict[str, Any]) -> str:
    """Return the text of manifest.json.

    It is the document with one last key, the SHA-256 of all bytes before that key's digits.
    """
    head = json.dumps(document, indent=1, allow_nan=False).removesuffix("\n}") + SEAL
    return head + hashlib.sha256(head.encode()).hexdigest() + SEAL_END


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        document = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is damaged: it must be a JSON object")
    return document


def _check_version(path: Path, document: dict[str, Any]) -> None:
    """Check `format_version` before any other key: only this one means the same in every version."""
    if "format_version" not in document:
        raise CheckpointError(f"{path}: format_version is missing; was this written by malora_dist?")
    version = document["format_version"]
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: format_version={version!r} must be an integer of at least 1")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version={version} is newer than {FORMAT_VERSION}, the newest that is read here; "
            f"it was written by malora_dist {document.get('malora_dist', 'of unknown version')}"
        )


def _check_seal(path: Path, content: bytes) -> None:
    head, digest, end = _split_seal(content)
    if not head.endswith(SEAL.encode()) or end != SEAL_END.encode():
        raise CheckpointError(f"{path} is damaged: it does not end in manifest_sha256")
    found = hashlib.sha256(head).hexdigest().encode()
    if found != digest:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is {found.decode()}, "
            f"manifest_sha256 says {digest.decode('ascii', 'replace')}"
        )


def _split_seal(content: bytes) -> tuple[bytes, bytes, bytes]:
    end_at = len(content) - len(SEAL_END)
    digest_at = max(0, end_at - DIGEST_CHARACTERS)
    return content[:digest_at], content[digest_at:end_at], content[end_at:]
