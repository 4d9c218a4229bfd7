"""What activation checkpointing does to a forward: which pass it is, and the form of it that loses the balance loss."""

import sys
from types import FrameType

import torch

from malora_dist.errors import TrainingError

# What runs the forward of every autograd function.
APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def is_recomputing() -> bool:
    """Return whether this forward runs inside a backward."""
    return torch._C._current_graph_task_id() != -1


def refuse_reentrant(training: bool) -> None:
    """Raise TrainingError in a forward of reentrant checkpointing, which runs without a graph.

    What a router says there can have no gradient, and its balance loss would train nothing. Every such checkpointing,
    whoever wrote it, is an autograd function around layers; so are tiled and reversible ones.
    """
    if not training or torch.is_grad_enabled():
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is APPLY:
            raise TrainingError(
                "reentrant activation checkpointing (use_reentrant=True), or another autograd function around layers, "
                "runs them without a graph, so that routers would get no gradient of the balance loss: choose "
                "use_reentrant=False, in transformers "
                'model.gradient_checkpointing_enable({"use_reentrant": False}) or '
                'TrainingArguments(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
        frame = frame.f_back
