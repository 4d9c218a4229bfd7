"""Measuring a model on the tasks' held-out rows, on any number of processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from malora_dist.adapters.inject import mixture_layers
from malora_dist.console.progress import Bar
from malora_dist.data.encode import ChoiceItem, Sample
from malora_dist.data.packed_row import Packing
from malora_dist.distributed.process_groups import World, gather_lists
from malora_dist.evaluation.packed_forward import cross_entropies
from malora_dist.evaluation.scoring import (
    Forward,
    check_scores,
    row_tokens,
    score_items,
    scores_of_questions,
    summarise,
    task_result,
)
from malora_dist.models.packed_attention import is_masked
from malora_dist.ops.products import kept_weight_copies


def evaluate_tasks(
    engine: Any,
    evaluation: Mapping[str, Sequence[ChoiceItem] | Sequence[Sample]],
    world: World,
    *,
    batch_tokens: int | str,
    title: str,
    packing: Packing,
    use_adapter: bool = True,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One side of eval.json, the same on every process; tasks without rows are left out.

    All tasks' questions are scored in one pass, so that rows are full and processes evenly loaded. `batch_tokens` may
    be `auto`. packing: what `evaluation.packing` found that the model takes. `between` is called after each forward, as
    often on every process; what it raises leaves the engine as it was. Raises NonFiniteError on all for scores that are
    not numbers.
    """
    questions = {task: [as_question(row) for row in rows] for task, rows in evaluation.items() if rows}
    items = [item for rows in questions.values() for item in rows]

    def progress(done: int, total: int) -> None:
        bar.update(done, total)
        between()

    with evaluating(engine, use_adapter), Bar(title, active=world.is_main) as bar:
        mine = score_items(
            forward_of(engine),
            items,
            batch_tokens=row_tokens(batch_tokens, world.device, is_masked(engine.module)),
            packing=packing,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            progress=progress,
        )
    scores = scores_of_questions(items, dict(gather_lists(list(mine.items()))))
    results, start = {}, 0
    for task, rows in questions.items():
        of_task = scores[start : start + len(rows)]
        check_scores(task, of_task)
        results[task] = task_result(rows, of_task)
        start += len(rows)
    return summarise(results)


@contextmanager
def evaluating(engine: Any, use_adapter: bool) -> Iterator[None]:
    """Put the engine in evaluation mode, with or without its adapters, for as long as the block lasts."""
    training = engine.module.training
    engine.eval()
    set_adapter(engine.module, use_adapter)
    try:
        with kept_weight_copies(engine.module):
            yield
    finally:
        set_adapter(engine.module, True)
        engine.train(training)


def forward_of(engine: Any) -> Forward:
    """The engine as the function that `scoring` calls."""
    return torch.no_grad()(partial(cross_entropies, engine))


def set_adapter(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off; off, the model is its untouched base."""
    for _, layer in mixture_layers(model):
        layer.adapter_enabled = enabled


def as_question(row: ChoiceItem | Sample) -> ChoiceItem:
    """A completion is a question with one choice: only its loss is measured."""
    if isinstance(row, ChoiceItem):
        return row
    ids = tuple(int(i) for i in row.input_ids)
    return ChoiceItem(row.task_id, ids[: row.prompt_length], (ids[row.prompt_length :],), (1,), 0)
