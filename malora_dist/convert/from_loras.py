"""Several LoRAs, of PEFT or ours, as the start of one mixture: expert i is LoRA i, the router is yet to be trained."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from malora_dist.adapters.inject import layer_seed, remove_adapters
from malora_dist.adapters.io.card import model_card
from malora_dist.adapters.io.folder import AdapterInfo, AdapterTensors, fill_adapter_folder, open_adapter
from malora_dist.adapters.io.peft import open_lora
from malora_dist.adapters.loading import put_adapter
from malora_dist.adapters.methods import MixtureSpec, default_shared_r, mixture_spec
from malora_dist.adapters.parameter_counts import factor_shapes
from malora_dist.convert.gates import constant_gates
from malora_dist.convert.gather_loras import Pair, fill_new_ranks, resized, shared_subspace, squared_error
from malora_dist.convert.job import Job, check_layer_specs
from malora_dist.convert.subspace import subspace_of
from malora_dist.convert.verify import Difference, difference, judge, logits_of, text_rows
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.ops.init import kaiming_uniform

EXACT = 1e-6


def to_mixture(job: Job) -> None:
    """Write a malora or molora adapter (--to) whose expert i adds what SRC number i adds, weighted by its gate.

    --r is the experts' rank, by default the largest of the sources'; --shared-r, --beta and --top-k are those of the
    recipe. Logs the relative error of each layer. Every layer that any source adapts is adapted; where a source does
    not, its expert adds nothing. Raises CheckpointError for sources that are not LoRAs or have different bases.
    """
    sources = [open_lora(path) for path in job.sources]
    info = _info(job, sources)
    layers, errors = _layers(sources), list[float]()
    values = _values(job, sources, info.spec, layers, errors)
    fill_adapter_folder(job.folder, info, _shapes(info.spec, layers), values, model_card(info, (), {}))
    job.log(
        "warning: the router is untrained: its weights are drawn as at the start of a training, so experts are chosen "
        f"at random. normalize_gates is true: a token's {info.spec.top_k} gates sum to 1. Train it before use"
    )
    if job.options.verify:
        _verify(job, sources, exact=max(errors) < EXACT)


Layers = dict[str, tuple[int, int]]  # name -> inputs, outputs


def _info(job: Job, sources: Sequence[AdapterTensors]) -> AdapterInfo:
    if job.options.beta is not None and not 0 < job.options.beta < math.inf:
        raise ConfigError(f"--beta {job.options.beta} must be a positive number")
    if len(sources) < 2:
        raise ConfigError(f"--to {job.kind} makes a mixture of LoRAs: give two SRC or more, then DST")
    for path, source in zip(job.sources, sources, strict=True):
        if source.info.spec.method != "lora":
            raise CheckpointError(f"{path} is a {source.info.spec.method} adapter; a mixture is made of plain LoRAs")
        check_layer_specs(path, job.kind, source)
    bases = {source.info.base_model for source in sources}
    if job.options.base is None and (len(bases) > 1 or not next(iter(bases))):
        raise CheckpointError(
            f"the sources name the bases {', '.join(sorted(base or 'none' for base in bases))}; if they are one and "
            "the same, say which with --base"
        )
    targets = {source.info.target_modules for source in sources}
    return replace(
        sources[0].info,
        spec=_spec(job, sources),
        target_modules=targets.pop() if len(targets) == 1 else tuple(_layers(sources)),
        base_model=job.options.base or sources[0].info.base_model,
    )


def _spec(job: Job, sources: Sequence[AdapterTensors]) -> MixtureSpec:
    """Return the spec of the mixture.

    Its scaling is that of the sources where they share one, so that B stays as it is; else 1, and each source's is
    folded into its B.
    """
    options, N = job.options, len(sources)
    r = options.r or max(source.info.spec.r for source in sources)
    scalings = {source.info.spec.scaling for source in sources}
    if options.top_k is not None and options.top_k > N:
        raise ConfigError(f"--top-k {options.top_k} must be at most {N}, the number of SRC")
    if job.kind == "malora" and options.shared_r is not None and options.shared_r < r:
        raise ConfigError(f"--shared-r {options.shared_r} must be at least {r}, the rank of each expert")
    shared = None if job.kind != "malora" else options.shared_r or max(default_shared_r(N, r, 0.5), r)
    return mixture_spec(
        job.kind,
        num_experts=N,
        top_k=options.top_k or min(2, N),
        r=r,
        shared_r=shared,
        lora_alpha=r * (scalings.pop() if len(scalings) == 1 else 1.0),
        beta=options.beta or 1.0,
        normalize_gates=True,
    )


def _layers(sources: Sequence[AdapterTensors]) -> Layers:
    """Return all layers of the sources. Raises CheckpointError if a layer has different sizes in two of them."""
    layers: Layers = {}
    for source in sources:
        for layer in source.layers():
            size = source.shapes[f"{layer}.A"][2], source.shapes[f"{layer}.B"][1]
            if layers.setdefault(layer, size) != size:
                raise CheckpointError(
                    f"{source.path}: {layer} has {size[0]} inputs and {size[1]} outputs, another source's "
                    f"{layers[layer][0]} and {layers[layer][1]}: they are of different bases"
                )
    return layers


def _shapes(spec: MixtureSpec, layers: Layers) -> dict[str, tuple[int, ...]]:
    for layer, (inputs, _) in layers.items():
        if spec.shared_r is not None and spec.shared_r > inputs:
            raise ConfigError(f"--shared-r {spec.shared_r} must be at most {inputs}, the inputs of {layer}")
    return {
        f"{layer}.{name}": shape for layer, size in layers.items() for name, shape in factor_shapes(spec, *size).items()
    }


def _values(
    job: Job, sources: Sequence[AdapterTensors], spec: MixtureSpec, layers: Layers, errors: list[float]
) -> Iterator[Tensor]:
    """Yield the factors in the order of `factor_shapes`; log each layer's error and append it to `errors`."""
    width = max(map(len, layers))
    for layer, size in layers.items():
        pairs = [_pair(source, layer, size) for source in sources]
        factors = _mixture(pairs, spec, torch.Generator().manual_seed(layer_seed(0, layer)))
        error = _relative_error(pairs, factors, spec)
        errors.append(error)
        job.log(f"{layer:<{width}}  relative error {error:.1e}" + ("  (exact)" if error < EXACT else ""))
        yield from factors.values()


def _pair(source: AdapterTensors, layer: str, size: tuple[int, int]) -> Pair:
    if layer not in source.layers():
        return torch.zeros(size[1], 0, dtype=torch.float64), torch.zeros(0, size[0], dtype=torch.float64)
    factors = source.read_layer(layer)
    return source.info.spec.scaling * factors["B"][0].double(), factors["A"][0].double()


def _mixture(pairs: Sequence[Pair], spec: MixtureSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the factors of a layer, rounded to fp32."""
    ranks = [min(len(A_RI), spec.r) for _, A_RI in pairs]
    equal = [resized(pair, spec.r) for pair in pairs]
    inputs = equal[0][1].shape[1]
    factors = {"gate": kaiming_uniform((len(pairs), inputs), fan_in=inputs, generator=generator)}
    if spec.shared_r is not None:
        factors["shared_A"], core = shared_subspace(equal, spec.shared_r, spec.beta, generator)
        fill_new_ranks(core, ranks, spec.beta, generator)
        factors["P"] = core
    else:
        factors["A"] = torch.stack([A_RI for _, A_RI in equal])
        fill_new_ranks(factors["A"], ranks, 1.0, generator)
    factors["B"] = torch.stack([B_OR for B_OR, _ in equal]) / spec.scaling
    return {name: tensor.float() for name, tensor in factors.items()}


def _relative_error(pairs: Sequence[Pair], factors: dict[str, Tensor], spec: MixtureSpec) -> float:
    """Compute sqrt(sum_i |B_i A_i - B'_i A'_i|^2 / sum_i |B_i A_i|^2) of what is stored."""
    wide = {name: tensor.double() for name, tensor in factors.items()}
    downs = wide["P"] @ wide["shared_A"] if "P" in wide else wide["A"]
    errors = [
        squared_error(pair, (spec.scaling * B_OR, A_RI))
        for pair, B_OR, A_RI in zip(pairs, wide["B"], downs, strict=True)
    ]
    total = sum(size for _, size in errors)
    return float((sum(error for error, _ in errors) / total) ** 0.5) if total else 0.0


def _verify(job: Job, sources: Sequence[AdapterTensors], exact: bool) -> None:
    """Compare the mixture, its gates forced to one expert after the other, with that expert's LoRA on real text.

    Raises CheckpointError beyond the tolerance of a mixture that is to be exact; for one of less rank the difference is
    only logged.
    """
    mixture = open_adapter(job.folder)
    rows = text_rows(job, mixture.info)
    model = job.load_base(mixture.info)
    for number, (path, source) in enumerate(zip(job.sources, sources, strict=True)):
        put_adapter(model, source)
        wanted = logits_of(model, rows)
        remove_adapters(model)
        put_adapter(model, mixture)
        one_hot = dict.fromkeys(mixture.layers(), torch.eye(len(sources))[number])
        with constant_gates(model, one_hot):
            logits = list(zip(logits_of(model, rows), wanted, strict=True))
        remove_adapters(model)
        name = f"expert {number} = {path}: "
        if exact:
            judge(job, name, logits, _weight_differences(source, mixture, number))
        else:
            pairs = [difference((found, None), (wanted_logits, None)) for found, wanted_logits in logits]
            apart, size = (max(values) for values in zip(*pairs, strict=True))
            job.log(f"{name}max |d logits| {apart:.1e} of {size:.1e}, by the errors above")


def _weight_differences(source: AdapterTensors, mixture: AdapterTensors, number: int) -> Iterator[Difference]:
    for layer in source.layers():
        factors = mixture.read_layer(layer)
        space = subspace_of(factors)
        size = factors["gate"].shape[1], factors["B"].shape[1]
        expert = mixture.info.spec.scaling * space.B_EOR[number], space.downs()[number]
        yield difference(expert, _pair(source, layer, size))
