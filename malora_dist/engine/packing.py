"""Whether a model keeps the samples of a packed row apart, asked of the model itself."""

from typing import Any

import torch
from torch import Tensor

from malora_dist.data.packed_row import PackedRow, cumulative_lengths
from malora_dist.engine.evaluation import evaluating
from malora_dist.engine.forward import cross_entropies
from malora_dist.errors import ConfigError
from malora_dist.parallel.groups import World, max_over_processes

LENGTH = 6
# Rows that differ in nothing the second sample may see give it the same bits, or nearly so.
TOLERANCE = 1e-4


def check_packing(engine: Any, world: World) -> None:
    """Raise ConfigError, on every process alike, if the base lets one sample of a packed row change another.

    Every process calls.
    """
    difference = float(max_over_processes(packing_difference(engine, world.device)))
    if not difference <= TOLERANCE:
        raise ConfigError(
            f"model.name_or_path: {type(engine.module).__name__} lets the samples of a packed row see each other (one "
            f"changes the cross-entropies of another by {difference:.1g}), so that losses and scores would be wrong; "
            "this base is not supported"
        )


def packing_difference(engine: Any, device: torch.device) -> Tensor:
    """Return by how much the cross-entropies of a sample depend on the other sample of its row, in fp64.

    Two short rows, which differ in their first sample alone, go through the base without adapters.
    """
    with evaluating(engine, use_adapter=False), torch.no_grad():
        one, other = (cross_entropies(engine, _row(engine.module, first).to(device)) for first in (1, 7))
    return (one.double() - other.double()).abs().max()


def _row(model: Any, first: int) -> PackedRow:
    """Return two samples, the first made of the numbers from `first` on, the second always the same."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = [number % vocabulary for number in (*range(first, first + LENGTH), *range(3, 3 + LENGTH))]
    place = torch.arange(2 * LENGTH)
    return PackedRow(
        input_ids=torch.tensor([ids]),
        position_ids=(place % LENGTH)[None],
        target_index=place[LENGTH:-1],
        targets=torch.tensor(ids[LENGTH + 1 :]),
        token_sample=place // LENGTH,
        token_branch=None,
        cu_seq_lens=cumulative_lengths([LENGTH, LENGTH]),
        max_length=LENGTH,
    )
