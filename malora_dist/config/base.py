"""What all sections of a recipe have in common: they are frozen, know every name, and check themselves."""

import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

RULE_ERROR = "section_rules"
# More than any run has of processes, experts, ranks or samples in a batch, of steps, of tokens; lists are made of some.
MOST, MOST_STEPS, MOST_TOKENS = 10**6, 10**12, 10**9
# File systems take no longer name, and Linux no longer path, in bytes.
LONGEST_NAME, LONGEST_PATH = 255, 4095


@dataclass(frozen=True)
class Rule:
    """A rule between keys of one section that is broken. The first key is the one to name; `keys` are all it reads."""

    keys: tuple[str, ...]
    text: str


class Written:
    """A number of a recipe, with the word that it is written as, which it is where a key holds text."""

    word: str

    def __str__(self) -> str:
        return self.word


class WrittenInt(Written, int):
    """A whole number, such as the revision 0123456."""


class WrittenFloat(Written, float):
    """A number, such as the revision 12e4567 or the choice 1.50."""


def _read(value: Any, as_text: bool) -> Any:
    """Replace the numbers of a recipe in a value: by their words where the key holds text, else by plain numbers."""
    if isinstance(value, WrittenInt | WrittenFloat):
        number = int(value) if isinstance(value, WrittenInt) else float(value)
        return value.word if as_text else number
    return [_read(item, as_text) for item in value] if isinstance(value, list) else value


def _holds_text(annotation: Any) -> bool:
    """Return whether the values of a key are texts and never numbers."""
    types = set(_leaf_types(annotation))
    return str in types and types.isdisjoint((int, float, bool))


def _leaf_types(annotation: Any) -> Iterator[Any]:
    inner = typing.get_args(annotation)
    for part in inner:
        yield from _leaf_types(part)
    # What Literal and Annotated hold beside types is none, and need not have a hash.
    if not inner and isinstance(annotation, type):
        yield annotation


class Section(BaseModel):
    """Base of all sections. A subclass states its own rules in `rules` and dead settings in `inapplicable_fields`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    aliases: ClassVar[Mapping[str, str]] = {}

    def rules(self) -> Iterator[Rule]:
        """Yield the rules between keys that these values break."""
        yield from ()

    def inapplicable_fields(self) -> dict[str, str]:
        """Return the keys that nothing reads under these values, with the reason. Setting one by hand is an error."""
        return {}

    @field_validator("*", mode="before")
    @classmethod
    def _words_and_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise PydanticCustomError("bool_given", "must not be true or false")
        return _read(value, _holds_text(annotation))

    @model_validator(mode="after")
    def _check_rules(self) -> "Section":
        broken = list(self.rules())
        broken += [Rule((key,), why) for key, why in self.inapplicable_fields().items() if key in self.model_fields_set]
        if broken:
            text = "; ".join(f"{rule.keys[0]}={getattr(self, rule.keys[0])!r}: {rule.text}" for rule in broken)
            raise PydanticCustomError(RULE_ERROR, "{text}", {"text": text, "broken": broken})
        return self


def usable_path(value: str | None) -> str | None:
    """Return a path that the operating system can take as it is, with `~` replaced by the home folder.

    Raises PydanticCustomError if it cannot take the path, or if that home folder is not known.
    """
    if value is None:
        return value
    value = os.path.expanduser(value)
    if value.startswith("~"):
        rule = "must start with the home folder of a user of this machine (write ./~... for a name that begins with ~)"
        raise PydanticCustomError("unknown_home", rule)
    encoded = value.encode("utf-8", "surrogatepass")
    if len(encoded) > LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        rule = f"must be a path of at most {LONGEST_PATH} bytes, with names of at most {LONGEST_NAME}"
        raise PydanticCustomError("long_path", rule)
    return value


def split_commas(value: Any) -> Any:
    """Split `a,b` into the list [a, b], so that a list can be given on the command line without brackets."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
