"""The tokens of a prompt and its answer are those of the whole text, whatever the tokenizer does with blanks."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from malora_dist.data.boundary import common_length, encode_texts, missing_end, special_tokens, without_start
from malora_dist.data.encode import ChoiceItem, Encoder, Sample
from malora_dist.data.example import Example
from malora_dist.errors import DataError
from tests.tiny_models import merging_tokenizer

TEMPLATES = [
    ("Question: {prompt}\nAnswer:", " {response}"),
    ("{prompt}\n### Response:\n", "{response}"),
    ("Answer: ", "{response}"),
    ("Answer:", "{response}"),
    ('{prompt}: "', '{response}"'),
    ("<user>{prompt}<model>", "{response}"),
]
QUESTION = Example("t", "the wall's red?", "red", ("red", "green", "7", "purple", "(blue"), 0)


@pytest.fixture(params=["", "prepend", "metaspace", "replace"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return merging_tokenizer(spaces=request.param)


def encode(encoder: Encoder, example: Example = QUESTION) -> tuple[Sample, ChoiceItem]:
    (sample,), (item,) = (make([example], 0, Counter()) for make in (encoder.samples, encoder.choice_items))
    return sample, item


@pytest.mark.parametrize(("before", "after"), TEMPLATES)
@pytest.mark.parametrize("label", range(5))
def test_the_tokens_are_those_of_the_whole_text(
    tokenizer: PreTrainedTokenizerBase, before: str, after: str, label: int
) -> None:
    example = Example("t", QUESTION.prompt, QUESTION.choices[label], QUESTION.choices, label)
    before = before if "{prompt}" in before else f"{{prompt}} {before}"
    sample, item = encode(Encoder(tokenizer, 128, before, after), example)
    text = before.format(prompt=example.prompt) + after.format(response=example.response)
    assert sample.input_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert [*item.prompt_ids, *item.choice_ids[label], tokenizer.eos_token_id] == sample.input_ids.tolist()
    assert sample.prompt_length == len(item.prompt_ids)
    learned = tokenizer.decode(sample.input_ids[sample.prompt_length :])
    assert after.format(response=example.response) in learned


def pieces(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[str], list[str]]:
    """The prompt's tokens and the answer's, blanks as ▁."""
    ((ids, end),) = encode_texts(tokenizer, [(prompt, answer)])
    tokens = [token.replace("Ġ", "▁").replace("Ċ", "\n") for token in tokenizer.convert_ids_to_tokens(ids)]
    return tokens[:end], tokens[end:]


def test_a_line_break_takes_no_blank_with_it() -> None:
    """Tokenised apart, these tokenizers would learn ▁red behind a line break, and two blanks behind a colon."""
    for spaces in ("prepend", "metaspace", "replace", ""):
        tokenizer = merging_tokenizer(spaces=spaces)
        assert "".join(pieces(tokenizer, "the wall\n", "red")[1]) == "red", spaces
        assert pieces(tokenizer, "Answer:", " red")[1] == ["▁red"], spaces


@pytest.mark.parametrize("spaces", ["", "replace"])
def test_a_token_that_crosses_the_boundary_belongs_to_the_answer(spaces: str) -> None:
    tokenizer = merging_tokenizer(spaces=spaces)
    prompt, answer = pieces(tokenizer, "the wall ", "red")
    assert answer == ["▁red"] and "".join(prompt) == "the▁wall"
    sample, item = encode(Encoder(tokenizer, 64, "{prompt} ", "{response}"), QUESTION)
    # "purple" leaves the blank alone, yet it is an answer's token as the others' first blank is.
    assert all(tokenizer.decode(ids).startswith(" ") for ids in item.choice_ids)
    assert tokenizer.decode(sample.input_ids[sample.prompt_length :]) == " red<end>"


def test_any_texts_give_the_tokens_of_both_together(tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random("texts")
    parts = [
        "red",
        " ",
        "  ",
        "\n",
        "the",
        "wall",
        "é",
        "日本",
        "\N{PARTY POPPER}",
        "e\u0301",
        "\u200b",
        "'s",
        '"',
        "\t",
        "7",
    ]
    pairs = [("".join(draw.choices(parts, k=5)), "".join(draw.choices(parts, k=3))) for _ in range(200)]
    for (prompt, answer), (ids, end) in zip(pairs, encode_texts(tokenizer, pairs), strict=True):
        assert ids == tokenizer(prompt + answer)["input_ids"]
        if tokenizer.backend_tokenizer.normalizer is None and tokenizer.convert_tokens_to_ids("Ċ") is not None:
            first, rest = (tokenizer.decode(part) for part in (ids[:end], ids[end:]))
            assert first + rest == prompt + answer and prompt.startswith(first) and rest.endswith(answer)


def test_offsets_that_leave_out_blanks_hide_no_token() -> None:
    """Tokenizers of GPT-NeoX and RoBERTa report the places of tokens without the blanks that they cover."""
    from tokenizers.processors import ByteLevel

    plain, trimming = merging_tokenizer(), merging_tokenizer()
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    before = str(trimming.backend_tokenizer.post_processor)
    assert pieces(trimming, "the wall\n", "  red") == (["the", "▁wall"], ["\n▁", "▁red"])
    draw = random.Random(0)
    for _ in range(50):
        pair = ["".join(draw.choices([" ", "  ", "\n", "red", "wall"], k=4)) for _ in range(2)]
        assert pieces(trimming, *pair) == pieces(plain, *pair), pair
    assert str(trimming.backend_tokenizer.post_processor) == before


def test_a_special_token_that_takes_the_blanks_beside_it_belongs_where_it_is_written() -> None:
    tokenizer = merging_tokenizer()
    takes_next, takes_last = AddedToken("<model>", rstrip=True), AddedToken("<end>", lstrip=True)
    tokenizer.add_tokens([takes_next, takes_last], special_tokens=True)
    assert pieces(tokenizer, "wall<model>\n", " red")[1] == ["red"]
    assert pieces(tokenizer, "wall ", "<end>") == (["wall"], ["<end>"])


def test_an_unknown_token_that_crosses_the_boundary_belongs_to_the_answer() -> None:
    """It is a special token too, and stands for letters of both."""
    tokenizer = letters_tokenizer("abc ", "<unk>")
    tokenizer.backend_tokenizer.model.fuse_unk = True
    assert tokenizer.tokenize("ab xyz c") == ["a", "b", " ", "<unk>", " ", "c"]
    assert pieces(tokenizer, "ab x", "yz c") == (["a", "b", " "], ["<unk>", " ", "c"])
    assert pieces(tokenizer, "ab xyz", " c") == (["a", "b", " ", "<unk>"], [" ", "c"])


def test_a_tokenizer_without_offsets_cuts_at_the_first_token_that_is_another(tmp_path: Path) -> None:
    slow = sentencepiece_tokenizer(tmp_path)
    assert not slow.is_fast
    for before, after, expected in (
        ("the wall is", " red", ["▁red"]),
        ("the wall is ", "red", ["▁red"]),
        ("the wall is\n", "red", ["red"]),
        ("the wall is re", "d", ["▁red"]),
    ):
        prompt, answer = pieces(slow, before, after)
        assert answer == expected, (before, answer)
        assert prompt + answer == slow.tokenize(before + after)
    sample, item = encode(Encoder(slow, 64, "{prompt} is ", "{response}"))
    assert sample.prompt_length == len(item.prompt_ids) and slow.decode(item.choice_ids[0]).strip() == "red"


def sentencepiece_tokenizer(folder: Path) -> Any:
    """Return a tokenizer that transformers runs in Python, with a vocabulary of its own."""
    import sentencepiece
    from transformers import GPTSw3Tokenizer

    lines = ["the wall is red", "the wall is blue", "red green blue yellow", "what colour is the wall"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        model_type="bpe",
        character_coverage=1.0,
        user_defined_symbols=["\n"],
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return GPTSw3Tokenizer(str(folder / "spiece.model"))


@pytest.mark.parametrize(
    ("prefix", "template", "start"),
    [
        ((), "{prompt}", ()),
        (("<start>",), "{prompt}", ("<start>",)),
        (("<start>",), "<start><user>{prompt}", ("<start>", "<user>")),
        (("[gMASK]", "<sop>"), "{prompt}", ("[gMASK]", "<sop>")),
        (("[gMASK]", "<sop>"), "[gMASK]<sop><user>{prompt}", ("[gMASK]", "<sop>", "<user>")),
        (("[gMASK]", "<sop>"), "<sop>{prompt}", ("[gMASK]", "<sop>")),
    ],
)
def test_what_the_tokenizer_puts_before_a_text_stands_there_once(
    prefix: tuple[str, ...], template: str, start: tuple[str, ...]
) -> None:
    tokenizer = merging_tokenizer(prefix)
    whole, item = encode(Encoder(tokenizer, 64, template, " {response}"))
    cut, cut_item = encode(Encoder(tokenizer, 8, template, " {response}"))
    for ids in (whole.input_ids, item.prompt_ids):
        assert tokenizer.convert_ids_to_tokens(list(ids))[: len(start)] == list(start)
    assert whole.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("<sop>")) == start.count("<sop>")
    for ids in (cut.input_ids, cut_item.prompt_ids):
        assert tokenizer.convert_ids_to_tokens(list(ids))[: len(prefix)] == list(prefix)


@pytest.mark.parametrize("template", [" {response}", " {response}<end>", " {response}<end>\n"])
def test_an_end_that_the_template_writes_is_not_written_twice(template: str) -> None:
    tokenizer = merging_tokenizer()
    sample, item = encode(Encoder(tokenizer, 64, "{prompt}", template))
    assert tokenizer.decode(sample.input_ids).count("<end>") == 1
    assert tokenizer.decode(item.choice_ids[0]) == template.format(response="red")


def test_special_tokens_on_both_sides() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = merging_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<start>", "<sop>", "<end>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <sop> <end>", special_tokens=list(ids.items())
    )
    assert special_tokens(tokenizer) == ([ids["<start>"]], [ids["<sop>"], ids["<end>"]])
    sample, _ = encode(Encoder(tokenizer, 64))
    assert sample.input_ids.tolist()[-2:] == [ids["<sop>"], ids["<end>"]]


@pytest.mark.parametrize("unknown", [None, "<s>", "<unk>"])
def test_a_vocabulary_without_letters_of_english(unknown: str | None) -> None:
    """As of DNA: "a" has no token there, or is unknown, or is read as a special one."""
    tokenizer = letters_tokenizer("CGTN", unknown)
    assert special_tokens(tokenizer) == ([0], [1])
    (sample,) = Encoder(tokenizer, 32, "{prompt}", "{response}").samples([Example("t", "CGT", "GG")], 0, Counter())
    assert sample.input_ids.tolist() == tokenizer("CGTGG")["input_ids"] and sample.prompt_length == 4


def test_a_vocabulary_of_special_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="has no tokens but special ones for any text"):
        special_tokens(letters_tokenizer("", None))


def letters_tokenizer(letters: str, unknown: str | None) -> PreTrainedTokenizerBase:
    """Return a tokenizer of single letters that puts <s> before a text and </s> behind it."""
    names = ["<s>", "</s>", "<unk>", *letters]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    named = {} if unknown is None else {"unk_token": unknown}
    special = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<unk>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **named)


def test_parts_of_lists() -> None:
    assert [common_length(one, [1, 2, 3]) for one in ([], [1, 2], [1, 3, 3], [1, 2, 3, 4])] == [0, 2, 1, 3]
    assert [without_start(ids, [1, 2]) for ids in ([1, 2, 2], [2, 5], [1, 5], [])] == [[2], [5], [1, 5], []]
    assert [missing_end(ids, [1, 2]) for ids in ([1, 2], [5, 1], [5, 2], [])] == [[], [2], [1, 2], [1, 2]]
