"""The `data` section of a recipe: the tasks, and how they are mixed."""

import re
import string
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from malora_dist.config.base import MOST_STEPS, MOST_TOKENS, Rule, Section, usable_path
from malora_dist.errors import short

MOST_CHOICES = 26
# Numbers of rows and of tokens may be weights; times sizes of tasks they stay numbers.
LEAST_WEIGHT, MOST_WEIGHT = 1e-12, 1e12
# A field of the row, or one inside of it: question.stem, answers.text.0.
FIELD = re.compile(r"[^\W\d]\w*(\.([^\W_]\w*))*")
WIDE = re.compile(r"\d{5}")
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


File = Annotated[str, Field(min_length=1), AfterValidator(usable_path)]
Files = Annotated[tuple[File, ...], BeforeValidator(_as_list), Field(min_length=1)]


def _texts(value: Any) -> Any:
    """Numbers of Python as texts; those of a recipe are as they are written there by now."""
    if isinstance(value, list | tuple):
        if any(isinstance(item, bool) for item in value):
            raise PydanticCustomError("truth_for_text", 'must be texts: write "true", "false" in quotes')
        return [str(item) if isinstance(item, int | float) else item for item in value]
    return value


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_as_list)]
Choices = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class RowFields(Section):
    """Which field of a row holds what; `a.b` is the field b inside of a."""

    prompt: str = Field("prompt", min_length=1, description="Field with the question.")
    choices: Name | tuple[Name, ...] = Field(
        "choices", description="Field with the list of answers to choose from, or a list of fields with one each."
    )
    label: str = Field(
        "label",
        min_length=1,
        description="Field with the right answer's key, text, letter, or number from first_label.",
    )
    response: str = Field("response", min_length=1, description="Field with the answer to learn, for kind completion.")

    def rules(self) -> Iterator[Rule]:
        if not isinstance(self.choices, str) and not 2 <= len(set(self.choices)) == len(self.choices) <= MOST_CHOICES:
            yield Rule(("choices",), f"must be one field, or 2 to {MOST_CHOICES} fields with a choice each")


class TaskConfig(Section):
    """One task: its files, how to read a row, and its part in the mixture."""

    aliases: ClassVar = {
        "task": "name",
        "task_name": "name",
        "dataset_name": "name",
        "train_file": "train",
        "train_files": "train",
        "path": "train",
        "validation_file": "validation",
        "test_file": "test",
        "template": "prompt_template",
        "max_samples": "max_train_samples",
    }

    name: str = Field(description="Short name, used in metric names and file names: letters, digits, '.', '_' and '-'.")
    train: Files = Field(
        description="Training rows: a file, a glob or a list of them (.jsonl, .json, .csv, .parquet). "
        "A relative path starts at the folder the command runs in."
    )
    validation: Files | None = Field(
        None, description="Rows for validation. Give these or validation_size, or neither."
    )
    test: Files | None = Field(None, description="Rows for the final test. Give these or test_size, or neither.")
    validation_size: int | float | None = Field(
        None, description="Number of rows, or a fraction below 1, cut from `train` for validation."
    )
    test_size: int | float | None = Field(
        None, description="Number of rows, or a fraction below 1, cut from `train` for the final test."
    )
    group_by: str | None = Field(
        None, description="Field of a row; rows that share its value never fall on two sides of a split."
    )
    kind: Literal["multiple_choice", "completion"] | None = Field(
        None, description="multiple_choice or completion; null looks at the rows."
    )
    prompt_template: str = Field(
        "Question: {prompt}\nAnswer:", description="Text of the prompt around the row's prompt."
    )
    response_template: str = Field(" {response}", description="Text of the answer, which is what the model learns.")
    fields: RowFields = Field(
        RowFields(),
        description="Names of the row's fields: prompt, choices (one, or a list of fields with a choice each), label, "
        "response. a.b is the field b inside of a.",
    )
    optional_fields: Names = Field((), description="Fields of the templates that a row may lack or leave empty.")
    choices: Choices | None = Field(
        None, description="The answers to choose from, where the rows hold none and all have the same."
    )
    first_label: Literal[0, 1] = Field(0, description="The number of the first choice, where labels are numbers.")
    weight: float = Field(
        1.0, ge=LEAST_WEIGHT, le=MOST_WEIGHT, description="Multiplies this task's share of the mixture."
    )
    max_train_samples: int | None = Field(None, ge=1, le=MOST_STEPS, description="Use at most this many training rows.")
    max_eval_samples: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="Use at most this many rows of each evaluation split."
    )
    scoring: Literal["text", "letter"] = Field(
        "text", description="Evaluate a choice by the likelihood of its text, or of its letter (A, B, ...)."
    )

    def rules(self) -> Iterator[Rule]:
        if not TASK_NAME.fullmatch(self.name):
            yield Rule(("name",), "must be letters, digits, '.', '_' or '-', start with a letter or digit, at most 64")
        yield from self._size_rules()
        yield from self._choice_rules()
        yield from _template_rules("prompt_template", self.prompt_template, "prompt")
        yield from _template_rules("response_template", self.response_template, "response")
        yield from self._optional_field_rules()
        if self.scoring == "letter" and self.kind == "completion":
            yield Rule(("scoring", "kind"), "letters need choices; kind is completion")

    def _optional_field_rules(self) -> Iterator[Rule]:
        try:
            named = {*template_names(self.prompt_template), *template_names(self.response_template)}
        except ValueError:
            return
        for name in self.optional_fields:
            if name not in named - {"prompt", "response"}:
                keys = ("optional_fields", "prompt_template", "response_template")
                yield Rule(keys, f"{short(name)} stands in no template beside prompt and response")

    def _choice_rules(self) -> Iterator[Rule]:
        texts = [choice.strip() for choice in self.choices or ()]
        if self.choices is not None and (not 2 <= len(texts) <= MOST_CHOICES or "" in texts):
            yield Rule(("choices",), f"must be 2 to {MOST_CHOICES} texts, none of them empty")
        if len(set(texts)) < len(texts):
            yield Rule(("choices",), "must not hold a choice twice")
        if self.choices is not None and self.kind == "completion":
            yield Rule(("choices", "kind"), "have no meaning for kind=completion")
        if self.choices is not None and self.fields.choices != "choices":
            yield Rule(("choices", "fields"), f"give either these or fields.choices={self.fields.choices!r}, not both")

    def _size_rules(self) -> Iterator[Rule]:
        for split in ("validation", "test"):
            size = getattr(self, f"{split}_size")
            if size is None:
                continue
            if getattr(self, split) is not None:
                yield Rule((f"{split}_size", split), f"give either {split} or {split}_size, not both")
            if size <= 0 or (size >= 1 and size != int(size)):
                yield Rule((f"{split}_size",), "must be a whole number of rows, or a fraction above 0 and below 1")
        fractions = [size for size in (self.validation_size, self.test_size) if size is not None and 0 < size < 1]
        if sum(fractions) >= 1:
            yield Rule(("validation_size", "test_size"), f"with test_size={self.test_size} leaves no row to train on")


def template_names(template: str) -> list[str]:
    """The names of fields in a template, in order. Raises ValueError if it cannot be filled with texts."""
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not FIELD.fullmatch(name):
            raise ValueError(f"{short(name)} must be the plain name of a field")
        if conversion not in (None, "r", "s", "a"):
            raise ValueError(f"{{{name}!{conversion}}}: the conversions are !r, !s and !a")
        if WIDE.search(spec or ""):
            raise ValueError(f"{short(spec)} has a number of more than four digits")
        format("", spec or "")
        names.append(name)
    return names


def _template_rules(key: str, template: str, needed: str) -> Iterator[Rule]:
    try:
        names = template_names(template)
    except ValueError as error:
        yield Rule((key,), f"is not a template: {error} (write {{{{ for a brace)")
        return
    if needed not in names:
        yield Rule((key,), f"must contain {{{needed}}}")


class DataConfig(Section):
    """All tasks of the run and the mixture they are drawn from."""

    aliases: ClassVar = {
        "datasets": "tasks",
        "max_length": "max_seq_length",
        "max_seq_len": "max_seq_length",
        "seq_length": "max_seq_length",
        "sequence_len": "max_seq_length",
        "cutoff_len": "max_seq_length",
        "mixing": "mixture",
        "mix_strategy": "mixture",
    }

    tasks: tuple[TaskConfig, ...] = Field(description="The tasks to learn together, one entry each.")
    max_seq_length: int = Field(
        1024, ge=8, le=MOST_TOKENS, description="Longest sample in tokens; longer prompts lose their start."
    )
    mixture: Literal["proportional", "uniform", "temperature"] = Field(
        "proportional", description="A task's share: by its rows n, equal for all, or by n^(1/temperature)."
    )
    temperature: float = Field(2.0, ge=1, description="For mixture temperature: 1 is proportional, large is uniform.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="A row that cannot be used stops the run, or is skipped and counted."
    )
    near_duplicate_threshold: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="Training rows at least this similar to an evaluation row are removed and counted; null: off.",
    )
    split_seed: int = Field(0, ge=0, description="Seed of the splits cut from `train`.")
    cache_dir: Annotated[str | None, AfterValidator(usable_path)] = Field(
        None, description="Folder for prepared data; null: $MALORA_CACHE, or .cache/malora_dist in the home folder."
    )

    def rules(self) -> Iterator[Rule]:
        if not self.tasks:
            yield Rule(("tasks",), "must hold at least one task")
        times = Counter(task.name for task in self.tasks)
        for name in sorted(name for name in times if times[name] > 1):
            yield Rule(("tasks",), f"the task name {name!r} is used {times[name]} times; names must be unique")

    def inapplicable_fields(self) -> dict[str, str]:
        if self.mixture == "temperature":
            return {}
        return {"temperature": f"has no meaning for data.mixture={self.mixture}"}
