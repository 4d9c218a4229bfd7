"""The family of methods as one table.

Every method is the sum  y = W0 x + s * sum_t g_t(x) * B_t C_t D x  with different switches, so a method is a row of
`METHODS` and nothing else: which factors exist, their shapes, and whether a router weighs the experts.
Equations are those of MALoRA (arXiv 2410.22782).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from malora_dist.adapters.scaling import LORA, RSLORA, SCALINGS, uniform_gates
from malora_dist.adapters.target_names import end_of_name, pattern_value
from malora_dist.errors import ConfigError, short

Patterns = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Which factors a method has. Everything else that the package knows of a method follows from this.

    about: what a recipe's reader should know of it, in a few words.
    shared_down: one down-projection S_A (D, I) serves all experts. Otherwise each expert has its own A_t (R, I), eq. 3.
    expert_down: each expert has a P_t (R, D) behind S_A, eq. 7. Without one S_A has the experts' rank.
    routed: a linear router weighs the experts for each token, eq. 4. Otherwise there is one expert.
    dense: all experts take part in every token, with their softmax weights; there is no load to balance.
    magnitude: the adapted weight W + s B A is rescaled to a trained norm for each output, as DoRA does.
    """

    about: str
    shared_down: bool = False
    expert_down: bool = False
    routed: bool = False
    dense: bool = False
    magnitude: bool = False

    def __post_init__(self) -> None:
        wrong = {
            "expert_down needs shared_down: P_t reads what S_A makes": self.expert_down and not self.shared_down,
            "dense needs routed: a router gives the experts' weights": self.dense and not self.routed,
            "shared_down needs routed: one expert shares with no other": self.shared_down and not self.routed,
            "magnitude needs a single expert: it rescales one product": self.magnitude and self.routed,
        }
        for rule, is_broken in wrong.items():
            if is_broken:
                raise ValueError(f"Structure: {rule}")

    @property
    def sparse(self) -> bool:
        """Return whether a token goes to `top_k` experts, whose load is balanced, rather than to all."""
        return self.routed and not self.dense


METHODS: dict[str, Structure] = {
    "lora": Structure(about="low-rank adapter without router"),
    "dora": Structure(about="lora with a trained magnitude for each output", magnitude=True),
    "molora": Structure(about="mixture of LoRA experts with top-k routing", routed=True),
    "hydralora": Structure(
        about="experts share the down-projection; every token uses all experts",
        shared_down=True,
        routed=True,
        dense=True,
    ),
    "malora": Structure(
        about="top-k routing; experts share a down-projection S_A, each with a small P_t of its own",
        shared_down=True,
        expert_down=True,
        routed=True,
    ),
}


def register_method(name: str, structure: Structure) -> None:
    """Add a method, which recipes, plans, adapters, files and reports then know by this name.

    Every process must do so before it reads a recipe or an adapter.

    Raises:
        ConfigError: another method has this name.
    """
    if METHODS.setdefault(name, structure) != structure:
        raise ConfigError(f"name={name!r} is registered already, with another structure")


def unknown_method(name: object) -> str | None:
    """Return the rule that a name of a method breaks, which lists those that are registered; None if it is one."""
    return None if isinstance(name, str) and name in METHODS else f"must be one of {', '.join(METHODS)}"


@dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """A method with its numbers; what `inject_adapters` builds on each target linear.

    r is the rank of an expert (r-bar in the paper), shared_r the rank of S_A (d), None for methods without one.
    router_input: `x`: the router reads the layer's input. `h`: it reads what the experts read, S_A drop(x), and so has
    D instead of I inputs (CoMoL, arXiv 2603.00573).
    router_dtype: of the router's product, `float32` or `input`, that of what it reads. Softmax and gates are fp32.
    scaling_rule: how s follows from lora_alpha and r (`adapters.scaling`).
    rank_pattern, alpha_pattern: r and lora_alpha of layers whose names a pattern matches, as pairs of pattern and
    number in PEFT's order and meaning; what such a layer gets is `of_layer`.
    """

    method: str
    num_experts: int
    top_k: int
    r: int
    shared_r: int | None
    lora_alpha: float
    beta: float
    normalize_gates: bool
    scaling_rule: str = LORA
    router_input: str = "x"
    router_dtype: str = "float32"
    rank_pattern: Patterns = ()
    alpha_pattern: Patterns = ()

    def of_layer(self, name: str) -> "MixtureSpec":
        """Return the spec of the layer of this name, without patterns.

        With another r the rank of S_A changes in proportion, so that the compression ratio stays what it is.
        """
        if not self.has_patterns:
            return self
        r = int(pattern_value(self.rank_pattern, name, self.r))
        alpha = float(pattern_value(self.alpha_pattern, name, self.lora_alpha))
        shared_r = self.shared_r
        if shared_r is not None and r != self.r:
            shared_r = max(r, round(shared_r * r / self.r))
        return replace(self, r=r, shared_r=shared_r, lora_alpha=alpha, rank_pattern=(), alpha_pattern=())

    @property
    def has_patterns(self) -> bool:
        """Whether layers may have numbers of their own."""
        return bool(self.rank_pattern or self.alpha_pattern)

    @property
    def structure(self) -> Structure:
        return METHODS[self.method]

    @property
    def has_expert_down(self) -> bool:
        """Whether each expert has a down-projection of its own, P_t or A_t."""
        return self.structure.expert_down or not self.structure.shared_down

    def expert_width(self, in_features: int) -> int:
        """Return how many numbers an expert of a linear reads of a token: those of S_A x, or all inputs without S_A."""
        return in_features if self.shared_r is None else self.shared_r

    @property
    def scaling(self) -> float:
        """s, which multiplies the sum over experts: lora_alpha / r, or by another rule (`adapters.scaling`)."""
        gates = uniform_gates(self.num_experts, self.top_k, self.normalize_gates)
        return SCALINGS[self.scaling_rule](self.lora_alpha, self.r, gates)

    @property
    def use_rslora(self) -> bool:
        """Whether s = lora_alpha / sqrt(r), by the name that PEFT has for it."""
        return self.scaling_rule == RSLORA


def default_shared_r(num_experts: int, r: int, compression_ratio: float) -> int:
    """Compute the rank of S_A for expert rank r.

    d = lambda r0 N and r = (2 - lambda) r0 give d = lambda / (2 - lambda) N r.

    With lambda = 0.5 and 8 experts: 16, 32, 64, 128 for r = 6, 12, 24, 48, the paper's Table 11.
    """
    return max(1, round(compression_ratio / (2 - compression_ratio) * num_experts * r))


def mixture_spec(
    method: str,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    r: int = 12,
    shared_r: int | None = None,
    compression_ratio: float = 0.5,
    lora_alpha: float | None = None,
    beta: float = 1.0,
    normalize_gates: bool = False,
    scaling_rule: str = LORA,
    router_input: str = "x",
    router_dtype: str = "float32",
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | Patterns = (),
    alpha_pattern: Mapping[str, float] | Patterns = (),
) -> MixtureSpec:
    """Fill in what follows from the method: one expert without a router, all experts for a dense gate, `shared_r`
    (r where experts have no expert_down), and lora_alpha = 2 r. `use_rslora` is PEFT's name of a scaling_rule.

    Raises ConfigError for an unknown method or impossible numbers.
    """
    problem = unknown_method(method)
    if problem is not None:
        raise ConfigError(f"method={method!r} {problem}")
    structure = METHODS[method]
    if not structure.routed:
        num_experts = top_k = 1
    if structure.dense:
        top_k = num_experts
    for argument, number in (("r", r), ("num_experts", num_experts), ("top_k", top_k)):
        if number < 1:
            raise ConfigError(f"{argument}={number} must be at least 1")
    if top_k > num_experts:
        raise ConfigError(f"top_k={top_k} must be at most num_experts={num_experts}")
    _check_router(router_input, router_dtype)
    if structure.expert_down:
        shared_r = _rank_of_shared_down(shared_r, r, num_experts, compression_ratio)
    else:
        shared_r = r if structure.shared_down else None
    return MixtureSpec(
        method=method,
        num_experts=num_experts,
        top_k=top_k,
        r=r,
        shared_r=shared_r,
        lora_alpha=2.0 * r if lora_alpha is None else lora_alpha,
        beta=beta,
        normalize_gates=normalize_gates,
        scaling_rule=_scaling_rule(structure, scaling_rule, use_rslora),
        router_input=router_input if structure.shared_down else "x",
        router_dtype=router_dtype if structure.routed else "float32",
        rank_pattern=_patterns("rank_pattern", rank_pattern, "integers of at least 1", _is_rank),
        alpha_pattern=_patterns("alpha_pattern", alpha_pattern, "positive numbers", _is_positive),
    )


def _rank_of_shared_down(shared_r: int | None, r: int, num_experts: int, compression_ratio: float) -> int:
    found = default_shared_r(num_experts, r, compression_ratio) if shared_r is None else shared_r
    if found < r:
        given = (
            f"shared_r={found}" if shared_r is not None else f"compression_ratio={compression_ratio}: shared_r={found}"
        )
        raise ConfigError(f"{given} must be at least r={r}, because each P_t has r rows of rank shared_r")
    return found


def _scaling_rule(structure: Structure, rule: str, use_rslora: bool) -> str:
    """Return the rule, which `use_rslora` may name too; without a router one of those that read no gates.

    Raises ConfigError for an unknown one, and for two that differ.
    """
    if rule not in SCALINGS:
        raise ConfigError(f"scaling={short(rule)} must be one of {', '.join(SCALINGS)}")
    if use_rslora and rule not in (LORA, RSLORA):
        raise ConfigError(f"use_rslora=True is scaling={RSLORA!r}, and scaling={rule!r} is given too")
    if use_rslora:
        return RSLORA
    return rule if structure.routed or rule == RSLORA else LORA


ROUTER_INPUTS, ROUTER_DTYPES = ("x", "h"), ("float32", "input")


def _check_router(router_input: str, router_dtype: str) -> None:
    given = {"router_input": (router_input, ROUTER_INPUTS), "router_dtype": (router_dtype, ROUTER_DTYPES)}
    for name, (value, known) in given.items():
        if value not in known:
            raise ConfigError(f"{name}={short(value)} must be one of {', '.join(known)}")


def _patterns(argument: str, given: Any, rule: str, holds: Callable[[Any], bool]) -> Patterns:
    pairs = tuple(given.items() if isinstance(given, Mapping) else given)
    for pattern, value in pairs:
        if not isinstance(pattern, str) or not holds(value):
            raise ConfigError(f"{argument}={short(dict(pairs))} must give names of layers {rule}")
        try:
            end_of_name(pattern)
        except ValueError as error:
            raise ConfigError(f"{argument}: {error}") from error
    return pairs


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
