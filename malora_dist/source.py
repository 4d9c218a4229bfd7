"""Where a base model comes from: a hub id, a local folder, or a GGUF file; the result is a folder."""

import hashlib
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from malora_dist.cache import build_once, default_cache_dir
from malora_dist.errors import ConfigError
from malora_dist.progress import tell


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
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    said = f"model.name_or_path={repository!r}"
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
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
                "HF_HUB_OFFLINE=1 forbids to download it: run `malora prepare` where the network is"
            ) from error
        raise ConfigError(f"{said} is neither a local folder nor a model that can be downloaded: {error}") from error


def _convert_gguf(path: Path, cache_dir: Path) -> Path:
    """Cached safetensors folder of a GGUF file, named by the file's content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_dir / "gguf" / f"{path.stem}-{digest}"
    build_once(target, partial(_write_converted, path.resolve()))
    return target


def _write_converted(path: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    tell(f"converting {path.name} to a model folder in the cache, once")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    # Not model.save_pretrained, which writes nothing on any process but the main one, and refuses GGUF models.
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files for their owner only; a cache may be shared.
    (target / "model.safetensors").chmod(target.stat().st_mode & 0o666)
    model.config.save_pretrained(target)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware; float32 elsewhere, where emulation is many times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else torch.float32
