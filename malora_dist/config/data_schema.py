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
    """Turn numbers given in Python into texts; those of a recipe are already text, as they are written there."""
    if isinstance(value, list | tuple):
        if any(isinstance(item, bool) for item in value):
            raise PydanticCustomError("truth_for_text", "must be strings: put true and false in quotes")
        return [str(item) if isinstance(item, int | float) else item for item in value]
    return value


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_as_list)]
Choices = Annotated[tuple[str, ...], BeforeValidator(_texts)]


class RowFields(Section):
    """Which field of a row holds what; `a.b` is the field b inside of a."""

    prompt: str = Field("prompt", min_length=1, description="Row field that holds the question.")
    choices: Name | tuple[Name, ...] = Field(
        "choices",
        description="Row field that holds the list of answer choices, or a list of fields that hold one choice each.",
    )
    label: str = Field(
        "label",
        min_length=1,
        description="Row field that holds the correct choice: its key, text, letter, or number counted from "
        "first_label.",
    )
    response: str = Field(
        "response", min_length=1, description="Row field that holds the target text of a completion row."
    )

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
        description="Training files: a path, a glob, or a list of them (.jsonl, .json, .csv, .parquet). Relative paths "
        "start at the working directory."
    )
    validation: Files | None = Field(None, description="Validation files. Set this or validation_size, or neither.")
    test: Files | None = Field(None, description="Test files. Set this or test_size, or neither.")
    validation_size: int | float | None = Field(
        None, description="Rows to split off `train` for validation: a count, or a fraction below 1."
    )
    test_size: int | float | None = Field(
        None, description="Rows to split off `train` for the test: a count, or a fraction below 1."
    )
    group_by: str | None = Field(
        None, description="Row field that defines groups: rows with the same value are always placed in the same split."
    )
    kind: Literal["multiple_choice", "completion"] | None = Field(
        None, description="multiple_choice or completion; null: detected from the rows."
    )
    prompt_template: str = Field(
        "Question: {prompt}\nAnswer:",
        description="Prompt template. {prompt} and the names of other row fields are filled in.",
    )
    response_template: str = Field(
        " {response}", description="Response template. The loss is computed on the response tokens only."
    )
    fields: RowFields = Field(
        RowFields(),
        description="Names of the row fields that hold prompt, choices (one field, or a list with one choice each), "
        "label and response. a.b is field b nested in a.",
    )
    optional_fields: Names = Field((), description="Template fields that may be missing or empty in a row.")
    choices: Choices | None = Field(
        None, description="Answer choices of all rows, if they are the same and the rows do not hold them."
    )
    first_label: Literal[0, 1] = Field(0, description="Number of the first choice, where labels are numbers.")
    weight: float = Field(
        1.0, ge=LEAST_WEIGHT, le=MOST_WEIGHT, description="Factor on this task's sampling weight in the mixture."
    )
    max_train_samples: int | None = Field(None, ge=1, le=MOST_STEPS, description="Maximum number of training rows.")
    max_eval_samples: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="Maximum number of rows of each evaluation split."
    )
    scoring: Literal["text", "letter"] = Field(
        "text",
        description="What evaluation scores as a choice: the likelihood of its text, or of its letter (A, B, ...).",
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
            yield Rule(("scoring", "kind"), "scoring=letter needs multiple-choice rows; kind is completion")

    def _optional_field_rules(self) -> Iterator[Rule]:
        try:
            named = {*template_names(self.prompt_template), *template_names(self.response_template)}
        except ValueError:
            return
        for name in self.optional_fields:
            if name not in named - {"prompt", "response"}:
                keys = ("optional_fields", "prompt_template", "response_template")
                yield Rule(
                    keys,
                    f"{short(name)} must be a field of prompt_template or response_template, not prompt or response",
                )

    def _choice_rules(self) -> Iterator[Rule]:
        texts = [choice.strip() for choice in self.choices or ()]
        if self.choices is not None and (not 2 <= len(texts) <= MOST_CHOICES or "" in texts):
            yield Rule(("choices",), f"must be 2 to {MOST_CHOICES} texts, none of them empty")
        if len(set(texts)) < len(texts):
            yield Rule(("choices",), "must not contain a choice twice")
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
    """Return the names of fields in a template, in order. Raises ValueError if it cannot be filled with texts."""
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

    tasks: tuple[TaskConfig, ...] = Field(description="The tasks to train on, one entry each.")
    max_seq_length: int = Field(
        1024,
        ge=8,
        le=MOST_TOKENS,
        description="Maximum sample length in tokens; longer prompts are truncated on the left.",
    )
    mixture: Literal["proportional", "uniform", "temperature"] = Field(
        "proportional",
        description="Sampling weight of a task with n training rows: n, equal for all tasks, or n^(1/temperature).",
    )
    temperature: float = Field(
        2.0, ge=1, description="For mixture=temperature: 1 samples proportionally, large values approach uniform."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="What an invalid row does: error stops the run, skip drops and counts the row."
    )
    near_duplicate_threshold: float | None = Field(
        0.8,
        gt=0,
        le=1,
        description="Training rows whose Jaccard similarity to an evaluation row is at least this are removed and "
        "counted; null: off.",
    )
    split_seed: int = Field(0, ge=0, description="Random seed of the splits taken from `train`.")
    cache_dir: Annotated[str | None, AfterValidator(usable_path)] = Field(
        None, description="Cache folder for prepared data; null: $MALORA_CACHE, else ~/.cache/malora_dist."
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
