"""`malora bench step`: whole training steps of a real model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from malora_dist.adapters.inject import DEFAULT_TARGETS
from malora_dist.bench.local.adapter_flops import GEMM, base_gemm, with_shares
from malora_dist.bench.local.equal_work import check_losses
from malora_dist.bench.local.losses import LOSSES, Batch
from malora_dist.bench.local.machine import describe, ready_device
from malora_dist.bench.local.models import SMOLLM2, load_model
from malora_dist.bench.local.options import BASES, DTYPES, command_line, default_names, labelled_share, one_of
from malora_dist.bench.local.output import Output, say
from malora_dist.bench.local.peers.baselines import Contestant
from malora_dist.bench.local.peers.build import Base, build, flops_above_base
from malora_dist.bench.local.peers.here import taking_part
from malora_dist.bench.local.records import Record, Report
from malora_dist.bench.local.timing import interleave, records_of, reference
from malora_dist.bench.local.trainee import Trainee
from malora_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The command line of `malora bench step`."""

    case: str = "step"
    model: str = SMOLLM2
    batch: int = 4
    length: int = 256
    dtype: str = "bf16"
    base: str = "full"
    dropout: float = 0.0
    labels: str = "all"
    loss: str = "hf"
    only: str | None = None
    against: str | None = None
    repeats: int = 10
    warmup: int = 2
    threads: int | None = None
    device: str = "cpu"


class Stage:
    """The shared base and batch of a run, on which contestants become trainees."""

    def __init__(self, options: StepOptions, device: torch.device, *, peft: bool) -> None:
        self.options, self.device, self.dtype = options, device, getattr(torch, DTYPES[options.dtype])
        model = load_model(options.model, self.dtype, device)
        self.vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        self.base = Base.of(model, DEFAULT_TARGETS, load_in_4bit=options.base == "nf4", peft=peft)

    def title(self, case: str) -> str:
        """Case and conditions in words."""
        given = self.options
        conditions = (
            f"{given.batch} x {given.length} tokens, {given.dtype}, {given.base} base, dropout {given.dropout:g}"
        )
        return f"{case}: {given.model}, {conditions}, labels {given.labels}, loss {given.loss}"

    def trainee(self, contestant: Contestant, *, times: int = 1) -> Trainee:
        """The contestant on `times` as many rows."""
        given = self.options
        rows, share = times * given.batch, labelled_share(given.labels)
        batch = Batch.of(rows, given.length, self.vocabulary, share, self.device)
        return Trainee(
            build(contestant, self.base, dropout=given.dropout), batch, loss=given.loss, dropout=given.dropout > 0
        )

    def interleave(self, subjects: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds by subject and round."""
        say(f"{self.options.warmup} + {self.options.repeats} rounds of {', '.join(subjects)}")
        return interleave(subjects, repeats=self.options.repeats, warmup=self.options.warmup, device=self.device)


def run(options: StepOptions, output: Output) -> Report:
    """Measure one kind of case and put the report out. Raises ConfigError for options that cannot be."""
    from malora_dist.bench.local.step_cases import CASES

    output.check()
    one_of("--case", options.case, ("step", *CASES))
    one_of("--dtype", options.dtype, DTYPES)
    one_of("--base", options.base, BASES)
    one_of("--loss", options.loss, LOSSES)
    labelled_share(options.labels)
    device = ready_device(options.device, options.threads, options.dtype)
    names = default_names(options.dtype) if options.case == "step" else CASES[options.case].default
    contestants = taking_part(options.only, names, device)
    _check_against(options, contestants)
    machine = describe(device)
    stage = Stage(options, device, peft=any(one.maker == "peft" for one in contestants.values()))
    measured = measure if options.case == "step" else CASES[options.case].measure
    report = Report(machine, command_line("step", options), measured(stage, contestants))
    output.put(report)
    return report


def _check_against(options: StepOptions, contestants: Mapping[str, Contestant]) -> None:
    from malora_dist.bench.local.step_cases import CASES

    if options.against is not None and options.case in CASES and CASES[options.case].to_itself:
        raise ConfigError(f"--against has no meaning with --case {options.case}: ratios are to the contestant itself")
    reference(options.against, contestants)


def measure(stage: Stage, contestants: Mapping[str, Contestant]) -> list[Record]:
    """Records of whole steps, and of the products of one block's adapted linears alone."""
    trainees = {name: stage.trainee(contestant) for name, contestant in contestants.items()}
    facts = first_steps(trainees, stage.dtype)
    tokens = next(iter(trainees.values())).batch.tokens
    gemm, gemm_flops = base_gemm(stage.base.sizes[: len(stage.base.targets)], tokens, stage.dtype, stage.device)
    times = stage.interleave({**trainees, GEMM: gemm})
    adapted = {name: trainee.adapted for name, trainee in trainees.items()}
    flops = flops_above_base(adapted, tokens) | {GEMM: gemm_flops}
    records = records_of(stage.title("step"), times, reference(stage.options.against, contestants), facts)
    return with_shares(records, times, flops)


def first_steps(trainees: Mapping[str, Trainee], dtype: torch.dtype) -> dict[str, dict[str, object]]:
    """Let everyone make the first step, check that all do the same work, and say what each is."""
    say(f"first steps of {', '.join(trainees)}")
    losses = {name: float(trainee()) for name, trainee in trainees.items()}
    check_losses(losses, dtype)
    return {
        name: {
            **trainee.adapted.facts,
            "tokens": trainee.batch.tokens,
            "learned": trainee.batch.targets,
            "first loss": losses[name],
        }
        for name, trainee in trainees.items()
    }
