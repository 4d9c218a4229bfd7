"""Shapes and numbers of what a method trains on a linear, and the rank that meets a budget of parameters."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any

from malora_dist.adapters.methods import MixtureSpec, mixture_spec


def factor_shapes(spec: MixtureSpec, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every adapter tensor on one linear of I inputs and O outputs.

    `gate` (E, I), or (E, D) if it reads h, is the router's linear; `shared_A` (D, I) is S_A; `P` (E, R, D) or
    `A` (E, R, I) lead into an expert's rank; `B` (E, O, R) leads out. Experts are stacked on dim 0. `magnitude` (O,) is
    DoRA's norm of each output's row.
    """
    E, R = spec.num_experts, spec.r
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.structure.routed:
        width = in_features if spec.router_input == "x" else spec.shared_r
        assert width is not None
        shapes["gate"] = (E, width)
    if spec.shared_r is not None:
        shapes["shared_A"] = (spec.shared_r, in_features)
    if spec.structure.expert_down:
        assert spec.shared_r is not None
        shapes["P"] = (E, R, spec.shared_r)
    elif spec.shared_r is None:
        shapes["A"] = (E, R, in_features)
    shapes["B"] = (E, out_features, R)
    if spec.structure.magnitude:
        shapes["magnitude"] = (out_features,)
    return shapes


def count_parameters(spec: MixtureSpec, in_features: int, out_features: int) -> int:
    """Count the trainable parameters of one linear of n inputs and m outputs.

    LoRA r(n+m); DoRA r(n+m) + m; MoLoRA N r(n+m) + N n; HydraLoRA r n + N r m + N n; MALoRA d n + N r d + N r m + N n.
    A router that reads h has N d (HydraLoRA N r) instead of N n.
    """
    return sum(math.prod(shape) for shape in factor_shapes(spec, in_features, out_features).values())


def match_budget(method: str, sizes: Sequence[tuple[int, int]], parameters: int, **numbers: Any) -> MixtureSpec:
    """Return the spec whose count over linears of `sizes` (in_features, out_features) is nearest to `parameters`.

    Only r is solved for; `numbers` are the other arguments of `mixture_spec`, so MALoRA's `shared_r` follows from its
    compression ratio. Of two ranks that are equally near the smaller is taken. Raises ConfigError as `mixture_spec`
    does, also if a given `shared_r` is too small for the rank that is needed.
    """
    linears = Counter(sizes)
    below: tuple[int, MixtureSpec] | None = None
    for r in count(1):
        spec = mixture_spec(method, r=r, **numbers)
        total = sum(times * count_parameters(spec, *size) for size, times in linears.items())
        if total >= parameters:
            break
        below = total, spec
    return below[1] if below is not None and parameters - below[0] <= total - parameters else spec
