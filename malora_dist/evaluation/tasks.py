"""Measuring a model on the tasks' held-out rows, on any number of processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from malora_dist.adapters.adapted_layers import mixture_layers
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
    score_rows,
    scores_of_questions,
    summarise,
    task_result,
)
from malora_dist.models.packed_attention import is_masked, longest_row
from malora_dist.ops.products import kept_weight_copies

Rows = Mapping[str, Sequence[ChoiceItem] | Sequence[Sample]]


@dataclass(frozen=True)
class Measured:
    """What an evaluation found: one side of eval.json, and a record for each question (`scoring.score_rows`)."""

    summary: dict[str, Any]
    questions: list[dict[str, object]]


@dataclass(frozen=True)
class TaskEvaluator:
    """Measures an engine on the held-out rows of tasks.

    Attributes:
        engine: the model under DeepSpeed.
        world: the processes that share the rows.
        batch_tokens: tokens of a packed row, or `auto`.
        packing: what the model takes in one row (`evaluation.packing`).
        poll: called after each forward, as often on every process; what it raises leaves the engine as it was.
    """

    engine: Any
    world: World
    batch_tokens: int | str
    packing: Packing
    poll: Callable[[], None] = lambda: None

    def evaluate(self, rows: Rows, title: str, *, use_adapter: bool = True) -> dict[str, Any]:
        """Score the questions of all tasks in one pass, so that rows are full and processes evenly loaded.

        Args:
            rows: those of each task; tasks without rows are left out.
            title: of the progress bar.
            use_adapter: False for the untouched base.

        Returns:
            One side of eval.json, the same on every process.

        Raises:
            NonFiniteError: on all processes, for scores that are not numbers.
        """
        return self.measure(rows, title, use_adapter=use_adapter).summary

    def measure(self, rows: Rows, title: str, *, use_adapter: bool = True) -> "Measured":
        """Evaluate as `evaluate` does, and return the scores of every question too."""
        questions = {task: [as_question(row) for row in of_task] for task, of_task in rows.items() if of_task}
        scores = self._scores([item for of_task in questions.values() for item in of_task], title, use_adapter)
        results: dict[str, dict[str, float]] = {}
        records: list[dict[str, object]] = []
        start = 0
        for task, items in questions.items():
            of_task = scores[start : start + len(items)]
            check_scores(task, of_task)
            results[task] = task_result(items, of_task)
            records += score_rows(task, items, of_task)
            start += len(items)
        return Measured(summarise(results), records)

    def _scores(self, items: Sequence[ChoiceItem], title: str, use_adapter: bool) -> list[list[float]]:
        """Return the scores of each question's choices, gathered from all processes."""

        def progress(done: int, total: int) -> None:
            bar.update(done, total)
            self.poll()

        engine, world, model = self.engine, self.world, self.engine.module
        tokens = row_tokens(self.batch_tokens, world.device, is_masked(model), longest_row(model.config))
        with evaluating(engine, use_adapter), Bar(title, active=world.is_main) as bar:
            mine = score_items(
                forward_of(engine),
                items,
                batch_tokens=tokens,
                packing=self.packing,
                rank=world.rank,
                world_size=world.size,
                device=world.device,
                progress=progress,
            )
        return scores_of_questions(items, dict(gather_lists(list(mine.items()))))


@contextmanager
def evaluating(engine: Any, use_adapter: bool) -> Iterator[None]:
    """Keep the engine in evaluation mode for a block, with or without its adapters."""
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
    """Return the engine as the function that `scoring` calls."""
    return torch.no_grad()(partial(cross_entropies, engine))


def set_adapter(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off; off, the model is its untouched base."""
    for _, layer in mixture_layers(model):
        layer.adapter_enabled = enabled


def as_question(row: ChoiceItem | Sample) -> ChoiceItem:
    """Return a row as a question: a completion has one choice, of which only the loss is measured."""
    if isinstance(row, ChoiceItem):
        return row
    ids = tuple(int(i) for i in row.input_ids)
    return ChoiceItem(row.task_id, ids[: row.prompt_length], (ids[row.prompt_length :],), (1,), 0)
