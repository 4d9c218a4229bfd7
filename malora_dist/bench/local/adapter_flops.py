"""How long an adapter's products would take if they ran as fast as the base's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch
import torch.nn.functional as F

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.parameter_counts import factor_shapes
from malora_dist.bench.local.records import Measurement

GEMM = "gemm"
BASE = "base"


def adapter_flops(spec: MixtureSpec, sizes: Sequence[tuple[int, int]], tokens: int, *, all_experts: bool) -> int:
    """Return the FLOPs of adapters' products, forward and backward, on linears of `sizes` (in_features, out_features).

    Every number of a factor takes one multiplication and one addition forward, and two of each backward (for the
    input's gradient and for its own). all_experts: each token is multiplied by all experts, as our dense form does;
    otherwise by its top_k.
    """
    share = 1.0 if all_experts else spec.top_k / spec.num_experts
    total = 0.0
    for size in sizes:
        shapes = factor_shapes(spec, *size)
        counted = {name: torch.Size(shape).numel() for name, shape in shapes.items() if name != "magnitude"}
        total += sum(numel * (share if name in ("A", "P", "B") else 1.0) for name, numel in counted.items())
    return round(6 * tokens * total)


def base_gemm(
    sizes: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], None], int]:
    """Return a function that runs x W^T once for a linear of each size, and its FLOPs.

    This measures the rate that the base's own products reach.
    """
    pairs = [
        (torch.randn(tokens, n, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)) for n, m in sizes
    ]

    @torch.no_grad()
    def run() -> None:
        for x, weight in pairs:
            F.linear(x, weight)

    return run, sum(2 * tokens * n * m for n, m in sizes)


def with_shares(
    records: Sequence[Measurement], times: Mapping[str, Sequence[float]], flops: Mapping[str, int]
) -> list[Measurement]:
    """Return the records with the GEMM's rate, and each adapter's time above the base beside that of its products.

    adapter ms: seconds above the frozen base, median over rounds. FLOPs ms: the same FLOPs at the GEMM's rate.
    """
    rate = flops[GEMM] / median(times[GEMM])
    return [_with_share(record, times, flops.get(record.name, 0), rate) for record in records]


def _with_share(record: Measurement, times: Mapping[str, Sequence[float]], flops: int, rate: float) -> Measurement:
    if record.name == GEMM:
        return replace(record, ratio=None, ratio_quartiles=None, against=None, facts={"GFLOP/s": rate / 1e9})
    if not flops or BASE not in times:
        return record
    above = median(mine - base for mine, base in zip(times[record.name], times[BASE], strict=True))
    shares = {"adapter ms": above * 1e3, "FLOPs ms": flops / rate * 1e3, "adapter / FLOPs": above * rate / flops}
    return replace(record, facts={**record.facts, **shares})
