"""Packed rows give, on every family of transformers, what a plain loop over transformers gives, or are refused."""

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from malora_dist.data.encode import ChoiceItem
from malora_dist.data.packed_row import Packing
from malora_dist.errors import ConfigError
from malora_dist.evaluation.packed_forward import cross_entropies
from malora_dist.evaluation.packing import check_rows, packing_of
from malora_dist.evaluation.scoring import build_row, row_tokens, score_items, scores_of_questions
from malora_dist.evaluation.tasks import forward_of
from malora_dist.models.attention import choose_attention
from malora_dist.models.loss_head import install_loss_head
from malora_dist.models.packed_attention import TORCH_VARLEN, longest_row, register_attention
from tests.adapters.varlen_kernel import kernel_on_cpu
from tests.families import families, family_config, family_model, without_compiler
from tests.tiny_models import tiny_config

A100 = (8, 0)
# Shorter than the prompts below.
WINDOWS = {"sliding_window": 5, "attention_chunk_size": 5, "local_attention": 6}
LAYERS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "afmoe": {"layer_types": ["full_attention", "sliding_attention"]},
    "cohere2": {"layer_types": ["full_attention", "sliding_attention"]},
    "exaone4": {"layer_types": ["full_attention", "sliding_attention"]},
    "gemma3_text": {"layer_types": ["full_attention", "sliding_attention"]},
    "llama4_text": {"layer_types": ["full_attention", "chunked_attention"]},
    "olmo3": {"layer_types": ["full_attention", "sliding_attention"]},
    **{
        name: {"use_sliding_window": True, "max_window_layers": 1}
        for name in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
    },
    # Encoders, where their configuration does not say that they are to decode.
    **{
        name: {"is_decoder": True}
        for name in (
            "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
            "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
        ).split()
    },
}
# A state, or blocks of tokens, runs on through the row; or positions are counted through it.
ALONE = frozenset(
    (
        "axk2 bailing_hybrid bamba deepseek_v32 deepseek_v4 dots3_note_text falcon_h1 falcon_mamba glm_moe_dsa "
        "granitemoehybrid hy_v4 inkling2_text inkling_text jamba kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2 minimax "
        "minimax_m3_vl_text nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next "
        "qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya "
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp openai-gpt pegasus plbart reformer trocr"
    ).split()
)
# Windows, distances or masks of their own, which branches of a prompt would break.
SEQUENCES = frozenset(
    (
        "big_bird biogpt bloom codegen falcon gpt_neo gpt_neox_japanese gptj megatron-bert mpt rembert roformer "
        "stablelm whisper xglm"
    ).split()
)
# They see what follows, or count positions from another number.
REFUSED = frozenset(
    (
        "camembert cpmant data2vec-text prophetnet roberta roberta-prelayernorm xlm xlm-roberta xlm-roberta-xl xlnet "
        "xmod"
    ).split()
)
# Parts of it stay in 32 bits.
ONE_PRECISION = ("inkling2_text",)


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    register_attention()
    with kernel_on_cpu(), without_compiler():
        yield


def changes_of(name: str) -> dict[str, Any]:
    config = family_config(name)
    return {key: value for key, value in WINDOWS.items() if hasattr(config, key)} | LAYERS.get(name, {})


def questions(first: int = 9) -> list[ChoiceItem]:
    """Return prompts longer than a window, the first of so many tokens, and choices of several lengths."""
    draw = torch.Generator().manual_seed(3)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 60, (length,), generator=draw).tolist())

    return [
        ChoiceItem(0, ids(first), (ids(4), ids(1), ids(6)), (1, 1, 1), 0),
        ChoiceItem(0, ids(7), (ids(2), ids(5)), (1, 1), 0),
    ]


@torch.no_grad()
def by_a_plain_loop(model: Any, first: int = 9) -> list[float]:
    """Return the log-likelihood of each choice, each in a call of its own, of nothing but its tokens."""
    scores = []
    for item in questions(first):
        for choice in item.choice_ids:
            ids = torch.tensor([item.prompt_ids + choice[:-1]])
            found = model(input_ids=ids, use_cache=False).logits[0, len(item.prompt_ids) - 1 :].log_softmax(-1)
            scores.append(float(found.gather(1, torch.tensor(choice)[:, None]).sum()))
    return scores


def packed(model: Any, packing: Packing, first: int = 9) -> list[float]:
    found = score_items(forward_of(model), questions(first), batch_tokens=256, packing=packing)
    return [score for scores in scores_of_questions(questions(first), found) for score in scores]


@torch.no_grad()
def assert_place_in_the_row_does_not_matter(model: Any) -> None:
    """Behind 300 tokens, where distances that are counted through the row have no exact number in 16 bits."""
    items = [questions()[1], *questions() * 8, questions()[1]]
    losses = cross_entropies(model, build_row(items, tuple(range(len(items))), share_prompt=False))
    assert torch.equal(losses[:7], losses[-7:])


@torch.no_grad()
def assert_head_gives_losses_of_whole_logits(model: Any) -> None:
    """Whether the model has a plain head or one that scales, caps or casts."""
    row = build_row(questions(), (0, 1), share_prompt=False)
    whole = cross_entropies(model, row)
    install_loss_head(model)
    torch.testing.assert_close(cross_entropies(model, row), whole, rtol=1e-5, atol=1e-5)


def attentions_of(name: str) -> list[str]:
    """Return what the family has: what `auto` is here, eager, and kernels without a mask."""
    config = family_config(name, **changes_of(name))
    found = [choose_attention("auto", config, 4, None, False), "eager"]
    with suppress(ConfigError):
        found.append(choose_attention("varlen", config, 2, A100, False))
    return list(dict.fromkeys(found))


def expected(name: str, attention: str) -> Packing:
    if name in ALONE:
        return Packing.ALONE
    return Packing.SEQUENCES if name in SEQUENCES or attention == TORCH_VARLEN else Packing.TREES


@pytest.mark.parametrize("name", families())
def test_packed_scores_are_those_of_a_plain_loop(name: str) -> None:
    """At every attention that the family has, with its windows, and by its loss head."""
    wanted: list[float] = []
    for attention in attentions_of(name):
        # Noise in what a model computes of its sizes, as MiniMax's decays, would be another model.
        model = family_model(name, noise=0, attention=attention, **changes_of(name)).requires_grad_(False)
        if name in REFUSED:
            with pytest.raises(ConfigError, match=f"{type(model).__name__} does not predict each token from those"):
                packing_of(model)
            continue
        found, wanted = packing_of(model), wanted or by_a_plain_loop(model)
        assert found is expected(name, attention), attention
        if attention == attentions_of(name)[0] and name not in ONE_PRECISION:
            assert_head_gives_losses_of_whole_logits(deepcopy(model).bfloat16())
        install_loss_head(model)
        for packing in list(Packing)[: found.value]:
            assert packed(model, packing) == pytest.approx(wanted, rel=1e-4, abs=1e-4), (attention, packing)


def test_the_same_in_16_bits() -> None:
    """What rounding alone changes, and what another sample does, are told apart."""
    for name in ("llama", "gemma2", "falcon", "gpt_oss"):
        assert packing_of(family_model(name, attention="eager").bfloat16()) is expected(name, "eager")
    with pytest.raises(
        ConfigError, match="per_device_train_batch_size=2 must be 1 for BartForCausalLM: its attention mixes"
    ):
        packing_of(family_model("bart").bfloat16(), samples=2)


def test_one_sample_a_row_is_enough_for_all_others() -> None:
    assert packing_of(family_model("bart"), samples=1) is Packing.ALONE
    for config in (family_config("bart"), family_config("llama"), family_config("gpt_oss")):
        check_rows(config, samples=8)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "original_max_position_embeddings": 18,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def test_rotations_that_change_with_the_longest_text_of_a_row() -> None:
    """One question is longer than the texts that the base was first trained on, the other is not."""
    model = family_model("phi3", rope_parameters={**LONGROPE}, original_max_position_embeddings=18)
    wanted, longest = by_a_plain_loop(model, first=20), 26
    assert packing_of(model, longest=18) is Packing.TREES and packing_of(model, longest=longest) is Packing.ALONE
    assert packed(model, Packing.ALONE, first=20) == pytest.approx(wanted, rel=1e-4)
    assert packed(model, Packing.SEQUENCES, first=20) != pytest.approx(wanted, rel=1e-4)
    check_rows(model.config, samples=8, longest=18)
    check_rows(model.config, samples=1, longest=longest)
    with pytest.raises(ConfigError, match="batch_size=2 must be 1 for this phi3, or data.max_seq_length=26 at most 18"):
        check_rows(model.config, samples=2, longest=longest)
    dynamic = family_config("llama", rope_parameters={**DYNAMIC})
    check_rows(dynamic, samples=8, longest=64)
    with pytest.raises(ConfigError, match=f"^{TOO_LONG}"):
        check_rows(dynamic, samples=1, longest=65)


TOO_LONG = "samples of 65 tokens are too long for this llama: .*set data.max_seq_length=64"


def test_a_text_that_would_change_the_scores_of_those_after_it_is_not_scored() -> None:
    """With dynamic rotations what is asked first decides; nothing measures such texts, in whatever order."""
    model = family_model("llama", rope_parameters={**DYNAMIC})
    text, longer = torch.arange(65)[None] % 60, torch.arange(80)[None] % 60
    with torch.no_grad():
        before, _, after = (model(input_ids=ids, use_cache=False).logits for ids in (text, longer, text))
    assert not torch.allclose(before, after, rtol=0.01)
    assert packing_of(model, longest=64) is Packing.TREES
    with pytest.raises(ConfigError, match=f"^{TOO_LONG}"):
        packing_of(model, longest=65)


class Narrow(LlamaForCausalLM):
    """Code as others write it: it knows few options, and makes masks for whole rows."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True) -> Any:
        T = input_ids.shape[1]
        before = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
        return super().forward(input_ids=input_ids, attention_mask=before, use_cache=use_cache)


def test_a_model_that_is_told_nothing_gets_one_sample_a_row() -> None:
    torch.manual_seed(0)
    model = Narrow(tiny_config()).eval()
    assert packing_of(model) is Packing.ALONE
    assert packed(model, Packing.ALONE) == pytest.approx(by_a_plain_loop(model), rel=1e-4)


class Whole(LlamaForCausalLM):
    """Code that gives the logits of all tokens, as it knows no other way."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
    ) -> Any:
        options = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        return super().forward(input_ids=input_ids, **options)


class Swallowing(Whole):
    """The same, of a forward that takes every option and heeds few."""

    def forward(self, input_ids: Tensor, logits_to_keep: Any = 0, **options: Any) -> Any:
        return super().forward(input_ids, **options)


@pytest.mark.parametrize("kind", [Whole, Swallowing])
@pytest.mark.parametrize("first", [2, 3, 4])
def test_logits_of_all_tokens_are_told_from_those_asked_for(kind: type[LlamaForCausalLM], first: int) -> None:
    """As many tokens of prompts as choices make a row of as many tokens as targets."""
    torch.manual_seed(0)
    model = kind(tiny_config()).eval()
    assert packing_of(model) is Packing.TREES
    found = score_items(forward_of(model), questions(first)[:1], batch_tokens=256, packing=Packing.TREES)
    assert list(found.values()) == pytest.approx(by_a_plain_loop(model, first)[:3], rel=1e-4)


@pytest.mark.parametrize("name", ["mamba", "jamba", "falcon_h1", "lfm2", "rwkv", "recurrent_gemma", "qwen3_next"])
def test_a_state_along_the_row_is_refused_before_any_weight_is_read(name: str) -> None:
    config = family_config(name, **LAYERS.get(name, {}))
    check_rows(config, samples=1)
    with pytest.raises(
        ConfigError, match=f"per_device_train_batch_size=2 must be 1 for {name}: its layers carry state"
    ):
        check_rows(config, samples=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "changes"), [("bloom", {}), ("falcon", {"alibi": True})])
def test_distances_are_counted_in_each_sample(family: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    assert_place_in_the_row_does_not_matter(family_model(family, **changes).to(dtype))


@pytest.mark.parametrize(("family", "changes"), [("gpt_neo", {}), ("mpt", {"max_seq_len": 64})])
def test_a_row_is_no_longer_than_the_mask_of_the_model(family: str, changes: dict[str, Any]) -> None:
    """Not even where one question with all its choices is."""
    model = family_model(family, **changes)
    (question, _), most = questions(9), longest_row(model.config)
    item = replace(question, choice_ids=question.choice_ids * 5, choice_lengths=(1,) * 15)
    with pytest.raises(RuntimeError, match="size of tensor"):
        score_items(forward_of(model), [item], batch_tokens=1024, packing=Packing.SEQUENCES)
    tokens = row_tokens("auto", "cpu", True, most)
    found = score_items(forward_of(model), [item], batch_tokens=tokens, packing=Packing.SEQUENCES)
    assert most == tokens == 64
    assert [found[choice] for choice in range(15)] == pytest.approx(by_a_plain_loop(model)[:3] * 5, rel=1e-4)
