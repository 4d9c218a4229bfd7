"""Bytes that a forward pass keeps for backward, read off the operations of the code, for one micro-batch of T tokens.

s is the bytes of a number of the base's dtype. A tensor that several operations keep counts once. Parameters do not
count; copies of them in another dtype or layout do.
"""

from malora_dist.plan.parameters import FP32
from malora_dist.plan.run import Run
from malora_dist.plan.shapes import Linear
from malora_dist.traffic import rows_per_token

INDEX = 8
MOVE_COST = 64


def activation_bytes(run: Run) -> int:
    """Peak over forward and backward, logits excepted.

    Without checkpointing every block's tensors. With it (non-reentrant) every block's input and routing, and the
    tensors of the one block that backward has computed again.
    """
    L, s = run.shape.num_layers, run.itemsize
    final_norm = run.tokens * run.shape.hidden_size * FP32
    rotary = 2 * run.tokens * run.shape.head_dim * s
    if not run.checkpointing:
        return L * block_bytes(run) + final_norm + rotary
    inputs = L * (run.tokens * run.shape.hidden_size * s + len(run.adapted) * _routing_bytes(run))
    mask = run.tokens**2 if _has_mask(run) else 0
    return inputs + mask + block_bytes(run) + final_norm + rotary


def logit_bytes(run: Run) -> int:
    """Logits exist for targets only: in the base's dtype, in fp32, and as the log-softmax that backward keeps."""
    numel = run.targets * run.shape.vocab_size
    return numel * (FP32 + FP32 + (run.itemsize if run.itemsize < FP32 else 0))


def saved_logit_bytes(run: Run) -> int:
    """What of `logit_bytes` is kept for backward: the fp32 log-softmax."""
    return run.targets * run.shape.vocab_size * FP32


def block_bytes(run: Run) -> int:
    """One decoder block: two norms, attention, the gated MLP, and the adapters on its linears."""
    norms = 2 * run.tokens * (run.shape.hidden_size + 1) * FP32
    mlp = 3 * run.tokens * run.shape.intermediate_size * run.itemsize
    adapters = sum(_adapter_bytes(run, linear) for linear in run.adapted)
    return norms + _attention_bytes(run) + mlp + _input_bytes(run) + adapters


def _has_mask(run: Run) -> bool:
    """Whether attention gets a (T, T) mask that keeps packed samples apart; flash attention needs none."""
    return run.micro_batch > 1 and run.attention != "flash_attention_2"


def _attention_bytes(run: Run) -> int:
    """q, k, v and the output; with a mask k and v repeated for all heads, and the mask in the base's dtype.

    Eager attention keeps the (heads, T, T) probabilities too: in fp32, and in the base's dtype if that is another.
    """
    shape, T, s = run.shape, run.tokens, run.itemsize
    repeats = _has_mask(run) or run.attention == "eager"
    kv_heads = shape.num_heads if repeats else shape.num_kv_heads
    numbers = 2 * T * (shape.num_heads + kv_heads) * shape.head_dim
    if run.attention == "eager":
        return numbers * s + shape.num_heads * T * T * (FP32 + (s if s < FP32 else 0))
    log_sums = T * shape.num_heads * FP32
    return numbers * s + log_sums + (T * T * s if _has_mask(run) else 0)


def _input_bytes(run: Run) -> int:
    """Inputs of adapted linears, once for those that share one.

    Kept by the down-projection unless dropout gave it another tensor, and by an fp32 router. The input of o_proj is
    attention's output and already counted.
    """
    if run.dropout > 0 and not (run.spec.structure.routed and run.itemsize == FP32):
        return 0
    names = {linear.name for linear in run.adapted}
    widths = [
        run.shape.hidden_size if names & {"q_proj", "k_proj", "v_proj"} else 0,
        run.shape.hidden_size if names & {"gate_proj", "up_proj"} else 0,
        run.shape.intermediate_size if "down_proj" in names else 0,
    ]
    return run.tokens * sum(widths) * run.itemsize


def _routing_bytes(run: Run) -> int:
    """Probabilities (fp32) and their order (int64) over all experts, and the chosen gates."""
    spec = run.spec
    return run.tokens * (spec.num_experts * (FP32 + INDEX) + spec.top_k * FP32) if spec.structure.routed else 0


def _adapter_bytes(run: Run, linear: Linear) -> int:
    """Dropped input, the router's fp32 input, routing, a copy of S_A in the base's dtype, and what the experts keep."""
    spec, T, s = run.spec, run.tokens, run.itemsize
    total = _routing_bytes(run)
    if run.dropout > 0:
        total += T * linear.in_features * s
    if spec.structure.routed and s < FP32:
        total += T * linear.in_features * FP32
    if spec.shared_r is not None and s < FP32:
        total += spec.shared_r * linear.in_features * s
    return total + _expert_bytes(run, linear)


def _expert_bytes(run: Run, linear: Linear) -> int:
    """What the experts here keep: of all tokens or, under expert parallelism, of the rows that reach this rank.

    Copies of P or A and B; then, dense, h = S_A x, the products h P, the gates, and both multiplied, and DoRA's output
    before it is rescaled; grouped, a row of h for each chosen expert and its products.
    """
    spec, s, E = run.spec, run.itemsize, run.num_local_experts
    in_width = linear.in_features if spec.shared_r is None else spec.shared_r
    rows, arriving = run.tokens, 0
    if run.ep_size > 1:
        rows = expected_rows(run)
        arriving = rows * (in_width * s + E * FP32 + 3 * INDEX)
    weights = E * spec.r * linear.out_features * s if s < FP32 or E > 1 else 0
    weights += E * spec.r * in_width * s if s < FP32 and spec.has_core else 0
    if is_grouped(run, linear):
        chosen = rows * min(spec.top_k, E)
        return arriving + weights + chosen * (in_width * s + 2 * spec.r * s + s + 2 * INDEX)
    h = rows * in_width * s if spec.shared_r is not None and run.ep_size == 1 else 0
    gated = rows * E * (spec.r + 1) * s if spec.structure.routed else 0
    rescaled = rows * linear.out_features * s if spec.structure.magnitude else 0
    return arriving + weights + h + rows * E * spec.r * s + gated + rescaled


def expected_rows(run: Run) -> int:
    """Rows of a layer that reach a rank under uniform routing: as many as its own tokens send."""
    return round(run.tokens * rows_per_token(run.spec.num_experts, run.spec.top_k, run.ep_size))


def exchange_buffer_bytes(run: Run) -> int:
    """Rows out and in, and sums out and in, of the layer with the most, while they are under way."""
    if run.ep_size == 1:
        return 0
    rows, s = expected_rows(run), run.itemsize
    widths = [
        (linear.in_features if run.spec.shared_r is None else run.spec.shared_r) * s
        + run.num_local_experts * FP32
        + linear.out_features * s
        for linear in run.adapted
    ]
    return 2 * rows * max(widths)


def is_grouped(run: Run, linear: Linear) -> bool:
    """Whether the layer multiplies the chosen experts only: the rule of `functional.adapter.prefer_grouped`."""
    spec, E = run.spec, run.num_local_experts
    if not spec.structure.routed or run.computation != "auto":
        return spec.structure.routed and run.computation == "grouped"
    in_width = linear.in_features if spec.shared_r is None else spec.shared_r
    K, O = min(spec.top_k, E), linear.out_features  # noqa: E741
    dense = E * spec.r * (in_width + O)
    return K * spec.r * (in_width + O) + MOVE_COST * K * (in_width + 2 * O) < dense
