"""Examples as token ids, cut between prompt and answer where training and evaluation cut alike."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from malora_dist.data.boundary import (
    Tokens,
    encode_texts,
    missing_end,
    special_tokens,
    split_answers,
    without_start,
)
from malora_dist.data.example import Example
from malora_dist.data.row import BadRow
from malora_dist.data.templates import (
    PROMPT_TEMPLATE,
    RESPONSE_TEMPLATE,
    TEXT,
    choice_texts,
    prompt_text,
    response_text,
)
from malora_dist.data.watch import Watch, unwatched
from malora_dist.errors import DataError

Ids = npt.NDArray[np.int32]
BATCH_EXAMPLES = 250


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sample. All ids from `prompt_length` on are learned; EOS ends them unless they were cut.

    `sample_id` is unique over all tasks of the mixture and the same on every rank.
    """

    sample_id: int
    task_id: int
    input_ids: Ids
    prompt_length: int

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response."""
        return len(self.input_ids)


@dataclass(frozen=True)
class ChoiceItem:
    """One evaluation question. `choice_lengths` are in characters, for a likelihood per character."""

    task_id: int
    prompt_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]
    choice_lengths: tuple[int, ...]
    label: int

    @property
    def tokens(self) -> int:
        """Tokens of the prompt with the longest choice."""
        return len(self.prompt_ids) + max(map(len, self.choice_ids))


@dataclass(frozen=True)
class _Cut:
    """An example's prompt and answers, as texts and as ids; without choices there is one answer."""

    example: Example
    texts: tuple[str, ...]
    prompt: Tokens
    answers: list[Tokens]


@dataclass(frozen=True)
class Encoder:
    """Turns examples into token ids of at most `max_seq_length`, cut as `malora_dist.data.boundary` says.

    What the tokenizer puts around a text stands around it once, also where a template writes it too. A prompt that is
    too long loses its start (never what every text begins with). A response that alone is too long loses its end:
    `counts` reports both, `prompts_cut` and `responses_cut`, and questions of which another choice has the right one's
    tokens, `choices_alike`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    prompt_template: str = PROMPT_TEMPLATE
    response_template: str = RESPONSE_TEMPLATE
    scoring: str = TEXT
    watch: Watch = unwatched
    skip_bad_rows: bool = False

    def samples(self, examples: Sequence[Example], task_id: int, counts: Counter[str]) -> list[Sample]:
        """Encode examples as training samples with sample_id 0, 1, ...; add to `counts`.

        Raises BadRow for a text of no tokens, unless such rows are skipped.
        """
        samples = []
        for number, cut in enumerate(self._usable(examples, counts)):
            label = cut.example.label or 0
            answer = [*cut.answers[label], *self._ending(cut.answers[label], cut.texts[label])]
            prompt, (response,) = self._fit(cut, [answer], counts)
            ids = np.asarray(prompt + response, dtype=np.int32)
            samples.append(Sample(number, task_id, ids, len(prompt)))
        return samples

    def choice_items(self, examples: Sequence[Example], task_id: int, counts: Counter[str]) -> list[ChoiceItem]:
        """Encode examples as evaluation questions; add to `counts`. Raises BadRow as `samples` does."""
        items = []
        for cut in self._usable(examples, counts):
            assert cut.example.label is not None
            prompt, ids = self._fit(cut, cut.answers, counts)
            counts["choices_alike"] += ids.count(ids[cut.example.label]) > 1
            lengths = tuple(len(text.strip()) for text in cut.texts)
            items.append(ChoiceItem(task_id, tuple(prompt), tuple(map(tuple, ids)), lengths, cut.example.label))
        return items

    @cached_property
    def start_of_text(self) -> Tokens:
        """What the tokenizer puts before every text: BOS, or other tokens, or nothing."""
        return special_tokens(self.tokenizer)[0]

    @cached_property
    def end_of_text(self) -> Tokens:
        """What ends a response: what the tokenizer puts behind a text, EOS at least.

        Raises DataError if the tokenizer has no EOS.
        """
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise DataError(f"the tokenizer {self.tokenizer.name_or_path!r} has no end-of-text token (eos_token)")
        end = special_tokens(self.tokenizer)[1]
        return end if eos in end else [*end, eos]

    def _usable(self, examples: Sequence[Example], counts: Counter[str]) -> Iterator[_Cut]:
        for cut in self._cuts(examples):
            has_prompt = bool(self._start(cut.prompt)[1])
            if has_prompt and all(cut.answers):
                yield cut
            elif self.skip_bad_rows:
                counts["bad_rows_skipped"] += 1
            else:
                what = "response" if has_prompt else "prompt"
                raise BadRow(f"{cut.example.source}: the {what} has no tokens of its own")

    def _cuts(self, examples: Sequence[Example]) -> Iterator[_Cut]:
        for first in range(0, len(examples), BATCH_EXAMPLES):
            self.watch("tokenising", first, len(examples))
            batch = examples[first : first + BATCH_EXAMPLES]
            prompts = [prompt_text(example, self.prompt_template, self.scoring) for example in batch]
            answers = [self._answer_texts(example) for example in batch]
            pairs = [(prompt, text) for prompt, row in zip(prompts, answers, strict=True) for text in row]
            encoded = iter(encode_texts(self.tokenizer, pairs))
            for example, texts in zip(batch, answers, strict=True):
                yield _Cut(example, texts, *split_answers([next(encoded) for _ in texts]))

    def _answer_texts(self, example: Example) -> tuple[str, ...]:
        if example.label is None:
            return (response_text(example, self.response_template, self.scoring),)
        return choice_texts(example, self.response_template, self.scoring)

    def _ending(self, answer: Tokens, text: str) -> Tokens:
        """Return what to put behind an answer; a template may have written EOS, and a line break behind it, already."""
        eos = self.tokenizer.eos_token_id
        if eos in answer and text.rstrip().endswith(str(self.tokenizer.eos_token)):
            return []
        return missing_end(answer, self.end_of_text)

    def _fit(self, cut: _Cut, responses: list[Tokens], counts: Counter[str]) -> tuple[Tokens, list[Tokens]]:
        """Cut prompt and responses to `max_seq_length`; the prompt keeps at least one token to predict from."""
        start, prompt = self._start(cut.prompt)
        room = self.max_seq_length - len(start) - 1
        counts["responses_cut"] += any(len(response) > room for response in responses)
        responses = [response[:room] for response in responses]
        left = self.max_seq_length - len(start) - max(map(len, responses))
        counts["prompts_cut"] += len(prompt) > left
        return [*start, *prompt[-left:]], responses

    def _start(self, prompt: Tokens) -> tuple[Tokens, Tokens]:
        """Split a prompt into what the text begins with, which is never cut, and the rest."""
        start = self.start_of_text
        bos = self.tokenizer.bos_token_id
        if not start and bos is not None and prompt[:1] == [bos]:
            start = [bos]
        return start, without_start(prompt, start)
