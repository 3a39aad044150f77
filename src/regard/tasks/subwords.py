"""Sub-words that make words likeliest: P(word) = the greatest product of P(piece) over its cuts (SWE; Li, 2024; a unigram model, Kudo, 2018)."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import RegardError


@dataclass(frozen=True)
class Subwords:
    """log_p: natural logarithm of each piece's probability."""

    log_p: Mapping[str, float]

    @functools.cached_property
    def longest(self) -> int:
        return max(map(len, self.log_p))

    def segment(self, word: str, without: str | None = None) -> list[str]:
        """The pieces of greatest product, by dynamic programming over the word's ends; of equal cuts the one whose last piece is longest. without: a
        piece that may not be used. RegardError for a word that no pieces make up."""
        best, cut = [0.0] + [-math.inf] * len(word), [0] * (len(word) + 1)
        for end in range(1, len(word) + 1):
            for start in range(max(0, end - self.longest), end):
                piece = word[start:end]
                if piece in self.log_p and piece != without and best[start] + self.log_p[piece] > best[end]:
                    best[end], cut[end] = best[start] + self.log_p[piece], start
        if word and best[-1] == -math.inf:
            raise RegardError(f"word {word!r} is not made of the vocabulary's pieces; expected all of its characters among them")
        found, end = [], len(word)
        while end:
            found.append(word[cut[end] : end])
            end = cut[end]
        return found[::-1]

    def log_likelihood(self, pieces: list[str]) -> float:
        return math.fsum(self.log_p[piece] for piece in pieces)

    def corpus(self, words: Mapping[str, int]) -> float:
        """log P of all words, each as often as it is counted."""
        return math.fsum(count * self.log_likelihood(self.segment(word)) for word, count in words.items())

    def counted(self, words: Mapping[str, int]) -> Counter[str]:
        """How often each piece is used."""
        found: Counter[str] = Counter()
        for word, count in words.items():
            for piece in self.segment(word):
                found[piece] += count
        return found


def estimated(counts: Mapping[str, float]) -> Subwords:
    """P = count / sum of counts; what was counted 0 times has half a count, so that it stays possible."""
    given = {piece: max(count, 0.5) for piece, count in counts.items()}
    whole = math.fsum(given.values())
    return Subwords({piece: math.log(count / whole) for piece, count in given.items()})


def fitted(words: Mapping[str, int], vocabulary: Mapping[str, float], rounds: int = 8) -> Subwords:
    """P of a given vocabulary (pieces with first counts): cut every word, count the pieces, and again, until nothing changes."""
    model = estimated(vocabulary)
    for _ in range(rounds):
        counts = model.counted(words)
        new = estimated({piece: counts[piece] for piece in vocabulary})
        if new == model:
            break
        model = new
    return model


def losses(model: Subwords, words: Mapping[str, int]) -> dict[str, float]:
    """What log P of the words loses if a piece is cut into others: count (log P(piece) - log P(its best other cut)). Characters cannot go."""
    counts, found = model.counted(words), {}
    for piece, log_p in model.log_p.items():
        if len(piece) > 1:
            found[piece] = counts[piece] * (log_p - model.log_likelihood(model.segment(piece, without=piece)))
    return found


def learn_subwords(
    words: Mapping[str, int], size: int, *, longest: int = 12, least: int = 2, rounds: int = 4, keep: float = 0.75
) -> Subwords:
    """A vocabulary of `size` pieces with P(piece), from words and how often they come (byte-pair encoding merges what is frequent; this keeps what
    makes the words likely).

    Begins with every substring of at most `longest` characters that comes `least` times, and all characters; then in turn fits P (`rounds` cuts
    of all words) and drops the pieces of least loss, a share of 1 - keep at a time, until `size` are left. All characters stay.
    """
    characters = {c for word in words for c in word}
    if (
        not characters
        or any(count < 1 for count in words.values())
        or size < len(characters)
        or longest < 1
        or rounds < 1
        or not 0 < keep < 1
    ):
        raise RegardError(
            f"{len(words)} words of {len(characters)} characters, size={size}, longest={longest}, rounds={rounds}, keep={keep}: expected words "
            "counted at least once, a size of at least their characters, positive numbers, and 0 < keep < 1"
        )
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + longest, len(word)) + 1):
                counts[word[start:end]] += count
    vocabulary: dict[str, float] = {piece: n for piece, n in counts.items() if len(piece) == 1 or n >= least}
    while True:
        model = fitted(words, vocabulary, rounds)
        if len(vocabulary) <= size:
            return model
        lost = losses(model, words)
        order = sorted(lost, key=lambda piece: (lost[piece], -len(piece), piece))
        gone = set(order[: max(1, min(len(vocabulary) - size, math.ceil((1 - keep) * len(vocabulary))))])
        used = model.counted(words)
        vocabulary = {piece: float(used[piece]) for piece in vocabulary if piece not in gone}


__all__ = ["Subwords", "estimated", "fitted", "learn_subwords", "losses"]
