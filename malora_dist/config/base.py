"""What all sections of a recipe have in common: they are frozen, know every name, and check themselves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

RULE_ERROR = "section_rules"
# File systems take no longer name, and Linux no longer path, in bytes.
LONGEST_NAME, LONGEST_PATH = 255, 4095


@dataclass(frozen=True)
class Rule:
    """A rule between keys of one section that is broken. The first key is the one to name; `keys` are all it reads."""

    keys: tuple[str, ...]
    text: str


class Section(BaseModel):
    """Base of all sections. A subclass states its own rules in `rules` and dead settings in `inapplicable_fields`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    aliases: ClassVar[Mapping[str, str]] = {}

    def rules(self) -> Iterator[Rule]:
        """The rules between keys that these values break."""
        yield from ()

    def inapplicable_fields(self) -> dict[str, str]:
        """Keys that nothing reads under these values, with the reason. Setting one by hand is an error."""
        return {}

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("bool_given", "must not be true or false")
        return value

    @model_validator(mode="after")
    def _check_rules(self) -> "Section":
        broken = list(self.rules())
        broken += [Rule((key,), why) for key, why in self.inapplicable_fields().items() if key in self.model_fields_set]
        if broken:
            text = "; ".join(f"{rule.keys[0]}={getattr(self, rule.keys[0])!r}: {rule.text}" for rule in broken)
            raise PydanticCustomError(RULE_ERROR, "{text}", {"text": text, "broken": broken})
        return self


def usable_path(value: str | None) -> str | None:
    """The path, which the operating system can take as it is. Raises PydanticCustomError if it cannot."""
    if value is None:
        return value
    encoded = value.encode("utf-8", "surrogatepass")
    if len(encoded) > LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        rule = f"must be a path of at most {LONGEST_PATH} bytes, with names of at most {LONGEST_NAME}"
        raise PydanticCustomError("long_path", rule)
    return value


def split_commas(value: Any) -> Any:
    """`a,b` as the list [a, b], so that a list can be given on the command line without brackets."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
