"""What a recipe asks of its base model, looked at on the model without weights, where its configuration is here."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from malora_dist.config import AdapterConfig, RunConfig
from malora_dist.plan.shapes import local_config
from malora_dist.summary import adapter_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_model(config: RunConfig, path: Path) -> None:
    """Raise ConfigError if `adapter.target_modules` is not what the model of a folder or GGUF file can adapt."""
    from malora_dist.nn.targets import check_targets

    check_targets(empty_base(path), config.adapter.target_modules, adapter_spec(config))


def check_local_model(config: RunConfig) -> Iterator[str]:
    """`check_model` where that can be done on this machine; else a note on what was not checked, and why."""
    path = local_config(config.model.name_or_path, config.model.revision)
    if path is None:
        yield (
            f"model.name_or_path={config.model.name_or_path!r} is not on this machine: adapter.target_modules was not "
            "compared with its linears"
        )
    elif not has_torch():
        yield "torch is not on this machine: adapter.target_modules was not compared with the model's linears"
    else:
        check_model(config, path)


def family_targets(name_or_path: str) -> tuple[str, ...] | None:
    """What `malora init` writes for a model: our default where it has all of that, else all its linears but the head.

    None if the model or torch is not on this machine.
    """
    path = local_config(name_or_path)
    if path is None or not has_torch():
        return None
    from malora_dist.nn.targets import ALL_LINEAR, all_linear, plain_names

    model = empty_base(path)
    names = all_linear(model)
    default: tuple[str, ...] = AdapterConfig.model_fields["target_modules"].default
    if {name.rpartition(".")[2] for name in names}.issuperset(default):
        return default
    found = plain_names(model, {ALL_LINEAR: names})
    return found if all("." not in name for name in found) else (ALL_LINEAR,)


def has_torch() -> bool:
    """Return whether models can be built here."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


def empty_base(path: Path) -> "PreTrainedModel":
    """Return the model without weights of a folder, its config.json or a GGUF file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from malora_dist.model import build_empty_model

    if path.suffix == ".gguf":
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    # No attention is computed, and every family has this one.
    return build_empty_model(path, dtype=torch.float32, attn_implementation="eager")
