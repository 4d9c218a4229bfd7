"""Accuracy by log-likelihood: the choice a model finds most probable, in sum or per character.

Questions are packed into rows of about `batch_tokens` tokens, without padding. With `share_prompt` a question's prompt
stands once in its row and every choice attends to it (a tree-shaped mask); otherwise, for attention kernels that take
no mask, each choice carries its own copy of the prompt. Both give the same scores.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malora_dist.data.encode import ChoiceItem

# (input_ids (1,T), position_ids (1,T), attention_mask (1,1,T,T) bool or None, positions (N,)) -> logits (1,N,V)
Forward = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """Questions packed into one sequence; the last three say which logits predict which choice's tokens."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    predict_from: Tensor
    targets: Tensor
    choice_of_target: Tensor
    items: tuple[int, ...]


def plan_rows(items: Sequence[ChoiceItem], batch_tokens: int, share_prompt: bool) -> list[tuple[int, ...]]:
    """Which questions share a row: neighbours in length, as many as fit, at least one."""
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


def build_row(
    items: Sequence[ChoiceItem], members: tuple[int, ...], share_prompt: bool, device: torch.device | str = "cpu"
) -> Row:
    """The packed row of `members`. A choice's last token is predicted, never fed."""
    ids: list[int] = []
    positions: list[int] = []
    item_of: list[int] = []
    branch_of: list[int] = []
    predict_from: list[int] = []
    targets: list[int] = []
    choice_of: list[int] = []

    def feed(tokens: Sequence[int], start: int, item: int, branch: int) -> None:
        ids.extend(tokens)
        positions.extend(range(start, start + len(tokens)))
        item_of.extend([item] * len(tokens))
        branch_of.extend([branch] * len(tokens))

    choice = 0
    for member in members:
        prompt = items[member].prompt_ids
        for number, answer in enumerate(items[member].choice_ids, start=1):
            if number == 1 or not share_prompt:
                feed(prompt, 0, member if share_prompt else choice, 0)
                end_of_prompt = len(ids) - 1
            predict_from += [end_of_prompt, *range(len(ids), len(ids) + len(answer) - 1)]
            feed(answer[:-1], len(prompt), member if share_prompt else choice, number)
            targets += answer
            choice_of += [choice] * len(answer)
            choice += 1
    mask = _tree_mask(torch.tensor(item_of), torch.tensor(branch_of)).to(device) if share_prompt else None
    return Row(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=mask,
        predict_from=torch.tensor(predict_from, device=device),
        targets=torch.tensor(targets, device=device),
        choice_of_target=torch.tensor(choice_of, device=device),
        items=members,
    )


def _tree_mask(item_T: Tensor, branch_T: Tensor) -> Tensor:
    """(1, 1, T, T) bool: a token sees what stands before it in its own question's prompt and its own choice."""
    T = len(item_T)
    same_item = item_T[:, None] == item_T[None, :]
    same_path = (branch_T[None, :] == 0) | (branch_T[:, None] == branch_T[None, :])
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    return (same_item & same_path & causal)[None, None]


@torch.no_grad()
def score_row(forward: Forward, row: Row, items: Sequence[ChoiceItem]) -> dict[int, list[float]]:
    """Summed log-probability of every choice, by question."""
    logits = forward(row.input_ids, row.position_ids, row.attention_mask, row.predict_from)
    log_probs = logits[0].float().log_softmax(dim=-1).gather(1, row.targets[:, None])[:, 0].double()
    choices = int(row.choice_of_target[-1]) + 1
    sums = log_probs.new_zeros(choices).index_add(0, row.choice_of_target, log_probs).tolist()
    scores, start = {}, 0
    for member in row.items:
        end = start + len(items[member].choice_ids)
        scores[member] = sums[start:end]
        start = end
    return scores


def score_items(
    forward: Forward,
    items: Sequence[ChoiceItem],
    *,
    batch_tokens: int,
    share_prompt: bool = True,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, list[float]]:
    """Scores of this process's part of the questions.

    Every process makes the same number of forwards, as ZeRO-3 needs: one that has no row left repeats another's and
    drops the result.
    """
    rows = plan_rows(items, batch_tokens, share_prompt)
    rounds = math.ceil(len(rows) / world_size)
    scores: dict[int, list[float]] = {}
    for number in range(rounds):
        mine = number * world_size + rank
        row = build_row(items, rows[mine % len(rows)], share_prompt, device)
        result = score_row(forward, row, items)
        if mine < len(rows):
            scores |= result
        progress(number + 1, rounds)
    return scores


def task_result(items: Sequence[ChoiceItem], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Record of one task: n and mean loss per token of the right answer; for multiple choice also accuracies.

    accuracy takes the largest summed log-likelihood, accuracy_norm the largest per character, stderr belongs to
    accuracy, majority is what always giving the commonest answer (by text or by position) would reach.
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
    """One side of eval.json: {"tasks": ..., "average": mean accuracy over the multiple-choice tasks or None}."""
    accuracies = [record["accuracy"] for record in tasks.values() if "accuracy" in record]
    return {"tasks": tasks, "average": sum(accuracies) / len(accuracies) if accuracies else None}
