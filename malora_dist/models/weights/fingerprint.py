"""Telling base models apart by what is in their files, wherever they lie."""

import hashlib
from pathlib import Path

from malora_dist.models.weights.reader import INDEX, SINGLE, readable, weight_files

SAMPLES, SAMPLE_BYTES = 64, 4096


def base_fingerprint(model: Path) -> str:
    """32 hex digits that a copy of the folder shares: config.json, and each weight file's size, header and samples.

    No weight file is read whole. Raises ConfigError if a file cannot be read.
    """
    with readable(model / "config.json"):
        digest = hashlib.sha256((model / "config.json").read_bytes())
    file_of = weight_files(model)
    for name in [SINGLE] if file_of is None else [INDEX, *sorted(set(file_of.values()))]:
        with readable(model / name):
            digest.update(f"{name}:{(model / name).stat().st_size}:{content_samples(model / name)}".encode())
    return digest.hexdigest()[:32]


def content_samples(path: Path) -> str:
    """SHA-256 of a file's first bytes (a safetensors header) and of samples spread over it. Raises OSError."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header_bytes = min(int.from_bytes(file.read(8), "little"), 2**25)
        digest.update(file.read(header_bytes))
        for index in range(SAMPLES):
            file.seek(index * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
