"""Finding numbers that are not finite, and the layer they come from, before the optimizer uses them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.data.loader import MicroBatch
from malora_dist.distributed.process_groups import max_over_processes
from malora_dist.errors import NonFiniteError
from malora_dist.evaluation.packed_forward import cross_entropies, set_token_keys

# Gradients that ZeRO could free are kept until their norms are taken, up to this size.
HELD_BYTES = 2**25


class NonFiniteCheck:
    """Takes the norm of every trained adapter gradient of this process, without waiting for the device.

    `norms_P` is the largest norm of each parameter since `clear`; an infinity or NaN of any micro-batch stays in it.
    Norms are taken of many gradients at a time: a micro-batch starts a handful of kernels, however many layers there
    are. Call `collect` after each backward. `reached` is called with the name of each layer that backward reaches.
    """

    def __init__(self, model: nn.Module, device: torch.device, reached: Callable[[str], None]) -> None:
        self.reached = reached
        self.layers: list[str] = []
        for name, layer in mixture_layers(model):
            for _, parameter in layer.factors():
                if parameter.requires_grad:
                    parameter.register_hook(self._hook(len(self.layers), name))
                    self.layers.append(name)
        self.norms_P = torch.zeros(len(self.layers), device=device)
        self._zero = torch.zeros((), device=device)
        self._held: list[tuple[int, Tensor]] = []
        self._held_bytes = 0
        self._norms: dict[int, Tensor] = {}

    def _hook(self, index: int, name: str) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            self.reached(name)
            # An alias: autograd copies a gradient that anybody else holds.
            self._held.append((index, gradient.detach()))
            self._held_bytes += gradient.nbytes
            if self._held_bytes >= HELD_BYTES:
                self._measure()

        return record

    def _measure(self) -> None:
        """Take the norms of the gradients that are held, and release them."""
        if self._held:
            norms = torch._foreach_norm([gradient for _, gradient in self._held])
            for (index, _), norm in zip(self._held, norms, strict=True):
                earlier = self._norms.get(index)
                self._norms[index] = norm if earlier is None else torch.maximum(earlier, norm)
        self._held, self._held_bytes = [], 0

    def collect(self) -> None:
        """Add the gradients of the backward that has ended."""
        self._measure()
        if self.layers:
            norms_P = torch.stack([self._norms.get(index, self._zero) for index in range(len(self.layers))])
            self.norms_P = torch.maximum(self.norms_P, norms_P)
        self._norms = {}

    def clear(self) -> None:
        """Forget all gradients, those of an unfinished micro-batch too."""
        self._held, self._held_bytes, self._norms = [], 0, {}
        self.norms_P = torch.zeros_like(self.norms_P)

    def first_bad_layer(self, norms_P: Sequence[float]) -> str | None:
        """Return the layer nearest the loss among those with a norm that is not finite: backward reached it first."""
        bad = [layer for layer, norm in zip(self.layers, norms_P, strict=True) if not math.isfinite(norm)]
        return bad[-1] if bad else None


def first_nonfinite_layer(
    engine: Any, batches: Sequence[MicroBatch], device: torch.device, *, seed: int, step: int
) -> str:
    """Run the step's micro-batches forward again, with the same dropout, and find the first layer that is not finite.

    Every process must call it.

    Args:
        engine: of the step.
        batches: this process's micro-batches.
        device: of the engine.
        seed, step: those of the dropout masks.

    Returns:
        The name of the adapted layer, or `the loss` if the outputs of all layers are finite.
    """
    layers = list(mixture_layers(engine.module))
    first = torch.tensor([-len(layers)], dtype=torch.int64, device=device)

    def watch(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if not torch.isfinite(output).all():
                first.clamp_(min=-index)

        return hook

    handles = [layer.register_forward_hook(watch(index)) for index, (_, layer) in enumerate(layers)]
    try:
        with torch.no_grad():
            for batch in batches:
                set_token_keys(engine.module, batch, seed, step)
                cross_entropies(engine, batch)
    finally:
        for handle in handles:
            handle.remove()
    index = -int(max_over_processes(first))
    return layers[index][0] if index < len(layers) else "the loss"


def stop_if_nonfinite(
    step: int, sums: Sequence[float], task_sums: Sequence[float], task_names: Sequence[str], where: Callable[[], str]
) -> None:
    """Raise NonFiniteError if a summed loss is not finite; the same on every process.

    Args:
        step: the number of the step, for the message.
        sums: losses over all processes.
        task_sums: the same by task.
        task_names: names of the tasks.
        where: finds the layer, for the message.
    """
    if all(map(math.isfinite, [*sums, *task_sums])):
        return
    bad = [name for name, total in zip(task_names, task_sums, strict=True) if not math.isfinite(total)]
    tasks = ", ".join(bad) or "no single task"
    raise NonFiniteError(f"the loss is not finite at step {step}: task {tasks}, first in layer {where()}")
