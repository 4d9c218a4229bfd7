"""The files that a run writes, and its log. Only the main process writes; all must call.

What cannot be written ends the run on all processes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import nn

from malora_dist.adapters.inject import InjectionReport
from malora_dist.adapters.io.card import model_card
from malora_dist.adapters.io.folder import AdapterInfo, save_adapter
from malora_dist.checkpoint.layout import is_of_run
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.config import RunConfig, config_text
from malora_dist.config.summary import adapter_spec
from malora_dist.console.log import LOGGER, console, start_logging
from malora_dist.data.build import PreparedData
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.rank_errors import run_on_rank0
from malora_dist.distributed.zero3 import gathered_adapter_state
from malora_dist.files import run_files
from malora_dist.files.atomic import write_json, write_text
from malora_dist.files.durable import reading
from malora_dist.report import print_results, write_report
from malora_dist.tracking.metrics import (
    BASE_DTYPE,
    BASE_PARAMETERS,
    BYTES,
    CHECKPOINT,
    DEVICE,
    EVAL,
    KIND,
    MAX_STEPS,
    RESIDENT_BYTES,
    RESUME,
    ROUTING,
    RUN,
    STEP,
    TRAINABLE_PARAMETERS,
    WORLD_SIZE,
    MetricsWriter,
    eval_accuracy,
    eval_loss,
    eval_score,
)
from malora_dist.tracking.trackers import open_trackers
from malora_dist.training.best_checkpoint import Tasks, score
from malora_dist.training.run_folder import (
    forget_evaluations,
    read_evaluations,
    read_json,
    read_measured_on,
    scores_file,
    scores_text,
    writing_into,
)
from malora_dist.training.run_summary import injection_lines, next_steps, placement_lines


class RunLogger:
    """The files of one run folder: config.yaml, data.json, metrics.jsonl, eval.json, adapter/, report/, train.log.

    A run that goes on adds to what its folder holds.
    """

    def __init__(self, config: RunConfig, folder: Path, world: World) -> None:
        self.config, self.folder, self.world = config, folder, world
        self.log = logging.getLogger(LOGGER)
        self.evaluations: dict[str, Any] = run_on_rank0(lambda: read_evaluations(folder), world)
        self.report: InjectionReport | None = None
        start_logging(None)
        self._write(self._open)
        self.log.info(
            "run folder %s, %d process%s on %s", folder, world.size, "es" if world.size > 1 else "", world.device.type
        )

    def _open(self) -> None:
        write_text(self.folder / run_files.CONFIG, config_text(self.config))
        start_logging(self.folder / run_files.LOG)
        self.metrics = MetricsWriter(self.folder / run_files.METRICS)
        self.trackers = open_trackers(self.config.train.report_to, self.folder, self.config.model_dump(mode="json"))

    def notes(self, notes: Sequence[str]) -> None:
        """Log what a reader should know about the run."""
        for note in notes:
            self.log.info("note: %s", note)

    def data(self, data: PreparedData) -> None:
        """Write data.json: what was read, skipped and removed, by task."""
        self.notes(data.warnings())
        self._write_json(run_files.DATA, data.counts)
        sizes = ", ".join(f"{name} {size}" for name, size in zip(data.task_names, data.train_sizes, strict=True))
        self.log.info("training samples: %s", sizes)

    def injection(self, report: InjectionReport) -> None:
        """Log which modules were adapted."""
        self.report = report
        for line in injection_lines(report):
            self.log.info("%s", line)

    def placement(self, dtype: str, resident: dict[str, int], steps: int, steps_per_epoch: float) -> None:
        """Log what this process holds once DeepSpeed has placed everything, and record the facts of the run.

        Args:
            dtype: of the base.
            resident: bytes of `base` and `adapter` weights on this process.
            steps: optimizer steps of the whole run.
            steps_per_epoch: of one epoch.
        """
        for line in placement_lines(self.config, resident, steps, steps_per_epoch):
            self.log.info("%s", line)
        assert self.report is not None
        self.record(
            {
                KIND: RUN,
                WORLD_SIZE: self.world.size,
                MAX_STEPS: steps,
                DEVICE: self.world.device.type,
                BASE_DTYPE: dtype.removeprefix("torch."),
                TRAINABLE_PARAMETERS: self.report.trainable_parameters,
                BASE_PARAMETERS: self.report.base_parameters,
                RESIDENT_BYTES: resident,
            }
        )

    def record(self, record: dict[str, Any]) -> None:
        """Append to metrics.jsonl and to the trackers."""

        def append() -> None:
            self.metrics.write(record)
            for tracker in self.trackers:
                tracker.log(record)

        self._write(append)

    def resumed(self, step: int, checkpoint: Checkpoint | None, *, validated: bool = True) -> None:
        """Remove the records of lost work from metrics.jsonl, and add one that training resumes after `step`.

        Args:
            step: optimizer steps so far.
            checkpoint: where they come from. None, or one of another run, for a run whose own records are all lost.
            validated: False if the validation of the step is still to be done, and so to be recorded again.
        """
        own = checkpoint is not None and is_of_run(checkpoint.folder, self.folder)
        self._write(lambda: self.metrics.cut(step if own else 0, () if validated else (EVAL, ROUTING)))
        folder = None
        if checkpoint is not None:
            folder = str(checkpoint.folder)
            self.log.info("resuming after step %d, from %s", step, folder)
        if checkpoint is not None and own:
            self._record_checkpoint(checkpoint)
        self.record({KIND: RESUME, STEP: step, CHECKPOINT: folder})

    def _record_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Add the record of a checkpoint of this run whose writer was killed before it could."""
        step, files = checkpoint.manifest.step, checkpoint.manifest.files.values()
        if not run_on_rank0(lambda: self._holds_checkpoint(step), self.world):
            self.record({KIND: CHECKPOINT, STEP: step, BYTES: sum(record.bytes for record in files)})

    def _holds_checkpoint(self, step: int) -> bool:
        with reading(self.folder / run_files.METRICS):
            return self.metrics.holds(CHECKPOINT, step)

    def measured_on(self, what: Mapping[str, Any]) -> None:
        """Forget the evaluations of an earlier start of this run that had another recipe, base or rows."""
        path = self.folder / run_files.MEASURED_ON
        before = run_on_rank0(lambda: read_measured_on(path), self.world)
        if before is not None and before != what and self.evaluations:
            self.notes(["an earlier start of this run had another recipe, base or rows: evaluations are repeated"])
        if before != what:
            self.evaluations = {}
            self._write(lambda: forget_evaluations(self.folder))
            self._write_json(run_files.MEASURED_ON, what)

    def kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the content of a JSON file of the folder, which the first start of a run measures and writes."""
        path = self.folder / name
        if not run_on_rank0(path.exists, self.world):
            self._write_json(name, measure())
        content: dict[str, Any] = run_on_rank0(lambda: read_json(path), self.world)
        return content

    def validation(self, step: int, result: dict[str, Any], metric: str, baseline: Tasks | None) -> float:
        """Record a validation, as `eval/<task>/accuracy` and `/loss`; return its score by `metric`."""
        value = score(metric, result["tasks"], baseline)
        names = {"accuracy": eval_accuracy, "loss": eval_loss}
        values = {
            name_of(task): row[name]
            for task, row in result["tasks"].items()
            for name, name_of in names.items()
            if name in row
        }
        self.record({KIND: EVAL, STEP: step, **values, eval_score(metric): value})
        self.log.info("step %d  validation: %s %.3f", step, metric.replace("_", " "), value)
        return value

    def evaluation(self, side: str, result: dict[str, Any]) -> None:
        """Write the `base` or `tuned` side of eval.json."""
        self.evaluations[side] = result
        self._write_json(run_files.EVALUATIONS, self.evaluations)
        if result["average"] is not None:
            measured = sum("accuracy" in row for row in result["tasks"].values())
            self.log.info("%s: accuracy %.3f on average over %d tasks", side, result["average"], measured)

    def scores(self, side: str, questions: Sequence[Mapping[str, object]]) -> None:
        """Write the scores of every question of the `base` or `tuned` side, as scores-SIDE.jsonl."""
        self._write(lambda: write_text(self.folder / scores_file(side), scores_text(questions)))

    def adapter(self, model: nn.Module, name: str) -> None:
        """Write the adapter folder `name`. Every process must call: all gather the weights, and rank 0 keeps them."""
        state = dict(gathered_adapter_state(model, keep=self.world.is_main))
        self._write(lambda: save_adapter(self.folder / name, self.adapter_info(), state, self._card()))
        self.log.info("saved %s", self.folder / name)

    def adapter_info(self) -> AdapterInfo:
        """Return what adapter_config.json says."""
        adapter = self.config.adapter
        return AdapterInfo(
            spec=adapter_spec(self.config),
            target_modules=adapter.target_modules if self.report is None else self.report.target_modules,
            base_model=self.config.model.name_or_path,
            lora_dropout=adapter.lora_dropout,
            trust_remote_code=self.config.model.trust_remote_code,
        )

    def _card(self) -> str:
        return model_card(self.adapter_info(), [task.name for task in self.config.data.tasks], self.evaluations)

    def close(self) -> None:
        """Close the files of a run that is to be resumed later."""
        self._write(self._close)

    def close_after_failure(self) -> None:
        """Close the files of a run that has failed, and let trackers show it as failed. For rank 0 alone."""
        # The error of the run is the one to show.
        with suppress(OSError):
            self._close(failed=True)

    def _close(self, *, failed: bool = False) -> None:
        for tracker in self.trackers:
            tracker.close(failed=failed)
        self.metrics.close()

    def finish(self) -> None:
        """Write the report and the adapter's model card, and print what to look at next."""
        self._write(self._finish)

    def _finish(self) -> None:
        write_text(self.folder / run_files.ADAPTER / "README.md", self._card())
        self._close()
        try:
            write_report(self.folder)
        except Exception as error:
            # All that was trained and measured is there, and another start would train nothing more.
            self.log.error("%s has no report (%r); `malora report %s` writes it", self.folder, error, self.folder)
        terminal = console()
        if self.evaluations:
            terminal.print(print_results(self.evaluations))
        text = next_steps(self.folder, trust_remote_code=self.config.model.trust_remote_code)
        terminal.print(Text(text), soft_wrap=True)

    def _write_json(self, name: str, value: Any) -> None:
        self._write(lambda: write_json(self.folder / name, value))

    def _write(self, write: Callable[[], None]) -> None:
        """Write into the folder on rank 0. Raises TrainingError on all if it cannot be written."""
        run_on_rank0(writing_into(self.folder)(write), self.world)
