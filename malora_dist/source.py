"""Where base weights come from: a hub id, a local folder, or a GGUF file; read one tensor at a time."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from malora_dist.cache import default_cache_dir
from malora_dist.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def resolve_model(name_or_path: str, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """A local folder in Hugging Face layout. A GGUF file is converted once, a hub id downloaded once.

    Safe to call on every process: a file lock lets one work while the others wait, and no collective is held open.
    Raises ConfigError if there is no such model.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model.name_or_path={name_or_path!r}: there is no such GGUF file")
        return _convert_gguf(path, cache_dir or default_cache_dir())
    if path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise ConfigError(f"model.name_or_path={name_or_path!r}: there is no such folder")
    return _download(name_or_path, revision)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise ConfigError(
            f"model.name_or_path={repository!r} is neither a local folder nor a model that can be downloaded: {error}"
        ) from error


def _convert_gguf(path: Path, cache_dir: Path) -> Path:
    """Cached safetensors folder of a GGUF file, named by the file's content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_dir / "gguf" / f"{path.stem}-{digest}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            _write_converted(path.resolve(), partial)
            partial.rename(target)
    return target


def _write_converted(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    target.mkdir()
    # Not model.save_pretrained, which writes nothing on any process but the main one, and refuses GGUF models.
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    # safetensors makes files for their owner only; a cache may be shared.
    (target / SINGLE).chmod(target.stat().st_mode & 0o666)
    model.config.save_pretrained(target)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware; float32 elsewhere, where emulation is many times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else torch.float32


class TensorReader:
    """Reads single tensors from the safetensors files of a model folder.

    Raises ConfigError if the folder has no safetensors, or for a tensor that no file holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            with _readable(folder / INDEX):
                self._file_of: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE).is_file():
            with _readable(folder / SINGLE), safe_open(folder / SINGLE, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise ConfigError(f"{folder} holds neither {SINGLE} nor {INDEX}; other weight formats are not read")

    def read(self, names: list[str]) -> Tensor:
        """The tensor stored under the first of `names` that exists (tied weights have several)."""
        for name in names:
            if name in self._file_of:
                path = self.folder / self._file_of[name]
                with _readable(path), safe_open(path, framework="pt") as file:
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
        raise ConfigError(
            f"{self.folder} holds no weight named {' or '.join(names)}: do config and weights belong together?"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path} is missing or damaged: {error}") from error
