"""What an adapter holds: numbers, norms of its experts, and experts that do nothing or the same as another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from malora_dist.adapters.io.folder import AdapterTensors
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.scaling import LORA
from malora_dist.errors import CheckpointError, MaloraError
from malora_dist.ops.expert_gram import expert_gram, norms_and_cosines
from malora_dist.tracking.metrics import KIND, ROUTING, SHARE, STEP, read_metrics, without_lost_steps

# An expert that gets less than this part of an even share of the tokens, and experts at least this much alike.
STARVED, ALIKE = 0.05, 0.99

Facts = dict[str, Any]
Shares = Mapping[str, Sequence[float]]


def adapter_facts(adapter: AdapterTensors, shares: Shares | None = None) -> Facts:
    """Return method, numbers, counts, and of each layer the norms |s B_t C_t D| of its experts.

    shares: by layer, the part of the tokens' choices that each expert got. A tensor that cannot be read is named under
    `damaged` and its layer left out. DoRA's norms are those of s B A before its rows are rescaled.
    """
    facts = spec_facts(adapter.info.spec) | {
        "base_model": adapter.info.base_model,
        # Whether code of the base's own folder made the layers.
        "trust_remote_code": adapter.info.trust_remote_code or None,
        "target_modules": list(adapter.info.target_modules),
        "tensors": len(adapter.shapes),
        "parameters": sum(_numel(shape) for shape in adapter.shapes.values()),
    }
    layers, damaged = {}, []
    for layer in adapter.layers():
        try:
            layers[layer] = _layer_facts(adapter, layer, None if shares is None else shares.get(layer))
        except CheckpointError as error:
            damaged.append(str(error))
    return facts | {"layers": layers, "damaged": damaged}


def spec_facts(spec: MixtureSpec) -> Facts:
    """Return the method and the numbers that it has."""
    facts: Facts = {"method": spec.method, "r": spec.r, "lora_alpha": spec.lora_alpha, "scaling": spec.scaling}
    if spec.use_rslora:
        facts["use_rslora"] = True
    elif spec.scaling_rule != LORA:
        facts["scaling_rule"] = spec.scaling_rule
    if spec.structure.routed:
        facts |= {"num_experts": spec.num_experts, "top_k": spec.top_k, "normalize_gates": spec.normalize_gates}
    if spec.router_input != "x":
        facts["router_input"] = spec.router_input
    if spec.router_dtype != "float32":
        facts["router_dtype"] = spec.router_dtype
    if spec.shared_r is not None:
        facts["shared_r"] = spec.shared_r
    return facts


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _layer_facts(adapter: AdapterTensors, layer: str, share_E: Sequence[float] | None) -> Facts:
    norm_E, cosine_EE = norms_and_cosines(expert_gram(adapter.read_layer(layer)))
    E = len(norm_E)
    zero = {expert for expert in range(E) if norm_E[expert] == 0}
    starved = {expert for expert, part in enumerate(share_E or ()) if part < STARVED / E}
    facts: Facts = {
        "norms": (adapter.info.spec.of_layer(layer).scaling * norm_E).tolist(),
        "dead": sorted(zero | starved),
    }
    if share_E is not None:
        facts["shares"] = list(share_E)
    facts["duplicates"] = [
        [t, u, float(cosine_EE[t, u])] for t in range(E) for u in range(t + 1, E) if cosine_EE[t, u] >= ALIKE
    ]
    return facts


def routing_shares(metrics: Path, step: int | None = None) -> Shares | None:
    """Return each expert's share of tokens, by layer, in the last routing record (up to `step`); tasks count equally.

    None without a file or record. Raises MaloraError if the file is damaged.
    """
    if not metrics.is_file():
        return None
    records = [record for record in without_lost_steps(read_metrics(metrics)) if record[KIND] == ROUTING]
    try:
        records = [record for record in records if step is None or record[STEP] <= step]
        if not records:
            return None
        tasks = [task for task in records[-1][SHARE].values() if any(map(sum, task.values()))]
        return {
            layer: [sum(parts) / len(tasks) for parts in zip(*(task[layer] for task in tasks), strict=True)]
            for layer in (tasks[0] if tasks else ())
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MaloraError(f"{metrics} is damaged: a routing record is not readable: {error!r}") from error
