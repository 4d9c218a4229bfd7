"""What a token of a packed row sees, by whichever rule the model has, and in the form that its attention takes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from malora_dist.data.encode import ChoiceItem
from malora_dist.evaluation.scoring import Row, build_row
from malora_dist.models.packed_masks import Window, packed_row, register_masks

MAKERS = {"full": create_causal_mask, "window": create_sliding_window_causal_mask, "chunk": create_chunked_causal_mask}
SIZE = 3
# Prompts of 4 and 2 tokens; the last token of each choice is not fed.
ITEMS = [ChoiceItem(0, (1,) * 4, ((2,) * 3, (3,) * 5), (1, 1), 0), ChoiceItem(0, (4,) * 2, ((5,) * 4,), (1,), 0)]


def made(row: Row, maker: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """What a model gets that asks in the way of transformers' models, with no word of positions."""
    config = LlamaConfig(num_hidden_layers=1)
    config._attn_implementation, config.sliding_window, config.attention_chunk_size = attention, SIZE, SIZE
    T = row.input_ids.shape[1]
    return MAKERS[maker](
        config=config,
        inputs_embeds=torch.zeros(1, T, 8, dtype=dtype),
        attention_mask=torch.ones(1, T, dtype=torch.long),
        past_key_values=None,
    )


def seen_by_hand(row: Row, maker: str) -> list[list[bool]]:
    """Token by token."""
    positions, samples = row.position_ids[0].tolist(), row.token_sample.tolist()
    branches = [0] * len(samples) if row.token_branch is None else row.token_branch.tolist()

    def sees(q: int, k: int) -> bool:
        near = positions[q] - positions[k] < SIZE if maker == "window" else True
        inside = positions[q] // SIZE == positions[k] // SIZE if maker == "chunk" else True
        together = samples[q] == samples[k] and branches[k] in (0, branches[q])
        return together and near and inside and positions[k] <= positions[q]

    return [[sees(q, k) for k in range(len(samples))] for q in range(len(samples))]


def as_seen(mask: Tensor, attention: str) -> list[list[bool]]:
    least = torch.finfo(mask.dtype).min if attention == "eager" else float("-inf")
    assert bool(((mask == 0) | (mask == least)).all())
    return (mask[0, 0] == 0).tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_token_sees_by_positions_in_its_sample_and_branch(share_prompt: bool, maker: str, attention: str) -> None:
    row = build_row(ITEMS, (0, 1), share_prompt)
    with packed_row(row):
        mask = made(row, maker, attention, torch.bfloat16)
    assert as_seen(mask, attention) == seen_by_hand(row, maker)
    assert mask.dtype == torch.bfloat16
    # Lines begin at multiples of 16 numbers, whatever their length.
    assert attention == "eager" or (mask.stride(2) % 16, mask.stride(3)) == (0, 1)


def test_a_sample_alone_needs_no_mask_but_for_what_a_window_hides() -> None:
    """Eager attention knows nothing of causality itself."""
    short, long = (build_row([ChoiceItem(0, (1,), ((2,) * n,), (1,), 0)], (0,), False) for n in (SIZE, SIZE + 1))
    for row, maker, needed in ((short, "full", False), (short, "window", False), (long, "window", True)):
        for attention in ("sdpa", "eager"):
            with packed_row(row):
                mask = made(row, maker, attention)
            assert (mask is not None) == (needed or attention == "eager")
            assert mask is None or as_seen(mask, attention) == seen_by_hand(row, maker)


def test_kernels_without_masks_are_told_the_window() -> None:
    register_masks("no masks")
    short, long = (build_row([ChoiceItem(0, (1,), ((2,) * n,), (1,), 0)], (0,), False) for n in (SIZE, SIZE + 1))
    with packed_row(short):
        assert made(short, "window", "no masks") is None
    with packed_row(long):
        assert made(long, "window", "no masks") == Window(SIZE) and made(long, "full", "no masks") is None


def test_other_models_keep_the_masks_of_transformers() -> None:
    """Outside of a row, after one that failed, and inside for what is not the row."""
    row = build_row(ITEMS, (0, 1), True)
    with pytest.raises(RuntimeError), packed_row(row):
        raise RuntimeError
    assert made(row, "full", "sdpa") is None
    other = build_row(ITEMS[:1], (0,), False)
    with packed_row(row):
        assert made(other, "full", "sdpa") is None
