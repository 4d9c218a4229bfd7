"""Where the answer begins among the tokens of a whole text.

Prompt and answer are one text to the tokenizer, as they are to a model that is used. A token that covers a character of
the answer belongs to the answer, also where it begins in the prompt; a special token belongs where it is written.
Where one prompt has several answers, all tokens behind those that their texts have in common belong to the answers, so
that their likelihoods can be compared.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from tokenizers import Encoding
from transformers import BatchEncoding, PreTrainedTokenizerBase

from malora_dist.errors import DataError

Tokens = list[int]
MOST_TRIED = 1000


def encode_texts(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, int]]:
    """Return the ids of each prompt with its answer, nothing put around them, and how many ids are the prompt's.

    For a tokenizer without offsets, the prompt's ids are those that the whole text and the prompt alone both begin
    with.
    """
    texts = [prompt + answer for prompt, answer in pairs]
    with _true_offsets(tokenizer):
        whole = _encode(tokenizer, texts)
    ids: list[Tokens] = whole["input_ids"]
    if whole.encodings is not None:
        # Not the token of what no other one stands for: it is written nowhere, and may stand for prompt and answer.
        special = (set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)) - {tokenizer.unk_token_id}
        ends = [
            _prompt_tokens(found, text, len(prompt), special)
            for found, text, (prompt, _) in zip(whole.encodings, texts, pairs, strict=True)
        ]
    else:
        alone = _encode(tokenizer, [prompt for prompt, _ in pairs])["input_ids"]
        ends = [common_length(one, other) for one, other in zip(ids, alone, strict=True)]
    return list(zip(ids, ends, strict=True))


@contextmanager
def _true_offsets(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Switch off what comes after tokenising: special tokens around a text, and for some offsets without blanks."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    before = getattr(backend, "post_processor", None)
    if before is None:
        yield
        return
    backend.post_processor = None
    try:
        yield
    finally:
        backend.post_processor = before


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def _prompt_tokens(found: Encoding, text: str, length: int, special: set[int]) -> int:
    """Count the leading tokens that end within the first `length` characters of the text."""
    spans = found.offsets
    end = bisect_right(spans, length, key=lambda span: span[1])
    # Some special tokens take the blanks beside them; they belong where they are written.
    while end < len(spans) and found.ids[end] in special and _first_letter(text, spans[end]) < length:
        end += 1
    return end


def _first_letter(text: str, span: tuple[int, int]) -> int:
    start, stop = span
    return stop - len(text[start:stop].lstrip())


def common_length(one: Tokens, other: Tokens) -> int:
    """Count the leading ids that both have in common."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])


def split_answers(texts: Iterable[tuple[Tokens, int]]) -> tuple[Tokens, list[Tokens]]:
    """Split `texts`, which `encode_texts` gave for one prompt, into the prompt's ids and those of each answer."""
    (first, shared), *others = texts
    for ids, end in others:
        shared = min(shared, end, common_length(first, ids))
    return first[:shared], [ids[shared:] for ids, _ in [(first, 0), *others]]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, Tokens]:
    """Return the ids that the tokenizer puts before and behind a text. Raises DataError if they cannot be found."""
    text, bare = _plain_text(tokenizer)
    full: Tokens = tokenizer(text)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        end = start + len(bare)
        if full[start:end] == bare:
            return full[:start], full[end:]
    raise DataError(
        f"the tokenizer {tokenizer.name_or_path!r} reads {text!r} as {bare}, and as {full} with its special tokens: "
        "what it puts around a text cannot be told"
    )


def _plain_text(tokenizer: PreTrainedTokenizerBase) -> tuple[str, Tokens]:
    """Return a text without special tokens, and its tokens: among special ones they could not be found again."""
    special = set(tokenizer.all_special_ids)
    plain = (number for number in sorted(tokenizer.get_vocab().values()) if number not in special)
    # Not every vocabulary has letters of English, as those of proteins.
    for text in chain("aA0", (tokenizer.decode([number]) for number in islice(plain, MOST_TRIED))):
        bare: Tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if bare and special.isdisjoint(bare):
            return text, bare
    raise DataError(f"the tokenizer {tokenizer.name_or_path!r} has no tokens but special ones for any text")


def without_start(ids: Tokens, start: Tokens) -> Tokens:
    """Remove `start`, or the end of it, from the beginning of the ids, where a template wrote it already."""
    for length in range(len(start), 0, -1):
        if ids[:length] == start[-length:]:
            return ids[length:]
    return ids


def missing_end(ids: Tokens, end: Tokens) -> Tokens:
    """Return the part of `end` that is missing behind the ids, which may end with its first ids already."""
    for length in range(len(end), 0, -1):
        if ids[-length:] == end[:length]:
            return end[length:]
    return end
