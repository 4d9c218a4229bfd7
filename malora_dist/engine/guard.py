"""Finding out that, and where, a number stopped being finite, before the optimizer spreads it into every weight."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.data.loader import MicroBatch
from malora_dist.engine.forward import cross_entropies, set_token_keys
from malora_dist.errors import NonFiniteError
from malora_dist.nn.inject import mixture_layers
from malora_dist.parallel.groups import max_over_processes


class GradientGuard:
    """Collects, without synchronising, which layers got a non-finite adapter gradient since the last `clear`.

    Calls `reached` with the name of each layer that backward comes to.
    """

    def __init__(self, model: nn.Module, device: torch.device, reached: Callable[[str], None]) -> None:
        layers = list(mixture_layers(model))
        self.reached = reached
        self.names = [name for name, _ in layers]
        self.flags_L = torch.zeros(len(layers), dtype=torch.float64, device=device)
        for index, (_, layer) in enumerate(layers):
            for _, parameter in layer.factors():
                if parameter.requires_grad:
                    parameter.register_hook(self._hook(index))

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def record(gradient: Tensor) -> None:
            # 0 x inf and 0 x nan are nan: one reduction, no comparison, no host synchronisation.
            self.reached(self.names[index])
            self.flags_L[index] += gradient.sum().double() * 0

        return record

    def clear(self) -> None:
        self.flags_L.zero_()

    def culprit(self, flags_L: Tensor) -> str | None:
        """The layer nearest the loss among those with a bad gradient, where backward met it first."""
        bad = (~torch.isfinite(flags_L)).nonzero()
        return self.names[int(bad[-1])] if len(bad) else None


def first_nonfinite_layer(
    engine: Any, batches: Sequence[MicroBatch], device: torch.device, *, seed: int, step: int
) -> str:
    """Run the step's micro-batches forward again, as they were, and name the first adapted layer that is not finite.

    Every process must call it. Falls back to `the loss` if all layers are finite.
    """
    layers = list(mixture_layers(engine.module))
    first = torch.tensor([-len(layers)], dtype=torch.int64, device=device)

    def watch(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if not torch.isfinite(output).all():
                first.clamp_(min=-index)

        return hook

    handles = [layer.register_forward_hook(watch(index)) for index, (_, layer) in enumerate(layers)]
    with torch.no_grad():
        for batch in batches:
            set_token_keys(engine.module, batch, seed, step)
            cross_entropies(engine, batch)
    for handle in handles:
        handle.remove()
    index = -int(max_over_processes(first))
    return layers[index][0] if index < len(layers) else "the loss"


def stop_if_nonfinite(
    step: int, sums: Tensor, task_sums: Tensor, task_names: Sequence[str], where: Callable[[], str]
) -> None:
    """Raise NonFiniteError naming step, task and layer if a summed loss is not finite; the same on every process."""
    if bool(torch.isfinite(sums).all() and torch.isfinite(task_sums).all()):
        return
    bad = [name for name, finite in zip(task_names, torch.isfinite(task_sums).tolist(), strict=True) if not finite]
    tasks = ", ".join(bad) or "no single task"
    raise NonFiniteError(f"the loss is not finite at step {step}: task {tasks}, first in layer {where()}")
