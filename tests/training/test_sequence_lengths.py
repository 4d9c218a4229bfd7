"""Samples beyond the positions of a base: a note where the model can go on, a refusal where it cannot."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPTJConfig, OPTConfig, PreTrainedConfig

from malora_dist.data.build import PreparedData
from malora_dist.data.encode import ChoiceItem
from malora_dist.data.store import SampleStore, TrainStore
from malora_dist.errors import ConfigError
from malora_dist.training.sequence_lengths import LIMITS, position_notes
from tests.evaluation.test_packing import REFUSED
from tests.families import families, family_config, family_model
from tests.tiny_models import tiny_config

SIZES = {"vocab_size": 61, "n_embd": 16, "n_layer": 1, "n_head": 2}
TABLES: list[PreTrainedConfig] = [
    GPT2Config(**SIZES, n_positions=16),
    GPTJConfig(**SIZES, n_positions=16, rotary_dim=8),
    OPTConfig(vocab_size=61, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
              word_embed_proj_dim=16, max_position_embeddings=16),
]  # fmt: skip


def data_of(lengths: list[int], question: int) -> PreparedData:
    """Two tasks: samples of these lengths, and a question of so many tokens."""
    stores = [
        SampleStore(np.zeros(sum(part), np.int32), np.cumsum([0, *part]), np.ones(len(part), np.int32), task)
        for task, part in enumerate((lengths, [3]))
    ]
    item = ChoiceItem(1, (1,) * (question - 2), ((1,), (1, 2)), (1, 2), 0)
    evaluation: dict[str, Any] = {"validation": {"a": [], "b": []}, "test": {"a": [], "b": [item]}}
    sizes = (len(lengths), 1)
    return PreparedData(
        ("a", "b"), ("completion", "multiple_choice"), TrainStore(stores), sizes, (0.5, 0.5), evaluation, {}, "", {}
    )


def test_samples_that_fit_need_no_word(tmp_path: Path) -> None:
    for config in (tiny_config(max_position_embeddings=16), *TABLES):
        config.save_pretrained(tmp_path)
        assert position_notes(data_of([4, 16], 16), tmp_path) == []


def test_longer_samples_are_named_by_task(tmp_path: Path) -> None:
    tiny_config(max_position_embeddings=16).save_pretrained(tmp_path)
    first, second = position_notes(data_of([17, 4, 30], 17), tmp_path)
    assert first.startswith("task a: 2 of 3 samples are longer than the 16 tokens that the base was made for")
    assert "the longest 30; data.max_seq_length cuts them" in first
    assert second.startswith("task b: 1 of 2 samples are longer")


@pytest.mark.parametrize("config", TABLES, ids=lambda config: config.model_type)
def test_a_base_with_a_table_of_positions_refuses_them(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="task a: 1 of 1 samples .*\n  This base has .* set data.max_seq_length=16"):
        position_notes(data_of([17], 3), tmp_path)


def test_a_base_whose_mask_is_of_a_size_refuses_longer_rows(tmp_path: Path) -> None:
    """Four samples of 16 tokens are 64; evaluation makes shorter rows by itself."""
    family_config("gpt_neo").save_pretrained(tmp_path)
    assert position_notes(data_of([16, 3], 30), tmp_path, samples=4) == []
    with pytest.raises(ConfigError, match="batch_size=4 must be at most 3 for this gpt_neo, .* at most 16: a row"):
        position_notes(data_of([17, 3], 30), tmp_path, samples=4)


def test_a_base_whose_rotations_change_beyond_its_positions_refuses_them(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    tiny_config(max_position_embeddings=16, rope_parameters=dynamic).save_pretrained(tmp_path)
    assert position_notes(data_of([4, 16], 16), tmp_path) == []
    with pytest.raises(ConfigError, match="^samples of 17 tokens are too long for this llama"):
        position_notes(data_of([4], 17), tmp_path)


# Limits that are reached in a moment, where the sizes of tests set none.
SMALL = {
    "bailing_hybrid": {"max_position_embeddings": 32},
    "kimi_linear": {"max_position_embeddings": 32},
    "mpt": {"max_seq_len": 32},
    "whisper": {"max_target_positions": 32},
}
# Position tables by the axis, a kernel that is compiled where it is used, and bases that are refused otherwise.
OTHERS = {"reformer", "rwkv", *REFUSED}


@pytest.mark.parametrize("family", [family for family in families() if family not in OTHERS])
def test_samples_are_refused_where_the_model_cannot_compute_them(tmp_path: Path, family: str) -> None:
    """One token beyond what a configuration counts, for every family."""
    model = family_model(family, **SMALL.get(family, {}))
    text = model.config.get_text_config()
    limit = next((size for name in LIMITS if isinstance(size := getattr(text, name, None), int)), 64)
    model.config.save_pretrained(tmp_path)
    ids = torch.arange(limit + 1)[None] % 40 + 3
    with torch.no_grad():
        model(input_ids=ids[:, :limit], use_cache=False)
        try:
            model(input_ids=ids, use_cache=False)
            fails = False
        except (IndexError, RuntimeError):
            fails = True
    with pytest.raises(ConfigError, match="no other positions") if fails else nullcontext():
        position_notes(data_of([limit + 1], 3), tmp_path)
