"""Bytes that a forward pass keeps for backward, read off the operations of the code, for one micro-batch of T tokens.

s is the bytes of a number of the base's dtype. A tensor that several operations keep counts once. Parameters do not
count; copies of them in another dtype or layout do.
"""

import math

from malora_dist.adapters.target_names import READERS
from malora_dist.ops.choices import chunk_rows
from malora_dist.plan.communication import rows_per_token
from malora_dist.plan.parameters import FP32
from malora_dist.plan.run import Run, is_grouped
from malora_dist.plan.shapes import Linear

INDEX = 8


def activation_bytes(run: Run) -> int:
    """Count the peak bytes over forward and backward, without the logits.

    Without checkpointing it is every block's tensors; with it (non-reentrant), every block's input and routing, and the
    tensors of the one block that backward has recomputed.
    """
    L, s = run.shape.num_layers, run.itemsize
    final_norm = run.tokens * run.shape.hidden_size * FP32
    rotary = 2 * run.tokens * run.shape.head_dim * s
    mask = _mask_bytes(run)
    if not run.checkpointing:
        return L * block_bytes(run) + mask + final_norm + rotary
    routers = sum(run.shape.copies(linear) for linear in run.adapted)
    inputs = L * run.tokens * run.shape.hidden_size * s + routers * _routing_bytes(run)
    return inputs + mask + block_bytes(run) + final_norm + rotary


def logit_bytes(run: Run) -> int:
    """Count bytes the loss holds at once: a chunk's logits, in the base's dtype and fp32, and the kept gradient."""
    numel = min(run.targets, chunk_rows(run.shape.vocab_size, "cuda")) * run.shape.vocab_size
    return numel * (FP32 + (run.itemsize if run.itemsize < FP32 else 0)) + saved_logit_bytes(run)


def saved_logit_bytes(run: Run) -> int:
    """Count those of `logit_bytes` kept for backward: the gradient of the head's input and a fp32 sum per target."""
    return run.targets * (run.shape.hidden_size * run.itemsize + FP32)


def block_bytes(run: Run) -> int:
    """Count the bytes of one decoder block: two norms, attention, the gated MLP, and the adapters on its linears.

    Where blocks differ, it is their mean.
    """
    norms = 2 * run.tokens * (run.shape.hidden_size + 1) * FP32
    mlp = 3 * run.tokens * run.shape.intermediate_size * run.itemsize
    adapters = math.ceil(sum(_a_block(run, linear) * _adapter_bytes(run, linear) for linear in run.adapted))
    return norms + _attention_bytes(run) + mlp + _input_bytes(run) + adapters


def _mask_bytes(run: Run) -> int:
    """Count the mask of all layers, in the base's dtype, in rows that are a multiple of 16 numbers apart."""
    return run.tokens * -(-run.tokens // 16) * 16 * run.itemsize if run.masked else 0


def _attention_bytes(run: Run) -> int:
    """Count q, k, v and the output; with a mask k and v repeated for all heads.

    Eager attention keeps the (heads, T, T) probabilities too: in fp32, and in the base's dtype if that is another.
    """
    shape, T, s = run.shape, run.tokens, run.itemsize
    repeats = run.masked or run.attention == "eager"
    kv_heads = shape.num_heads if repeats else shape.num_kv_heads
    numbers = 2 * T * (shape.num_heads + kv_heads) * shape.head_dim
    if run.attention == "eager":
        return numbers * s + shape.num_heads * T * T * (FP32 + (s if s < FP32 else 0))
    log_sums = T * shape.num_heads * FP32
    return numbers * s + log_sums


def _input_bytes(run: Run) -> int:
    """Count bytes of adapted linears' inputs, once for those that share one; that of o_proj is attention's output.

    Every input projection keeps its input and recomputes dropout on it. DoRA keeps what it reads, dropped or not.
    """
    if run.dropout > 0 and run.spec.structure.magnitude:
        return 0
    alone, shared = 0.0, dict[str, float]()
    for linear in run.adapted:
        width, group = _a_block(run, linear) * linear.in_features, READERS.get(linear.name)
        if group is not None:
            shared[group] = max(width, shared.get(group, 0.0))
        elif linear.name != "o_proj":
            alone += width
    return math.ceil(run.tokens * (alone + sum(shared.values())) * run.itemsize)


def _a_block(run: Run, linear: Linear) -> float:
    """Return the mean number of linears of a kind in a block."""
    return run.shape.copies(linear) / run.shape.num_layers


def _routing_bytes(run: Run) -> int:
    """Count bytes of probabilities and gates (fp32) over all experts, and of the chosen experts' numbers (int64).

    The z-loss keeps logits and the log of their sum too.
    """
    spec = run.spec
    logits = (spec.num_experts + 1) * FP32 if run.z_loss else 0
    return run.tokens * (spec.num_experts * 2 * FP32 + spec.top_k * INDEX + logits) if spec.structure.routed else 0


def _adapter_bytes(run: Run, linear: Linear) -> int:
    """Count bytes of routing, of an input after dropout where experts read it, and of what the experts keep."""
    read_by_experts = run.spec.structure.magnitude or (
        run.spec.shared_r is None and run.ep_size == 1 and is_grouped(run)
    )
    dropped = run.tokens * linear.in_features * run.itemsize if run.dropout > 0 and read_by_experts else 0
    return _routing_bytes(run) + dropped + _router_input_bytes(run) + _expert_bytes(run, linear)


def _router_input_bytes(run: Run) -> int:
    """Count bytes of the fp32 copy of h that a router which reads h keeps, where the base has another dtype."""
    spec = run.spec
    if spec.router_input == "x" or spec.router_dtype == "input" or run.itemsize == FP32 or spec.shared_r is None:
        return 0
    return run.tokens * spec.shared_r * FP32


def _expert_bytes(run: Run, linear: Linear) -> int:
    """Count bytes that this rank's experts keep of all tokens or, under expert parallelism, of rows that reach it.

    Dense: h = S_A x and the products h P (or A x). Grouped: h, and of each chosen expert its product, gate and two
    indices. DoRA also keeps copies of A and B in the base's dtype, and its output before it is rescaled.
    """
    spec, s, E = run.spec, run.itemsize, run.num_local_experts
    in_width = spec.expert_width(linear.in_features)
    rows, kept = run.tokens, 0
    if run.ep_size > 1:
        rows = expected_rows(run)
        kept = rows * (in_width * s + E * FP32 + 3 * INDEX)
    elif spec.shared_r is not None:
        kept = rows * in_width * s
    if spec.structure.magnitude:
        copies = spec.r * (in_width + linear.out_features) * s if s < FP32 else 0
        kept += copies + rows * linear.out_features * s
    if is_grouped(run):
        return kept + rows * min(spec.top_k, E) * (spec.r * s + FP32 + 2 * INDEX)
    return kept + rows * E * spec.r * s


def expected_rows(run: Run) -> int:
    """Return the rows of a layer that reach a rank under uniform routing: as many as its own tokens send."""
    return round(run.tokens * rows_per_token(run.spec.num_experts, run.spec.top_k, run.ep_size))


def exchange_buffer_bytes(run: Run) -> int:
    """Count bytes of the rows and sums, sent and received, that are in flight, for the layer with the most."""
    if run.ep_size == 1:
        return 0
    rows, s = expected_rows(run), run.itemsize
    widths = [
        run.spec.expert_width(linear.in_features) * s + run.num_local_experts * FP32 + linear.out_features * s
        for linear in run.adapted
    ]
    return 2 * rows * max(widths)
