"""Putting adapters on a model, and reading them off it."""

import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from malora_dist.errors import ConfigError
from malora_dist.methods import MixtureSpec, count_parameters, factor_shapes
from malora_dist.nn.kernels import require_triton
from malora_dist.nn.mixture import MixtureLinear
from malora_dist.nn.nf4_linear import NF4Linear
from malora_dist.nn.siblings import SIBLINGS, join_siblings, part_siblings

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class InjectionRow:
    """One kind of target: how many modules matched, and their parameters."""

    target: str
    modules: int
    in_features: int
    out_features: int
    trainable_parameters: int


@dataclass(frozen=True)
class InjectionReport:
    """What `inject_adapters` did."""

    rows: tuple[InjectionRow, ...]
    trainable_parameters: int
    base_parameters: int
    adapted_parameters: int
    quantized_parameters: int


def inject_adapters(
    model: nn.Module,
    spec: MixtureSpec,
    target_modules: Sequence[str] = DEFAULT_TARGETS,
    *,
    lora_dropout: float = 0.0,
    computation: str = "auto",
    fuse_siblings: bool = False,
    seed: int = 0,
    init_weights: bool = True,
    place: Callable[[MixtureLinear], None] | None = None,
    whole: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
) -> InjectionReport:
    """Freeze `model` and wrap each linear whose name ends in one of `target_modules` in a MixtureLinear, in place.

    Adapters are fp32, built on the device of the layer they wrap. Their initial values depend on the seed and the
    module's name alone, so every process builds the same ones (DoRA's magnitude depends on the base's weight too, which
    `whole(base_layer)` must show whole while it is measured). With `fuse_siblings`, linears that read one tensor enter
    together (`nn.siblings`), where the method has an S_A. `place` then decides what of a layer stays on this
    process, before the next layer is built; the report counts whole layers all the same. Without `init_weights` no
    initial value is computed: the factors are memory that the caller must fill, every one.

    Raises ConfigError if `computation` is grouped_triton where Triton cannot run, if a target matches nothing or
    matches a module that is not a linear, or if the model keeps its experts as fused 3-D parameters, which linears
    cannot reach.
    """
    _refuse_fused_experts(model)
    if computation == "grouped_triton" and spec.structure.routed:
        require_triton(next(model.parameters()).device)
    matches = {target: _find_targets(model, target) for target in target_modules}
    _check_matches(model, matches, spec)
    model.requires_grad_(False)
    base_parameters = count_base_parameters(model)
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    rows = []
    for target, names in matches.items():
        for name in names:
            with whole(model.get_submodule(name)) if spec.structure.magnitude else nullcontext():
                layer = _wrap(model, name, spec, lora_dropout, computation, seed, init_weights)
            if place is not None:
                place(layer)
        rows.append(_row(model, spec, target, names))
    if fuse_siblings and spec.shared_r is not None:
        join_siblings(model)
    return InjectionReport(
        rows=tuple(rows),
        trainable_parameters=sum(row.trainable_parameters for row in rows),
        base_parameters=base_parameters,
        adapted_parameters=sum(row.modules * row.in_features * row.out_features for row in rows),
        quantized_parameters=quantized,
    )


def mixture_layers(model: nn.Module) -> Iterator[tuple[str, MixtureLinear]]:
    """Name and layer of every adapted linear, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, MixtureLinear):
            yield name, module


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every adapter tensor: `<layer>.<factor>`, e.g. `model.layers.0.mlp.up_proj.shared_A`."""
    for name, layer in mixture_layers(model):
        for factor, parameter in layer.factors():
            yield f"{name}.{factor}", parameter


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter tensor, trained or frozen, detached. Under ZeRO-3 gather first (`parallel.zero`)."""
    return {name: parameter.detach() for name, parameter in adapter_parameters(model)}


def count_base_parameters(model: nn.Module) -> int:
    """Weights of the base as its authors count them: a 4-bit blob counts the weights it stands for."""
    total = 0
    for module in model.modules():
        if isinstance(module, NF4Linear):
            total += module.in_features * module.out_features + (0 if module.bias is None else module.bias.numel())
    blobs = {id(p) for m in model.modules() if isinstance(m, NF4Linear) for p in m.parameters()}
    adapters = {id(p) for _, p in adapter_parameters(model)}
    # ds_numel: ZeRO-3 leaves an empty tensor in place of a partitioned parameter.
    others = (p for p in model.parameters() if id(p) not in blobs | adapters)
    return total + sum(getattr(p, "ds_numel", p.numel()) for p in others)


def layer_seed(seed: int, name: str) -> int:
    """A 31-bit number from the run's seed and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big") >> 1


def _find_targets(model: nn.Module, target: str) -> list[str]:
    candidates = {name: m for name, m in model.named_modules() if name == target or name.endswith(f".{target}")}
    if not candidates:
        linears = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)})
        near = difflib.get_close_matches(target, linears, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the model's linears are {', '.join(linears)}"
        raise ConfigError(f"adapter.target_modules: {target!r} matches no module of the model; {hint}")
    wrong = [f"{name} ({type(m).__name__})" for name, m in candidates.items() if not _is_linear(m)]
    if wrong:
        raise ConfigError(f"adapter.target_modules: {target!r} matches {wrong[0]}, which is not a linear layer")
    return list(candidates)


def _check_matches(model: nn.Module, matches: dict[str, list[str]], spec: MixtureSpec) -> None:
    """Refuse what cannot be built, before anything of the model is changed."""
    if not matches:
        raise ConfigError("adapter.target_modules is empty: there would be nothing to train")
    target_of: dict[str, str] = {}
    for target, names in matches.items():
        for name in names:
            if name in target_of:
                raise ConfigError(f"adapter.target_modules: {target_of[name]!r} and {target!r} both match {name}")
            target_of[name] = target
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear | NF4Linear)
            if spec.shared_r is not None and spec.shared_r > linear.in_features:
                raise ConfigError(
                    f"adapter.shared_r={spec.shared_r} must be at most the {linear.in_features} inputs of {name}: "
                    "S_A is made of that many orthogonal rows"
                )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, NF4Linear))


def _refuse_fused_experts(model: nn.Module) -> None:
    # Convolutions have weights of three dimensions, one for each place of their window.
    convolutions = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Conv1d))
    for name, parameter in model.named_parameters():
        known = name.endswith((".P", ".A", ".B")) or name.rpartition(".")[0] in convolutions
        if len(getattr(parameter, "ds_shape", parameter.shape)) == 3 and not known:
            raise ConfigError(
                f"{type(model).__name__} keeps experts as one 3-D parameter ({name}), which adapters on linears would "
                "silently miss; this base is not supported"
            )


def _wrap(
    model: nn.Module,
    name: str,
    spec: MixtureSpec,
    dropout: float,
    computation: str,
    seed: int,
    init_weights: bool,
) -> MixtureLinear:
    parent_name, _, leaf = name.rpartition(".")
    parent, base = model.get_submodule(parent_name), model.get_submodule(name)
    assert isinstance(base, (nn.Linear, NF4Linear))
    device = next(base.parameters()).device
    with torch.device(device):
        layer = MixtureLinear(
            base,
            in_features=base.in_features,
            out_features=base.out_features,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            r=spec.r,
            shared_r=spec.shared_r,
            routed=spec.structure.routed,
            scaling=spec.scaling,
            core=spec.structure.core,
            balanced=not spec.structure.dense,
            magnitude=spec.structure.magnitude,
            beta=spec.beta,
            dropout=dropout,
            normalize_gates=spec.normalize_gates,
            computation=computation,
            input_salt=layer_seed(seed, f"{parent_name}:{SIBLINGS.get(leaf, leaf)}"),
            generator=torch.Generator("cpu").manual_seed(layer_seed(seed, name)),
            init_weights=init_weights,
        )
    layer.train(base.training)
    setattr(parent, leaf, layer)
    return layer


def _row(model: nn.Module, spec: MixtureSpec, target: str, names: list[str]) -> InjectionRow:
    sizes = [(layer.in_features, layer.out_features) for name, layer in mixture_layers(model) if name in set(names)]
    return InjectionRow(target, len(names), *sizes[0], sum(count_parameters(spec, *size) for size in sizes))


def expected_shapes(model: nn.Module, spec: MixtureSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter tensor that `spec` puts on `model`, to check a file against."""
    return {
        f"{name}.{factor}": shape
        for name, layer in mixture_layers(model)
        for factor, shape in factor_shapes(spec, layer.in_features, layer.out_features).items()
    }


def remove_adapters(model: nn.Module) -> None:
    """Put every adapted layer's base back in its place: the model is what `inject_adapters` was given."""
    part_siblings(model)
    for name, layer in list(mixture_layers(model)):
        parent_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent_name), leaf, layer.base_layer)
