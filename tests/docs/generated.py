"""What the documentation takes from the code: the page of all recipe keys, and the table of methods.

`python -m tests.docs.generated --write` writes both; a test compares.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from malora_dist.adapters.methods import METHODS, MixtureSpec, mixture_spec
from malora_dist.adapters.parameter_counts import count_parameters, factor_shapes, match_budget
from malora_dist.config.names import section_of
from malora_dist.config.schema import AdapterConfig, RunConfig
from tests.multiprocess import ROOT

CONFIGURATION = ROOT / "docs" / "configuration.md"
METHODS_PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- made by tests/docs/generated.py -->\n", "<!-- end -->"
BLOCK = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", re.DOTALL)

INTRODUCTION = """\
# Configuration

All keys of a recipe, made from the code that checks recipes. `malora init my.yaml` writes a recipe with all of them as
comments; `malora validate my.yaml` reports every mistake of a recipe at once, each with the nearest right name.

A recipe is YAML 1.2 with one section for each heading below. Any key can be given on the command line, where it wins
over the recipe: `malora train my.yaml --adapter.r 16 --train.learning_rate=5e-4`. A key of a task is given by the
task's name: `--data.tasks.boolq.weight 2`. Names are those of transformers, PEFT and bitsandbytes where these have one;
other common spellings are accepted, and named behind the meaning.
"""

# Linears of LLaMA-2 7B that the recipes adapt, inputs and outputs: q, k, v; gate, up; down.
LLAMA_7B = [(4096, 4096)] * 3 + [(4096, 11008)] * 2 + [(11008, 4096)]
BLOCKS = 32
# Bounds from here on keep numbers computable, and tell a reader nothing.
NO_LIMIT = 10**6


def configuration_page() -> str:
    """Return docs/configuration.md."""
    parts = [INTRODUCTION, _top_keys()]
    for name in RunConfig.model_fields:
        section = section_of(RunConfig, name)
        if section is not None:
            parts += list(_section(name, section))
    return "\n".join(parts)


def _top_keys() -> str:
    sections = {name for name in RunConfig.model_fields if section_of(RunConfig, name) is not None}
    return _table(RunConfig, skipped=sections)


def _section(name: str, section: Any) -> Iterator[str]:
    """Return the heading and table of a section, then those of the sections within."""
    title = str(RunConfig.model_fields[name].description) if name in RunConfig.model_fields else str(section.__doc__)
    also = [f"`{alias}`" for alias, key in RunConfig.aliases.items() if key == name]
    accepted = f" Also accepted as the section's name: {', '.join(also)}." if also else ""
    yield f"## {name}\n\n{title}{accepted}\n"
    yield _table(section)
    for key in section.model_fields:
        inner = section_of(section, key)
        if inner is not None:
            yield from _section(f"{name}.{key}", inner)


def _table(model: Any, skipped: set[str] | None = None) -> str:
    schema = model.model_json_schema()
    aliases: dict[str, list[str]] = {}
    for alias, key in model.aliases.items():
        aliases.setdefault(key, []).append(alias)
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for key, field in schema["properties"].items():
        if key in (skipped or ()):
            continue
        default = "" if key in schema.get("required", ()) else _default(model.model_fields[key].default)
        also = f" Also: {', '.join(f'`{alias}`' for alias in aliases[key])}." if key in aliases else ""
        meaning = str(model.model_fields[key].description).replace("|", r"\|")
        lines.append(f"| `{key}` | {_values(field, schema)} | {default} | {meaning}{also} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, str) and value and value.isprintable():
        return f"`{value}`"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def _values(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return in words what a JSON schema allows."""
    if "$ref" in field:
        return "see below"
    if "anyOf" in field or "allOf" in field:
        return " or ".join(dict.fromkeys(_values(one, schema) for one in field.get("anyOf", field.get("allOf", ()))))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_values(field.get('items', {}), schema)}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    text = words.get(field.get("type", ""), str(field.get("type", "any")))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]:g}" for name, sign in bounds.items() if field.get(name, NO_LIMIT) < NO_LIMIT]
    return f"{text} {', '.join(limits)}".strip()


def methods_table() -> str:
    """Return the table of docs/methods.md: what each method has, its parameters, the keys that it ignores."""
    malora = _total(mixture_spec("malora"))
    lines = [
        "| `adapter.method` | down-projection | experts of a token | tensors | numbers trained | "
        "rank at the same number | keys without meaning |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for name, structure in METHODS.items():
        spec = mixture_spec(name)
        down = (
            "shared, then each its own"
            if structure.expert_down
            else "shared"
            if structure.shared_down
            else "each its own"
        )
        chosen = "one expert, no router" if not structure.routed else "all" if structure.dense else "`top_k`"
        equal = match_budget(name, LLAMA_7B * BLOCKS, malora).r
        lines.append(
            f"| `{name}` | {down if structure.routed else 'one'} | {chosen} | {', '.join(_tensors(spec))} | "
            f"{_total(spec):,} | {equal} | "
            f"{', '.join(f'`{key}`' for key in _without_meaning(name)) or 'none'} |"
        )
    return "\n".join(lines)


def _tensors(spec: MixtureSpec) -> list[str]:
    return [f"`{name}`" for name in factor_shapes(spec, 8, 8)]


def _total(spec: MixtureSpec) -> int:
    return BLOCKS * sum(count_parameters(spec, *size) for size in LLAMA_7B)


def _without_meaning(method: str) -> Iterator[str]:
    """Return the keys of the section `adapter` that are refused beside this method."""
    for key, field in AdapterConfig.model_fields.items():
        if key != "method":
            try:
                AdapterConfig.model_validate({"method": method, key: 1 if field.default is None else field.default})
            except ValidationError as error:
                if f"has no meaning for adapter.method={method}" in str(error):
                    yield key


def methods_page() -> str:
    """Return docs/methods.md with the table as it is now."""
    page, blocks = BLOCK.subn(lambda _: f"\n{methods_table()}\n\n", METHODS_PAGE.read_text(encoding="utf-8"))
    assert blocks == 1, f"{METHODS_PAGE} has {blocks} places for the table"
    return page


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], "python -m tests.docs.generated --write"
    CONFIGURATION.write_text(configuration_page(), encoding="utf-8")
    METHODS_PAGE.write_text(methods_page(), encoding="utf-8")
