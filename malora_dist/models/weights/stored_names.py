"""Under which names a checkpoint holds the tensors of a model, by the renaming and conversion of transformers."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Conversion:
    """How transformers makes a tensor of others: projections cut out of one, experts stacked into one.

    parts: (pattern of the converter, stored name). first: what the converter calls the first tensor that it makes.
    """

    converter: Any
    parts: tuple[tuple[str, str], ...]
    first: str
    target: str
    config: Any

    def __call__(self, read: Callable[[str], Tensor]) -> Tensor:
        """Build the tensor from the parts that `read` reads. Raises as transformers does for parts that do not fit."""
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.parts:
            converter.add_tensor(self.first, name, pattern, read(name))
        made = converter.convert(self.first, config=self.config)[self.target]
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor


@dataclass(frozen=True)
class StoredAs:
    """The names of what a tensor is read from: of one stored tensor, or of the parts that a conversion takes."""

    names: tuple[str, ...]
    conversion: Conversion | None = None


def stored_names(model: "PreTrainedModel", held: Iterable[str]) -> dict[str, StoredAs]:
    """Return where each tensor of an empty model is, if names in `held` stand for it; others are left out."""
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    state = model.state_dict()
    found: dict[str, StoredAs] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    rename, converters = _renaming(model, state)
    for name in sorted(held, key=dot_natural_key):
        renamed, pattern = rename(name)
        if renamed in state and pattern is not None:
            parts.setdefault(renamed, []).append((pattern, name))
        elif renamed in state:
            # Of several names for one tensor transformers takes the first.
            found.setdefault(renamed, StoredAs((name,)))
    for first, named in parts.items():
        converter: WeightConverter = converters[named[0][0]]
        for pattern in converter.target_patterns:
            target = first.replace(converter.target_patterns[0], pattern, 1)
            conversion = Conversion(converter, tuple(named), first, target, model.config)
            found.setdefault(target, StoredAs(tuple(name for _, name in named), conversion))
    return found


def _renaming(
    model: "PreTrainedModel", state: dict[str, Tensor]
) -> tuple[Callable[[str], tuple[str, str | None]], dict[str, Any]]:
    """Return a function that renames stored names, and the converters by pattern.

    The function takes a stored name to the model's name and the pattern of its converter, None without one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix

    def rename(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        return renamed, pattern

    return rename, {pattern: converter for converter in converters for pattern in converter.source_patterns}
