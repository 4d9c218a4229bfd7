"""`malora bench data`: how many tokens a second the data pipeline gives, and how many training takes."""

import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from malora_dist.bench.local.machine import describe
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.records import Measurement, Report
from malora_dist.bench.local.timing import interleave
from malora_dist.bench.measure import Subject
from malora_dist.bench.results import quartiles
from malora_dist.bench.variants import recipe_variant
from malora_dist.config import RunConfig, load_config
from malora_dist.config.data_schema import DataConfig
from malora_dist.console.log import start_logging
from malora_dist.data.build import PreparedData, build_data
from malora_dist.data.encode import ChoiceItem, Sample
from malora_dist.data.loader import MicroBatch, TrainLoader
from malora_dist.distributed.process_groups import World, start_processes
from malora_dist.models.load import load_tokenizer
from malora_dist.models.resolve import resolve_model
from malora_dist.training.process import run_as_process
from malora_dist.training.setup import train_loader
from malora_dist.training.watchdog import Watchdog, watched

LOADER, TRAINING = "loader", "training"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The command line of `malora bench data`; `overrides` are settings of the recipe. Warm-up: see `bench ep`."""

    recipe: str
    overrides: tuple[str, ...] = ()
    repeats: int = 5
    warmup: int = 2

    @property
    def command(self) -> str:
        """How to run it again."""
        numbers = ["--repeats", str(self.repeats), "--warmup", str(self.warmup)]
        return shlex.join(["malora", "bench", "data", self.recipe, *numbers, *self.overrides])


def main(options: DataOptions, output: Output) -> int:
    """Measure as the only process of a run. Returns the exit code: 0, 1 for a failure, 2 for a mistake."""
    return run_as_process(lambda: _start(options, output))


def _start(options: DataOptions, output: Output) -> None:
    output.check()
    config = load_config(options.recipe, options.overrides)
    start_logging(None)
    world = start_processes(config.parallel.timeout_seconds)
    machine = describe(world.device)
    watchdog = Watchdog(world.rank)
    with watched(watchdog, config.parallel.timeout_seconds):
        records = _measure(options, config, world, watchdog)
    output.put(Report(machine, options.command, records))


def _measure(options: DataOptions, config: RunConfig, world: World, watchdog: Watchdog) -> list[Measurement]:
    trusted = config.model.trust_remote_code
    folder = resolve_model(config.model.name_or_path, config.model.revision, trust_remote_code=trusted)
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    watchdog.mark_phase("preparing the data")
    data, preparing = prepare_twice(config.data, tokenizer)
    loader = train_loader(config, data, world)
    steps = options.warmup + options.repeats
    subject = Subject.build(recipe_variant(config), config, folder, data, world, steps=steps + 1, watchdog=watchdog)
    drawn = Drawn(loader, world)
    training = Training(drawn, subject)
    times = interleave(
        {LOADER: drawn, TRAINING: training}, repeats=options.repeats, warmup=options.warmup, device=world.device
    )
    tokens = {LOADER: drawn.tokens[-options.repeats :], TRAINING: training.tokens[-options.repeats :]}
    return [*preparing, *rates(f"steps of {config.train.global_batch_size} samples", times, tokens)]


def prepare_twice(config: DataConfig, tokenizer: Any) -> tuple[PreparedData, list[Measurement]]:
    """Return the data, prepared in an empty cache and then read from it, with a record of each."""
    with tempfile.TemporaryDirectory() as cache:
        settings = config.model_copy(update={"cache_dir": cache})
        started = time.perf_counter()
        build_data(settings, tokenizer)
        prepared = time.perf_counter()
        # Files that are mapped into memory stay readable when the folder is gone.
        data = build_data(settings, tokenizer)
        seconds = {"first time": prepared - started, "from the cache": time.perf_counter() - prepared}
    tokens = all_tokens(data)
    case = "preparing all splits of the recipe: reading, checking, tokenising"
    return data, [
        Measurement(name, case, median_s=taken, facts={"tokens": tokens, "tokens/s": round(tokens / taken)})
        for name, taken in seconds.items()
    ]


def all_tokens(data: PreparedData) -> int:
    """Count the tokens of every split; a question counts its prompt and all its choices."""
    evaluated = [item for split in data.evaluation.values() for items in split.values() for item in items]
    return sum(map(_tokens, data.train)) + sum(map(_tokens, evaluated))


def _tokens(item: Sample | ChoiceItem) -> int:
    if isinstance(item, Sample):
        return len(item.input_ids)
    return len(item.prompt_ids) + sum(map(len, item.choice_ids))


class Drawn:
    """One call draws the next optimizer step's micro-batches: mixture, order, packing, and the copy to the device."""

    def __init__(self, loader: TrainLoader, world: World) -> None:
        self.loader, self.world = loader, world
        self.tokens: list[int] = []
        # The first round may begin with training.
        self.batches = self._next()

    def __call__(self) -> None:
        self.batches = self._next()
        self.tokens.append(row_tokens(self.batches))

    def _next(self) -> list[MicroBatch]:
        return [batch.to(self.world.device) for batch in next(self.loader)]


class Training:
    """One call runs an optimizer step on what was drawn last."""

    def __init__(self, drawn: Drawn, subject: Subject) -> None:
        self.drawn, self.subject = drawn, subject
        self.tokens: list[int] = []

    def __call__(self) -> None:
        self.subject.step(len(self.tokens) + 1, self.drawn.batches)
        self.tokens.append(row_tokens(self.drawn.batches))


def row_tokens(batches: Sequence[MicroBatch]) -> int:
    """Count the tokens of a step."""
    return sum(batch.input_ids.numel() for batch in batches)


def rates(case: str, times: dict[str, list[float]], tokens: dict[str, list[int]]) -> list[Measurement]:
    """Return tokens per second of the loader and of training, and the ratio of the loader's rate, round by round."""
    per_second = {
        name: [count / taken for count, taken in zip(tokens[name], seconds, strict=True)]
        for name, seconds in times.items()
    }
    faster = [ours / theirs for ours, theirs in zip(per_second[LOADER], per_second[TRAINING], strict=True)]
    low, high = quartiles(faster)
    times_faster = {"times training's rate": round(median(faster), 1), "quartiles of it": f"{low:.0f}-{high:.0f}"}
    return [
        Measurement(
            name,
            case,
            median_s=median(seconds),
            facts={
                "tokens a step": round(sum(tokens[name]) / len(tokens[name])),
                "tokens/s": round(median(per_second[name])),
                **(times_faster if name == LOADER else {}),
            },
        )
        for name, seconds in times.items()
    ]
