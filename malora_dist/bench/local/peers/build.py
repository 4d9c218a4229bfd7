"""From a baseline's name to a model that trains its way, on one base that all of them share."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from malora_dist.adapters.inject import inject_adapters
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.bench.local.adapter_flops import adapter_flops
from malora_dist.bench.local.peers.baselines import Baseline
from malora_dist.bench.local.peers.dispatched import DispatchedLinear, dispatch_adapters
from malora_dist.bench.local.peers.quantised import with_bitsandbytes, with_nf4
from malora_dist.bench.local.peers.with_peft import add_peft
from malora_dist.models.nf4_linear import NF4Linear


@dataclass(frozen=True)
class Base:
    """A frozen model, as our linears want it and as PEFT does: they differ for 4 bits, in the class alone.

    sizes: (in_features, out_features) of every linear that is adapted. dtype: what the model computes in.
    """

    ours: nn.Module
    theirs: nn.Module
    dtype: torch.dtype
    targets: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, model: nn.Module, targets: Sequence[str], *, load_in_4bit: bool, peft: bool) -> "Base":
        """Freeze `model`, and quantise its linears if asked, with `peft` also as bitsandbytes' linears."""
        model.requires_grad_(False)
        dtype = next(model.parameters()).dtype
        ours = with_nf4(shared_copy(model)) if load_in_4bit else model
        theirs = with_bitsandbytes(shared_copy(model)) if load_in_4bit and peft else ours
        return cls(ours, theirs, dtype, tuple(targets), tuple(target_sizes(ours, targets)))


@dataclass(frozen=True)
class Adapted:
    """A baseline's model, and the numbers of its method on linears of `sizes`. spec: None for the base alone.

    our_linears: the frozen linears are those of the baseline `base`, not bitsandbytes'.
    """

    model: nn.Module
    spec: MixtureSpec | None
    sizes: tuple[tuple[int, int], ...]
    our_linears: bool = True

    @property
    def trained(self) -> list[nn.Parameter]:
        """What an optimizer gets."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def routers(self) -> list[MixtureLinear | DispatchedLinear]:
        """Layers with a router, whose `routing` belongs in a balance loss."""
        kinds = (MixtureLinear, DispatchedLinear)
        return [m for m in self.model.modules() if isinstance(m, kinds) and getattr(m, "balanced", True)]

    @property
    def form(self) -> str | None:
        """How tokens meet their experts, where there are several: dense, grouped or dispatched."""
        if not self.routers:
            return None
        grouped = {getattr(layer, "grouped", None) for layer in self.routers}
        return {None: "dispatched", True: "grouped", False: "dense"}[grouped.pop()] if len(grouped) == 1 else "mixed"

    def flops(self, tokens: int) -> int:
        """Return the FLOPs of the adapters' products for `tokens` tokens, forward and backward."""
        if self.spec is None:
            return 0
        return adapter_flops(self.spec, self.sizes, tokens, all_experts=self.form in (None, "dense", "mixed"))

    @property
    def facts(self) -> dict[str, Any]:
        """Trainable parameters, and the rank and form of what has one."""
        facts = {"trainable": sum(p.numel() for p in self.trained)}
        found = {"r": None if self.spec is None else self.spec.r, "form": self.form}
        return facts | {name: value for name, value in found.items() if value is not None}


def flops_above_base(adapted: Mapping[str, Adapted], tokens: int) -> dict[str, int]:
    """Return `flops` by name, without PEFT on a 4-bit base, whose time above `base` is not its adapter's alone."""
    return {name: one.flops(tokens) for name, one in adapted.items() if one.our_linears}


def build(baseline: Baseline, base: Base, *, dropout: float = 0.0, seed: int = 0) -> Adapted:
    """Build the baseline on a copy of the base that shares its weights, in training mode.

    Adapters start so that the output is the base's. Raises ConfigError if a package is missing.
    """
    if baseline.maker == "base":
        return Adapted(shared_copy(base.ours).train(), None, base.sizes)
    spec = baseline.spec(base.sizes)
    if baseline.maker == "peft":
        theirs = shared_copy(base.theirs)
        model = add_peft(theirs, spec, base.targets, dropout=dropout, fp32=baseline.fp32, seed=seed)
        return Adapted(model, spec, base.sizes, our_linears=base.theirs is base.ours)
    model = shared_copy(base.ours)
    dispatched = baseline.maker == "dispatched"
    computation = "auto" if dispatched else baseline.computation
    inject_adapters(
        model,
        spec,
        base.targets,
        lora_dropout=dropout,
        computation=computation,
        fuse_projections=baseline.fuse_projections,
        seed=seed,
    )
    if dispatched:
        dispatch_adapters(model, spec, base.dtype, dropout=dropout, looped=baseline.computation == "looped")
    return Adapted(model.train(), spec, base.sizes)


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy the model's modules; the copy shares its parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def target_sizes(model: nn.Module, targets: Sequence[str]) -> list[tuple[int, int]]:
    """Return (in_features, out_features) of every linear whose name ends in one of `targets`."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | NF4Linear)}
    return [(m.in_features, m.out_features) for n, m in linears.items() if n.rpartition(".")[2] in targets]
