"""BLEU, ROUGE_L and CIDEr-D of captions, as COCO defines them, on tokens (see `caption_tokens.py`).

Every number is kept by image as well, so that intervals can resample images: BLEU as the counts that it is made of,
the others as scores whose mean they are. What CIDEr knows of the whole set, in how many images an n-gram stands, stays
as it is when images are drawn again.

Sources: Papineni et al. 2002, Lin 2004, Vedantam et al. 2015, and the choices of COCO's evaluation server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from vlkit.evaluation.comparison import PerQueryMetrics
from vlkit.evaluation.statistics import Statistic

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
    def from_tokens(cls, candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> CaptionScores:
        """Score captions.

        Args:
            candidates: [images].
            references: [images][at least one].
        """
        rouge = [rouge_l(tokens, each) for tokens, each in zip(candidates, references, strict=True)]
        made = [_parted(tokens) for tokens in candidates]
        told = [[_parted(tokens) for tokens in each] for each in references]
        length = np.array([len(tokens) for tokens in made], np.int64)
        closest = [
            _closest(len(tokens), [len(other) for other in each]) for tokens, each in zip(made, told, strict=True)
        ]
        image_of = np.repeat(np.arange(len(made)), [len(each) for each in told])
        counts = _counts([*made, *(tokens for each in told for tokens in each)])
        grams = [_Grams(each[: len(made)], each[len(made) :], image_of) for each in counts]
        correct = np.column_stack([each.correct() for each in grams])
        guessed = np.maximum(0, length[:, None] - np.arange(ORDERS))
        return cls(correct, guessed, length, np.array(closest, np.int64), np.array(rouge), _cider_d(grams))

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

    def measured(self) -> PerQueryMetrics:
        """By the names of results.json, for intervals and comparisons."""

        def bleu(order: int) -> Statistic:
            return lambda weights: self.bleu(weights)[:, order]

        counts = np.column_stack([self.correct, self.guessed, self.length, self.reference_length])
        names = [f"bleu_{order}" for order in range(1, ORDERS + 1)]
        others = {name: bleu(order) for order, name in enumerate(names)}
        return PerQueryMetrics({"rouge_l": self.rouge_l, "cider": self.cider}, others, dict.fromkeys(names, counts))


def _closest(length: int, lengths: Sequence[int]) -> int:
    """The length nearest to `length`; of two that are as near, the shorter."""
    return min(lengths, key=lambda size: (abs(size - length), size))


def _parted(tokens: Tokens) -> list[str]:
    """What a no-break space joins ("22 3/4") is one token to ROUGE_L, and two to the others."""
    return [part for token in tokens for part in (token.split("\u00a0") if "\u00a0" in token else (token,))]


def _counts(captions: Sequence[Sequence[str]]) -> list[sparse.csr_matrix]:
    """How often each n-gram stands in each caption, of each order: float64 [captions, n-grams]."""
    known: dict[str, int] = {}
    words = np.array([known.setdefault(word, len(known)) for tokens in captions for word in tokens], np.int64)
    sizes = np.array([len(tokens) for tokens in captions], np.int64)
    caption_of = np.repeat(np.arange(len(captions)), sizes)
    # How many words of its caption come after each.
    behind = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(words)) - 1
    found, grams = [], words
    for order in range(ORDERS):
        if order:
            # A gram is the one that is a word shorter, and a word.
            longer = grams[:-1] * len(known) + words[order:]
            _, grams = np.unique(longer, return_inverse=True) if len(longer) else (longer, longer)
        whole = np.flatnonzero(behind[: len(grams)] >= order)
        width = int(grams.max(initial=0)) + 1
        places = (caption_of[whole], grams[whole])
        found.append(sparse.csr_matrix((np.ones(len(whole)), places), shape=(len(captions), width)))
    return found


@dataclass(frozen=True)
class _Grams:
    """n-grams of one order.

    Attributes:
        made, told: counts of the captions, and of the references, as `_counts` gives them.
        image_of: int64 [references], the caption that each belongs to.
    """

    made: sparse.csr_matrix
    told: sparse.csr_matrix
    image_of: np.ndarray

    def correct(self) -> np.ndarray:
        """int64 [captions]: n-grams that a reference has, too, none more often than one of them has it."""
        references = self.told.tocoo()
        width = self.told.shape[1]
        keys = self.image_of[references.row] * width + references.col
        order = np.argsort(keys, kind="stable")
        firsts = np.flatnonzero(np.diff(keys[order], prepend=-1))
        most = np.maximum.reduceat(references.data[order], firsts) if len(firsts) else np.zeros(0)
        places = np.divmod(keys[order][firsts], width)
        best = sparse.csr_matrix((most, places), shape=self.made.shape)
        return np.asarray(self.made.minimum(best).sum(axis=1)).ravel().astype(np.int64)

    def alike(self) -> np.ndarray:
        """float64 [references]: the cosine of a caption and its reference, n-grams weighed by how rare they are.

        What a caption says too often is cut at what the reference has.
        """
        images = self.made.shape[0]
        of_image = sparse.csr_matrix(
            (np.ones(len(self.image_of)), (self.image_of, np.arange(len(self.image_of)))),
            shape=(images, len(self.image_of)),
        )
        standing_in = np.bincount((of_image @ self.told).tocoo().col, minlength=self.told.shape[1])
        weight = sparse.diags(math.log(max(1, images)) - np.log(np.maximum(1, standing_in)))
        made, told = (self.made @ weight).tocsr(), (self.told @ weight).tocsr()
        sizes = _norms(made)[self.image_of] * _norms(told)
        shared = np.asarray(made[self.image_of].minimum(told).multiply(told).sum(axis=1)).ravel()
        return np.divide(shared, sizes, out=np.zeros(len(sizes)), where=sizes > 0)


def _norms(rows: sparse.csr_matrix) -> np.ndarray:
    return np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())


def _cider_d(grams: Sequence[_Grams]) -> np.ndarray:
    """CIDEr-D of every image: float64 [images]. Of one image all n-grams weigh nothing, and it is 0."""
    image_of, images = grams[0].image_of, grams[0].made.shape[0]
    made, told = (np.asarray(counts.sum(axis=1)).ravel() for counts in (grams[1].made, grams[1].told))
    off = np.exp(-((made[image_of] - told) ** 2) / (2 * SIGMA**2))
    alike = off * sum(each.alike() for each in grams) / ORDERS
    return 10 * np.bincount(image_of, alike, minlength=images) / np.bincount(image_of, minlength=images)


def rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """F of the longest common subsequence: the best precision and the best recall, each over all references."""
    # One without tokens has, to COCO, an empty one.
    candidate, references = candidate or [""], [reference or [""] for reference in references]
    common = [longest_common(candidate, reference) for reference in references]
    precision = max(common) / len(candidate)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
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
