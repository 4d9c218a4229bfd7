"""Examples as token ids. Prompt and answer are tokenised apart, so training and evaluation cut between them alike."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from malora_dist.data.example import Example
from malora_dist.data.templates import (
    PROMPT_TEMPLATE,
    RESPONSE_TEMPLATE,
    TEXT,
    choice_texts,
    prompt_text,
    response_text,
)
from malora_dist.errors import DataError

Ids = npt.NDArray[np.int32]
BATCH_TEXTS = 1000


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sample. All ids from `prompt_length` on are learned; the last is EOS unless it was cut.

    `sample_id` is unique over all tasks of the mixture and the same on every rank.
    """

    sample_id: int
    task_id: int
    input_ids: Ids
    prompt_length: int


@dataclass(frozen=True)
class ChoiceItem:
    """One evaluation question. `choice_lengths` are in characters, for a likelihood per character."""

    task_id: int
    prompt_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]
    choice_lengths: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class Encoder:
    """Turns examples into token ids of at most `max_seq_length`.

    A prompt that is too long loses its start (never a leading BOS). A response that alone is too long loses its end:
    `counts` reports both, `prompts_cut` and `responses_cut`. `look` is called every thousand texts; it may raise.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    prompt_template: str = PROMPT_TEMPLATE
    response_template: str = RESPONSE_TEMPLATE
    scoring: str = TEXT
    look: Callable[[], None] = lambda: None

    def samples(self, examples: Sequence[Example], task_id: int, counts: Counter[str]) -> list[Sample]:
        """Training samples with sample_id 0, 1, ...; adds to `counts`. Raises DataError for a text of no tokens."""
        prompts = self._tokens([prompt_text(example, self.prompt_template, self.scoring) for example in examples])
        answers = [response_text(example, self.response_template, self.scoring) for example in examples]
        samples = []
        for number, (example, prompt, response) in enumerate(
            zip(examples, prompts, self._tokens(answers), strict=True)
        ):
            prompt, (response,) = self._fit(example, prompt, [response], counts, ending=[self.end_of_text])
            ids = np.asarray(prompt + response, dtype=np.int32)
            samples.append(Sample(number, task_id, ids, len(prompt)))
        return samples

    def choice_items(self, examples: Sequence[Example], task_id: int, counts: Counter[str]) -> list[ChoiceItem]:
        """Evaluation questions; adds to `counts`. Raises DataError for a text of no tokens."""
        prompts = self._tokens([prompt_text(example, self.prompt_template, self.scoring) for example in examples])
        texts = [choice_texts(example, self.response_template, self.scoring) for example in examples]
        choices = iter(self._tokens([text for row in texts for text in row]))
        items = []
        for example, prompt, row in zip(examples, prompts, texts, strict=True):
            assert example.label is not None
            prompt, ids = self._fit(example, prompt, [next(choices) for _ in row], counts)
            lengths = tuple(len(text.strip()) for text in row)
            items.append(ChoiceItem(task_id, tuple(prompt), tuple(map(tuple, ids)), lengths, example.label))
        return items

    @cached_property
    def start_of_text(self) -> list[int]:
        """[BOS] for a tokenizer that begins every text with it, else nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else []

    @cached_property
    def end_of_text(self) -> int:
        """The id that ends a response. Raises DataError if the tokenizer has none."""
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise DataError(f"the tokenizer {self.tokenizer.name_or_path!r} has no end-of-text token (eos_token)")
        return eos

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), BATCH_TEXTS):
            self.look()
            batch = texts[start : start + BATCH_TEXTS]
            ids += self.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _fit(
        self,
        example: Example,
        prompt: list[int],
        responses: list[list[int]],
        counts: Counter[str],
        ending: Sequence[int] = (),
    ) -> tuple[list[int], list[list[int]]]:
        """Prompt and responses within the budget; the prompt keeps at least one token to predict from."""
        if not prompt or not all(responses):
            raise DataError(f"{example.source}: prompt or response has no tokens")
        start = self.start_of_text
        room = self.max_seq_length - len(start) - 1
        counts["responses_cut"] += any(len(response) + len(ending) > room for response in responses)
        responses = [[*response, *ending][:room] for response in responses]
        left = self.max_seq_length - len(start) - max(map(len, responses))
        counts["prompts_cut"] += len(prompt) > left
        return [*start, *prompt[-left:]], responses
