"""Words cut up by hand: byte-pair encoding, every way to cut, and the longest piece first."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator

from regard.tasks.text import python_text


def words_of(size: int) -> Counter[str]:
    text = bytes(python_text(40_000).train[:size].tolist()).decode("utf8", "ignore")
    return Counter(re.findall(r"[a-z]{2,}", text.lower()))


def merged(words: Counter[str], size: int) -> tuple[dict[str, list[str]], set[str]]:
    """Byte-pair encoding: the commonest pair of neighbours becomes a piece, until there are `size`. (Words cut up, pieces.)"""
    found = {word: list(word) for word in words}
    pieces = {c for word in words for c in word}
    while len(pieces) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, own in found.items():
            for pair in itertools.pairwise(own):
                pairs[pair] += words[word]
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        pieces.add(a + b)
        for own in found.values():
            at = 0
            while at + 1 < len(own):
                if (own[at], own[at + 1]) == (a, b):
                    own[at : at + 2] = [a + b]
                at += 1
    return found, pieces


def cuts(word: str, known: set[str]) -> Iterator[list[str]]:
    """All ways to cut a word."""
    if not word:
        yield []
    for end in range(1, len(word) + 1):
        if word[:end] in known:
            for rest in cuts(word[end:], known):
                yield [word[:end], *rest]


def longest_first(word: str, known: set[str]) -> list[str]:
    found = []
    while word:
        found.append(next(word[:end] for end in range(len(word), 0, -1) if word[:end] in known))
        word = word[len(found[-1]) :]
    return found
