"""Telling base models apart by what is in their files, wherever they lie."""

import hashlib
import re
from pathlib import Path
from typing import Any

from malora_dist.models.weights.reader import readable, weight_files

SAMPLES, SAMPLE_BYTES = 64, 4096


def base_fingerprint(model: Path) -> str:
    """Compute 32 hex digits that a copy of the folder shares.

    They come from config.json and each weight file's size, header and samples.

    No weight file is read whole. Raises ConfigError if a file cannot be read.
    """
    with readable(model / "config.json"):
        digest = hashlib.sha256((model / "config.json").read_bytes())
    for name in weight_files(model).listed:
        with readable(model / name):
            digest.update(f"{name}:{(model / name).stat().st_size}:{content_samples(model / name)}".encode())
    return digest.hexdigest()[:32]


def file_identity(path: Path) -> list[Any]:
    """Return what identifies a file, without reading it whole. Raises OSError.

    A file of the hub's cache is named by the hash of its content; any other is identified by size, time of change, and
    samples of its content (a time alone says nothing where archives or images set all to the same).
    """
    real = path.resolve()
    size = real.stat().st_size
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return [size, real.name]
    return [size, real.stat().st_mtime_ns, content_samples(real)]


def content_samples(path: Path) -> str:
    """Compute the SHA-256 of a file's first bytes (a safetensors header) and samples spread over it. Raises OSError."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header_bytes = min(int.from_bytes(file.read(8), "little"), 2**25)
        digest.update(file.read(header_bytes))
        for index in range(SAMPLES):
            file.seek(index * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
