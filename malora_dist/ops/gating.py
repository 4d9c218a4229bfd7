"""Gates on the experts' ranks: z (T, E*R) times s * g_e, once for each of an expert's R ranks."""

import torch
from torch import Tensor

from malora_dist.ops.operators import operator


def _weights(gates_TE: Tensor, R: int, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return s * g, (T, E*R)."""
    return (gates_TE * scaling).to(dtype).repeat_interleave(R, dim=1, output_size=gates_TE.shape[1] * R)


def _ranks(z_TN: Tensor, gates_TE: Tensor) -> int:
    return z_TN.shape[1] // gates_TE.shape[1]


def _gate(z_TN: Tensor, gates_TE: Tensor, scaling: float) -> Tensor:
    return z_TN * _weights(gates_TE, _ranks(z_TN, gates_TE), scaling, z_TN.dtype)


def _gate_backward(grad_TN: Tensor, z_TN: Tensor, gates_TE: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    R = _ranks(z_TN, gates_TE)
    weights_TN = _weights(gates_TE, R, scaling, z_TN.dtype)
    # In the dtype of the gates, since the softmax behind them subtracts.
    products_TN = grad_TN * z_TN.to(gates_TE.dtype)
    grad_gates_TE = products_TN.view(-1, gates_TE.shape[1], R).sum(dim=2).mul_(scaling)
    grad_TN.mul_(weights_TN)
    return weights_TN.mul_(z_TN), grad_gates_TE


def _gate_kernel(z_TN: Tensor, gates_TE: Tensor, scaling: float) -> Tensor:
    from malora_dist.ops.gating_kernels import launch_forward

    if gates_TE.dtype == torch.float64:
        # Kernels get Python's numbers in fp32.
        return _gate(z_TN, gates_TE, scaling)
    return launch_forward(z_TN, gates_TE, scaling)


def _gate_backward_kernel(grad_TN: Tensor, z_TN: Tensor, gates_TE: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    from malora_dist.ops.gating_kernels import launch_backward

    if gates_TE.dtype == torch.float64:
        return _gate_backward(grad_TN, z_TN, gates_TE, scaling)
    return launch_backward(grad_TN, z_TN, gates_TE, scaling)


# (T, E*R): z times s * g, rounded to the dtype of z.
gate_ranks = operator(
    "gate_ranks(Tensor z, Tensor gates, float scaling) -> Tensor",
    plain=_gate,
    kernel=_gate_kernel,
    fake=lambda z, gates, scaling: z.new_empty(z.shape),
)

# From the gradient of the product, which becomes that of z in place: the product again, and the gradient of the gates.
gate_ranks_backward_ = operator(
    "gate_ranks_backward_(Tensor(a!) grad, Tensor z, Tensor gates, float scaling) -> (Tensor, Tensor)",
    plain=_gate_backward,
    kernel=_gate_backward_kernel,
    fake=lambda grad, z, gates, scaling: (z.new_empty(z.shape), gates.new_empty(gates.shape)),
)
