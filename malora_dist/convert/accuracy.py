"""What a static LoRA loses against the mixture it stands for, in accuracy on a task's held-out rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from malora_dist.console.progress import Bar
from malora_dist.data.encode import ChoiceItem, Sample
from malora_dist.evaluation.packing import packing_of
from malora_dist.evaluation.scoring import row_tokens, score_items, scores_of_questions, task_result
from malora_dist.evaluation.tasks import as_question, forward_of
from malora_dist.models.packed_attention import is_masked, longest_row

GAP_HEADER = f"{'task':<16} {'n':>5}  {'measure':<10} {'routed':>8} {'static':>8} {'change':>8}"


@dataclass(frozen=True)
class Gap:
    """One task's record of `scoring.task_result`, routed and static."""

    routed: Mapping[str, float]
    static: Mapping[str, float]


def measure(model: Any, rows: Sequence[ChoiceItem] | Sequence[Sample], batch_tokens: int | str) -> dict[str, float]:
    """Return the record of the model as it is now; `batch_tokens` may be `auto`."""
    items = [as_question(row) for row in rows]
    device = next(model.parameters()).device
    longest = max(len(item.prompt_ids) + len(ids) for item in items for ids in item.choice_ids)
    with Bar("measuring accuracy, forwards") as bar:
        scores = score_items(
            forward_of(model),
            items,
            batch_tokens=row_tokens(batch_tokens, device, is_masked(model), longest_row(model.config)),
            packing=packing_of(model, longest=longest),
            device=device,
            progress=bar.update,
        )
    return task_result(items, scores_of_questions(items, scores))


def gap_line(task: str, gap: Gap) -> str:
    """Return a line under GAP_HEADER: accuracy of multiple choice or loss of completions, and the difference."""
    name = "accuracy" if "accuracy" in gap.routed else "loss"
    before, after = gap.routed[name], gap.static[name]
    return f"{task:<16} {gap.routed['n']:>5}  {name:<10} {before:8.3f} {after:8.3f} {after - before:+8.3f}"
