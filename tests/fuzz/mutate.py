"""Values and files that are almost right: what a seed draws, it draws always."""

import json
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

# What people and programs put where something else belongs.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e-4, 1e300, -1e300, 2**31, 2**63, 10**40, "", " ", "0", "1", "true",
    "no", "auto", "null", "nan", "inf", "1e400", "5e-4", "2024-13-45", "../..", "/", "~", "-", "--x", "a b", "a\nb",
    "$(x)", "%s", "{x}", "{", "<b>", "[/b]", "ä", "世", "\u2028", "x" * 3000, ".".join("x" * 2000), [], [[]], {},
    ".*(", "a{99999999999999999999}", "(" * 900 + ")" * 900, {".*(": 3}, {"a{99999999999999999999}": 3},
    {"": 0}, [None], ["a", 1], {"a": {"b": []}}, ["x"] * 50,
)  # fmt: skip
# What no JSON of ours may hold, as it may stand in a file.
LETTERS = "{}[]:,\"'\\#&*!|>%@`-?~\t\n\0\x07\x7f\x85\ufeff"
BROKEN = (
    "NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, '"\\ud83d"', '"\\u0000"', "01", "'x'", "",
)  # fmt: skip


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in nested lists and mappings."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*at, key)
            yield from places(item, (*at, key))
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield (*at, index)
            yield from places(item, (*at, index))


def mutated(draw: Random, value: Any) -> Any:
    """A copy with one to three changes: a value, a key, something more, something less, something moved."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2, 3))):
        known = list(places(copy))
        if not known:
            return copy
        at = draw.choice(known)
        inner = copy
        for part in at[:-1]:
            inner = inner[part]
        _change(draw, inner, at[-1])
    return copy


def _change(draw: Random, inner: Any, last: str | int) -> None:
    kind = draw.choice(("set", "set", "set", "drop", "rename", "copy", "wrap"))
    if kind == "drop":
        del inner[last]
    elif kind == "wrap":
        inner[last] = draw.choice(([inner[last]], {"a": inner[last]}, str(inner[last])))
    elif kind in ("rename", "copy") and isinstance(inner, dict):
        value = inner[last] if kind == "copy" else inner.pop(last)
        inner[draw.choice((str(last) + "x", str(last).upper(), str(last)[:-1], "a.b", "", "0"))] = value
    else:
        inner[last] = draw.choice(ODD)


def broken_text(draw: Random, text: str) -> str:
    """The text with some letters gone, doubled, swapped or replaced, or with a piece that is no value."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice((0, 1, 1, 3, 20)))
        piece = draw.choice((
            "", text[start:end] * 2, text[start:end][::-1], draw.choice(LETTERS),
            draw.choice(BROKEN), str(draw.choice(ODD)),
        ))  # fmt: skip
        text = text[:start] + piece + text[end:]
    return text


def broken_bytes(draw: Random, content: bytes) -> bytes:
    """The bytes with some flipped, cut away, doubled or put in."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice((0, 1, 1, 8, 200)))
        piece = draw.choice((b"", bytes([draw.randrange(256)]), content[start:end] * 2, b"\xff" * 8, bytes(8)))
        content = content[:start] + piece + content[end:]
    return content


def safetensors_file(header: Any, data: bytes, text: str | None = None) -> bytes:
    """A safetensors file of a header, given as a value or as its text, and data that need not fit."""
    encoded = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + data
