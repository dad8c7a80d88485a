"""BLEU, ROUGE_L and CIDEr-D of captions, as COCO defines them, on tokens (see `caption_tokens.py`).

Every number is kept by image as well, so that intervals can resample images: BLEU as the counts that it is made of,
the others as scores whose mean they are. What CIDEr knows of the whole set, in how many images an n-gram stands, stays
as it is when images are drawn again.

Sources: Papineni et al. 2002, Lin 2004, Vedantam et al. 2015, and the choices of COCO's evaluation server.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlkit.evaluation.comparison import Measured
from vlkit.evaluation.intervals import Statistic

Tokens = Sequence[str]
ORDERS = 4
# Of ROUGE_L: recall counts this much more than precision, squared.
BETA = 1.2
# Of CIDEr-D: how far a caption's length may be off, in bigrams.
SIGMA = 6.0
# So that a caption without a match has a logarithm.
TINY, SMALL = 1e-15, 1e-9


@dataclass(frozen=True)
class CaptionScores:
    """One caption an image, beside its references.

    Attributes:
        correct: int64 [images, 4], n-grams that a reference has too, clipped at the most that one has.
        guessed: int64 [images, 4], n-grams.
        length: int64 [images], tokens.
        reference_length: int64 [images], of the reference closest in length, of equals the shorter.
        rouge_l, cider: float64 [images].
    """

    correct: np.ndarray
    guessed: np.ndarray
    length: np.ndarray
    reference_length: np.ndarray
    rouge_l: np.ndarray
    cider: np.ndarray

    @classmethod
    def of(cls, candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> CaptionScores:
        """Score captions.

        Args:
            candidates: [images].
            references: [images][at least one].
        """
        rouge = [rouge_l(tokens, each) for tokens, each in zip(candidates, references, strict=True)]
        candidates = [_parted(tokens) for tokens in candidates]
        references = [[_parted(tokens) for tokens in each] for each in references]
        counted = [_counts(tokens) for tokens in candidates]
        told = [[_counts(tokens) for tokens in each] for each in references]
        images = len(candidates)
        correct, guessed = np.zeros((images, ORDERS), np.int64), np.zeros((images, ORDERS), np.int64)
        closest = np.zeros(images, np.int64)
        for image, (tokens, own, others) in enumerate(zip(candidates, counted, told, strict=True)):
            guessed[image] = [max(0, len(tokens) - order) for order in range(ORDERS)]
            for order in range(ORDERS):
                correct[image, order] = sum(
                    min(count, max(other[order].get(gram, 0) for other in others)) for gram, count in own[order].items()
                )
            lengths = [len(reference) for reference in references[image]]
            closest[image] = min(lengths, key=lambda length: (abs(length - len(tokens)), length))
        length = np.array([len(tokens) for tokens in candidates], np.int64)
        return cls(correct, guessed, length, closest, np.array(rouge), cider_d(counted, told))

    def bleu(self, drawn: np.ndarray | None = None) -> np.ndarray:
        """BLEU-1 to 4 of the whole set, or of draws.

        Args:
            drawn: int or float [draws, images], how often each image is in a draw.

        Returns:
            float64 [4], or [draws, 4].
        """
        weights = np.ones((1, len(self.length))) if drawn is None else np.asarray(drawn, np.float64)
        correct, guessed = weights @ self.correct, weights @ self.guessed
        logs = np.log((correct + TINY) / (guessed + SMALL))
        means = np.exp(np.cumsum(logs, axis=1) / np.arange(1, ORDERS + 1))
        ratio = (weights @ self.length + TINY) / (weights @ self.reference_length + SMALL)
        found = means * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)[:, None]
        return found[0] if drawn is None else found

    def measured(self) -> Measured:
        """By the names of results.json, for intervals and comparisons."""

        def bleu(order: int) -> Statistic:
            return lambda weights: self.bleu(weights)[:, order]

        counts = np.column_stack([self.correct, self.guessed, self.length, self.reference_length])
        names = [f"bleu_{order}" for order in range(1, ORDERS + 1)]
        others = {name: bleu(order) for order, name in enumerate(names)}
        return Measured({"rouge_l": self.rouge_l, "cider": self.cider}, others, dict.fromkeys(names, counts))


Counts = list[Counter[tuple[str, ...]]]


def _parted(tokens: Tokens) -> list[str]:
    """What a no-break space joins ("22 3/4") is one token to ROUGE_L, and two to the others."""
    return [part for token in tokens for part in (token.split("\u00a0") if "\u00a0" in token else (token,))]


def _counts(tokens: Tokens) -> Counts:
    """n-grams of each order, and how often each stands there."""
    return [Counter(zip(*(tokens[start:] for start in range(order)), strict=False)) for order in range(1, ORDERS + 1)]


def rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """F of the longest common subsequence: the best precision and the best recall, each over all references."""
    if not candidate:
        return 0.0
    common = [longest_common(candidate, reference) for reference in references]
    precision = max(common) / len(candidate)
    recall = max(length / max(1, len(reference)) for length, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(one: Tokens, other: Tokens) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of one number.

    Source: Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for place, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << place
    whole = (1 << len(one)) - 1
    row = whole
    for token in other:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & whole
    return len(one) - row.bit_count()


def cider_d(candidates: Sequence[Counts], references: Sequence[Sequence[Counts]]) -> np.ndarray:
    """CIDEr-D of every image: float64 [images]. Of one image all n-grams weigh nothing, and it is 0."""
    images = len(candidates)
    found = [Counter[tuple[str, ...]]() for _ in range(ORDERS)]
    for told in references:
        for order in range(ORDERS):
            found[order].update({gram for each in told for gram in each[order]})
    weight = [{gram: math.log(images / count) for gram, count in of.items()} for of in found]
    unseen = math.log(images) if images else 0.0
    scores = np.zeros(images)
    for image, (own, others) in enumerate(zip(candidates, references, strict=True)):
        mine = [_Weighted.of(own[order], weight[order], unseen) for order in range(ORDERS)]
        length = own[1].total()
        for other in others:
            off = math.exp(-((length - other[1].total()) ** 2) / (2 * SIGMA**2))
            for order in range(ORDERS):
                scores[image] += off * mine[order].like(_Weighted.of(other[order], weight[order], unseen))
        scores[image] *= 10 / (ORDERS * len(others))
    return scores


@dataclass(frozen=True)
class _Weighted:
    """n-grams of one order, by how often they stand there and how rare they are."""

    values: dict[tuple[str, ...], float]
    norm: float

    @classmethod
    def of(cls, counts: Counter[tuple[str, ...]], weight: dict[tuple[str, ...], float], unseen: float) -> _Weighted:
        values = {gram: count * weight.get(gram, unseen) for gram, count in counts.items()}
        return cls(values, math.sqrt(sum(value * value for value in values.values())))

    def like(self, other: _Weighted) -> float:
        """Cosine, what this one has too often being cut at what the other has."""
        if not self.norm or not other.norm:
            return 0.0
        shared = self.values.keys() & other.values.keys()
        return sum(min(self.values[g], other.values[g]) * other.values[g] for g in shared) / (self.norm * other.norm)
