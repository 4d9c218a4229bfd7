"""The evaluations of a run: of its untouched base, during training, and of the trained adapter."""

from pathlib import Path

from malora_dist.config import RunConfig
from malora_dist.data.build import PreparedData
from malora_dist.data.packed_row import Packing
from malora_dist.errors import ConfigError
from malora_dist.evaluation.tasks import Measured, TaskEvaluator
from malora_dist.files import run_files
from malora_dist.training.best_checkpoint import Tasks, read_baseline
from malora_dist.training.run_context import RunContext
from malora_dist.training.run_logger import RunLogger
from malora_dist.training.train_step import TrainStep


def stored_baseline(config: RunConfig, data: PreparedData) -> Tasks | None:
    """Read the scores that train.best_metric compares with, if train.best_baseline names a file of them.

    Raises:
        ConfigError: validations are wanted and no task has rows for them, or the file is not such a file.
    """
    if config.train.eval_steps is None:
        return None
    measured = [task for task, rows in data.evaluation["validation"].items() if rows]
    if not measured:
        raise ConfigError(f"train.eval_steps={config.train.eval_steps}: no task has validation rows to evaluate on")
    if config.train.best_baseline is None:
        return None
    return read_baseline(Path(config.train.best_baseline), measured)


class RunEvaluations:
    """Measures the engine of a run on the splits of its tasks, and writes what comes out into its folder."""

    def __init__(
        self, context: RunContext, data: PreparedData, train_step: TrainStep, packing: Packing, logger: RunLogger
    ) -> None:
        """Prepare to evaluate the engine of `train_step`, which takes `packing` in one row."""
        self.config, self.watchdog, self.data, self.logger = context.config, context.watchdog, data, logger
        tokens = context.config.evaluation.batch_tokens
        self.evaluator = TaskEvaluator(train_step.engine, context.world, tokens, packing, context.poll)

    def evaluate_base(self, baseline: Tasks | None) -> Tasks | None:
        """Measure the untouched base, unless an earlier start of the run has; return the baseline of best_metric."""
        train = self.config.train
        if self.config.evaluation.base and "base" not in self.logger.evaluations:
            self._evaluate("base", use_adapter=False)
        if train.eval_steps is None or train.best_metric != "worst_drop" or baseline is not None:
            return baseline
        kept = self.logger.kept(run_files.BASELINE, lambda: self._measure("validation", use_adapter=False).summary)
        tasks: Tasks = kept["tasks"]
        return tasks

    def validate(self, step: int, baseline: Tasks | None) -> float:
        """Measure the adapter on the validation rows; return its score by train.best_metric."""
        return self.logger.validation(
            step, self._measure("validation").summary, self.config.train.best_metric, baseline
        )

    def evaluate_tuned(self) -> None:
        """Measure the trained adapter, if evaluation.tuned is set."""
        if self.config.evaluation.tuned:
            self._evaluate("tuned")

    def _evaluate(self, side: str, use_adapter: bool = True) -> None:
        measured = self._measure(side, use_adapter)
        # The scores first: a run that goes on and finds the side in eval.json does not measure it again.
        if self.config.evaluation.write_scores:
            self.logger.scores(side, measured.questions)
        self.logger.evaluation(side, measured.summary)

    def _measure(self, what: str, use_adapter: bool = True) -> Measured:
        self.watchdog.mark_phase(f"evaluation ({what})")
        split = "validation" if what == "validation" else self.config.evaluation.split
        return self.evaluator.measure(self.data.evaluation[split], f"evaluating ({what})", use_adapter=use_adapter)
