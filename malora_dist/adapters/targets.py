"""Which linears of a model are meant by `target_modules`: ends of names, patterns, or all of them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from malora_dist.adapters.methods import MixtureSpec
from malora_dist.adapters.near_names import near_names
from malora_dist.adapters.target_names import ALL_LINEAR, EVERYTHING, Narrowing, is_pattern, name_matches
from malora_dist.adapters.text_linears import idle_linears
from malora_dist.errors import ConfigError, short
from malora_dist.models.linears import linear_sizes, output_head
from malora_dist.ops.partitioned import whole_shape

# Before the names of a recipe's keys.
RECIPE = "adapter."


def find_targets(
    model: nn.Module, targets: Sequence[str], spec: MixtureSpec, narrowing: Narrowing = EVERYTHING
) -> dict[str, list[str]]:
    """Find the linears that each target means, and that `narrowing` keeps.

    A target is the end of a module's name from a dot on, a regular expression that matches whole names, or
    `all-linear`: every linear but the output head. All of it is PEFT's meaning, but for linears that text never trains,
    such as those for pictures: they are not meant.

    Returns: names of linears by target, in the order of the model.
    Raises: ConfigError with all that is wrong at once, and with the linears that the model has.
    """
    needed = ALL_LINEAR in targets or _has_other_parts(model)
    found, wrong = _look(model, targets, spec, (idle_linears(model) if needed else None) or (), narrowing, "")
    _refuse(model, wrong, "")
    return found


def check_targets(model: nn.Module, targets: Sequence[str], spec: MixtureSpec) -> list[str]:
    """Raise ConfigError as `find_targets` does, naming a recipe's keys, and for what a training run cannot adapt.

    Returns: notes of what is not known.

    It cannot adapt linears that text never trains, and the output head: a run computes logits of learned tokens alone,
    so the head sees other tokens than the routers of all other layers.
    """
    idle = idle_linears(model)
    found, wrong = _look(model, targets, spec, idle or (), EVERYTHING, RECIPE)
    _refuse(model, [*wrong, *_untrainable(model, found, idle or ())], RECIPE)
    if idle is not None:
        return []
    return [
        f"it is not known before a run which linear layers of {type(model).__name__} process text; if a target is not "
        "one of them, the first step fails"
    ]


def _look(
    model: nn.Module,
    targets: Sequence[str],
    spec: MixtureSpec,
    idle: Collection[str],
    narrowing: Narrowing,
    section: str,
) -> tuple[dict[str, list[str]], list[str]]:
    """Return what each target means, and what is wrong with it. `section`: as in `_refuse`."""
    if not targets:
        return {}, ["must not be empty"]
    broken = list(_broken(targets))
    if broken:
        return {}, broken
    linears = linears_of(model)
    found = {target: _matches(model, target, linears, idle) for target in targets}
    if _has_other_parts(model):
        found = {target: [name for name in names if name not in idle] for target, names in found.items()}
    wrong = [text for target, names in found.items() for text in _unmatched(target, names, linears)]
    try:
        kept = {target: [name for name in names if narrowing.keeps(name)] for target, names in found.items()}
    except ValueError as error:
        raise ConfigError(f"{narrowing}: {error}") from error
    wrong += [text for target, names in kept.items() for text in _not_linear(model, target, names, linears)]
    if not any(kept.values()) and not wrong:
        wrong.append(f"no module is left after {narrowing}")
    chosen = {name: linears[name] for names in kept.values() for name in names if name in linears}
    return kept, [*wrong, *_overlaps(kept), *_too_narrow(chosen, spec, section)]


def _refuse(model: nn.Module, wrong: Sequence[str], section: str) -> None:
    """Raise ConfigError for what is wrong. `section`: stands before the names of arguments that are a recipe's keys."""
    if wrong:
        fused = next(iter(fused_experts(model)), None)
        kept = "" if fused is None else f"; experts that are stored as one parameter ({fused}) are not linear layers"
        text = "; ".join(wrong)
        end = "" if text.endswith("?") else "."
        raise ConfigError(
            f"{section}target_modules: {text}{end} The model's linears are {described(linears_of(model))}{kept}"
        )


def _untrainable(model: nn.Module, found: Mapping[str, Sequence[str]], idle: Collection[str]) -> Iterable[str]:
    head = output_head(model)
    heads = {name for name, module in model.named_modules() if module is head}
    for target, names in found.items():
        untrained = [name for name in names if name in idle]
        if untrained:
            yield (
                f"{target!r} matches {untrained[0]} and {len(untrained) - 1} more that text gives no gradient token by "
                "token: they are not called, only choose, or read something else; name the others by more of their "
                "names, or by a pattern"
            )
        for name in heads & set(names):
            yield (
                f"{target!r} matches {name}, the output head, which computes the logits of learned tokens alone and is "
                f"not adapted; {ALL_LINEAR} means every other linear"
            )


def linears_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of every linear, by its name."""
    sizes = ((name, linear_sizes(module)) for name, module in model.named_modules())
    return {name: size for name, size in sizes if size is not None}


def fused_experts(model: nn.Module) -> list[str]:
    """Return the names of parameters each of which holds the matrices of many experts, in a model without adapters.

    They are not linears.
    """
    return [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        if "expert" in f"{name}.{type(module).__name__}".lower() and linear_sizes(module) is None
        for leaf, parameter in module.named_parameters(recurse=False)
        if len(whole_shape(parameter)) >= 2 and "bias" not in leaf
    ]


def all_linear(model: nn.Module) -> list[str]:
    """Return the names of all linears but the output head and those that text never trains."""
    return _all_linear(model, idle_linears(model) or ())


def _all_linear(model: nn.Module, idle: Collection[str]) -> list[str]:
    head = output_head(model)
    return [name for name in linears_of(model) if name not in idle and model.get_submodule(name) is not head]


def _has_other_parts(model: nn.Module) -> bool:
    """Return whether this is a model of pictures or sounds beside text."""
    config: Any = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and config.get_text_config() is not config


def plain_names(model: nn.Module, found: Mapping[str, Sequence[str]], narrowed: bool = False) -> tuple[str, ...]:
    """Return the targets as ends of names alone: as given, the last parts of what was found, or else whole names.

    `narrowed`: `found` may be less than what the targets match.
    """
    if not narrowed and not any(target == ALL_LINEAR or is_pattern(target) for target in found):
        return tuple(found)
    chosen = [name for names in found.values() for name in names]
    leaves = tuple(dict.fromkeys(name.rpartition(".")[2] for name in chosen))
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in set(chosen)}
    return leaves if others.isdisjoint(leaves) else tuple(chosen)


def described(linears: Mapping[str, tuple[int, int]]) -> str:
    """Describe linears by the last parts of their names with their sizes, each once.

    >>> described({"h.0.fc1": (8, 32), "h.0.c_proj": (8, 8), "h.1.fc1": (8, 32), "h.1.c_proj": (32, 8)})
    'c_proj (8 -> 8, 32 -> 8), fc1 (8 -> 32)'
    """
    sizes: dict[str, dict[str, None]] = {}
    for name, (inputs, outputs) in linears.items():
        sizes.setdefault(leaf_of(name), {})[f"{inputs} -> {outputs}"] = None
    return ", ".join(f"{leaf} ({', '.join(kinds)})" for leaf, kinds in sorted(sizes.items())) or "none"


def leaf_of(name: str) -> str:
    """Return the last part of a name, with the one before it where that is a number."""
    rest, _, leaf = name.rpartition(".")
    return f"{rest.rpartition('.')[2]}.{leaf}" if leaf.isdigit() else leaf


def _matches(model: nn.Module, target: str, linears: Mapping[str, object], idle: Collection[str]) -> list[str]:
    if target == ALL_LINEAR:
        return _all_linear(model, idle)
    if is_pattern(target):
        return [name for name in linears if name_matches(target, name)]
    return [name for name, _ in model.named_modules() if name and name_matches(target, name)]


def _broken(targets: Sequence[str]) -> Iterable[str]:
    for target in targets:
        try:
            name_matches(target, "")
        except ValueError as error:
            yield f"{short(target)} is not a valid regular expression: {error}"


def _unmatched(target: str, names: Sequence[str], linears: Mapping[str, object]) -> Iterable[str]:
    if not names:
        near = [] if is_pattern(target) or target == ALL_LINEAR else near_names(target, map(leaf_of, linears))
        hint = f", did you mean {' or '.join(near)}?" if near else ""
        yield f"{target!r} matches no {'linear' if is_pattern(target) else 'module'} of the model{hint}"


def _not_linear(model: nn.Module, target: str, names: Sequence[str], linears: Mapping[str, object]) -> Iterable[str]:
    wrong = [name for name in names if name not in linears]
    if wrong:
        kind = type(model.get_submodule(wrong[0]))
        yield f"{target!r} matches {wrong[0]} ({kind.__name__}), which is not a linear layer"


def _overlaps(found: Mapping[str, Sequence[str]]) -> Iterable[str]:
    pairs: dict[tuple[str, str], str] = {}
    target_of: dict[str, str] = {}
    for target, names in found.items():
        for name in names:
            first = target_of.setdefault(name, target)
            if first != target:
                pairs.setdefault((first, target), name)
    return [f"{first!r} and {second!r} both match {name}" for (first, second), name in pairs.items()]


def _too_narrow(chosen: Mapping[str, tuple[int, int]], spec: MixtureSpec, section: str) -> Iterable[str]:
    """Yield an error if S_A has more rows than the layer has inputs, as its rows are orthogonal."""
    ranks = {name: spec.of_layer(name).shared_r or 0 for name in chosen}
    narrow = {name: inputs for name, (inputs, _) in chosen.items() if ranks[name] > inputs}
    if narrow:
        name, inputs = min(narrow.items(), key=lambda entry: entry[1])
        yield (
            f"{section}shared_r={ranks[name]} must be at most the {inputs} inputs of {name}: S_A has that many "
            "orthogonal rows"
        )
