"""One checked row of a task, whatever file it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MULTIPLE_CHOICE = "multiple_choice"
COMPLETION = "completion"


@dataclass(frozen=True)
class Example:
    """A question with its answer. `response` is the right choice's text where there are choices.

    `extra` holds further fields of the row that the prompt template names; `source` is "file.jsonl:12".
    """

    task: str
    prompt: str
    response: str
    choices: tuple[str, ...] = ()
    label: int | None = None
    group: str | None = None
    source: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """All that is asked: the further fields (a passage, say) and the prompt."""
        return " ".join((*self.extra.values(), self.prompt))
