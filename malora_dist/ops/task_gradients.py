"""Gradients of one weight by task, and taking out of each what is against another's (PCGrad, arXiv 2001.06782).

Ortho-LoRA (arXiv 2601.09684) does so for the factors of a LoRA. A token's gradient is that of its own task, since
samples that are packed together do not see one another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from malora_dist.ops.products import scaled_product


@dataclass(frozen=True)
class TokensByTask:
    """T tokens in the order of their tasks, (T,), and how many of them each of G tasks has, on the host."""

    order_T: Tensor
    sizes: tuple[int, ...]


class TaskGradients:
    """Adds up the gradients of the rows of a product's weights, (G, W, I) in fp32 or better, over micro-batches.

    tokens: those of the forward at hand.
    """

    def __init__(self) -> None:
        self.tokens: TokensByTask | None = None
        self.sum_GWI: Tensor | None = None

    def add(self, grad_TW: Tensor, read_TI: Tensor, alpha: float) -> Tensor:
        """Add the gradients alpha * grad' read of each task's tokens, and return their sum over tasks, (W, I)."""
        assert self.tokens is not None
        order_T, sizes = self.tokens.order_T, self.tokens.sizes
        grads, reads = (rows.index_select(0, order_T).split(sizes) for rows in (grad_TW, read_TI))
        # A task without a token here has zeros, as a product over nothing is.
        parts = [
            scaled_product(grad.T, read, alpha) if len(grad) else grad.T @ read
            for grad, read in zip(grads, reads, strict=True)
        ]
        parts_GWI = torch.stack(parts)
        parts_GWI = parts_GWI.to(torch.promote_types(parts_GWI.dtype, torch.float32))
        self.sum_GWI = parts_GWI if self.sum_GWI is None else self.sum_GWI.add_(parts_GWI)
        return parts_GWI.sum(dim=0)


def without_conflicts(grads_GN: Tensor) -> Tensor:
    """Return the sum (N,) of the tasks' gradients, each without its parts against the others' gradients.

    From each gradient, of the first task first, for each other task in the order of their numbers: if the inner product
    of what is left of it with the other's gradient is negative, the projection on that gradient is taken away.
    """
    left_GN = grads_GN.clone()
    squares_G = grads_GN.square().sum(dim=1)
    for task in range(len(grads_GN)):
        for other in range(len(grads_GN)):
            if other != task:
                inner = left_GN[task] @ grads_GN[other]
                # Not a branch, for which the host would wait.
                share = inner.clamp(max=0) / squares_G[other].clamp(min=torch.finfo(grads_GN.dtype).tiny)
                left_GN[task] -= share * grads_GN[other]
    return left_GN.sum(dim=0)
