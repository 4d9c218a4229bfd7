"""The work of `malora evaluate`: measures the accuracy of an adapter and of its base on each task.

The result goes to `RUN/eval.json` (`DIR/eval.json`), the log to `evaluate.log` beside it, or the result alone to a file
that the command names. Nothing measured before is lost: a result that says something else than the file, because
settings, rows or numbers are others, becomes `eval-2.json`, `eval-3.json`, ...
"""

import logging
import os
import shlex

from malora_dist.adapters.io.folder import AdapterTensors, open_adapter
from malora_dist.adapters.loading import put_adapter
from malora_dist.config import RunConfig, config_text
from malora_dist.config.compatibility import suggest_world_sizes
from malora_dist.config.evaluation_target import EvaluationTarget
from malora_dist.console.log import LOGGER, console, start_logging
from malora_dist.distributed.consistency import check_consistency, start_facts
from malora_dist.distributed.rank_errors import run_on_rank0, sharing_errors
from malora_dist.distributed.zero3 import gathered
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.evaluation.packing import check_packing
from malora_dist.evaluation.tasks import Measured, TaskEvaluator
from malora_dist.files.atomic import write_json, write_text
from malora_dist.launch.ranks import place_of
from malora_dist.report import print_results
from malora_dist.training.base_model import base_dtype, base_model
from malora_dist.training.deepspeed_engine import build_engine
from malora_dist.training.device_check import check_device, check_memory
from malora_dist.training.inputs import open_inputs
from malora_dist.training.process import run_as_process
from malora_dist.training.run_context import RunContext
from malora_dist.training.run_folder import evaluation_file, scores_file, scores_text
from malora_dist.training.setup import engine_config
from malora_dist.training.watchdog import Watchdog, watched


def evaluate(target: EvaluationTarget) -> int:
    """Evaluate; return the exit code: 0, 1 for a failure, 2 for a mistake in the recipe or the data."""
    return run_as_process(lambda: _evaluate(target))


def _evaluate(target: EvaluationTarget) -> None:
    from malora_dist.distributed.process_groups import start_processes

    config = target.config()
    if place_of(os.environ)[1] == 1:
        # No other process has to learn of a mistake, which is then found before DeepSpeed is imported.
        open_adapter(target.adapter)
    world = start_processes(config.parallel.timeout_seconds)
    check_consistency(world, start_facts(config_text(config)))
    with sharing_errors(world):
        adapter = open_adapter(target.adapter)
    start_logging(None)
    run_on_rank0(lambda: _start_logging(target), world)
    log = logging.getLogger(LOGGER)
    log.info("evaluating %s on %s %s", adapter.path, target.recipe, shlex.join(target.overrides))
    for note in check_device(config, world, trains=False):
        log.info("note: %s", note)
    context = RunContext(config, world, Watchdog(world.rank))
    with watched(context.watchdog, config.parallel.timeout_seconds):
        measured = evaluate_adapter(context, adapter)
    run_on_rank0(lambda: _show(target, measured, write_scores=config.evaluation.write_scores), world)


def _start_logging(target: EvaluationTarget) -> None:
    target.check_output()
    try:
        start_logging(target.log_file, level=logging.INFO)
    except OSError as error:
        raise ConfigError(f"{target.log_file} cannot be written: {error.strerror}") from error


def _show(target: EvaluationTarget, measured: dict[str, Measured], *, write_scores: bool) -> None:
    """Print the result first: hours of work must not be lost with a file that cannot be written."""
    result = {side: of_side.summary for side, of_side in measured.items()}
    console().print(print_results(result))
    if not target.save:
        return
    path = target.output or evaluation_file(target.folder, result)
    try:
        if write_scores:
            for side, of_side in measured.items():
                write_text(path.with_name(scores_file(side, path)), scores_text(of_side.questions))
        write_json(path, result)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; the result is printed above") from error
    logging.getLogger(LOGGER).info("wrote %s", path)


def evaluate_adapter(context: RunContext, adapter: AdapterTensors) -> dict[str, Measured]:
    """Evaluate an adapter on the recipe's base and tasks.

    Experts are not spread (`parallel.ep_size` is of no effect), so that any number of processes will do.

    Args:
        context: the recipe and the processes.
        adapter: its opened folder.

    Returns:
        What was measured, by side of eval.json, on every process.
    """
    config, world, watchdog = context.config, context.world, context.watchdog
    dtype = base_dtype(config, world)
    with context.while_waiting() as poll:
        inputs = open_inputs(config, dtype, world.device, poll, trains=False)
    data, folder = inputs.data, inputs.folder
    fitting = _with_fitting_batch(config, world.size)
    for note in (*inputs.notes, *inputs.data_notes, *check_memory(fitting, folder, world, None)):
        logging.getLogger(LOGGER).info("note: %s", note)
    watchdog.mark_phase("loading the base model")
    settings = engine_config(fitting, world)
    model = base_model(context, folder, settings)
    put_adapter(model, adapter, gathered)
    engine = build_engine(
        model,
        settings,
        None,
        zero_stage=config.parallel.zero_stage,
        timeout_seconds=config.parallel.timeout_seconds,
    )
    watchdog.attach(engine.module)
    watchdog.mark_phase("evaluation")
    packing = check_packing(engine, world, samples=1, longest=data.longest)
    sides = {"base": config.evaluation.base, "tuned": config.evaluation.tuned}
    evaluator = TaskEvaluator(engine, world, config.evaluation.batch_tokens, packing)
    rows = data.evaluation[config.evaluation.split]
    return {
        side: evaluator.measure(rows, f"evaluating ({side})", use_adapter=side == "tuned")
        for side, wanted in sides.items()
        if wanted
    }


def _with_fitting_batch(config: RunConfig, world_size: int) -> RunConfig:
    """Return the recipe, with a global batch that fits if its own does not: evaluation draws no training batch."""
    if world_size in suggest_world_sizes(config):
        return config
    size = config.train.per_device_train_batch_size * world_size
    train = config.train.model_copy(update={"global_batch_size": size, "gradient_accumulation_steps": None})
    return config.model_copy(update={"train": train})
