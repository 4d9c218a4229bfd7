"""What each setting of model.attn_implementation becomes, by machine and model."""

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    NemotronConfig,
    Qwen3Config,
)

from malora_dist.errors import ConfigError
from malora_dist.models.attention import attention_for, choose_attention
from malora_dist.models.packed_attention import FLASH_VARLEN, TORCH_VARLEN

LLAMA = LlamaConfig()
A100, V100, CPU = (8, 0), (7, 0), None


@pytest.mark.parametrize(
    ("requested", "config", "itemsize", "capability", "flash_attn", "wanted"),
    [
        ("auto", LLAMA, 2, A100, False, TORCH_VARLEN),
        ("auto", LLAMA, 2, A100, True, FLASH_VARLEN),
        ("auto", LLAMA, 4, A100, True, "sdpa"),
        ("auto", LLAMA, 2, V100, True, "sdpa"),
        ("auto", LLAMA, 2, CPU, True, "sdpa"),
        ("auto", LlamaConfig(head_dim=288), 2, A100, True, "sdpa"),
        ("auto", MistralConfig(sliding_window=8), 2, A100, False, TORCH_VARLEN),
        ("auto", MistralConfig(sliding_window=8), 4, A100, False, "sdpa"),
        ("auto", MistralConfig(sliding_window=None), 4, A100, False, "sdpa"),
        ("auto", Qwen3Config(use_sliding_window=False), 2, CPU, False, "sdpa"),
        ("auto", DeepseekV3Config(), 2, A100, True, "sdpa"),
        ("auto", FalconConfig(), 2, A100, True, "sdpa"),
        ("auto", LlamaConfig(head_dim=100), 2, A100, False, "sdpa"),
        ("auto", NemotronConfig(), 2, A100, False, "sdpa"),
        ("auto", Gemma3Config(), 2, CPU, False, "sdpa"),
        ("auto", DogeConfig(), 2, A100, True, "sdpa"),
        ("auto", MambaConfig(), 2, A100, False, "eager"),
        ("auto", Gemma2Config(), 2, A100, True, "eager"),
        ("auto", GptOssConfig(), 2, A100, True, "eager"),
        ("varlen", LLAMA, 2, A100, True, TORCH_VARLEN),
        ("flash_attention_2", LLAMA, 2, A100, True, FLASH_VARLEN),
        ("flash_attention_2", Gemma2Config(), 2, A100, True, "flash_attention_2"),
        ("sdpa", LLAMA, 2, A100, True, "sdpa"),
        ("eager", LLAMA, 2, A100, True, "eager"),
    ],
)
def test_the_attention_of_a_model_on_a_machine(
    requested: str, config: Any, itemsize: int, capability: tuple[int, int] | None, flash_attn: bool, wanted: str
) -> None:
    assert choose_attention(requested, config, itemsize, capability, flash_attn) == wanted


@pytest.mark.parametrize(
    ("requested", "config", "itemsize", "capability", "rule"),
    [
        ("varlen", LLAMA, 2, CPU, "needs a CUDA GPU"),
        ("flash_attention_2", LLAMA, 2, CPU, "needs a CUDA GPU"),
        ("varlen", LLAMA, 2, V100, "needs a GPU of compute capability 8.0 or higher, this one has 7.0"),
        ("varlen", LLAMA, 4, A100, "needs model.dtype=bfloat16"),
        ("flash_attention_2", LLAMA, 2, A100, "needs the package flash_attn"),
        ("varlen", LlamaConfig(head_dim=288), 2, A100, "heads of 288 numbers are not a multiple of 8 up to 256"),
        ("varlen", DeepseekV3Config(), 2, A100, "values of deepseek_v3 have heads of a width of their own"),
        ("varlen", GptOssConfig(), 2, A100, "the attention of gpt_oss cannot be replaced"),
        ("sdpa", Gemma2Config(), 2, A100, "Gemma2ForCausalLM does not compute with it; choose eager"),
        ("sdpa", BloomConfig(), 4, CPU, "BloomForCausalLM does not compute with it; choose eager"),
    ],
)
def test_what_cannot_be_is_one_error(
    requested: str, config: Any, itemsize: int, capability: tuple[int, int] | None, rule: str
) -> None:
    with pytest.raises(ConfigError, match=f"^model.attn_implementation={requested}.*{rule}"):
        choose_attention(requested, config, itemsize, capability, flash_attn=False)


def test_flash_attention_of_a_family_without_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="flash_attention_2: the attention of bloom cannot be replaced; choose auto"):
        choose_attention("flash_attention_2", BloomConfig(), 2, A100, flash_attn=True)


def test_this_machine_has_no_gpu_for_a_cpu_device() -> None:
    assert attention_for("auto", LLAMA, torch.bfloat16, torch.device("cpu")) == "sdpa"
