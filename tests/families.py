"""Tiny models of every causal-LM family of transformers, for what must hold on whatever base people bring."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # decoders of models with an encoder
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "num_decoder_layers": 2,
    "num_encoder_layers": 1,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # attention over compressed keys and values
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    # states
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
}
TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
EVERY_HEAD: dict[str, Any] = {"num_key_value_heads": 4}
# Rotations of the last 4 of 8 numbers, and windows shorter than the prompts of tests.
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": EVERY_HEAD,
    "axk2": EVERY_HEAD,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "codegen": {"rotary_dim": 4},
    "cpmant": {"dim_head": 8, "dim_ff": 48, "position_bias_max_distance": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": EVERY_HEAD | {"topk_method": "greedy"},
    "deepseek_v3": EVERY_HEAD,
    "deepseek_v32": EVERY_HEAD,
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": EVERY_HEAD,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {
        "text_config": {key: SIZES[key] for key in TEXT},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
        "image_token_index": 63,
        "boi_token_index": 62,
        "eoi_token_index": 61,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "gemma4_unified_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "glm4_moe_lite": EVERY_HEAD,
    "glm_moe_dsa": EVERY_HEAD,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "hy_v4": EVERY_HEAD,
    "kimi_linear": EVERY_HEAD,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "num_layers": 1,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2},
    "minicpm3": EVERY_HEAD | {"head_dim": 8},
    "nemotron_h": {"n_groups": 2, "layers_block_type": ["attention", "mamba", "mlp"]},
    "plbart": {"decoder_attention_heads": 4},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": EVERY_HEAD,
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "attention_head_dim": 16},
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}
# Models of pictures and text whose causal language model is that of the text alone.
TEXT_OF = {"llama4": "llama4_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
TEXT_OF |= {"qwen4_exp": "qwen4_exp_text"}
# Models of pictures, sounds or bytes beside text, whose parts have sizes of their own.
NOT_TINY = frozenset(
    (
        "blt dots3_note emu3 fuyu gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 "
        "mllama moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal"
    ).split()
)


@cache
def families() -> tuple[str, ...]:
    """Return the model types that AutoModelForCausalLM knows and that can be built tiny."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_TINY)


def family_config(name: str, **changes: Any) -> Any:
    """Return a tiny configuration of a family, with changes."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    if name in TEXT_OF:
        return kind(text_config=family_config(TEXT_OF[name]).to_dict(), **changes)
    fields = kind.__dataclass_fields__
    sizes = {kind.attribute_map.get(key, key): value for key, value in SIZES.items()}
    return kind(**{key: value for key, value in sizes.items() if key in fields} | SPECIAL.get(name, {}) | changes)


@contextmanager
def without_compiler() -> Iterator[None]:
    """RWKV asks for ninja, in a process of its own, to compile a kernel for GPUs."""
    from transformers.models.rwkv import modeling_rwkv

    with patch.object(modeling_rwkv, "is_ninja_available", lambda: False):
        yield


def family_model(
    name: str, *, scale: float = 8.0, noise: float = 0.1, attention: str | None = None, **changes: Any
) -> Any:
    """Return a random model of a family, the same for the same arguments.

    scale: of its matrices. noise: of norms, biases and what else a checkpoint holds, so that nothing is lost unseen.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(name, **changes), attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    for tensor in dict.fromkeys(model.state_dict(keep_vars=True).values()):
        if isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1:
            tensor.data *= scale
        elif tensor.is_floating_point():
            tensor.data += noise * torch.randn(tensor.shape, generator=generator)
    return model.eval()
