"""Metrics of all right items of a query: average precision, and the fraction of them among the first k.

Both are expectations over random orders within each tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Up to this many right items a query, counting is faster than sorting.
MOST_COUNTED = 8
# float32 counts exactly up to here.
EXACT = 2**24


@dataclass(frozen=True)
class MatchPositions:
    """The positions of the right items of some queries; every right item of every query is an entry.

    Attributes:
        query: int64 [entries], ascending.
        above: int64 [entries], items that score above it.
        tied: int64 [entries], items that score the same, itself included.
        right_above, tied_right: int64 [entries], the right ones among these.
        queries: how many queries there are; each has an entry at least.
    """

    query: np.ndarray
    above: np.ndarray
    tied: np.ndarray
    right_above: np.ndarray
    tied_right: np.ndarray
    queries: int

    @classmethod
    def from_scores(
        cls, scores: torch.Tensor, rows: torch.Tensor, items: torch.Tensor, mask: torch.Tensor
    ) -> MatchPositions:
        """Count the entries (rows, items) of a block of scores [queries, items]; `rows` ascend.

        Args:
            mask: memory to compare in, as large as the scores.
        """
        right = scores[rows, items]
        few = int(rows.bincount().max()) <= MOST_COUNTED
        above, tied = _count_one_by_one(scores, rows, right, mask) if few else _count_sorted(scores, rows, right)
        return cls.from_counts(*(part.cpu().numpy() for part in (rows, right, above, tied)))

    @classmethod
    def from_counts(cls, query: np.ndarray, values: np.ndarray, above: np.ndarray, tied: np.ndarray) -> MatchPositions:
        """Build from the entries' scores, of queries 0, 1, 2, ..., and from their counts among all items."""
        order = np.lexsort((-values, query))
        starts = _starts(query)[query]
        # Among the query's own entries, sorted: those before the first, and up to the last, of equal value.
        fresh = np.ones(len(order), bool)
        fresh[1:] = (query[order][1:] != query[order][:-1]) | (values[order][1:] != values[order][:-1])
        tie = np.cumsum(fresh) - 1
        first, size = np.flatnonzero(fresh), np.bincount(tie)
        right_above, tied_right = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
        right_above[order], tied_right[order] = first[tie] - starts, size[tie]
        return cls(query, above, tied, right_above, tied_right, int(query.max(initial=-1)) + 1)

    def best(self) -> np.ndarray:
        """Return int64 [queries, 3]: items above the best right one, wrong and right ones that tie with it."""
        ahead = np.flatnonzero(self.right_above == 0)
        ahead = ahead[np.searchsorted(self.query[ahead], np.arange(self.queries))]
        tied, tied_right = self.tied[ahead], self.tied_right[ahead]
        return np.stack([self.above[ahead], tied - tied_right, tied_right], axis=1)

    def average_precision(self) -> np.ndarray:
        """Return float64 [queries]: the mean, over the right items, of the precision down to each of them.

        At position p of a tie of n items, r of them right, the others right before it are (p - 1)(r - 1)/(n - 1) on
        average; what is above the tie is known. Summed over p, with H the harmonic numbers:
        (R + 1)(H(N + n) - H(N)) + (r - 1)/(n - 1) (n - (N + 1)(H(N + n) - H(N))).
        """
        harmonic = np.concatenate(
            [[0.0], np.cumsum(1.0 / np.arange(1, int((self.above + self.tied).max(initial=0)) + 1))]
        )
        spread = harmonic[self.above + self.tied] - harmonic[self.above]
        share = (self.tied_right - 1) / np.maximum(self.tied - 1, 1)
        inner = (self.right_above + 1) * spread + share * (self.tied - (self.above + 1) * spread)
        # An entry that ties with nothing needs no sums that round.
        precision = np.where(self.tied == 1, (self.right_above + 1) / (self.above + 1), inner / self.tied)
        return self._mean(precision)

    def fraction_recall(self, k: int) -> np.ndarray:
        """Return float64 [queries]: the fraction of the right items that are among the first k."""
        return self._mean(np.clip((k - self.above) / self.tied, 0.0, 1.0))

    def _mean(self, values: np.ndarray) -> np.ndarray:
        counts = np.bincount(self.query, minlength=self.queries)
        return np.bincount(self.query, weights=values, minlength=self.queries) / counts


def _starts(query: np.ndarray) -> np.ndarray:
    """Return for each query the position of its first entry."""
    return np.concatenate([[0], np.cumsum(np.bincount(query))[:-1]])


def count_compared(
    compare: Callable[..., torch.Tensor],
    scores: torch.Tensor,
    against: torch.Tensor,
    mask: torch.Tensor,
    dim: int = 1,
) -> torch.Tensor:
    """Count in each row of scores, int64 [queries], those that compare so with its number; with dim 0 in each column.

    It compares into numbers and multiplies by ones: comparing into bools takes four times as long, their sum three.

    Args:
        compare: torch.gt, torch.ge or torch.eq.
        scores: [queries, items].
        against: [queries] or [items].
        mask: memory as large as the scores, of their type.
    """
    ones = compare(scores, against.unsqueeze(dim), out=mask[: len(scores)])
    if scores.shape[dim] >= EXACT:
        return ones.sum(dim, dtype=torch.float64).long()
    summing = ones.new_ones(scores.shape[dim])
    return (ones @ summing if dim == 1 else summing @ ones).long()


def best_counts(
    above: torch.Tensor, tied: torch.Tensor, query: torch.Tensor, right: torch.Tensor, best: torch.Tensor
) -> torch.Tensor:
    """Return int64 [queries, 3]: items above the best right one, wrong ones that tie with it, right ones that do.

    Args:
        above, tied: int64 [queries], items that score above the best right one, and the same.
        query: int64 [entries], the query of each right item.
        right: [entries], its score.
        best: [queries], the highest of them.
    """
    tied_right = torch.zeros_like(tied).index_add_(0, query, (right == best[query]).to(tied.dtype))
    return torch.stack([above, tied - tied_right, tied_right], dim=1)


def _count_one_by_one(
    scores: torch.Tensor, rows: torch.Tensor, right: torch.Tensor, mask: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Count above and tied of each entry, in one pass over the scores for every further right item of a query."""
    above, tied = torch.empty_like(rows), torch.empty_like(rows)
    ahead = rows.new_tensor(_starts(rows.cpu().numpy()))
    within = torch.arange(len(rows), device=rows.device) - ahead[rows]
    for number in range(int(within.max()) + 1):
        chosen = torch.nonzero(within == number)[:, 0]
        compared = scores if len(chosen) == len(scores) else scores[rows[chosen]]
        above[chosen] = count_compared(torch.gt, compared, right[chosen], mask)
        tied[chosen] = count_compared(torch.eq, compared, right[chosen], mask)
    return above, tied


def _count_sorted(scores: torch.Tensor, rows: torch.Tensor, right: torch.Tensor) -> Sequence[torch.Tensor]:
    """Count the same by sorting each query's scores once and searching its right items."""
    ascending = scores.sort(dim=1).values
    ahead = rows.new_tensor(_starts(rows.cpu().numpy()))
    within = torch.arange(len(rows), device=rows.device) - ahead[rows]
    padded = scores.new_full((len(scores), int(within.max()) + 1), torch.inf)
    padded[rows, within] = right
    below = torch.searchsorted(ascending, padded)[rows, within]
    up_to = torch.searchsorted(ascending, padded, right=True)[rows, within]
    return scores.shape[1] - up_to, up_to - below
