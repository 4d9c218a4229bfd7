"""What a target of adapters says of names alone; needs no torch."""

import re

ALL_LINEAR = "all-linear"
# Names of modules have none of these.
_NO_NAME = re.compile(r"[^\w.\-]")
LONGEST_PATTERN = 2000


def is_pattern(target: str) -> bool:
    """Return whether a target is a regular expression for whole names rather than the end of a name.

    >>> [is_pattern(target) for target in ("q_proj", "mlp.up_proj", "all-linear", r".*mlp.*")]
    [False, False, False, True]
    """
    return target != ALL_LINEAR and _NO_NAME.search(target) is not None


def name_matches(target: str, name: str) -> bool:
    """Return whether a target means the module of this whole name, if that is a linear.

    Raises ValueError as `compiled`.

    >>> [name_matches(target, "layers.0.mlp.up_proj") for target in ("up_proj", "proj", r".*\\.up_proj", "all-linear")]
    [True, False, True, True]
    """
    if target == ALL_LINEAR:
        return True
    if is_pattern(target):
        return compiled(target).fullmatch(name) is not None
    return name == target or name.endswith(f".{target}")


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern that anybody may have written. Raises ValueError, saying why, if it is none.

    >>> compiled("a(")
    Traceback (most recent call last):
    ...
    ValueError: missing ), unterminated subpattern at position 1
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"it has {len(pattern)} characters, more than {LONGEST_PATTERN}")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None
