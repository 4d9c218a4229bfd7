"""`malora evaluate RUN`, or `deepspeed --module malora_dist.evaluate RUN`: accuracy of a run's adapter and its base.

Also `--adapter DIR --recipe RECIPE` for an adapter on its own. Settings of the recipe may follow.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from malora_dist.checkpoint.adapter import load_adapter
from malora_dist.config import RunConfig, load_config, split_arguments
from malora_dist.data.build import build_data
from malora_dist.engine.build import build_engine
from malora_dist.engine.evaluation import evaluate_tasks
from malora_dist.engine.process import run_as_process
from malora_dist.engine.progress import LOGGER, start_logging
from malora_dist.engine.run_folder import write_json
from malora_dist.engine.setup import base_model, engine_config
from malora_dist.errors import ConfigError
from malora_dist.model import load_tokenizer
from malora_dist.parallel.groups import World
from malora_dist.report import print_results
from malora_dist.source import resolve_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate. Returns the exit code: 0, 1 for a failure, 2 for a mistake in the arguments."""
    return run_as_process(lambda: _start(list(sys.argv[1:] if arguments is None else arguments)))


def _start(arguments: list[str]) -> None:
    from malora_dist.parallel.groups import start_processes

    adapter, recipe, overrides = _parse(arguments)
    config = load_config(recipe, overrides)
    world = start_processes(config.parallel.timeout_seconds)
    start_logging(adapter.parent / "evaluate.log" if world.is_main else None)
    result = evaluate_adapter(config, adapter, world)
    if world.is_main:
        write_json(adapter.parent / "eval.json", result)
        logging.getLogger(LOGGER).info("wrote %s", adapter.parent / "eval.json")
        Console().print(print_results(result))


def _parse(arguments: list[str]) -> tuple[Path, str, list[str]]:
    """Adapter folder, recipe and overrides. Raises ConfigError if the run folder is none."""
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if arguments[:1] == ["--adapter"] and arguments[2:3] == ["--recipe"] and len(arguments) > 3:
        return Path(arguments[1]), arguments[3], arguments[4:]
    run, overrides = split_arguments(arguments)
    folder = Path(run)
    if not (folder / "config.yaml").is_file() or not (folder / "adapter").is_dir():
        raise ConfigError(f"RUN={run} is not the folder of a finished run: it needs config.yaml and adapter/")
    return folder / "adapter", str(folder / "config.yaml"), overrides


def evaluate_adapter(config: RunConfig, adapter: Path, world: World) -> dict[str, object]:
    """eval.json's content for an adapter folder on the recipe's base and tasks; on every process."""
    folder = resolve_model(config.model.name_or_path, config.model.revision)
    data = build_data(config.data, load_tokenizer(folder))
    settings = engine_config(config, world)
    model = base_model(config, folder, world, settings)
    load_adapter(model, adapter)
    engine = build_engine(
        model,
        settings,
        None,
        zero_stage=config.parallel.zero_stage,
        timeout_seconds=config.parallel.timeout_seconds,
    )
    sides = {"base": config.evaluation.base, "tuned": config.evaluation.tuned}
    return {
        side: evaluate_tasks(
            engine,
            data.evaluation[config.evaluation.split],
            world,
            batch_tokens=config.evaluation.batch_tokens,
            share_prompt=config.model.attn_implementation == "sdpa",
            title=f"evaluating ({side})",
            use_adapter=side == "tuned",
        )
        for side, wanted in sides.items()
        if wanted
    }


if __name__ == "__main__":
    sys.exit(main())
