"""A commented recipe for a new run, generated from the sections' descriptions so that it cannot go stale."""

import json
import re
import textwrap
import typing
from typing import Any

from pydantic.fields import FieldInfo

from malora_dist.config.base import Section
from malora_dist.config.data_schema import DataConfig, TaskConfig
from malora_dist.config.names import section_of
from malora_dist.config.schema import RunConfig

WIDTH = 100
PLAIN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
PLACEHOLDER_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Written as settings; all other keys are written as comments with their defaults.
SHOWN = {
    ("model", "name_or_path"),
    ("model", "load_in_4bit"),
    ("adapter", "method"),
    ("adapter", "r"),
    ("adapter", "target_modules"),
    ("data", "max_seq_length"),
    ("parallel", "zero_stage"),
    ("train", "num_train_epochs"),
    ("train", "global_batch_size"),
    ("train", "per_device_train_batch_size"),
    ("train", "learning_rate"),
    ("output_dir",),
}
SHOWN_VALUES: dict[tuple[str, ...], Any] = {("train", "num_train_epochs"): 3}

EXAMPLE_TASKS = """\
  # Each task has its own files and is measured apart. Twelve examples; keep those you have data for.
  tasks:
    - name: boolq
      train: data/boolq/train.jsonl
      validation: data/boolq/validation.jsonl
      test: data/boolq/test.jsonl
    - name: piqa
      train: data/piqa/train.jsonl
      validation_size: 0.05          # cut from `train`, because there is no file
      test: data/piqa/test.jsonl
    - name: openbookqa
      train: data/openbookqa/train.jsonl
      test: data/openbookqa/test.jsonl
      fields: {prompt: question_stem, label: answerKey}
    - name: arc_easy
      train: data/arc_easy/*.jsonl   # a glob; a list of files works too
      test_size: 500
    - name: arc_challenge
      train: data/arc_challenge/train.jsonl
      test: data/arc_challenge/test.jsonl
      weight: 2.0                    # twice its share of the mixture
    - name: commonsense_qa
      train: data/commonsense_qa/train.parquet
      test: data/commonsense_qa/test.parquet
      scoring: letter
    - name: social_iqa
      train: data/social_iqa/train.jsonl
      test_size: 0.1
      group_by: context              # rows with the same context stay on one side of the split
    - name: hellaswag
      train: data/hellaswag/train.jsonl
      test: data/hellaswag/test.jsonl
      max_train_samples: 10000
      prompt_template: "{prompt}"
      fields: {prompt: ctx, choices: endings, label: label}
    - name: winogrande
      train: data/winogrande/train.csv
      test: data/winogrande/test.csv
    - name: medmcqa
      train: data/medmcqa/train.jsonl
      test: data/medmcqa/test.jsonl
      max_eval_samples: 1000
    - name: gsm8k
      kind: completion               # prompt and answer instead of choices
      train: data/gsm8k/train.jsonl
      test: data/gsm8k/test.jsonl
      fields: {prompt: question, response: answer}
    - name: phrasebank
      train: data/phrasebank/all.jsonl
      validation_size: 200
      test_size: 400
      prompt_template: "Sentence: {prompt}\\nSentiment:"
"""


def recipe_text(
    model: str | None = None, target_modules: tuple[str, ...] | None = None, output_dir: str | None = None
) -> str:
    """Return a recipe that loads as it stands.

    Args:
        model: The base model's id; None for a small public one.
        target_modules: The model's linears to adapt; None for the default.
        output_dir: The folder of the run; None for the default.
    """
    lines = [
        "# A run of malora_dist. A line such as '#seed: 42' holds a key's default; remove the '#' to change it.",
        "# Check it with:  malora validate THIS_FILE --world-size 8      Train with:  malora train THIS_FILE",
        "",
    ]
    for key, field in RunConfig.model_fields.items():
        section = section_of(RunConfig, key)
        if section is None:
            lines += _leaf((key,), field, output_dir if key == "output_dir" else None)
            continue
        lines += [f"{key}:  # {field.description}"]
        lines += _section_lines(section, key, {"name_or_path": model, "target_modules": target_modules})
        lines.append("")
    return "\n".join(lines) + "\n"


def _section_lines(section: type[Section], name: str, values: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for key, field in section.model_fields.items():
        if section is DataConfig and key == "tasks":
            lines += [*EXAMPLE_TASKS.splitlines(), *_task_keys(), ""]
        elif (name, key) == ("model", "name_or_path"):
            lines += _leaf((name, key), field, values[key] or PLACEHOLDER_MODEL)
        elif (name, key) == ("adapter", "target_modules"):
            lines += _leaf((name, key), field, values[key])
        else:
            lines += _leaf((name, key), field)
    return lines


def _leaf(path: tuple[str, ...], field: FieldInfo, value: Any = None) -> list[str]:
    """Return the comment and the setting of one key."""
    indent = "  " * (len(path) - 1)
    if value is None:
        value = SHOWN_VALUES.get(path, field.default)
    setting = f"{path[-1]}: {_yaml(value)}"
    return [
        *textwrap.wrap(_explained(field), WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   "),
        f"{indent}{'' if path in SHOWN else '#'}{setting}",
    ]


def _task_keys() -> list[str]:
    """Return a comment with every key of a task."""
    lines = ["  # Keys of a task:"]
    for key, field in TaskConfig.model_fields.items():
        default = "" if field.is_required() or key == "fields" else f" Default: {_yaml(field.default)}."
        text = f"{key}: {_explained(field)}{default}"
        lines += textwrap.wrap(text, WIDTH, initial_indent="  #   ", subsequent_indent="  #       ")
    return lines


def _explained(field: FieldInfo) -> str:
    choices = _choices(field)
    return f"{field.description} One of: {', '.join(choices)}." if len(choices) > 1 else str(field.description)


def _choices(field: FieldInfo) -> list[str]:
    if typing.get_origin(field.annotation) is typing.Literal:
        return [str(choice) for choice in typing.get_args(field.annotation)]
    schema: dict[str, Any] = {}
    if callable(field.json_schema_extra):
        field.json_schema_extra(schema)
    choices: list[str] = schema.get("enum", [])
    return choices


def _yaml(value: Any) -> str:
    """Write a value on one line, as JSON, which is YAML; text that needs no quotes has none."""
    if isinstance(value, str):
        return value if PLAIN_TEXT.fullmatch(value) else json.dumps(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if isinstance(value, Section):
        return "{" + ", ".join(f"{key}: {_yaml(getattr(value, key))}" for key in type(value).model_fields) + "}"
    return json.dumps(value)
