"""`malora bench step`: whole training steps of a real model."""

from collections.abc import Mapping
from dataclasses import replace

from malora_dist.bench.local.adapter_flops import GEMM, base_gemm, with_shares
from malora_dist.bench.local.losses import LOSSES
from malora_dist.bench.local.machine import describe, ready_device
from malora_dist.bench.local.options import BASES, command_line, default_names, labelled_share, one_of, short_dtype
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.peers.baselines import Baseline
from malora_dist.bench.local.peers.build import flops_above_base
from malora_dist.bench.local.peers.here import taking_part
from malora_dist.bench.local.records import Measurement, Report
from malora_dist.bench.local.step_cases import CASES
from malora_dist.bench.local.step_setup import StepOptions, StepSetup, first_steps
from malora_dist.bench.local.timing import records_of, reference
from malora_dist.errors import ConfigError


def run(options: StepOptions, output: Output) -> Report:
    """Measure one kind of case and write the report. Raises ConfigError for impossible options."""
    output.check()
    options = replace(options, dtype=short_dtype(options.dtype))
    one_of("--case", options.case, ("step", *CASES))
    one_of("--base", options.base, BASES)
    one_of("--loss", options.loss, LOSSES)
    labelled_share(options.labels)
    device = ready_device(options.device, options.threads, options.dtype)
    names = default_names(options.dtype) if options.case == "step" else CASES[options.case].default
    baselines = taking_part(options.only, names, device)
    _check_against(options, baselines)
    machine = describe(device)
    setup = StepSetup(options, device, peft=any(one.maker == "peft" for one in baselines.values()))
    measured = measure if options.case == "step" else CASES[options.case].measure
    report = Report(machine, command_line("step", options), measured(setup, baselines))
    output.put(report)
    return report


def _check_against(options: StepOptions, baselines: Mapping[str, Baseline]) -> None:
    if options.against is not None and options.case in CASES and CASES[options.case].to_itself:
        raise ConfigError(f"--against has no meaning with --case {options.case}: ratios are to the baseline itself")
    reference(options.against, baselines)


def measure(setup: StepSetup, baselines: Mapping[str, Baseline]) -> list[Measurement]:
    """Return the records of whole steps, and of the products of one block's adapted linears alone."""
    trainees = {name: setup.trainee(baseline) for name, baseline in baselines.items()}
    facts = first_steps(trainees, setup.dtype)
    tokens = next(iter(trainees.values())).batch.tokens
    gemm, gemm_flops = base_gemm(setup.base.sizes[: len(setup.base.targets)], tokens, setup.dtype, setup.device)
    times = setup.interleave({**trainees, GEMM: gemm})
    adapted = {name: trainee.adapted for name, trainee in trainees.items()}
    flops = flops_above_base(adapted, tokens) | {GEMM: gemm_flops}
    records = records_of(setup.title("step"), times, reference(setup.options.against, baselines), facts)
    return with_shares(records, times, flops)
