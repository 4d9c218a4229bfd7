"""Accuracy by log-likelihood: the choice a model finds most probable, in sum or per character.

Questions are packed into rows of about `batch_tokens` tokens, without padding. Where the model takes `Packing.TREES`, a
question's prompt stands once in its row and every choice attends to it; else each choice carries its own copy of the
prompt wherever it stands, and has a row of its own where the model takes ALONE. All give the same scores.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from malora_dist.data.encode import ChoiceItem
from malora_dist.data.mixture import Indices
from malora_dist.data.packed_row import PackedRow, Packing, cumulative_lengths
from malora_dist.errors import NonFiniteError

# A row -> (N,) cross-entropy of each of its targets.
Forward = Callable[[PackedRow], Tensor]
CPU_TOKENS, GPU_TOKENS, GPU_MASK_TOKENS = 1024, 16_384, 4096


@dataclass(frozen=True, eq=False)
class Row(PackedRow):
    """Questions packed into one row; on the host, which choice of which question a target belongs to."""

    choice_of_target: Indices
    items: tuple[int, ...]


def row_tokens(batch_tokens: int | str, device: torch.device | str, masked: bool, most: int | None = None) -> int:
    """Return the tokens of a row, also for the setting `auto`; `most` is what the model takes.

    On a CPU long rows cost more than they save, as attention with a mask computes all T^2 pairs; on a GPU they keep the
    device busy, and a mask is what limits them.
    """
    if batch_tokens != "auto":
        wanted = int(batch_tokens)
    elif torch.device(device).type == "cpu":
        wanted = CPU_TOKENS
    else:
        wanted = GPU_MASK_TOKENS if masked else GPU_TOKENS
    return wanted if most is None else min(wanted, most)


def plan_rows(items: Sequence[ChoiceItem], batch_tokens: int, share_prompt: bool) -> list[tuple[int, ...]]:
    """Return which questions share a row: neighbours in length, as many as fit, at least one."""
    cost = [_tokens(item, share_prompt) for item in items]
    rows: list[list[int]] = []
    filled = batch_tokens
    for index in sorted(range(len(items)), key=lambda i: (cost[i], i)):
        if filled + cost[index] > batch_tokens:
            rows.append([])
            filled = 0
        rows[-1].append(index)
        filled += cost[index]
    return [tuple(row) for row in rows]


def _tokens(item: ChoiceItem, share_prompt: bool) -> int:
    prompts = 1 if share_prompt else len(item.choice_ids)
    return prompts * len(item.prompt_ids) + sum(len(ids) - 1 for ids in item.choice_ids)


def build_row(items: Sequence[ChoiceItem], members: tuple[int, ...], share_prompt: bool) -> Row:
    """Pack the questions `members` into a row. A choice's last token is predicted, never fed."""
    ids: list[int] = []
    positions: list[int] = []
    sequence_of: list[int] = []
    branch_of: list[int] = []
    target_index: list[int] = []
    targets: list[int] = []
    choice_of: list[int] = []

    def feed(tokens: Sequence[int], start: int, sequence: int, branch: int) -> None:
        ids.extend(tokens)
        positions.extend(range(start, start + len(tokens)))
        sequence_of.extend([sequence] * len(tokens))
        branch_of.extend([branch] * len(tokens))

    choice = 0
    for place, member in enumerate(members):
        prompt = items[member].prompt_ids
        for number, answer in enumerate(items[member].choice_ids, start=1):
            sequence = place if share_prompt else choice
            if number == 1 or not share_prompt:
                feed(prompt, 0, sequence, 0)
                end_of_prompt = len(ids) - 1
            target_index += [end_of_prompt, *range(len(ids), len(ids) + len(answer) - 1)]
            feed(answer[:-1], len(prompt), sequence, number)
            targets += answer
            choice_of += [choice] * len(answer)
            choice += 1
    lengths = np.bincount(sequence_of)
    return Row(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        target_index=torch.tensor(target_index),
        targets=torch.tensor(targets),
        token_sample=torch.tensor(sequence_of),
        token_branch=torch.tensor(branch_of) if share_prompt else None,
        cu_seq_lens=cumulative_lengths(lengths),
        max_length=int(lengths.max()),
        choice_of_target=np.asarray(choice_of),
        items=members,
    )


def choices_alone(items: Sequence[ChoiceItem]) -> list[ChoiceItem]:
    """Return every choice of every question as a question of its own."""
    return [
        replace(item, choice_ids=(ids,), choice_lengths=(length,), label=0)
        for item in items
        for ids, length in zip(item.choice_ids, item.choice_lengths, strict=True)
    ]


def score_row(forward: Forward, row: Row) -> list[float]:
    """Sum log-probabilities of every choice. The sums are made on the host, always in the same order."""
    losses_N = forward(row).double().cpu().numpy()
    sums: list[float] = (-np.bincount(row.choice_of_target, losses_N)).tolist()
    return sums


def score_items(
    forward: Forward,
    items: Sequence[ChoiceItem],
    *,
    batch_tokens: int,
    packing: Packing = Packing.TREES,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, float]:
    """Score this process's part of the choices of all questions.

    Every process makes the same number of forwards, as ZeRO-3 needs: one that has no row left repeats another's and
    drops the result.

    Args:
        forward: the model.
        items: all questions.
        batch_tokens: tokens of a row.
        packing: what the model takes in one row.
        rank, world_size: which rows are this process's.
        device: of the model.
        progress: called after each forward with the number done and that of all.

    Returns:
        Summed log-likelihoods by the number of the choice, counted through all questions.
    """
    share_prompt = packing is Packing.TREES
    if not share_prompt:
        items = choices_alone(items)
    if packing is Packing.ALONE:
        batch_tokens = 1
    rows = plan_rows(items, batch_tokens, share_prompt)
    first = list(accumulate((len(item.choice_ids) for item in items), initial=0))
    rounds = math.ceil(len(rows) / world_size)
    scores: dict[int, float] = {}
    for number in range(rounds):
        mine = number * world_size + rank
        row = build_row(items, rows[mine % len(rows)], share_prompt).to(device)
        result = score_row(forward, row)
        if mine < len(rows):
            choices = [choice for item in row.items for choice in range(first[item], first[item + 1])]
            scores |= dict(zip(choices, result, strict=True))
        progress(number + 1, rounds)
    return scores


def scores_of_questions(items: Sequence[ChoiceItem], scores: Mapping[int, float]) -> list[list[float]]:
    """Return the scores of each question's choices, out of those that `score_items` found on all processes."""
    ends = accumulate(len(item.choice_ids) for item in items)
    return [
        [scores[choice] for choice in range(end - len(item.choice_ids), end)]
        for item, end in zip(items, ends, strict=True)
    ]


def check_scores(task: str, scores: Sequence[Sequence[float]]) -> None:
    """Raise NonFiniteError if a score is not a number: the first choice would count as the most probable one."""
    if any(math.isnan(score) for row in scores for score in row):
        raise NonFiniteError(
            f"task {task}: cross-entropies are not numbers (nan): weights of adapter or base are not, or overflow"
        )


def score_rows(task: str, items: Sequence[ChoiceItem], scores: Sequence[Sequence[float]]) -> list[dict[str, object]]:
    """Return a record for each question of a task: its number, the right choice, and each choice's score and length.

    `scores` are summed log-likelihoods in nats, `lengths` characters, as `accuracy` and `accuracy_norm` take them.
    """
    return [
        {"task": task, "question": n, "label": item.label, "scores": list(row), "lengths": list(item.choice_lengths)}
        for n, (item, row) in enumerate(zip(items, scores, strict=True))
    ]


def task_result(items: Sequence[ChoiceItem], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Compute the record of one task.

    Args:
        items: its questions.
        scores: summed log-likelihoods of each question's choices.

    Returns:
        `n` and mean `loss` per token of the right answer; for multiple choice also `accuracy`, which takes the largest
        summed log-likelihood, `accuracy_norm`, which takes the largest per character, `stderr` of the accuracy, and
        `majority`, the accuracy of always giving the commonest answer (by text or by position).
    """
    n = len(items)
    loss = sum(-row[item.label] / len(item.choice_ids[item.label]) for item, row in zip(items, scores, strict=True)) / n
    record: dict[str, float] = {"n": n, "loss": loss}
    if all(len(item.choice_ids) == 1 for item in items):
        return record
    hits = sum(_best(row) == item.label for item, row in zip(items, scores, strict=True))
    by_length = [
        _best([s / max(1, length) for s, length in zip(row, item.choice_lengths, strict=True)]) == item.label
        for item, row in zip(items, scores, strict=True)
    ]
    texts, positions = Counter(item.choice_ids[item.label] for item in items), Counter(item.label for item in items)
    accuracy = hits / n
    return record | {
        "accuracy": accuracy,
        "accuracy_norm": sum(by_length) / n,
        "stderr": math.sqrt(accuracy * (1 - accuracy) / n),
        "majority": max(max(texts.values()), max(positions.values())) / n,
    }


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])


def summarise(tasks: dict[str, dict[str, float]]) -> dict[str, object]:
    """Return one side of eval.json: {"tasks": ..., "average": mean accuracy over the multiple-choice tasks or None}."""
    accuracies = [record["accuracy"] for record in tasks.values() if "accuracy" in record]
    return {"tasks": tasks, "average": sum(accuracies) / len(accuracies) if accuracies else None}
