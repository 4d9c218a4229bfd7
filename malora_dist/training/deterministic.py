"""Deterministic algorithms: the same bits each time, also on GPUs, where PyTorch's fastest sums have no fixed order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from malora_dist.errors import TrainingError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# PyTorch's message for an operation without a deterministic implementation.
NO_FORM = " does not have a deterministic implementation"


def use_deterministic_algorithms() -> None:
    """Use deterministic algorithms only, from now on. To be called before anything is computed on a GPU.

    A CUBLAS_WORKSPACE_CONFIG of the user's is kept; PyTorch refuses values that are not deterministic.
    """
    os.environ.setdefault(CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True)
    # PyTorch would also write to every new tensor, in case somebody reads it before it is filled.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def explained() -> Iterator[None]:
    """Replace PyTorch's error about an operation that has no deterministic form by one that names the setting."""
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(NO_FORM)
        if not found:
            raise
        raise TrainingError(
            f"train.deterministic=true: {operation.split()[-1]} has no deterministic form on this device; set "
            "train.deterministic: false, or, if attention or the experts use it, another model.attn_implementation or "
            "adapter.computation"
        ) from error
