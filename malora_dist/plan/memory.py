"""Bytes a rank needs at its peak, by kind."""

from malora_dist.plan.activations import activation_bytes, exchange_buffer_bytes, logit_bytes
from malora_dist.plan.gathers import gathered_bytes
from malora_dist.plan.parameters import optimizer_bytes, parameter_bytes, task_gradient_bytes, weight_copy_bytes
from malora_dist.plan.run import Run

HOST_KINDS = {"offload_optimizer": ("master", "moments", "gradients"), "offload_param": ("base_4bit", "base_other")}


def bytes_per_rank(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """Count device and host bytes by kind, each with its `total`.

    The kinds are counted as if all existed at once, which they do while backward reaches the last block. The copy
    of the gradients that the optimizer step makes is left out: activations are gone by then.
    """
    device = parameter_bytes(run) | optimizer_bytes(run)
    device["weight_copies"] = weight_copy_bytes(run)
    device["task_gradients"] = task_gradient_bytes(run)
    device["gathered"] = gathered_bytes(run)
    device["dequantised"] = _largest_weight(run) if run.load_in_4bit else 0
    device["activations"] = activation_bytes(run)
    device["logits"] = logit_bytes(run)
    device["exchange"] = exchange_buffer_bytes(run)
    host = {kind: 0 for kinds in HOST_KINDS.values() for kind in kinds}
    for setting, kinds in HOST_KINDS.items():
        if getattr(run.zero, setting):
            for kind in kinds:
                host[kind], device[kind] = device[kind], 0
    return _with_total(device), _with_total(host)


def _largest_weight(run: Run) -> int:
    """Count the bytes of the largest linear unpacked: one 4-bit linear is unpacked at a time, forward and backward."""
    return max(linear.weights for linear in run.shape.linears) * run.itemsize


def _with_total(kinds: dict[str, int]) -> dict[str, int]:
    return kinds | {"total": sum(kinds.values())}
