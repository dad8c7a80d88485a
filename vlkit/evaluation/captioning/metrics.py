"""BLEU, ROUGE_L and CIDEr-D of captions, as COCO defines them, on tokens (see `ptb_tokens.py`).

Every number is computed by image, so that intervals can resample images: BLEU as the counts that it is made of, the
others as scores whose mean they are. CIDEr's statistic of the whole set, in how many images an n-gram occurs, stays
as it is when images are resampled.

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
    """The scores of one caption an image against its references.

    Attributes:
        correct: int64 [images, 4], n-grams that a reference has too, clipped at the most that one has.
        total: int64 [images, 4], n-grams of the caption.
        length: int64 [images], tokens.
        reference_length: int64 [images], of the reference closest in length, of equals the shorter.
        rouge_l, cider: float64 [images].
    """

    correct: np.ndarray
    total: np.ndarray
    length: np.ndarray
    reference_length: np.ndarray
    rouge_l: np.ndarray
    cider: np.ndarray

    @classmethod
    def from_tokens(cls, candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> CaptionScores:
        """Score captions, tokenized as COCO does.

        Args:
            candidates: [images].
            references: [images][at least one].
        """
        rouge = [rouge_l(tokens, others) for tokens, others in zip(candidates, references, strict=True)]
        captions = [_split_no_break(tokens) for tokens in candidates]
        split_references = [[_split_no_break(tokens) for tokens in others] for others in references]
        length = np.array([len(tokens) for tokens in captions], np.int64)
        closest = [
            _closest_length(len(tokens), [len(other) for other in others])
            for tokens, others in zip(captions, split_references, strict=True)
        ]
        image_of = np.repeat(np.arange(len(captions)), [len(others) for others in split_references])
        counts = _count_ngrams([*captions, *(tokens for others in split_references for tokens in others)])
        ngrams = [_NGrams(count[: len(captions)], count[len(captions) :], image_of) for count in counts]
        correct = np.column_stack([count.correct() for count in ngrams])
        total = np.maximum(0, length[:, None] - np.arange(ORDERS))
        return cls(correct, total, length, np.array(closest, np.int64), np.array(rouge), _cider_d(ngrams))

    def bleu(self, drawn: np.ndarray | None = None) -> np.ndarray:
        """Return BLEU-1 to 4 of the whole set, or of draws.

        Args:
            drawn: int or float [draws, images], how often each image is in a draw.

        Returns:
            float64 [4], or [draws, 4].
        """
        weights = np.ones((1, len(self.length))) if drawn is None else np.asarray(drawn, np.float64)
        correct, total = weights @ self.correct, weights @ self.total
        logs = np.log((correct + TINY) / (total + SMALL))
        means = np.exp(np.cumsum(logs, axis=1) / np.arange(1, ORDERS + 1))
        ratio = (weights @ self.length + TINY) / (weights @ self.reference_length + SMALL)
        scores: np.ndarray = means * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)[:, None]
        return scores[0] if drawn is None else scores

    def per_query_metrics(self) -> PerQueryMetrics:
        """Return the scores by their names in results.json, for intervals and comparisons."""

        def bleu(order: int) -> Statistic:
            return lambda weights: self.bleu(weights)[:, order]

        counts = np.column_stack([self.correct, self.total, self.length, self.reference_length])
        names = [f"bleu_{order}" for order in range(1, ORDERS + 1)]
        others = {name: bleu(order) for order, name in enumerate(names)}
        return PerQueryMetrics({"rouge_l": self.rouge_l, "cider": self.cider}, others, dict.fromkeys(names, counts))


def _closest_length(length: int, lengths: Sequence[int]) -> int:
    """Return the length nearest to `length`; of two that are as near, the shorter."""
    return min(lengths, key=lambda size: (abs(size - length), size))


def _split_no_break(tokens: Tokens) -> list[str]:
    """Split tokens at no-break spaces ("22 3/4"): ROUGE_L counts one token there, the other metrics two."""
    return [part for token in tokens for part in (token.split("\u00a0") if "\u00a0" in token else (token,))]


def _count_ngrams(captions: Sequence[Sequence[str]]) -> list[sparse.csr_matrix]:
    """Count each n-gram in each caption, for each order: float64 [captions, n-grams]."""
    known: dict[str, int] = {}
    words = np.array([known.setdefault(word, len(known)) for tokens in captions for word in tokens], np.int64)
    sizes = np.array([len(tokens) for tokens in captions], np.int64)
    caption_of = np.repeat(np.arange(len(captions)), sizes)
    # How many words of its caption follow each word.
    following = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(words)) - 1
    counts, grams = [], words
    for order in range(ORDERS):
        if order:
            # An n-gram is the one that is a word shorter, and a word.
            longer = grams[:-1] * len(known) + words[order:]
            _, grams = np.unique(longer, return_inverse=True) if len(longer) else (longer, longer)
        whole = np.flatnonzero(following[: len(grams)] >= order)
        width = int(grams.max(initial=0)) + 1
        indices = (caption_of[whole], grams[whole])
        counts.append(sparse.csr_matrix((np.ones(len(whole)), indices), shape=(len(captions), width)))
    return counts


@dataclass(frozen=True)
class _NGrams:
    """n-grams of one order.

    Attributes:
        captions, references: counts, as `_count_ngrams` gives them.
        image_of: int64 [references], the caption of each.
    """

    captions: sparse.csr_matrix
    references: sparse.csr_matrix
    image_of: np.ndarray

    def correct(self) -> np.ndarray:
        """Return int64 [captions]: n-grams that a reference has, too, none more often than one of them has it."""
        references = self.references.tocoo()
        width = self.references.shape[1]
        keys = self.image_of[references.row] * width + references.col
        order = np.argsort(keys, kind="stable")
        firsts = np.flatnonzero(np.diff(keys[order], prepend=-1))
        most = np.maximum.reduceat(references.data[order], firsts) if len(firsts) else np.zeros(0)
        indices = np.divmod(keys[order][firsts], width)
        best = sparse.csr_matrix((most, indices), shape=self.captions.shape)
        return np.asarray(self.captions.minimum(best).sum(axis=1)).ravel().astype(np.int64)

    def similarity(self) -> np.ndarray:
        """Return float64 [references]: the cosine of a caption and its reference, rare n-grams weighing more.

        A caption's count is clipped at the reference's.
        """
        images = self.captions.shape[0]
        membership = sparse.csr_matrix(
            (np.ones(len(self.image_of)), (self.image_of, np.arange(len(self.image_of)))),
            shape=(images, len(self.image_of)),
        )
        frequency = np.bincount((membership @ self.references).tocoo().col, minlength=self.references.shape[1])
        weight = sparse.diags(math.log(max(1, images)) - np.log(np.maximum(1, frequency)))
        captions, references = (self.captions @ weight).tocsr(), (self.references @ weight).tocsr()
        sizes = _norms(captions)[self.image_of] * _norms(references)
        shared = np.asarray(captions[self.image_of].minimum(references).multiply(references).sum(axis=1)).ravel()
        cosine: np.ndarray = np.divide(shared, sizes, out=np.zeros(len(sizes)), where=sizes > 0)
        return cosine


def _norms(rows: sparse.csr_matrix) -> np.ndarray:
    norms: np.ndarray = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    return norms


def _cider_d(ngrams: Sequence[_NGrams]) -> np.ndarray:
    """Return CIDEr-D of every image, float64 [images]; with one image all n-grams weigh nothing, and it is 0."""
    image_of, images = ngrams[0].image_of, ngrams[0].captions.shape[0]
    captions, references = (
        np.asarray(counts.sum(axis=1)).ravel() for counts in (ngrams[1].captions, ngrams[1].references)
    )
    penalty = np.exp(-((captions[image_of] - references) ** 2) / (2 * SIGMA**2))
    similarity = penalty * sum(count.similarity() for count in ngrams) / ORDERS
    return 10 * np.bincount(image_of, similarity, minlength=images) / np.bincount(image_of, minlength=images)


def rouge_l(candidate: Tokens, references: Sequence[Tokens]) -> float:
    """Return F of the longest common subsequence: the best precision and the best recall, each over all references."""
    # COCO gives a caption without tokens one empty token.
    candidate, references = candidate or [""], [reference or [""] for reference in references]
    common = [longest_common_subsequence(candidate, reference) for reference in references]
    precision = max(common) / len(candidate)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common_subsequence(one: Tokens, other: Tokens) -> int:
    """Return the length of the longest common subsequence, a row of the table at a time as the bits of one number.

    Source: Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """
    positions: dict[str, int] = {}
    for position, token in enumerate(one):
        positions[token] = positions.get(token, 0) | 1 << position
    whole = (1 << len(one)) - 1
    row = whole
    for token in other:
        matches = row & positions.get(token, 0)
        row = (row + matches | row - matches) & whole
    return len(one) - row.bit_count()
