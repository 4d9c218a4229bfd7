"""`malora bench step`: whole training steps of a real model."""

from collections.abc import Mapping
from dataclasses import replace

from malora_dist.bench.local.adapter_flops import GEMM, base_gemm, with_shares
from malora_dist.bench.local.losses import LOSSES
from malora_dist.bench.local.machine import describe, ready_device
from malora_dist.bench.local.options import BASES, command_line, default_names, labelled_share, one_of, short_dtype
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.peers.baselines import Contestant
from malora_dist.bench.local.peers.build import flops_above_base
from malora_dist.bench.local.peers.here import taking_part
from malora_dist.bench.local.records import Record, Report
from malora_dist.bench.local.step_cases import CASES
from malora_dist.bench.local.step_stage import Stage, StepOptions, first_steps
from malora_dist.bench.local.timing import records_of, reference
from malora_dist.errors import ConfigError


def run(options: StepOptions, output: Output) -> Report:
    """Measure one kind of case and put the report out. Raises ConfigError for options that cannot be."""
    output.check()
    options = replace(options, dtype=short_dtype(options.dtype))
    one_of("--case", options.case, ("step", *CASES))
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
