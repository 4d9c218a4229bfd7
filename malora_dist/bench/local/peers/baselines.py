"""Who can take part in a benchmark, by name. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from malora_dist.adapters.methods import MixtureSpec, mixture_spec
from malora_dist.adapters.parameter_counts import count_parameters, match_budget
from malora_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One way to adapt a model's linears, or none.

    maker: `base`, the frozen model alone; `ours`, MixtureLinear; `peft`, the package; `dispatched`, a mixture whose
    experts see their own tokens only. numbers: for `mixture_spec`. equal: r is solved so that there are as many
    trainable parameters as in MALoRA with the paper's numbers. computation: of ours, or `sorted` or `looped` of the
    dispatched. fuse_projections: of ours, for q, k and v, or gate and up. fp32: PEFT's own default of adapters in fp32;
    without it they are in the model's dtype.
    """

    maker: str
    method: str = "lora"
    numbers: Mapping[str, int] = field(default_factory=dict)
    equal: bool = False
    computation: str = "auto"
    fuse_projections: bool = False
    fp32: bool = False

    def spec(self, sizes: Sequence[tuple[int, int]]) -> MixtureSpec:
        """Return the method's numbers for linears of `sizes` (in_features, out_features)."""
        if not self.equal:
            return mixture_spec(self.method, **self.numbers)  # type: ignore[arg-type]
        malora = mixture_spec("malora")
        return match_budget(self.method, sizes, sum(count_parameters(malora, *size) for size in sizes), **self.numbers)


LORA = {"r": 64}
MALORA = {"num_experts": 8, "top_k": 2, "r": 12, "shared_r": 32}
MOLORA = {"num_experts": 8, "top_k": 2, "r": 8}

BASELINES: dict[str, Baseline] = {
    "base": Baseline(maker="base"),
    "peft_lora": Baseline(maker="peft", numbers=LORA),
    "peft_lora_equal": Baseline(maker="peft", equal=True),
    "peft_lora_fp32": Baseline(maker="peft", numbers=LORA, fp32=True),
    "peft_lora_fp32_equal": Baseline(maker="peft", equal=True, fp32=True),
    "peft_dora": Baseline(maker="peft", method="dora", numbers=LORA),
    "lora": Baseline(maker="ours", numbers=LORA),
    "lora_equal": Baseline(maker="ours", equal=True),
    "malora": Baseline(maker="ours", method="malora", numbers=MALORA),
    "malora_grouped": Baseline(maker="ours", method="malora", numbers=MALORA, computation="grouped"),
    "malora_grouped_triton": Baseline(maker="ours", method="malora", numbers=MALORA, computation="grouped_triton"),
    "malora_fused": Baseline(maker="ours", method="malora", numbers=MALORA, fuse_projections=True),
    "molora": Baseline(maker="ours", method="molora", numbers=MOLORA),
    "malora_dispatched": Baseline(maker="dispatched", method="malora", numbers=MALORA, computation="sorted"),
    "malora_looped": Baseline(maker="dispatched", method="malora", numbers=MALORA, computation="looped"),
    "molora_dispatched": Baseline(maker="dispatched", method="molora", numbers=MOLORA, computation="sorted"),
    "molora_looped": Baseline(maker="dispatched", method="molora", numbers=MOLORA, computation="looped"),
}

# Older names, which command lines may still have.
RENAMED = {"malora_siblings": "malora_fused"}


def names_in(only: str) -> list[str]:
    """Return the names of a list `a,b`, with older names of baselines replaced by the present ones."""
    given = [name.strip() for name in only.split(",") if name.strip()]
    return [RENAMED.get(name, name) for name in given]


def chosen(only: str | None, default: Sequence[str] = tuple(BASELINES)) -> dict[str, Baseline]:
    """Return the baselines of a list `a,b`, or `default`. Raises ConfigError for an unknown name."""
    names = list(default) if only is None else names_in(only)
    unknown = [name for name in names if name not in BASELINES]
    if unknown or not names:
        raise ConfigError(f"--only {only!r}: {', '.join(unknown) or 'nobody'} is not one of {', '.join(BASELINES)}")
    return {name: BASELINES[name] for name in names}
