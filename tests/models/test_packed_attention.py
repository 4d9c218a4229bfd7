"""Packed rows through varlen kernels and through masks: outputs and gradients of each sample alone."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from malora_dist.data.encode import Sample
from malora_dist.data.loader import MicroBatch, collate
from malora_dist.errors import ConfigError
from malora_dist.evaluation.packed_forward import cross_entropies
from malora_dist.models.packed_attention import (
    TORCH_VARLEN,
    attention_arguments,
    flash_attn_varlen,
    register_attention,
    torch_varlen,
    varlen_attention,
)
from malora_dist.models.packed_masks import Window
from tests.adapters.varlen_kernel import kernel_on_cpu
from tests.families import family_config
from tests.reference import gradients, packed_attention_reference
from tests.tiny_models import SIZES, tiny_config

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LAYERS = ["full_attention", "sliding_attention"]
CONFIGS: dict[str, Any] = {
    "llama": tiny_config(),
    "window": MistralConfig(**SIZES, sliding_window=3),
    "one-windowed-layer": Qwen3Config(
        **SIZES, head_dim=12, use_sliding_window=True, sliding_window=4, layer_types=LAYERS
    ),
    # Which say nothing of positions where they ask for masks, or have no other attention, or chunks.
    "falcon": family_config("falcon"),
    "opt": family_config("opt", dropout=0.0),
    "gpt_oss": family_config("gpt_oss", sliding_window=3),
    "gemma2": family_config("gemma2", sliding_window=3),
    "llama4": family_config("llama4_text", attention_chunk_size=3),
}
ATTENTIONS: dict[str, tuple[str, ...]] = {
    "gpt_oss": ("eager",),
    "gemma2": ("eager",),
    **dict.fromkeys(("falcon", "llama4"), ("sdpa", "eager")),
}


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    with kernel_on_cpu():
        yield


def model_of(name: str, attention: str) -> Any:
    register_attention()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).train()


def samples_of(lengths: tuple[int, ...]) -> list[Sample]:
    draw = np.random.default_rng(1)
    return [Sample(i, 0, draw.integers(1, 61, n).astype(np.int32), 1) for i, n in enumerate(lengths)]


def losses_and_gradients(model: Any, batches: list[MicroBatch]) -> list[Tensor]:
    losses = torch.cat([cross_entropies(model, batch) for batch in batches])
    weights = torch.linspace(0.2, 1, len(losses))
    return [losses.detach(), *gradients(losses, list(model.parameters()), weights)]


@pytest.mark.parametrize(
    ("name", "lengths", "checkpointing"),
    [
        *((name, lengths, False) for name in CONFIGS for lengths in ((7, 1, 12, 2), (9,))),
        ("gpt_oss", (7, 4), True),
        ("llama", (1, 1), False),
        ("window", (5, 6), True),
    ],
)
def test_a_packed_row_is_its_samples_alone(name: str, lengths: tuple[int, ...], checkpointing: bool) -> None:
    samples = samples_of(lengths)
    alone = losses_and_gradients(model_of(name, "eager"), [collate([sample]) for sample in samples])
    for attention in ATTENTIONS.get(name, (TORCH_VARLEN, "sdpa", "eager")):
        model = model_of(name, attention)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for found, wanted in zip(losses_and_gradients(model, [collate(samples)]), alone, strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE, msg=lambda text, a=attention: f"{a}: {text}")


class FlashAttn(ModuleType):
    """The package's function, by the arguments that it documents."""

    @staticmethod
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        assert causal and cu_seqlens_k is cu_seqlens_q and max_seqlen_k == max_seqlen_q and dropout_p == softcap == 0
        left, right = window_size
        assert right == 0 and softmax_scale is not None
        window = None if left < 0 else left + 1
        return packed_attention_reference(q, k, v, cu_seqlens_q.diff().tolist(), softmax_scale, window)


HEADS = [(3, 3), (6, 2), (4, 1)]


def row_of(heads: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    """q, k and v of samples of 5, 1 and 9 tokens, and where they begin."""
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(15, n, 4, generator=draw, requires_grad=True) for n in (heads[0], heads[1], heads[1])]
    return states, torch.tensor([0, 5, 6, 15], dtype=torch.int32)


@pytest.mark.parametrize("kernel_name", ["torch", "flash_attn"])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("heads", HEADS)
def test_the_kernel_is_called_for_what_the_twin_computes(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], window: int | None, kernel_name: str
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttn("flash_attn"))
    states, starts = row_of(heads)
    found = {"torch": torch_varlen, "flash_attn": flash_attn_varlen}[kernel_name](*states, starts, 9, 0.3, window)
    wanted = packed_attention_reference(*states, [5, 1, 9], 0.3, window)
    direction = torch.linspace(-1, 1, found.numel()).view_as(found)
    torch.testing.assert_close(found, wanted, **CLOSE)
    for got, want in zip(gradients(found, states, direction), gradients(wanted, states, direction), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("heads", HEADS)
def test_the_signature_of_older_versions(monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int]) -> None:
    """Of 2.10: no window, no scale, as many heads of k as of q; what it cannot do is refused."""
    newer = varlen.varlen_attn

    def older(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
        is_causal: bool = False, return_aux: None = None,
    ) -> Tensor:  # fmt: skip
        assert is_causal
        options = {"window_size": (-1, 0), "scale": query.shape[-1] ** -0.5}
        found = newer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)
        assert isinstance(found, Tensor)
        return found

    monkeypatch.setattr(varlen, "varlen_attn", older)
    states, starts = row_of(heads)
    wanted = packed_attention_reference(*states, [5, 1, 9], 0.5)
    torch.testing.assert_close(torch_varlen(*states, starts, 9, 0.5, 9), wanted, **CLOSE)
    with pytest.raises(ConfigError, match="no sliding window"):
        torch_varlen(*states, starts, 9, 0.5, 8)
    with pytest.raises(ConfigError, match="no scale"):
        torch_varlen(*states, starts, 9, 0.3, None)


def test_who_gets_which_arguments() -> None:
    """A mask that hides nothing, in the place of which transformers makes ours; and lengths for varlen kernels."""
    batch = collate(samples_of((3, 2)))
    for attention in ("sdpa", "eager", TORCH_VARLEN, "flash_attention_2"):
        model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention, model_type="llama"))
        given = attention_arguments(model, batch)
        shown = given.pop("attention_mask")
        assert (shown is None) if attention == "flash_attention_2" else (shown.tolist() == [[1] * 5])
        lengths = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
        assert set(given) == (lengths if attention in (TORCH_VARLEN, "flash_attention_2") else set())
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager", model_type="bloom"))
    shown = attention_arguments(model, batch)["attention_mask"]
    assert shown.cumsum(-1).tolist() == [[1, 2, 3, 1, 2]]  # what such models count by


def test_the_window_is_the_mask_s() -> None:
    """Some models name their window to whoever makes masks, and not to their attention."""
    seen: list[int | None] = []

    def kernel(q: Tensor, *others: Any) -> Tensor:
        seen.append(others[-1])
        return q

    row, lengths = torch.zeros(1, 2, 3, 4), {"cu_seq_lens_q": torch.tensor([0, 3]), "max_length_q": 3}
    for mask, named in ((Window(2), None), (Window(2), 2), (None, 7), (None, None)):
        varlen_attention(kernel, nn.Module(), row, row, row, mask, sliding_window=named, **lengths)
    assert seen == [2, 2, 7, None]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"cu_seq_lens_q": None}, "hands no lengths"),
        ({"softcap": 30.0}, "no softcap"),
        ({"s_aux": torch.zeros(2)}, "no s_aux"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "no attention_mask"),
        ({"is_causal": False}, "no is_causal=False"),
        ({"dropout": 0.1}, "no dropout=0.1"),
        ({"value": torch.zeros(1, 2, 3, 6)}, "no v of another width"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(given: dict[str, Any], named: str) -> None:
    row = torch.zeros(1, 2, 3, 4)
    lengths = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3}
    arguments = {"query": row, "key": row, "value": row, "attention_mask": None} | lengths | given
    with pytest.raises(ConfigError, match=f"Module.* {named}.*sdpa or eager"):
        varlen_attention(torch_varlen, nn.Module(), **arguments)
