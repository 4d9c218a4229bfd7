"""Texts that say nearly the same: Jaccard similarity of their word triples, found through an inverted index."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from malora_dist.data.watch import Watch, unwatched, watched

SHINGLE_WORDS = 3
COMMON_SHARE = 0.5
COMMON_AT_LEAST = 10

Shingle = tuple[str, ...]
# Scripts without blanks between words count each character as a word.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]|\w+")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def normalized(text: str) -> str:
    """Return a text without differences of case, punctuation and blanks."""
    return " ".join(words(text)) or text.strip()


def shingles(text: str, size: int = SHINGLE_WORDS) -> frozenset[Shingle]:
    """Return all runs of `size` words of a text; a shorter text is one shingle."""
    parts = words(text) or [text.strip()]
    return frozenset(tuple(parts[start : start + size]) for start in range(max(1, len(parts) - size + 1)))


class NearDuplicateIndex:
    """Finds which of `texts` are similar to a given text, exactly, without comparing with all of them.

    Two sets with Jaccard similarity >= threshold share one of their rarest `size - ceil(threshold * size) + 1`
    members, so only those are indexed. Shingles that half of the texts share (an instruction, a list of fixed
    choices) are left out of the comparison: they would make any two short questions look alike.
    """

    def __init__(self, texts: Sequence[str], threshold: float, watch: Watch = unwatched) -> None:
        self.threshold = threshold
        raw = [shingles(text) for text in watched("reading held-out rows", texts, watch)]
        self._frequency = Counter(shingle for members in raw for shingle in members)
        limit = max(COMMON_AT_LEAST, COMMON_SHARE * len(raw))
        self._common = {shingle for shingle, count in self._frequency.items() if count > limit}
        self._sets = [self._telling(members) for members in raw]
        self._postings: defaultdict[Shingle, list[int]] = defaultdict(list)
        for number, members in enumerate(watched("indexing held-out rows", self._sets, watch)):
            for shingle in self._prefix(members):
                self._postings[shingle].append(number)

    def similar(self, text: str) -> list[int]:
        """Return the numbers of the texts whose similarity to `text` is at least the threshold, in ascending order."""
        members = self._telling(shingles(text))
        candidates = {number for shingle in self._prefix(members) for number in self._postings.get(shingle, ())}
        return sorted(number for number in candidates if self._jaccard(members, number) >= self.threshold)

    def _telling(self, members: frozenset[Shingle]) -> frozenset[Shingle]:
        return (members - self._common) or members

    def _prefix(self, members: frozenset[Shingle]) -> list[Shingle]:
        length = len(members) - math.ceil(self.threshold * len(members) - 1e-9) + 1
        return sorted(members, key=lambda shingle: (self._frequency[shingle], shingle))[:length]

    def _jaccard(self, members: frozenset[Shingle], number: int) -> float:
        shared = len(members & self._sets[number])
        return shared / (len(members) + len(self._sets[number]) - shared)


def clusters(keys: Sequence[Sequence[str]], threshold: float) -> list[int]:
    """Return a cluster number for each item; `keys[j][i]` is the j-th text of item i.

    Two items whose j-th texts are similar, for any j, are in one cluster; clusters that share an item are one.
    """
    parent = list(range(len(keys[0])))
    for texts in keys:
        index = NearDuplicateIndex(texts, threshold)
        for item, text in enumerate(texts):
            for other in index.similar(text):
                parent[_root(parent, item)] = _root(parent, other)
    return [_root(parent, item) for item in range(len(parent))]


def _root(parent: list[int], item: int) -> int:
    while parent[item] != item:
        parent[item] = parent[parent[item]]
        item = parent[item]
    return item
