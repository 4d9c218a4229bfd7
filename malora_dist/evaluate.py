"""`malora evaluate RUN`, or `deepspeed --module malora_dist.evaluate RUN`: accuracy of a run's adapter and its base.

Of a run that is not finished its newest checkpoint. Also `--adapter DIR --recipe RECIPE` for an adapter folder or a
checkpoint on its own. Settings of the recipe may follow.

The result goes to `RUN/eval.json` (`DIR/eval.json`), the log to `evaluate.log` beside it. Nothing measured before is
lost: a result that says something else than the file, because settings, rows or numbers are others, becomes
`eval-2.json`, `eval-3.json`, ...
"""

import logging
import shlex
import sys
from collections.abc import Sequence

from malora_dist.adapters.io.folder import AdapterTensors, open_adapter, put_adapter
from malora_dist.config import RunConfig, config_text
from malora_dist.config.compatibility import suggest_world_sizes
from malora_dist.config.evaluation_target import EvaluationTarget
from malora_dist.console.log import LOGGER, console, start_logging
from malora_dist.data.build import build_data
from malora_dist.distributed.consistency import check_consistency, start_facts
from malora_dist.distributed.zero3 import gathered
from malora_dist.evaluation.packing import check_packing
from malora_dist.evaluation.tasks import Measured, TaskEvaluator
from malora_dist.files.atomic import write_json, write_text
from malora_dist.launch.entry_point import run_malora
from malora_dist.models.attention import attention_for
from malora_dist.models.config import read_model_config
from malora_dist.models.load import load_tokenizer
from malora_dist.models.resolve import resolve_model
from malora_dist.models.vocabulary import check_tokens
from malora_dist.report import print_results
from malora_dist.training.base_model import base_dtype, base_model
from malora_dist.training.base_support import check_support
from malora_dist.training.deepspeed_engine import build_engine
from malora_dist.training.device_check import check_device, check_memory
from malora_dist.training.process import run_as_process
from malora_dist.training.run_context import RunContext
from malora_dist.training.run_folder import evaluation_file, scores_file, scores_text
from malora_dist.training.sequence_lengths import position_notes
from malora_dist.training.setup import engine_config
from malora_dist.training.watchdog import Watchdog, watched


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `malora evaluate` in this process; return its exit code: 0, 1 for a failure, 2 for a mistake."""
    return run_malora(["evaluate"], arguments)


def evaluate(target: EvaluationTarget) -> int:
    """Evaluate; return the exit code: 0, 1 for a failure, 2 for a mistake in the recipe or the data."""
    return run_as_process(lambda: _evaluate(target))


def _evaluate(target: EvaluationTarget) -> None:
    from malora_dist.distributed.process_groups import start_processes

    config = target.config()
    adapter = open_adapter(target.adapter)
    world = start_processes(config.parallel.timeout_seconds)
    check_consistency(world, start_facts(config_text(config)))
    start_logging(target.folder / "evaluate.log" if world.is_main else None)
    log = logging.getLogger(LOGGER)
    log.info("evaluating %s on %s %s", adapter.path, target.recipe, shlex.join(target.overrides))
    for note in check_device(config, world, trains=False):
        log.info("note: %s", note)
    context = RunContext(config, world, Watchdog(world.rank))
    with watched(context.watchdog, config.parallel.timeout_seconds):
        measured = evaluate_adapter(context, adapter)
    if world.is_main:
        result = {side: of_side.summary for side, of_side in measured.items()}
        path = evaluation_file(target.folder, result)
        if config.evaluation.write_scores:
            for side, of_side in measured.items():
                write_text(path.with_name(scores_file(side, path)), scores_text(of_side.questions))
        write_json(path, result)
        log.info("wrote %s", path)
        console().print(print_results(result))


def evaluate_adapter(context: RunContext, adapter: AdapterTensors) -> dict[str, Measured]:
    """Evaluate an adapter on the recipe's base and tasks.

    Experts are not spread (`parallel.ep_size` is of no effect), so that any number of processes will do.

    Args:
        context: the recipe and the processes.
        adapter: its opened folder.

    Returns:
        What was measured by side of eval.json, on every process.
    """
    config, world, watchdog = context.config, context.world, context.watchdog
    trusted, dtype = config.model.trust_remote_code, base_dtype(config, world)
    folder = resolve_model(config.model.name_or_path, config.model.revision, trust_remote_code=trusted)
    model_config = read_model_config(folder, trust_remote_code=trusted)
    attention_for(config.model.attn_implementation, model_config, dtype, world.device)
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    base = check_support(config, folder, tokenizer, dtype, trains=False)
    data = build_data(config.data, tokenizer)
    check_tokens(data, base.spare_tokens)
    fitting = _with_fitting_batch(config, world.size)
    lengths = position_notes(data, folder, trust_remote_code=trusted)
    for note in (*base.notes, *lengths, *check_memory(fitting, folder, world, None)):
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


if __name__ == "__main__":
    sys.exit(main())
