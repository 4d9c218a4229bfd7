"""`malora bench roofline`: the bounds as tables and as JSON. Needs no torch."""

from dataclasses import dataclass
from importlib.resources import files

from rich.console import Console

from malora_dist.bench.kernels import PHASES, Device, Kernel
from malora_dist.bench.local.options import BASES, command_line, one_of
from malora_dist.bench.local.output import TABLE_WIDTH, Output
from malora_dist.bench.roofline import Roofline, distinct, title, totals
from malora_dist.bench.table import Sheet
from malora_dist.files.atomic import write_json, write_text
from malora_dist.plan.find_shape import find_shape
from malora_dist.plan.shapes import Linear
from malora_dist.plan.units import parse_flops, parse_rate

LLAMA2_7B = "recipes/models/llama2-7b.json"
NOTES = (
    "ms, us: bounds from below, every kernel at the longer of its FLOPs over the device's rate and its bytes over the "
    "bandwidth, without launches and recomputation. over base: what the adapter adds to the frozen model. "
    "ratio: to LoRA at equal trainable parameters.",
    "malora: as this package computes it: logits from an fp32 copy of x; backward, router and S_A in one product. "
    "_fused: one projection for q k v, and one for gate up (adapter.fuse_projections). "
    "_grouped: the chosen rows only. "
    "molora: as this package computes it: logits from an fp32 copy of x, router and A in two products. "
    "Not in this package: _fp32_router: the same of MALoRA. _apart: router and S_A in two products, without a copy. "
    "_joined: in one, forward and backward. dispatched: the chosen rows only, with gates on the experts' outputs. "
    "peft_lora: scaling and sum as kernels of their own. With --dropout a kernel that needs the mask makes it again; "
    "peft_lora and dispatched store it.",
    "The paper reports MALoRA 1.2 times as fast as MoLoRA and 7.5 % slower than LoRA, with other software.",
)


@dataclass(frozen=True, kw_only=True)
class RooflineOptions:
    """The command line of `malora bench roofline`. The rates are an H100 SXM's, bf16 without sparsity."""

    model: str | None = None
    tokens: int = 4096
    length: int = 1024
    base: str = "full"
    dropout: float = 0.0
    attention: str = "varlen"
    flops: str = "989TFLOP/s"
    bandwidth: str = "3.35TB/s"


def run(options: RooflineOptions, output: Output) -> Roofline:
    """Compute the tables, print and write them. Raises ConfigError for impossible options."""
    output.check()
    device = Device(parse_flops("--flops", options.flops), parse_rate("--bandwidth", options.bandwidth))
    nf4 = one_of("--base", options.base, BASES) == "nf4"
    shape = find_shape(options.model or str(files("malora_dist") / LLAMA2_7B))
    attention = one_of("--attention", options.attention, ("varlen", "sdpa"))
    roofline = Roofline(shape, options.tokens, options.length, device, nf4, options.dropout > 0, attention)
    console = Console(width=max(Console().width, TABLE_WIDTH))
    for sheet in sheets(roofline):
        console.print(sheet.for_terminal())
    Console().print("\n".join(NOTES), markup=False, highlight=False, soft_wrap=True)
    if output.json is not None:
        write_json(output.json, roofline.as_dict())
    if output.markdown is not None:
        write_text(output.markdown, markdown(roofline, command_line("roofline", options)))
    return roofline


def sheets(roofline: Roofline) -> list[Sheet]:
    """Return the tables of the step, of each distinct linear, and of MALoRA's kernels on one of them."""
    linears = distinct(roofline.adapted)
    return [
        _step_sheet(roofline),
        *(_linear_sheet(roofline, linear) for linear in linears),
        _kernel_sheet(roofline, linears[0]),
    ]


def markdown(roofline: Roofline, command: str) -> str:
    """Render the command, the tables and what their columns mean."""
    tables = [sheet.as_markdown() for sheet in sheets(roofline)]
    return "\n".join([f"    {command}", "", *tables, "\n\n".join(NOTES)]) + "\n"


def _step_sheet(roofline: Roofline) -> Sheet:
    """Return the table of each subject's step by phase."""
    all_kernels = {subject.name: roofline.step_kernels(subject) for subject in roofline.subjects()}
    base, lora = (roofline.seconds(kernels) for kernels in list(all_kernels.values())[:2])
    rows = []
    for name, kernels in all_kernels.items():
        total, sums = roofline.seconds(kernels), totals(kernels)
        phases = (f"{roofline.seconds(kernels, phase) * 1e3:.2f}" for phase in PHASES)
        work = (f"{sums['flops'] / 1e12:.1f}", f"{sums['nbytes'] / 2**30:.1f}")
        rows.append((name, *work, *phases, f"{total * 1e3:.2f}", f"{total / base - 1:.1%}", f"{total / lora:.3f}"))
    attention = f"{roofline.attention} attention{' over whole masked rows' if roofline.masked else ''}"
    heading = f"Step of {roofline.tokens} tokens, {roofline.shape.num_parameters / 1e9:.3g} B base, {attention}"
    return Sheet(heading, ("name", "TFLOP", "GiB", *PHASES, "ms", "over base", "ratio"), tuple(rows))


def _linear_sheet(roofline: Roofline, linear: Linear) -> Sheet:
    """Return the table of each subject on one linear.

    Columns: FLOPs and bytes of the adapter, and microseconds of the whole by phase.
    """
    subjects = roofline.subjects()
    base, lora = (roofline.seconds(roofline.linear_kernels(subject, linear)) for subject in subjects[:2])
    rows = []
    for subject in subjects:
        kernels = roofline.linear_kernels(subject, linear)
        own = totals([kernel for kernel in kernels if kernel.part not in ("base", "unpack")])
        phases = (f"{roofline.seconds(kernels, phase) * 1e6:.1f}" for phase in PHASES)
        total = roofline.seconds(kernels)
        work = (f"{own['flops'] / 1e9:.1f}", f"{own['nbytes'] / 2**20:.0f}")
        ratios = (f"{total / base - 1:.1%}", f"{total / lora:.3f}")
        rows.append((subject.name, *work, *phases, f"{total * 1e6:.1f}", *ratios))
    headers = ("name", "GFLOP of adapter", "MiB of adapter", *PHASES, "us", "over base", "ratio")
    return Sheet(f"Linear {title(linear)}, {roofline.tokens} tokens", headers, tuple(rows))


def _kernel_sheet(roofline: Roofline, linear: Linear) -> Sheet:
    """Return the table of every kernel of MALoRA on one linear, in the package's dense form."""
    subject = next(subject for subject in roofline.subjects() if subject.name == "malora")
    kernels = sorted(roofline.linear_kernels(subject, linear), key=lambda kernel: PHASES.index(kernel.phase))
    rows = tuple(_kernel_row(kernel, roofline.device) for kernel in kernels)
    headers = ("kernel", "GFLOP", "MiB", "FLOP/byte", "us", "bound by")
    return Sheet(f"Kernels of malora on {title(linear)}, {roofline.tokens} tokens", headers, rows)


def _kernel_row(kernel: Kernel, device: Device) -> tuple[str, ...]:
    limit = "computing" if kernel.is_compute_bound(device) else "moving"
    return (
        f"{kernel.phase}: {kernel.part}",
        f"{kernel.flops / 1e9:.2f}",
        f"{kernel.nbytes / 2**20:.1f}",
        f"{kernel.flops / kernel.nbytes:.0f}",
        f"{kernel.seconds(device) * 1e6:.1f}",
        limit,
    )
