"""All data of a run from its `data` section: the mixture to train on and the questions to evaluate with."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from malora_dist.config.data_schema import DataConfig, TaskConfig
from malora_dist.console.progress import Bar
from malora_dist.data.encode import ChoiceItem, Encoder, Sample
from malora_dist.data.mixture import Indices, epoch_counts, mixture_shares
from malora_dist.data.store import TaskTokens, TrainStore
from malora_dist.data.tokenize import (
    EVALUATION_SPLITS,
    SPLITS,
    prepare_task,
    read_task,
    tokenizer_fingerprint,
)
from malora_dist.data.watch import READING_FILES
from malora_dist.files.cache import default_cache_dir, expanded


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on and is measured with. A task's id is its place in `task_names`.

    `evaluation[split][task]` holds ChoiceItems for multiple choice and Samples for completion, and is empty where the
    task has no such split. `counts[task]` is what data.json shows. `fingerprint` changes with the training data,
    `digests[split][task]` with the rows of that split.
    """

    task_names: tuple[str, ...]
    kinds: tuple[str, ...]
    train: TrainStore
    train_sizes: tuple[int, ...]
    shares: tuple[float, ...]
    evaluation: dict[str, dict[str, list[ChoiceItem] | list[Sample]]]
    counts: dict[str, dict[str, int]]
    fingerprint: str
    digests: dict[str, dict[str, str]]

    def warnings(self) -> list[str]:
        """Return what a reader should know about the data before trusting the run, one sentence each."""
        sentences = {
            "bad_rows_skipped": "bad rows were skipped",
            "responses_cut": "responses are longer than max_seq_length and were truncated",
            "prompts_cut": "prompts were truncated on the left to max_seq_length",
            "shared_groups_removed": "training rows share a group with an evaluation split and were removed",
            "leaked_duplicates_removed": "training rows repeat an evaluation row and were removed",
            "near_duplicates_removed": "training rows nearly repeat an evaluation row and were removed",
            "duplicates_removed": "training rows repeat another and were removed",
            "choices_alike": "questions have a choice of the same tokens as the right one, as the tokenizer reads "
            "them or max_seq_length cuts them: no model can tell these apart, and the first of them is taken",
            "labels_from_1": "labels are numbers from 1 on, none is 0, and 1 is taken for the second choice: if it "
            "is the first one, set first_label: 1",
            "choice_fields_unused": "of the last fields in fields.choices hold a choice in no row: are they misspelt?",
            "labels_of_two_meanings": "labels are the text of one choice and the key, letter or number of another: "
            "taken are keys where rows name them, else texts, and numbers that are not written as text are counted",
        }
        return [
            f"task {task}: {counts[name]} {text}"
            for task, counts in self.counts.items()
            for name, text in sentences.items()
            if counts.get(name)
        ] + list(self._rare_tasks())

    def lengths(self, task: str) -> Indices:
        """Count the tokens of each sample of a task and of each of its questions with the longest choice."""
        evaluated = [row.tokens for split in self.evaluation.values() for row in split[task]]
        return np.concatenate([self.train.lengths(self.task_names.index(task)), np.asarray(evaluated, dtype=np.int64)])

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, or question with its longest choice, of all tasks."""
        return max((int(self.lengths(task).max(initial=0)) for task in self.task_names), default=0)

    def _rare_tasks(self) -> Iterator[str]:
        for task, share in zip(self.task_names, self.shares, strict=True):
            samples = share * sum(self.train_sizes)
            if samples < 1:
                yield (
                    f"task {task}: its share of the mixture is {samples:.2g} samples an epoch, one in about "
                    f"{1 / samples:.0f} epochs; see data.mixture and the task's weight"
                )


def build_data(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, poll: Callable[[], None] = lambda: None
) -> PreparedData:
    """Read, check, split and tokenise all tasks, or load them from the cache. Safe to call on all ranks at once.

    `poll` is called often; it may raise to stop the work, and finished tasks are kept. The process that does the work
    shows its progress.
    Raises DataError as `malora_dist.data.tasks.load_task` does.
    """
    cache_dir = expanded("data.cache_dir", data.cache_dir) if data.cache_dir is not None else default_cache_dir()
    tasks: list[TaskTokens] = []
    tokenizer_key = tokenizer_fingerprint(tokenizer)
    with Bar("preparing the tasks") as bar:
        for task_id, task in enumerate(data.tasks):
            encoder = Encoder(
                tokenizer,
                data.max_seq_length,
                task.prompt_template,
                task.response_template,
                task.scoring,
                partial(_watch, poll, bar, task.name),
                data.on_bad_row == "skip",
            )
            folder, _ = prepare_task(_task_settings(data, task), encoder, cache_dir, tokenizer_key=tokenizer_key)
            first_id = sum(len(earlier.train) for earlier in tasks)
            tasks.append(read_task(folder, task_id=task_id, first_id=first_id))
    return _prepared(data, tasks)


def _watch(poll: Callable[[], None], bar: Bar, task: str, work: str, done: int, total: int) -> None:
    poll()
    # Of the processes that wait, or all do the same, one at most may say so.
    alone = (done or total) and work != READING_FILES
    if alone or os.environ.get("RANK", "0") == "0":
        bar.update(done, total, f"task {task}: {work}")


def _task_settings(data: DataConfig, task: TaskConfig) -> dict[str, object]:
    """Return the arguments of `load_task`, without those that the encoder knows."""
    return {
        "name": task.name,
        "train": task.train,
        "validation": task.validation,
        "test": task.test,
        "validation_size": task.validation_size,
        "test_size": task.test_size,
        "group_by": task.group_by,
        "kind": task.kind,
        "fields": task.fields.model_dump(),
        "choices": task.choices,
        "optional_fields": task.optional_fields,
        "first_label": task.first_label,
        "max_train_samples": task.max_train_samples,
        "max_eval_samples": task.max_eval_samples,
        "on_bad_row": data.on_bad_row,
        "near_duplicate_threshold": data.near_duplicate_threshold,
        "split_seed": data.split_seed,
    }


def _prepared(data: DataConfig, tasks: Sequence[TaskTokens]) -> PreparedData:
    names = tuple(task.name for task in data.tasks)
    sizes = tuple(len(task.train) for task in tasks)
    weights = [task.weight for task in data.tasks]
    shares = mixture_shares(sizes, data.mixture, temperature=data.temperature, weights=weights)
    per_epoch = epoch_counts(shares, sum(sizes))
    evaluation = {
        split: {name: task.evaluation[split] for name, task in zip(names, tasks, strict=True)}
        for split in EVALUATION_SPLITS
    }
    counts = {
        name: {**task.counts, "samples_per_epoch": count}
        for name, task, count in zip(names, tasks, per_epoch, strict=True)
    }
    fingerprint = hashlib.sha256("\n".join(task.digests["train"] for task in tasks).encode()).hexdigest()
    return PreparedData(
        task_names=names,
        kinds=tuple(task.kind for task in tasks),
        train=TrainStore(tasks=[task.train for task in tasks]),
        train_sizes=sizes,
        shares=shares,
        evaluation=evaluation,
        counts=counts,
        fingerprint=fingerprint,
        digests={
            split: {name: task.digests[split] for name, task in zip(names, tasks, strict=True)} for split in SPLITS
        },
    )
