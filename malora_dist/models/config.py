"""A model folder's config.json and tokenizer, read by transformers' own code alone unless a recipe allows the folder's.

A folder may name Python files of its own (`auto_map`). transformers would ask on the terminal whether to run them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malora_dist.errors import ConfigError, require_package, short
from malora_dist.files.json_text import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

KEY = "model.trust_remote_code"
SUPPORTED = "docs/models.md lists the families that are supported"
NOT_RUN = (
    f"code of a model folder is not run unless the recipe says {KEY}: true, which gives it all of your permissions"
)


def read_model_config(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """Read a folder's config.json, without what a frozen base does not have.

    Raises ConfigError without one, and for one that is of no causal language model of transformers.
    """
    from transformers import AutoConfig

    content = _config_json(folder)
    if not trust_remote_code:
        check_family(content, str(folder / "config.json"), own_code(folder))
    config = _read(
        folder, "config.json", lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    )
    config.use_cache, config.return_dict = False, True
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0  # RWKV would halve weights in place, and 4-bit ones cannot be
    _remove_dropout(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # says how files are stored, not how this model computes
    return config


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Read a folder's tokenizer, which reads a text alike every time. Raises ConfigError if transformers cannot."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _read(
        folder, "the tokenizer", lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    )
    model: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if getattr(model, "dropout", None):
        model.dropout = None  # merges left out at random, as when the model was trained: no text would be read alike
    return tokenizer


def own_code(folder: Path) -> list[str]:
    """Return the Python classes that a model folder names as its own, in config.json or tokenizer_config.json."""
    found: list[str] = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            content = parse_json((folder / name).read_bytes(), lenient=True)
        except (OSError, ValueError):
            continue
        auto_map = content.get("auto_map") if isinstance(content, dict) else None
        values = auto_map.values() if isinstance(auto_map, dict) else auto_map if isinstance(auto_map, list) else ()
        classes = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
        found += [entry for entry in classes if isinstance(entry, str) and entry not in found]
    return found


def _remove_dropout(config: "PreTrainedConfig") -> None:
    """Set every rate of dropout, of values, layers and paths, to 0, in the configurations of parts too.

    The base is frozen, and its masks would depend on how samples are dealt to processes. Noise that a router adds in
    training stays in the configuration: Phi-MoE needs its size in evaluation too (`adapters.training_mode`).
    """
    from transformers import PreTrainedConfig

    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _remove_dropout(value)
        elif type(value) in (int, float) and "drop" in name:
            setattr(config, name, type(value)())


def check_family(content: Mapping[str, Any], source: str, code: Sequence[str] = ()) -> None:
    """Raise ConfigError unless transformers itself has a causal language model of a config.json's type.

    source: what the content is from. code: classes of its own that it names (`own_code`).
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = content.get("model_type")
    said = f"{source}: model_type={short(kind)}"
    known = isinstance(kind, str)
    if known and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if code:
        raise ConfigError(f"{said} is code of its own ({', '.join(code)}); {NOT_RUN}")
    if known and kind in CONFIG_MAPPING:
        raise ConfigError(f"{said} is not a causal language model; {SUPPORTED}")
    raise ConfigError(f"{said} is not a model type of transformers {transformers.__version__}; {SUPPORTED}")


def _config_json(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it holds no config.json")
    try:
        content = parse_json((folder / "config.json").read_bytes(), lenient=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{folder / 'config.json'} is not a JSON object")
    return content


def _read(folder: Path, what: str, read: Callable[[], Any]) -> Any:
    """Return what transformers reads from a folder. Raises ConfigError for whatever it raises."""
    try:
        return read()
    except Exception as error:  # code of some 200 families, for files that anybody may have written
        if not (folder / "tokenizer.json").exists() and any(folder.glob("*.model")):
            # Without them transformers takes a sentencepiece model for one of tiktoken.
            for package in ("sentencepiece", "google.protobuf"):
                require_package(package, "sentencepiece", f"{folder}: {what}")
        code = own_code(folder)
        if code and "trust_remote_code" in str(error):
            raise ConfigError(f"{folder}: {what} is code of its own ({', '.join(code)}); {NOT_RUN}") from error
        raise ConfigError(f"{folder}: transformers cannot read {what}: {error}") from error
