"""Where a base model comes from: a hub id, a local folder, or a GGUF file; the result is a folder."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from malora_dist.console.progress import log_line
from malora_dist.console.terminal import is_terminal
from malora_dist.errors import ConfigError, require_package, short
from malora_dist.files.cache import build_once, default_cache_dir
from malora_dist.files.folder import local_path
from malora_dist.models.weights.fingerprint import file_identity

# Weights, tokenizers in all their forms, chat templates.
DOWNLOADED = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "*.bpe"]
# Pickles run code when they are read; weights in other formats are not read.
NEVER = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.onnx"]
CODE = ["*.py", "*.so"]
LONGEST_SHOWN = 1000


def resolve_model(
    name_or_path: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
    *,
    trust_remote_code: bool = False,
    poll: Callable[[], None] = lambda: None,
) -> Path:
    """Return a local folder in Hugging Face layout. A GGUF file is converted once, a hub id downloaded once.

    Python files of a hub id are downloaded only with `trust_remote_code`. Safe to call on every process: a file lock
    lets one work while the others wait, and no collective is held open; those call `poll` several times a second, and
    what it raises ends the wait. Raises ConfigError if there is no such model, or for no name at all, and if the cache
    cannot be written.
    """
    if not name_or_path.strip():
        raise ConfigError("the base model has no name: say which folder or hub id it is (malora convert: --base)")
    path = local_path(name_or_path)
    if os.path.isdir(path):
        return path
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ConfigError(f"{_said(name_or_path)}: there is no such GGUF file")
        return _convert_gguf(path, cache_dir or default_cache_dir(), poll)
    if path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise ConfigError(f"{_said(name_or_path)}: there is no such folder, or none to be read")
    return _download(name_or_path, revision, trust_remote_code)


def local_model(
    name_or_path: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> Path | None:
    """Return the folder that `resolve_model` would give without any work, None if there is some to do."""
    from huggingface_hub import snapshot_download

    path = local_path(name_or_path)
    if name_or_path.strip() and os.path.isdir(path):
        return path
    if path.suffix == ".gguf":
        target = _converted_folder(path, cache_dir or default_cache_dir()) if os.path.isfile(path) else None
        return target if target is not None and target.is_dir() else None
    try:
        patterns = _patterns(trust_remote_code)
        return Path(snapshot_download(name_or_path, revision=revision, local_files_only=True, **patterns))
    except (ValueError, OSError):  # no such id, or nothing of it on this machine
        return None


def _said(name_or_path: str) -> str:
    """Return the key and its value, or the beginning of a value that is too long for a path."""
    return f"model.name_or_path={repr(name_or_path) if len(name_or_path) < LONGEST_SHOWN else short(name_or_path)}"


def _patterns(code: bool) -> dict[str, Any]:
    """Return which files of a hub id are downloaded."""
    if code:
        return {"allow_patterns": [*DOWNLOADED, *CODE], "ignore_patterns": NEVER}
    return {"allow_patterns": DOWNLOADED, "ignore_patterns": [*NEVER, *CODE]}


def _download(repository: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    said = _said(repository)
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        return Path(snapshot_download(repository, revision=revision, **_patterns(code)))
    except GatedRepoError as error:
        raise ConfigError(
            f"{said} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{said} is neither a local folder nor a model at {page}; a private one needs HF_TOKEN"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            raise ConfigError(
                f"{said} is neither a local folder nor wholly downloaded in {constants.HF_HUB_CACHE}, and "
                "HF_HUB_OFFLINE=1 forbids downloading it: run `malora prepare` on a machine with network access"
            ) from error
        raise ConfigError(f"{said} is neither a local folder nor a model that can be downloaded: {error}") from error


def _convert_gguf(path: Path, cache_dir: Path, poll: Callable[[], None]) -> Path:
    """Return the cached safetensors folder of a GGUF file, named by what identifies the file.

    Raises ConfigError if it has to be converted and the package gguf is not installed, or the cache cannot be written.
    """
    target = _converted_folder(path, cache_dir)
    if not target.is_dir():
        require_package("gguf", "gguf", f"model.name_or_path={str(path)!r}: a GGUF file")
    try:
        build_once(target, partial(_write_converted, path.resolve()), poll)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"MALORA_CACHE: {target.parent} cannot be written: {error}") from error
    return target


def _converted_folder(path: Path, cache_dir: Path) -> Path:
    digest = hashlib.sha256(json.dumps(file_identity(path)).encode()).hexdigest()
    return cache_dir / "gguf" / f"{path.stem}-{digest[:16]}"


def _write_converted(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log_line(f"converting {path.name} to a model folder in the cache, once")
    try:
        with _progress_on_terminals_only():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except Exception as error:  # of many families, for a file that anybody may have written
        raise ConfigError(
            f"model.name_or_path={str(path)!r}: transformers cannot read this GGUF file: {error}"
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    # Not model.save_pretrained, which writes nothing on any process but the main one, and refuses GGUF models.
    save_file(stored_tensors(model), target / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files for their owner only; a cache may be shared.
    (target / "model.safetensors").chmod(target.stat().st_mode & 0o666)
    model.config.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """Let transformers show no progress bar in a log file, for a while."""
    from transformers.utils import logging

    silenced = logging.is_progress_bar_enabled() and not is_terminal(sys.stderr)
    if silenced:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silenced:
            logging.enable_progress_bar()


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model.

    It is the parameters, of tied ones the first, and the buffers that it must keep.
    """
    held: dict[str, Tensor] = dict(model.named_parameters())
    held |= {name: tensor for name, tensor in model.named_buffers() if name in model.state_dict()}
    return {name: tensor.detach().contiguous() for name, tensor in held.items()}


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, else float32, as emulation is many times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else torch.float32
