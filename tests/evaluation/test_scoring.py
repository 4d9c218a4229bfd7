"""Packed scoring equals asking one sequence at a time, and the numbers made of the scores."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import adapter_parameters
from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.methods import mixture_spec
from malora_dist.data.encode import ChoiceItem
from malora_dist.data.packed_row import PackedRow, Packing
from malora_dist.errors import NonFiniteError
from malora_dist.evaluation.packed_forward import cross_entropies
from malora_dist.evaluation.scoring import (
    Forward,
    build_row,
    check_scores,
    plan_rows,
    row_tokens,
    score_items,
    scores_of_questions,
    summarise,
    task_result,
)
from malora_dist.models.packed_attention import TORCH_VARLEN, register_attention
from tests.adapters.varlen_kernel import kernel_on_cpu
from tests.tiny_models import tiny_llama

# Tokens of the prompt, and of each choice: prompts of one token, single-token choices, one choice to five.
SHAPES = [
    (7, (1, 1)), (3, (2, 1, 4)), (15, (3,)), (1, (1, 2)), (6, (1, 1, 1, 1, 1)), (7, (5, 2)), (1, (1,)),
    (12, (1, 6, 2, 3)), (4, (2, 2, 2)), (9, (1, 3, 1, 2, 4)), (2, (8,)),
]  # fmt: skip


@pytest.fixture
def items() -> list[ChoiceItem]:
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(96, (length,), generator=generator).tolist())

    return [
        ChoiceItem(0, ids(prompt), tuple(ids(n) for n in choices), (1,) * len(choices), 0) for prompt, choices in SHAPES
    ]


@pytest.fixture
def model() -> Any:
    """With MALoRA adapters that matter: B is not zero."""
    model = tiny_llama(vocab_size=96)
    inject_adapters(model, mixture_spec("malora", num_experts=4, r=3, shared_r=6), lora_dropout=0.1)
    for name, parameter in adapter_parameters(model):
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def counting(model: Any, count: Counter[str]) -> Forward:
    def forward(row: PackedRow) -> Tensor:
        count["forwards"] += 1
        return torch.no_grad()(cross_entropies)(model, row)

    return forward


@torch.no_grad()
def naive_scores(model: Any, items: list[ChoiceItem]) -> list[list[float]]:
    """Each prompt and choice as a sequence of its own, all logits, token by token."""
    scores = []
    for item in items:
        scores.append([])
        for choice in item.choice_ids:
            ids = torch.tensor([item.prompt_ids + choice])
            log_probs = model(input_ids=ids).logits[0].log_softmax(dim=-1)
            start = len(item.prompt_ids)
            scores[-1].append(sum(float(log_probs[start + i - 1, token]) for i, token in enumerate(choice)))
    return scores


def assert_same(items: list[ChoiceItem], found: dict[int, float], wanted: list[list[float]]) -> None:
    assert sorted(found) == list(range(sum(map(len, wanted))))
    for index, (row, wanted_row) in enumerate(zip(scores_of_questions(items, found), wanted, strict=True)):
        assert row == pytest.approx(wanted_row, abs=1e-5, rel=0), index


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_packed_scores_equal_one_sequence_at_a_time(
    model: Any, items: list[ChoiceItem], packing: Packing, batch_tokens: int
) -> None:
    count: Counter[str] = Counter()
    found = score_items(counting(model, count), items, batch_tokens=batch_tokens, packing=packing)
    assert_same(items, found, naive_scores(model, items))
    parts = len(items) if packing is Packing.TREES else sum(len(choices) for _, choices in SHAPES)
    expected = parts if packing is Packing.ALONE else {1: parts, 4096: 1}.get(batch_tokens)
    assert count["forwards"] == expected if expected else 1 < count["forwards"] < parts


def test_a_score_that_is_no_number_is_refused() -> None:
    """An answer that a model makes impossible has the score -inf, which is one."""
    check_scores("a", [[-1.0, -math.inf], [-2.0]])
    with pytest.raises(NonFiniteError, match="task a: cross-entropies are not numbers"):
        check_scores("a", [[-1.0, -2.0], [math.nan, -2.0]])


def test_scores_by_varlen_attention(model: Any, items: list[ChoiceItem]) -> None:
    wanted = naive_scores(model, items)
    register_attention()
    model.set_attn_implementation(TORCH_VARLEN)
    with kernel_on_cpu():
        found = score_items(counting(model, Counter()), items, batch_tokens=40, packing=Packing.SEQUENCES)
    assert_same(items, found, wanted)


@pytest.mark.parametrize("packing", [Packing.TREES, Packing.ALONE])
@pytest.mark.parametrize("number", [1, 2, 5, 11])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_questions_with_equal_forwards(
    model: Any, items: list[ChoiceItem], number: int, world_size: int, packing: Packing
) -> None:
    """As ZeRO-3 needs: the same number of forwards on every rank, also for one that has nothing left to score."""
    some, wanted = items[:number], naive_scores(model, items[:number])
    found: dict[int, float] = {}
    forwards = []
    for rank in range(world_size):
        count: Counter[str] = Counter()
        place = {"rank": rank, "world_size": world_size}
        mine = score_items(counting(model, count), some, batch_tokens=20, packing=packing, **place)
        assert not mine.keys() & found.keys()
        found |= mine
        forwards.append(count["forwards"])
    assert_same(some, found, wanted)
    choices = sum(len(item.choice_ids) for item in some)
    rows = choices if packing is Packing.ALONE else len(plan_rows(some, 20, True))
    assert forwards == [-(-rows // world_size)] * world_size


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 20, 33, 4096])
def test_rows_hold_every_question_once_within_the_budget(
    items: list[ChoiceItem], batch_tokens: int, share_prompt: bool
) -> None:
    rows = plan_rows(items, batch_tokens, share_prompt)
    assert sorted(index for row in rows for index in row) == list(range(len(items)))
    for members in rows:
        row = build_row(items, members, share_prompt)
        assert row.input_ids.numel() <= batch_tokens or len(members) == 1
        assert (row.token_branch is None) == (not share_prompt)
        lengths = torch.bincount(row.token_sample)
        assert row.cu_seq_lens.diff().tolist() == lengths.tolist() and row.max_length == lengths.max()
    # Filled, not one question a row: together with the first question of the next, a row would be too long.
    for members, following in zip(rows, rows[1:], strict=False):
        assert build_row(items, (*members, following[0]), share_prompt).input_ids.numel() > batch_tokens
    assert plan_rows([], batch_tokens, share_prompt) == []


def test_tokens_of_a_row_by_device() -> None:
    found = [row_tokens("auto", device, masked) for device in ("cpu", "cuda") for masked in (True, False)]
    assert found == [1024, 1024, 4096, 16_384]
    assert row_tokens(7, "cuda", False) == 7
    assert [row_tokens(wanted, "cpu", True, most=100) for wanted in ("auto", 7, 400)] == [100, 7, 100]


def question(label: int, ids: tuple[tuple[int, ...], ...], lengths: tuple[int, ...]) -> ChoiceItem:
    return ChoiceItem(0, (1, 2), ids, lengths, label)


def test_result_of_a_multiple_choice_task() -> None:
    items = [
        question(0, ((7,), (8, 9)), (1, 4)),  # right in sum, wrong per character
        question(1, ((5,), (7,), (6,)), (3, 8, 5)),  # wrong in sum, right per character
        question(1, ((5,), (7,)), (1, 1)),  # right in both
        question(0, ((3, 4), (2,)), (1, 1)),  # wrong in both
    ]
    scores = [[-1.0, -2.0], [-3.0, -4.0, -5.0], [-2.0, -1.0], [-6.0, -1.0]]
    assert task_result(items, scores) == pytest.approx(
        {
            "n": 4,
            "loss": (1 + 4 + 1 + 6 / 2) / 4,
            "accuracy": 0.5,
            "accuracy_norm": 0.5,
            "stderr": 0.25,  # sqrt(0.5 * 0.5 / 4)
            "majority": 0.75,  # three right answers are the text (7,), though each position is right only twice
        }
    )
    assert task_result(items[:1] * 3 + items[2:3], [scores[0]] * 3 + [scores[2]])["accuracy_norm"] == 0.25
    by_position = [question(1, ((1,), (index,)), (1, 1)) for index in (2, 3, 4)] + [question(0, ((9,), (1,)), (1, 1))]
    assert task_result(by_position, [[-1.0, -2.0]] * 4)["majority"] == 0.75


def test_completion_tasks_have_a_loss_only_and_no_part_in_the_average() -> None:
    completion = task_result([question(0, ((4, 5, 6),), (1,)), question(0, ((4,),), (1,))], [[-6.0], [-1.0]])
    assert completion == {"n": 2, "loss": 1.5}
    tasks = {"a": {"n": 1, "accuracy": 0.25}, "b": {"n": 9, "accuracy": 0.75}, "text": completion}
    assert summarise(tasks) == {"tasks": tasks, "average": 0.5}
    assert summarise({"text": completion})["average"] is None


def test_progress_counts_to_the_number_of_forwards(model: Any, items: list[ChoiceItem]) -> None:
    seen: list[tuple[int, int]] = []
    note: Callable[[int, int], None] = lambda done, total: seen.append((done, total))  # noqa: E731
    score_items(counting(model, Counter()), items, batch_tokens=40, progress=note)
    assert seen == [(number + 1, len(seen)) for number in range(len(seen))] and len(seen) > 1
