"""`malora bench launches`: what a GPU would launch and wait for, counted without one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch

from malora_dist.bench.local.launch_cases import BASELINES, CASES, LaunchCase, above
from malora_dist.bench.local.machine import describe
from malora_dist.bench.local.options import BASES, command_line, one_of, short_dtype
from malora_dist.bench.local.output import Output, log
from malora_dist.bench.local.peers.baselines import Baseline, names_in
from malora_dist.bench.local.records import Measurement, Report
from malora_dist.bench.strict.backend import register
from malora_dist.bench.strict.device import StrictDevice
from malora_dist.config.dtypes import long_name
from malora_dist.errors import ConfigError

BASE = "base"
NOTES = (
    "launches: kernels and copies of a forward and backward, one for each operation of PyTorch or of torch.library; "
    "views and allocations are free. above base: those that the adapters add. waits: how often the host stands still "
    "until the device has done everything before. atomics: sums without a fixed order, whose bits may differ from run "
    "to run. MiB moved: what every operation reads and writes, once each. Attention is the plain one, of several "
    "operations; it is the base's. Nothing here is a time.",
)


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """The command line of `malora bench launches`."""

    hidden: int = 512
    tokens: int = 128
    dtype: str = "bf16"
    base: str = "full"
    dropout: str = "0,0.05"
    only: str | None = None


def run(options: LaunchOptions, output: Output) -> Report:
    """Count every case and write the report. Raises ConfigError for impossible options."""
    output.check()
    options = replace(options, dtype=short_dtype(options.dtype))
    one_of("--base", options.base, BASES)
    if options.hidden % 16:
        raise ConfigError(f"--hidden {options.hidden} must be a multiple of 16: the block has 4 heads, of even width")
    dropouts, baselines = _dropouts(options.dropout), _taking_part(options)
    register()
    with StrictDevice() as device:
        records = [record for case in CASES for record in count(case, options, baselines, dropouts, device)]
    report = Report(describe("cpu"), command_line("launches", options), records, NOTES)
    output.put(report)
    return report


def _dropouts(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= p < 1 for p in found):
        raise ConfigError(f"--dropout {text!r} must be a list of numbers from 0 to below 1, such as 0,0.05")
    return found


def _taking_part(options: LaunchOptions) -> dict[str, Baseline]:
    """Return the base, and the baselines of --only or all that can be counted with these options and packages."""
    names = list(BASELINES) if options.only is None else names_in(options.only)
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ConfigError(f"--only {options.only!r}: {', '.join(unknown)} is not one of {', '.join(BASELINES)}")
    missing = None
    if options.base == "nf4":
        missing = "bitsandbytes' class of 4-bit weights is not imitated"
    elif find_spec("peft") is None:
        missing = "the package peft is not installed"
    peft = [name for name in names if BASELINES[name].maker == "peft"]
    if peft and missing is not None:
        log(f"{', '.join(peft)} left out: {missing}")
        names = [name for name in names if name not in peft]
    return {name: BASELINES[name] for name in dict.fromkeys([BASE, *names])}


def count(
    case: str,
    options: LaunchOptions,
    baselines: Mapping[str, Baseline],
    dropouts: list[float],
    device: StrictDevice,
) -> Iterator[Measurement]:
    """Yield the records of one case, at each dropout."""
    dtype = getattr(torch, long_name(options.dtype))
    launch_case = LaunchCase.of(case, options.hidden, options.tokens, dtype, load_in_4bit=options.base == "nf4")
    base = launch_case.counts(baselines[BASE], 0.0, device)
    for dropout in dropouts:
        title = (
            f"{case}, width {options.hidden}, {options.tokens} tokens, {options.dtype}, {options.base} base, "
            f"dropout {dropout:g}"
        )
        log(title)
        for name, baseline in baselines.items():
            found = base if name == BASE else launch_case.counts(baseline, dropout, device)
            facts = {"launches": found["launches"], "above base": above(found, base)["launches"]}
            facts |= {"waits": found["waits"], "atomics": found["atomics"]}
            yield Measurement(name, title, facts={**facts, "MiB moved": found["nbytes"] / 2**20})
