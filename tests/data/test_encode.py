"""Token ids: one boundary for training and evaluation, whole responses, and every cut counted."""

from collections import Counter

import pytest
from transformers import PreTrainedTokenizerBase

from malora_dist.data.encode import Encoder
from malora_dist.data.example import Example
from malora_dist.errors import DataError

EOS = 2


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, length: int) -> tuple[str, str, bool, Counter[str]]:
    counts: Counter[str] = Counter()
    encoder = Encoder(tokenizer, length, prompt_template="{prompt}", response_template="{response}")
    (sample,) = encoder.samples([example], 0, counts)
    assert len(sample.input_ids) <= length
    ids = sample.input_ids.tolist()
    learned = ids[sample.prompt_length :]
    ended = learned[-1] == EOS
    text = tokenizer.decode(learned[:-1] if ended else learned)
    return tokenizer.decode(ids[: sample.prompt_length]), text, ended, +counts


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (13, ("abcdefgh", "WXYZ", True, {})),
        (12, ("bcdefgh", "WXYZ", True, {"prompts_cut": 1})),
        (6, ("h", "WXYZ", True, {"prompts_cut": 1})),
        (5, ("h", "WXYZ", False, {"prompts_cut": 1, "responses_cut": 1})),
        (4, ("h", "WXY", False, {"prompts_cut": 1, "responses_cut": 1})),
    ],
)
def test_the_prompt_is_cut_first_and_from_the_left(
    tokenizer: PreTrainedTokenizerBase, length: int, expected: tuple[str, str, bool, dict[str, int]]
) -> None:
    assert encode(tokenizer, Example("t", "abcdefgh", "WXYZ"), length) == expected


def test_choices_share_the_cut_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example("t", "abcdefgh", "no", ("no", "perhaps"), 0)
    counts: Counter[str] = Counter()
    (item,) = Encoder(tokenizer, 12, "{prompt}", " {response}").choice_items([example], 3, counts)
    assert tokenizer.decode(item.prompt_ids) == "efgh"
    assert [tokenizer.decode(ids) for ids in item.choice_ids] == [" no", " perhaps"]
    assert (item.choice_lengths, item.label, item.task_id, +counts) == ((2, 7), 0, 3, {"prompts_cut": 1})


@pytest.mark.parametrize("scoring", ["text", "letter"])
def test_training_and_evaluation_see_the_same_tokens(smollm2_tokenizer: PreTrainedTokenizerBase, scoring: str) -> None:
    examples = [Example("t", f"Größe {i}? 日本", c[i % 3], c, i % 3) for i in range(6) for c in [("a b", "née", "7.5")]]
    encoder = Encoder(smollm2_tokenizer, 64, scoring=scoring)
    counts: Counter[str] = Counter()
    samples, items = encoder.samples(examples, 0, counts), encoder.choice_items(examples, 0, counts)
    for sample, item in zip(samples, items, strict=True):
        expected = [*item.prompt_ids, *item.choice_ids[item.label], EOS]
        assert sample.input_ids.tolist() == expected and sample.prompt_length == len(item.prompt_ids)
    text = smollm2_tokenizer.decode(samples[1].input_ids)
    assert (
        text
        == {
            "text": "Question: Größe 1? 日本\nAnswer: née<|im_end|>",
            "letter": "Question: Größe 1? 日本\nA. a b\nB. née\nC. 7.5\nAnswer: B<|im_end|>",
        }[scoring]
    )
    assert not +counts


def test_bos_is_kept_where_the_tokenizer_adds_it(tokenizer: PreTrainedTokenizerBase) -> None:
    import copy

    from tokenizers.processors import TemplateProcessing

    with_bos = copy.deepcopy(tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    prompt, *_ = encode(with_bos, Example("t", "abcdefgh", "WXYZ"), 10)
    assert prompt == "<s>efgh"
    assert encode(tokenizer, Example("t", "abcdefgh", "WXYZ"), 10)[0] == "defgh"


def test_a_row_without_tokens_is_named_or_skipped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    import copy

    from tokenizers.normalizers import Replace
    from tokenizers.processors import TemplateProcessing

    blind = copy.deepcopy(tokenizer)
    blind.backend_tokenizer.normalizer = Replace("\N{ZERO WIDTH SPACE}", "")
    # What every text begins with is no question.
    blind.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    gone = "\N{ZERO WIDTH SPACE}"
    rows = [
        Example("t", "p", "r"),
        Example("t", gone, "r", source="t.jsonl:2"),
        Example("t", "p", gone, source="t.jsonl:3"),
    ]
    for row, what in ((rows[1], r"t\.jsonl:2: the prompt has"), (rows[2], r"t\.jsonl:3: the response has")):
        with pytest.raises(DataError, match=f"{what} no tokens"):
            Encoder(blind, 16, "{prompt}", "{response}").samples([row], 0, Counter())
    counts: Counter[str] = Counter()
    encoder = Encoder(blind, 16, "{prompt}", "{response}", skip_bad_rows=True)
    assert [sample.sample_id for sample in encoder.samples([*rows, rows[0]], 0, counts)] == [0, 1]
    assert counts["bad_rows_skipped"] == 2


def test_choices_that_the_tokenizer_reads_alike_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    """Only where one of them is the right one."""
    import copy

    from tokenizers.normalizers import Lowercase

    small = copy.deepcopy(tokenizer)
    small.backend_tokenizer.normalizer = Lowercase()
    counts: Counter[str] = Counter()
    examples = [Example("t", "p", "yes", ("Yes", "yes", "no"), label) for label in (0, 1, 2)]
    Encoder(small, 64).choice_items(examples, 0, counts)
    assert counts["choices_alike"] == 2
    cut = Encoder(tokenizer, 12, "{prompt}", "{response}")
    cut.choice_items([Example("t", "p", "", ("abcdefghijkl", "abcdefghijkm"), 0)], 0, counts)
    assert counts["choices_alike"] == 3


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    import copy

    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="end-of-text"):
        Encoder(endless, 16).samples([Example("t", "p", "r")], 0, Counter())
