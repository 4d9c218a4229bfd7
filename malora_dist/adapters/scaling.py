"""The factor s of an adapter's output, by the rule that a recipe or a `MaloraConfig` names.

A single LoRA adds s B A x with s = lora_alpha / r. In a mixture each expert's part is multiplied by its gate g_t as
well, which at the start, with a router that is nearly uniform, is 1 / num_experts, or 1 / top_k with
`normalize_gates`. Two rules give a mixture the scale of a single LoRA of the same r and lora_alpha at that moment:

gate_norm   GOAT (arXiv 2502.16894) chooses s so that the weights move as those of the model it is compared with under
            gradient descent. With B = 0 and entries of A of variance 1 / (3 n), a step of rate e on B moves s B A by
            e s^2 G A'A, whose mean is e s^2 r / (3 n) G; equal to a full step of rate eta e this is GOAT's
            s = sqrt(3 n eta / r). Here the model compared with is a LoRA, and a token of gradient G moves the experts
            that it chose by g_t each, which count g_t again in its output: e s^2 sum_t g_t^2 r / (3 n) G. Equal
            to the LoRA's e s_lora^2 r / (3 n) G gives

                s = s_lora / sqrt(sum_t g_t^2) = s_lora / (sqrt(top_k) g)

gate_sum    Adam moves each entry of B by its rate, however small its gradient is, so that the output moves by
            s sum_t g_t times what a LoRA's does:

                s = s_lora / sum_t g_t = s_lora / (top_k g)

With 8 experts, top 2 and gates as they are, these are 5.7 and 4 times s_lora; with normalised gates 1.4 and 1 times.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LORA, RSLORA = "lora", "rslora"


@dataclass(frozen=True)
class GateSums:
    """The number of experts a token takes, K, and the gate that each has under a uniform router, g."""

    top_k: int
    gate: float


def uniform_gates(num_experts: int, top_k: int, normalize_gates: bool) -> GateSums:
    """Return the gates under a uniform router. One expert without a router has the gate 1."""
    return GateSums(top_k, 1 / top_k if normalize_gates else 1 / num_experts)


# The factor by rule, of lora_alpha, r and the gates. Without a router the last two are the first.
SCALINGS: Mapping[str, Callable[[float, int, GateSums], float]] = {
    LORA: lambda alpha, r, gates: alpha / r,
    RSLORA: lambda alpha, r, gates: alpha / math.sqrt(r),
    "gate_norm": lambda alpha, r, gates: alpha / r / (math.sqrt(gates.top_k) * gates.gate),
    "gate_sum": lambda alpha, r, gates: alpha / r / (gates.top_k * gates.gate),
}
