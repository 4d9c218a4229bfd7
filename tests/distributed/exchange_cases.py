"""Linears that read one input on several ranks: their tensors, odd cases by name, and any case by hypothesis."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import CASES, AdapterCase, make_inputs

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
_FAR = 8.0


@dataclass(frozen=True, kw_only=True)
class ExchangeCase:
    """One linear per number of `outs`, `tokens` of each rank of the world, experts over groups of `ep_size` ranks.

    D is None for experts without S_A. routing: as of AdapterCase, or one_rank = every token goes to the last
    K experts.
    """

    tokens: tuple[int, ...]
    ep_size: int
    outs: tuple[int, ...]
    I: int  # noqa: E741
    E: int
    K: int
    r: int
    D: int | None
    routing: str = "free"
    computation: str = "dense"
    normalize: bool = False
    dropout: bool = False
    dtype: str = "float64"
    seed: int = 0

    @property
    def method(self) -> str:
        return "molora" if self.D is None else "malora"

    def tensors(self, layer: int, rank: int) -> dict[str, Tensor]:
        """What `make_inputs` gives and the base's `weight` (O, I), float64 with values that `dtype` holds.

        Weights are the same on every rank, x is the same for every layer.
        """
        routing = "free" if self.routing == "one_rank" else self.routing
        shape = AdapterCase(1, self.I, self.outs[layer], self.E, self.K, self.r, self.D or 1, routing)  # type: ignore[arg-type]
        drawn = make_inputs(shape, self.method, seed=self.seed + layer)
        if self.routing == "one_rank":
            drawn["gate"].data[-self.K :, 0] += _FAR
        own = make_inputs(replace(shape, T=self.tokens[rank]), self.method, seed=self.seed + 100 + rank)
        weight = torch.randn(self.outs[layer], self.I, generator=torch.Generator().manual_seed(self.seed + layer))
        drawn |= {"x": own["x"], "base": own["base"], "weight": weight}
        del drawn["mask"]
        # The router computes in fp32 at least, so its weights are not rounded further.
        kept = {"gate": torch.promote_types(DTYPES[self.dtype], torch.float32)}
        return {name: t.detach().to(kept.get(name, DTYPES[self.dtype])).double() for name, t in drawn.items()}


def named_cases(world_size: int) -> dict[str, ExchangeCase]:
    """The odd shapes and routings of `tests.cases` with and without S_A, as 1 to 3 linears and in every precision."""
    cases = {}
    for number, (name, case) in enumerate(CASES.items()):
        for method in ("malora", "molora"):
            ep_size = 2 if method == "molora" else world_size
            E = -(-case.E // ep_size) * ep_size
            cases[f"{name}-{method}"] = ExchangeCase(
                tokens=tuple(case.T // (1 + rank) for rank in range(world_size)),
                ep_size=ep_size,
                outs=(case.O, case.O + 3, 2)[: 1 + (number + (method == "molora")) % 3],
                I=case.I,
                E=E,
                K=E if case.K == case.E else case.K,
                r=case.r,
                D=case.D if method == "malora" else None,
                routing=case.routing,
                computation=("dense", "grouped")[number % 2],
                normalize=number % 3 == 0,
                dropout=number % 2 == 0,
            )
    plain, k2 = cases["plain-malora"], cases["all-on-one-k2-malora"]
    # Few tokens, so that some ranks receive no row or one row, of an odd number of 2-byte numbers before 4-byte gates.
    few = replace(cases["one-token-malora"], D=5)
    odd = replace(plain, D=7, normalize=False, tokens=(3, 1, 0, 2)[:world_size], seed=3)
    cases["one-rank"] = replace(plain, routing="one_rank", E=4 * world_size, K=2)
    cases["only-the-last-rank-has-tokens"] = replace(plain, tokens=(0,) * (world_size - 1) + (9,))
    for dtype in ("float32", "bfloat16"):
        for name, case in {"plain": plain, "k2": k2, "few": few, "odd": odd}.items():
            cases[f"{name}-{dtype}"] = replace(case, dtype=dtype)
    return cases


@st.composite
def exchange_cases(draw: st.DrawFn, world_size: int) -> ExchangeCase:
    """Any numbers of tokens, experts and choices, any split, any routing."""
    ep_size = draw(st.sampled_from([2, 4][: world_size // 2]))
    E = ep_size * draw(st.integers(1, 3))
    K = draw(st.integers(1, E))
    routings = ["free", "one_expert", "one_rank", "equal"] + ["starved"] * (K < E)
    return ExchangeCase(
        tokens=tuple(draw(st.lists(st.integers(0, 40), min_size=world_size, max_size=world_size))),
        ep_size=ep_size,
        outs=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))),
        I=draw(st.integers(3, 9)),
        E=E,
        K=K,
        r=draw(st.integers(1, 4)),
        D=draw(st.none() | st.integers(1, 7)),
        routing=draw(st.sampled_from(routings)),
        computation=draw(st.sampled_from(["dense", "grouped"])),
        normalize=draw(st.booleans()),
        dropout=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
