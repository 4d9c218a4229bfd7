"""Names of dtypes, the same wherever one is given: PyTorch's, and a short one for each."""

from collections.abc import Sequence
from typing import Any

SHORT_NAMES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LONG_NAMES = {short: long for long, short in SHORT_NAMES.items()}


def long_name(given: Any) -> Any:
    """Return PyTorch's name of a dtype that has one of its names; what is none is returned as it is.

    >>> long_name("fp32"), long_name("torch.float32"), long_name("float32"), long_name("int8")
    ('float32', 'float32', 'float32', 'int8')
    """
    if not isinstance(given, str):
        return given
    name = given.removeprefix("torch.")
    name = _LONG_NAMES.get(name, name)
    return name if name in SHORT_NAMES else given


def dtype_rule(possible: Sequence[str]) -> str:
    """Return what an error says of a dtype that is not possible: which are, by both names."""
    named = [f"{name} ({SHORT_NAMES[name]})" if name in SHORT_NAMES else name for name in possible]
    return f"must be one of {', '.join(named)}"
