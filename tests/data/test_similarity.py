"""The inverted index finds exactly what comparing all pairs finds."""

import random

import pytest

from malora_dist.data.similarity import NearDuplicateIndex, clusters, normalized, shingles


def naive(texts: list[str], text: str, threshold: float) -> list[int]:
    wanted = shingles(text)
    return [i for i, t in enumerate(texts) if len(wanted & shingles(t)) / len(wanted | shingles(t)) >= threshold]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_equal_to_all_pairs(threshold: float) -> None:
    rng = random.Random(1)
    bases = [[rng.choice("abcdefgh") * rng.randint(1, 2) for _ in range(rng.randint(1, 25))] for _ in range(60)]
    texts = [" ".join(w if rng.random() > 0.06 else "zz" for w in rng.choice(bases)) for _ in range(400)]
    index = NearDuplicateIndex(texts, threshold)
    found = [index.similar(" ".join(base)) for base in bases]
    assert found == [naive(texts, " ".join(base), threshold) for base in bases]
    assert sum(map(len, found)) > 50


def test_an_instruction_that_all_rows_share_does_not_make_them_alike() -> None:
    instruction = "Read the question with great care and then say in one word which of the two answers is right:"
    texts = [f"{instruction} is {i} {word}?" for i, word in enumerate(["odd", "even"] * 20)]
    query = f"{instruction} is 77 odd?"
    assert naive(texts, query, 0.8)
    index = NearDuplicateIndex(texts, 0.8)
    assert index.similar(query) == []
    assert index.similar(texts[5]) == [5]


def test_case_and_punctuation_do_not_count() -> None:
    assert normalized("Is it -- RED?\n") == normalized("is it red")
    assert NearDuplicateIndex(["What, then, is a Fox?"], 1.0).similar("what then is a fox") == [0]


def test_scripts_without_blanks_are_compared_by_character() -> None:
    index = NearDuplicateIndex(["今日は天気がとても良いですね"], 0.5)
    assert index.similar("今日は天気がとても悪いですね") == [0]
    assert index.similar("明日の会議は何時からですか") == []


def test_the_index_says_how_far_it_is() -> None:
    seen: list[tuple[str, int, int]] = []
    NearDuplicateIndex(["red fox", "green frog"], 0.5, lambda *what: seen.append(what))
    assert seen == [(f"{work} held-out rows", done, 2) for work in ("reading", "indexing") for done in (0, 1)]


def test_clusters_join_over_any_key_and_in_chains() -> None:
    one = ["red fox runs fast", "red fox runs slow", "blue whale sings low", "green frog"]
    other = ["a", "b", "b", "c"]
    numbers = clusters([one, other], 0.3)
    assert numbers[0] == numbers[1] == numbers[2] != numbers[3]
