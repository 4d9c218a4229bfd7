"""`malora bench layer`: forward and backward of one adapted linear."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from malora_dist.bench.local.adapter_flops import GEMM, base_gemm, with_shares
from malora_dist.bench.local.equal_work import check_outputs
from malora_dist.bench.local.machine import describe, ready_device
from malora_dist.bench.local.options import (
    BASES,
    command_line,
    names_on_one_linear,
    one_of,
    short_dtype,
    sizes,
    whole_numbers,
)
from malora_dist.bench.local.output import Output, log
from malora_dist.bench.local.peers.baselines import Baseline
from malora_dist.bench.local.peers.build import Adapted, Base, build, flops_above_base
from malora_dist.bench.local.peers.here import taking_part
from malora_dist.bench.local.records import Measurement, Report
from malora_dist.bench.local.timing import interleave, records_of, reference
from malora_dist.config.dtypes import long_name
from malora_dist.ops.products import kept_weight_copies

TARGET = "linear"


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The command line of `malora bench layer`."""

    size: str = "576,2048,4096,4096x11008,11008x4096"
    tokens: str = "1024"
    dtype: str = "fp32"
    base: str = "full"
    dropout: float = 0.0
    only: str | None = None
    against: str | None = None
    repeats: int = 10
    warmup: int = 2
    threads: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Case:
    """One size of linear (I inputs, O outputs) and T tokens."""

    in_features: int
    out_features: int
    tokens: int

    def title(self, options: LayerOptions) -> str:
        size = f"{self.in_features} -> {self.out_features}, T {self.tokens}"
        return f"layer {size}, {options.dtype}, {options.base} base, dropout {options.dropout:g}"


class OneLinear(nn.Module):
    """The smallest model: a linear without bias."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class Pass:
    """Forward and backward of one linear; every call does the same."""

    def __init__(self, adapted: Adapted, x_TI: Tensor, grad_TO: Tensor) -> None:
        self.adapted = adapted
        # The layer itself, without what a package puts around a whole model.
        self.layer = next(m for name, m in adapted.model.named_modules() if name.rpartition(".")[2] == TARGET)
        self.x_TI, self.grad_TO = x_TI.clone().requires_grad_(), grad_TO

    def __call__(self) -> Tensor:
        """Run forward and backward and return the output (T, O), detached."""
        self.x_TI.grad = None
        for parameter in self.adapted.trained:
            parameter.grad = None
        with kept_weight_copies(self.layer):
            y_TO: Tensor = self.layer(self.x_TI)
            y_TO.backward(self.grad_TO)
        return y_TO.detach()


def run(options: LayerOptions, output: Output) -> Report:
    """Measure every case and write the report. Raises ConfigError for impossible options."""
    output.check()
    options = replace(options, dtype=short_dtype(options.dtype))
    device = ready_device(options.device, options.threads, options.dtype)
    baselines = taking_part(options.only, names_on_one_linear(options.dtype), device)
    reference(options.against, baselines)
    machine = describe(device)
    records = [record for case in _cases(options) for record in measure(case, options, baselines, device)]
    report = Report(machine, command_line("layer", options), records)
    output.put(report)
    return report


def _cases(options: LayerOptions) -> Iterator[Case]:
    one_of("--base", options.base, BASES)
    for (inputs, outputs), tokens in product(sizes(options.size), whole_numbers("--tokens", options.tokens)):
        yield Case(inputs, outputs, tokens)


def measure(
    case: Case, options: LayerOptions, baselines: Mapping[str, Baseline], device: torch.device
) -> list[Measurement]:
    """Return the records of one case: the baselines, and the base's product alone."""
    log(case.title(options))
    dtype = getattr(torch, long_name(options.dtype))
    passes = _passes(case, options, baselines, device)
    check_outputs({name: one() for name, one in passes.items()}, dtype)
    gemm, gemm_flops = base_gemm([(case.in_features, case.out_features)], case.tokens, dtype, device)
    subjects: dict[str, Callable[[], object]] = {**passes, GEMM: gemm}
    times = interleave(subjects, repeats=options.repeats, warmup=options.warmup, device=device)
    flops = flops_above_base({name: one.adapted for name, one in passes.items()}, case.tokens) | {GEMM: gemm_flops}
    facts = {name: {**one.adapted.facts, "tokens": case.tokens} for name, one in passes.items()}
    records = records_of(case.title(options), times, reference(options.against, baselines), facts)
    return with_shares(records, times, flops)


def _passes(
    case: Case, options: LayerOptions, baselines: Mapping[str, Baseline], device: torch.device
) -> dict[str, Pass]:
    dtype = getattr(torch, long_name(options.dtype))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OneLinear(case.in_features, case.out_features, dtype, device)
        x_TI = torch.randn(case.tokens, case.in_features).to(device, dtype)
        grad_TO = torch.randn(case.tokens, case.out_features).to(device, dtype)
    peft = any(baseline.maker == "peft" for baseline in baselines.values())
    base = Base.of(model, [TARGET], load_in_4bit=options.base == "nf4", peft=peft)
    return {
        name: Pass(build(baseline, base, dropout=options.dropout), x_TI, grad_TO)
        for name, baseline in baselines.items()
    }
