"""Seconds of an optimizer step from rates that the user gives."""

from dataclasses import dataclass

from malora_dist.plan.activations import expected_rows
from malora_dist.plan.run import Run, is_grouped
from malora_dist.plan.shapes import Linear
from malora_dist.plan.steps import KINDS, Flow, flows


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of equal nodes. intra and inter are bytes a second one GPU sends, flops what a GPU really reaches."""

    nodes: int = 1
    gpus_per_node: int = 8
    hbm: int = 80 * 2**30
    intra: float = 450e9
    inter: float = 50e9
    flops: float = 400e12

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


def step_seconds(run: Run, hardware: Hardware) -> dict[str, float]:
    """Estimate the seconds of computing and of each kind of traffic, and their sum `total`, if nothing overlaps.

    compute = step_flops / flops. A flow takes bytes / bandwidth, at `intra` if its groups lie within nodes and at
    `inter`, the slower link of the ring, if they span nodes. Latency, the unpacking of 4-bit weights and the optimizer
    are left out. ZeRO-3's gathers and reductions can hide behind computing; the exchange of tokens only in part.
    """
    seconds = {"compute": step_flops(run) / hardware.flops} | dict.fromkeys(KINDS, 0.0)
    for flow in flows(run):
        seconds[flow.kind] += flow.nbytes / (hardware.inter if spans_nodes(flow, hardware) else hardware.intra)
    return seconds | {"total": sum(seconds.values())}


def spans_nodes(flow: Flow, hardware: Hardware) -> bool:
    """Return whether groups of a flow span nodes: ranks are numbered node by node, groups start at rank 0."""
    return hardware.gpus_per_node % (flow.group * flow.stride) != 0


def step_flops(run: Run) -> float:
    """Count the floating-point operations of a rank in a step: 2 for each multiplication.

    A frozen product runs forward and once backward (for its input), a trained one and attention twice backward;
    checkpointing runs all but the head forward again. DoRA multiplies the dropped input by the frozen weight too.
    """
    T, shape, again = run.tokens, run.shape, 1 if run.checkpointing else 0
    frozen = 2 * T * (sum(shape.copies(each) * each.weights for each in shape.linears) + shape.expert_multiplications)
    if run.spec.structure.magnitude and run.dropout > 0:
        frozen += 2 * T * sum(shape.copies(linear) * linear.weights for linear in run.adapted)
    trained = 2 * T * sum(shape.copies(linear) * _adapter_multiplications(run, linear) for linear in run.adapted)
    blocks = (2 + again) * frozen + (3 + again) * (trained + shape.num_layers * _attention_flops(run))
    return run.accumulation * (blocks + 2 * 2 * run.targets * shape.embedding_numel)


def _attention_flops(run: Run) -> float:
    """Count scores and their product with v: over all pairs of a packed row if masked, else causal pairs of samples."""
    causal_pairs = run.micro_batch * run.tokens_per_sample**2 / 2
    pairs = run.tokens**2 if run.masked or run.attention == "eager" else causal_pairs
    return 4 * pairs * run.shape.num_heads * run.shape.head_dim


def _adapter_multiplications(run: Run, linear: Linear) -> float:
    """Count the multiplications per token: router, S_A, and the experts that are computed."""
    spec, E = run.spec, run.num_local_experts
    read_by_router = linear.in_features if spec.router_input == "x" or spec.shared_r is None else spec.shared_r
    total = float(spec.num_experts * read_by_router) if spec.structure.routed else 0.0
    total += 0 if spec.shared_r is None else spec.shared_r * linear.in_features
    in_width = spec.expert_width(linear.in_features)
    computed = min(spec.top_k, E) if is_grouped(run) else E
    rows = expected_rows(run) / run.tokens if run.ep_size > 1 else 1
    return total + rows * computed * spec.r * ((in_width if spec.has_expert_down else 0) + linear.out_features)
