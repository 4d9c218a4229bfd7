"""The facts of `malora inspect` as text."""

from collections.abc import Iterator
from typing import Any

from malora_dist.cli.inspect.adapters import ALIKE, STARVED, Facts

APART = {"path", "kind", "layers", "damaged", "adapters"}
MIB = 2**20


def lines(facts: Facts, indent: str = "") -> Iterator[str]:
    """Yield what it is, its numbers, a line for each layer, and what is wrong."""
    if "path" in facts:
        yield f"{facts['path']}: {facts['kind']}"
    for name, value in facts.items():
        if name not in APART and value not in (None, [], {}):
            yield f"{indent}  {name:<16} {_text(name, value)}"
    for name, other in facts.get("adapters", {}).items():
        yield f"{indent}  {name}: {other['kind']}"
        yield from lines(other, indent + "  ")
    layers = facts.get("layers", {})
    if layers:
        yield from _layers(layers, indent)
    yield from (f"{indent}damaged: {message}" for message in facts["damaged"])


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "bytes":
        return f"{value} ({value / MIB:.1f} MiB)"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(key, item)}" for key, item in value.items() if item not in (None, ""))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _layers(layers: dict[str, Facts], indent: str) -> Iterator[str]:
    width = max(map(len, layers))
    yield f"{indent}  norms of s B_t A_t, expert by expert:"
    for layer, facts in layers.items():
        yield f"{indent}  {layer:<{width}}  {' '.join(f'{norm:8.3g}' for norm in facts['norms'])}"
    dead = [f"{layer}: {', '.join(map(str, facts['dead']))}" for layer, facts in layers.items() if facts["dead"]]
    alike = [
        f"{layer}: {t} and {u}, cosine {cosine:.4f}"
        for layer, facts in layers.items()
        for t, u, cosine in facts["duplicates"]
    ]
    yield from _list(f"dead experts (norm 0, or under {STARVED:.0%} of an even share of the tokens)", dead, indent)
    yield from _list(f"experts alike (cosine of B_t A_t at least {ALIKE})", alike, indent)


def _list(title: str, found: list[str], indent: str) -> Iterator[str]:
    yield f"{indent}  {title}: {'none' if not found else ''}".rstrip()
    yield from (f"{indent}    {line}" for line in found)
