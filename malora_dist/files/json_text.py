"""JSON of files that others may have written: what Python's reader takes and nobody means is refused in words."""

import json
import math
from collections import deque
from collections.abc import Iterable
from typing import Any

DEEPEST = 100


def parse_json(text: str | bytes, *, non_finite: bool = False, lenient: bool = False) -> Any:
    """Return the value of a JSON text.

    `non_finite` takes NaN and infinities, which our own measurements may hold.

    `lenient` takes them and the last of keys given twice, as the libraries do for which others' files were written.
    Raises ValueError if the text is not JSON, gives a key twice, or is nested too deep.
    """
    constant, number = (float, float) if non_finite or lenient else (_refuse_constant, _finite)
    pairs = None if lenient else _unique
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    _check_depth(value)
    return value


def key_given_twice(pairs: Iterable[tuple[str, Any]]) -> str | None:
    """Return the first key of an object that repeats one before it, None if each stands once."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = key_given_twice(pairs)
    if twice is not None:
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:80]} is too large for a number")
    return value


def _check_depth(value: Any) -> None:
    level = deque([(value, 1)])
    while level:
        found, depth = level.popleft()
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if isinstance(found, dict | list):
            inner = found.values() if isinstance(found, dict) else found
            level.extend((item, depth + 1) for item in inner if isinstance(item, dict | list))
