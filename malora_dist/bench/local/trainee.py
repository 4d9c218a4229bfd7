"""A baseline in training: one call is one optimizer step, on the same tokens every time."""

import torch
from torch import Tensor

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.bench.local.losses import LOSSES, Batch, prepare_head
from malora_dist.bench.local.peers.build import Adapted
from malora_dist.bench.local.peers.dispatched import DispatchedLinear
from malora_dist.ops.balance import expert_statistics, load_balancing_loss
from malora_dist.ops.products import kept_weight_copies
from malora_dist.ops.routing import Routing

LEARNING_RATE = 1e-4
BALANCE_COEFFICIENT = 1e-3


class Trainee:
    """Forward, loss, backward, fused AdamW, gradients away. Mixtures add their balance loss."""

    def __init__(self, adapted: Adapted, batch: Batch, *, loss: str = "hf", dropout: bool = False) -> None:
        prepare_head(loss, adapted.model)
        self.loss = LOSSES[loss]
        self.adapted, self.batch, self.dropout = adapted, batch, dropout
        if adapted.spec is None:
            # The floor still passes gradients down to the first block.
            embedding = adapted.model.get_input_embeddings()  # type: ignore[operator]
            embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        self.optimizer = torch.optim.AdamW(adapted.trained, LEARNING_RATE, fused=True) if adapted.trained else None
        self.steps = 0

    def __call__(self) -> Tensor:
        """Run one step and return its cross-entropy, detached."""
        loss = self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def backward(self) -> Tensor:
        """Compute the gradients of one step and return its cross-entropy, detached."""
        self.steps += 1
        self._set_keys()
        with kept_weight_copies(self.adapted.model):
            loss = self.loss(self.adapted.model, self.batch)
            (loss + self.balance_loss()).backward()
        return loss.detach()

    def _set_keys(self) -> None:
        if self.dropout:
            keys_T = self.batch.keys(self.steps)
            for _, layer in mixture_layers(self.adapted.model):
                layer.token_keys = keys_T

    def balance_loss(self) -> Tensor | float:
        """Return the weighted load-balancing loss of the last forward, the mean over routers; 0 without one."""
        routings = [_take_routing(layer) for layer in self.adapted.routers]
        if not routings or self.adapted.spec is None:
            return 0.0
        statistics = expert_statistics(routings)
        counts_LE, top_k = statistics.counts_GLE.sum(dim=0), self.adapted.spec.top_k
        losses_L = load_balancing_loss(counts_LE, statistics.prob_sum_LE, self.batch.tokens, top_k)
        return BALANCE_COEFFICIENT * losses_L.mean()


def _take_routing(layer: MixtureLinear | DispatchedLinear) -> Routing:
    routing, layer.routing = layer.routing, None
    assert routing is not None, "a balance loss before a forward"
    return routing
