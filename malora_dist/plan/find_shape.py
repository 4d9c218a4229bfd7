"""The shape of a base model, read from its config.json or the metadata of a GGUF file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from malora_dist.errors import ConfigError, require_package, short
from malora_dist.files.folder import local_path
from malora_dist.files.json_text import parse_json
from malora_dist.plan.shapes import LAYOUTS, ModelShape

ASK_FOR_CONFIG = "give its config.json: --model path/to/config.json (or the model's folder)"


def find_shape(name_or_path: str, revision: str | None = None) -> ModelShape:
    """Find the shape of a recipe's model: a folder, a config.json, a GGUF file, or a hub id in the local cache.

    Nothing is downloaded. Raises ConfigError if there is no configuration on this machine or its layout is not known.
    """
    path = local_path(name_or_path)
    if path.suffix == ".json":
        return read_config(path)
    if path.suffix == ".gguf":
        return read_gguf(path)
    folder = path if os.path.isdir(path) else local_config(name_or_path, revision)
    if folder is None:
        raise ConfigError(f"model.name_or_path={name_or_path!r} is not on this machine: {ASK_FOR_CONFIG}")
    return read_config(folder / "config.json")


def local_config(name_or_path: str, revision: str | None = None) -> Path | None:
    """Find the folder with the config.json of a recipe's model, or its GGUF file; None if it is not on this machine.

    Nothing is downloaded.
    """
    path = local_path(name_or_path)
    if os.path.isdir(path):
        return path if (path / "config.json").is_file() else None
    if path.suffix == ".gguf":
        return path if os.path.isfile(path) else None
    cached = _cached_config(name_or_path, revision)
    return None if cached is None else cached.parent


def read_config(path: Path) -> ModelShape:
    """Read the shape in a config.json. Raises ConfigError for a file that cannot be read or an unknown layout."""
    try:
        config = parse_json(path.read_bytes(), lenient=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}): {ASK_FOR_CONFIG}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return shape_of(config, str(path))


def shape_of(config: Mapping[str, Any], source: str) -> ModelShape:
    """Return the shape in a config.json's keys; `source` names it in errors. Types beyond LAYOUTS need transformers."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        # It needs torch.
        from malora_dist.plan.families import family_shape

        return family_shape(config, source)
    layout = LAYOUTS[model_type]
    heads = _integer(config, "num_attention_heads", source)
    hidden = _integer(config, "hidden_size", source)
    attention_bias = bool(config.get("attention_bias", False)) and model_type in ("llama", "qwen3")
    return ModelShape(
        source=source,
        hidden_size=hidden,
        intermediate_size=_integer(config, "intermediate_size", source),
        num_layers=_integer(config, "num_hidden_layers", source),
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads", source, layout.get("num_key_value_heads", heads)),
        head_dim=_integer(config, "head_dim", source, layout.get("head_dim", hidden // heads)),
        vocab_size=_integer(config, "vocab_size", source),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or layout.get("qkv_bias", False),
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
        qk_norm=layout.get("qk_norm", False),
    )


def _integer(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{source}: {key}={value!r} must be a whole number above 0")
    return value


def read_gguf(path: Path) -> ModelShape:
    """Read the shape in a GGUF file's metadata. Raises ConfigError for an unreadable file or an unknown layout."""
    if not path.is_file():
        raise ConfigError(f"model.name_or_path={str(path)!r}: there is no such GGUF file; {ASK_FOR_CONFIG}")
    require_package("gguf", "gguf", f"{path}: a GGUF file")
    try:
        config = _gguf_config(path)
    except Exception as error:  # the reader checks nothing of what a file says of itself
        raise ConfigError(f"{path} cannot be read as GGUF ({error}): {ASK_FOR_CONFIG}") from error
    model_type = config["model_type"]
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        raise ConfigError(
            f"{path}: {short(model_type)} is a kind of GGUF file that plan does not know; {ASK_FOR_CONFIG}"
        )
    return shape_of(config, str(path))


def _gguf_config(path: Path) -> dict[str, Any]:
    """Read a GGUF file's metadata, by the keys of a config.json. Raises what the reader raises."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name.split(".", 1)[-1]: field for name, field in reader.fields.items()}
    keys = {
        "model_type": "architecture",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "vocab_size": "vocab_size",
    }
    config: dict[str, Any] = {"model_type": None}
    config |= {key: fields[name].contents() for key, name in keys.items() if name in fields}
    config["tie_word_embeddings"] = all(tensor.name != "output.weight" for tensor in reader.tensors)
    if "vocab_size" not in config and "ggml.tokens" in fields:
        config["vocab_size"] = len(fields["ggml.tokens"].data)
    return config


def _cached_config(repository: str, revision: str | None) -> Path | None:
    """Find the config.json of a hub id if it was downloaded before; None if it was not."""
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repository, "config.json", revision=revision)
    except (ImportError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None
