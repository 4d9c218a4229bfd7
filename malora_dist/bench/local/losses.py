"""The batch of a step, and the two ways to a loss on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.models.loss_head import install_loss_head, loss_head
from malora_dist.ops.dropout import token_keys

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """ids and labels (rows, length); a label is -100 where nothing is learned: in the first `unlearned` columns."""

    ids: Tensor
    labels: Tensor
    unlearned: int

    @classmethod
    def of(cls, rows: int, length: int, vocabulary: int, labelled: float, device: torch.device) -> "Batch":
        """Return seeded tokens; of each row the last `labelled` share is learned, as a response after its prompt."""
        ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
        unlearned = max(1, min(length - 1, length - round(labelled * length)))
        labels = ids.clone()
        labels[:, :unlearned] = IGNORED
        return cls(ids.to(device), labels.to(device), unlearned)

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def targets(self) -> int:
        """Tokens that are learned."""
        return len(self.ids) * (self.ids.shape[1] - self.unlearned)

    def keys(self, step: int) -> Tensor:
        """Return the (T,) keys of our dropout, which training makes for each step."""
        rows, length = self.ids.shape
        samples, positions = torch.arange(rows, device=self.ids.device), torch.arange(length, device=self.ids.device)
        return token_keys(0, step, samples.repeat_interleave(length), positions.repeat(rows))


Loss = Callable[[Any, Batch], Tensor]


def model_loss(model: Any, batch: Batch) -> Tensor:
    """Return the model's own loss: cross-entropy on the logits of all tokens."""
    loss: Tensor = model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss
    return loss


def chunked_loss(model: Any, batch: Batch) -> Tensor:
    """Return our loss, the same number: logits of learned tokens only, a chunk at a time."""
    head = loss_head(_causal_lm(model))
    assert head is not None
    targets_N = batch.labels[:, batch.unlearned :].flatten()
    positions = torch.arange(batch.unlearned - 1, batch.ids.shape[1] - 1, device=batch.ids.device)
    with head.loss_at(targets_N):
        losses_N: Tensor = model(input_ids=batch.ids, use_cache=False, logits_to_keep=positions).logits
    return losses_N.mean()


def prepare_head(loss: str, model: Any) -> None:
    """Make the model's head ready for the loss of that name. Raises ConfigError if it has no such head."""
    if loss == "chunked" and not install_loss_head(_causal_lm(model)):
        raise ConfigError("--loss chunked: this model does not return what its head gives, or has no plain head")


def _causal_lm(model: Any) -> Any:
    """Return the causal LM, unwrapped if PEFT has wrapped it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


LOSSES: dict[str, Loss] = {"hf": model_loss, "chunked": chunked_loss}
