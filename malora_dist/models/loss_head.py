"""An output head that returns cross-entropies in place of logits where it is given the targets."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.ops.choices import chunk_rows
from malora_dist.ops.linear_cross_entropy import linear_cross_entropy


class LossHead(nn.Linear):
    """A linear over the very parameters of another, under the same names: y = x W^T + bias, until `loss_at`."""

    targets_N: Tensor | None = None
    losses_N: Tensor | None = None

    @classmethod
    def around(cls, linear: nn.Linear) -> "LossHead":
        """Return a head over the parameters of a linear."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    @contextmanager
    def loss_at(self, targets_N: Tensor) -> Iterator[None]:
        """Let the head return (N,) fp32 cross-entropies of its N input rows, without whole logits, within the block."""
        self.targets_N = targets_N
        try:
            yield
        finally:
            # The losses too: a hook that failed has left them here.
            self.targets_N = self.losses_N = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run `forward` with its hooks, and return the losses of `loss_at` past the hooks.

        DeepSpeed's ZeRO-3 hook would gather the weight again before the backward of whatever leaves the module with a
        gradient, and this backward does not need it. So forward shows the hooks a detached copy.
        """
        output: Tensor = super().__call__(hidden)
        losses_N, self.losses_N = self.losses_N, None
        return output if losses_N is None else losses_N

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute logits, (..., H) -> (..., V), or inside `loss_at` the losses of N rows, (..., H) -> (N,)."""
        if self.targets_N is None:
            return super().forward(hidden)
        chunk = chunk_rows(self.out_features, hidden.device.type)
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])
        self.losses_N = linear_cross_entropy(hidden_NH, self.weight, self.bias, self.targets_N, chunk)
        return self.losses_N.detach()


def install_loss_head(model: Any) -> bool:
    """Replace a causal LM's output head by a LossHead, and return whether that could be done.

    Only where the head is a plain linear and the model returns its output untouched. Models that scale, cap or cast
    logits after the head (Gemma 2, Cohere, Granite, ...) keep the head they have. To be called before DeepSpeed puts
    its hooks on the modules.
    """
    head = model.get_output_embeddings()
    if isinstance(head, LossHead):
        return True
    names = [name for name, module in model.named_children() if module is head]
    if type(head) is not nn.Linear or not names or not _returns_what_the_head_gives(model, names[0], head):
        return False
    setattr(model, names[0], LossHead.around(head))
    return True


def loss_head(model: Any) -> LossHead | None:
    """Return the model's LossHead, if its head is one and is frozen. An adapted head is none."""
    head = model.get_output_embeddings()
    usable = isinstance(head, LossHead) and not any(parameter.requires_grad for parameter in head.parameters())
    return head if usable else None


def _returns_what_the_head_gives(model: Any, name: str, head: nn.Linear) -> bool:
    """Return whether the model's own forward returns the very tensor that its head made, unchanged.

    Its code runs on a copy whose decoder and head are stand-ins, so no weight is needed, and a change of any kind
    shows: it makes another tensor, or a new version of this one. A forward that needs more of its parts
    counts as one that changes logits.
    """
    logits = torch.zeros(1, 1, 1, dtype=head.weight.dtype)
    probe = copy.copy(model)
    decoder = _Decoder(torch.zeros(1, 2, head.in_features, dtype=head.weight.dtype))
    probe._modules = model._modules | {model.base_model_prefix: decoder, name: _Fixed(logits)}
    try:
        output = probe(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False, logits_to_keep=torch.tensor([0]))
    except Exception:
        return False
    return getattr(output, "logits", None) is logits and logits._version == 0


class _Decoder(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.hidden)


class _Fixed(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != self.output.shape[:2]:
            raise ValueError("a model that hands its head all rows, whichever are asked for")
        return self.output
