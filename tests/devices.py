"""Which device tests compute on: the CPU, unless those marked `gpu` are asked for."""

import os

import pytest
import torch

from malora_dist.launch.command import VISIBLE_DEVICES

# torch obeys the first, DeepSpeed and this package the second; the deepspeed launcher overwrites the first.
HIDDEN = {**dict.fromkeys(VISIBLE_DEVICES, ""), "DS_ACCELERATOR": "cpu"}


def hide_gpus() -> None:
    """Hide all GPUs from this process and from all that it starts; before CUDA is used for the first time."""
    os.environ.update(HIDDEN)


def kernel_device() -> str:
    """Return where tests of Triton kernels run: on the GPU if tests see one, else on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def kernel_mark() -> pytest.MarkDecorator:
    """Return the mark of tests of Triton kernels: `gpu` if tests see one; else they are run by Triton's interpreter.

    That has to be chosen before triton is first imported, by TRITON_INTERPRET=1 in the environment.
    """
    if kernel_device() == "cuda":
        return pytest.mark.gpu
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return pytest.mark.skipif(not interpreted, reason="no GPU: a second pytest runs it in Triton's interpreter")
