"""Scores -> ranks -> recall@k, MRR, median and mean rank; exact, tied scores and all, without the full score matrix.

A query's rank is that of its first hit. Where scores tie, the order within the tie is nobody's merit: every metric is
its expectation over random orders of the tied items (the median rank: the median of the expected ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlkit.data.labels import Groups, matching_pairs
from vlkit.distributed import ALONE, World
from vlkit.errors import NonFiniteError
from vlkit.evaluation.precision import Places, counted

KS = (1, 5, 10)
# Scores held at a time, by device.
BLOCK_SCORES = {"cpu": 2**22, "cuda": 2**26}


@dataclass(frozen=True)
class Ranks:
    """What is needed of a ranking, for each query that has a match.

    Attributes:
        better: int64 [queries], wrong items that score above the best right one.
        tied_wrong: int64 [queries], wrong items that score the same as it.
        tied_right: int64 [queries], right items that score the same, itself included.
        top: int64 [queries, up to 5], the items ranked first.
        query: int64 [queries], position of each of these queries among those asked; one without a match is left out.
        gallery: number of items.
        precision: float64 [queries, 1 + len(KS)], average precision and the fraction of all right items among the first
            k (see `precision.py`); None where it was not asked for.
    """

    better: np.ndarray
    tied_wrong: np.ndarray
    tied_right: np.ndarray
    top: np.ndarray
    query: np.ndarray
    gallery: int
    precision: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.better)

    def recall(self, k: int) -> np.ndarray:
        """float64 [queries]: probability that a right item stands among the first k (k is clamped to the gallery)."""
        room = np.clip(min(k, self.gallery) - self.better, 0, None)
        return 1 - self._none_within(room)

    def expected_rank(self) -> np.ndarray:
        """float64 [queries]: rank, from 1, of the first right item.

        In a random order of r right and w wrong ones the first right one stands, on average, at (r + w + 1) / (r + 1).
        """
        return self.better + (self.tied_wrong + self.tied_right + 1) / (self.tied_right + 1)

    def reciprocal(self) -> np.ndarray:
        """float64 [queries]: expectation of 1 / rank."""
        expected = 1.0 / (self.better + 1)
        for query in np.flatnonzero(self.tied_wrong):
            places = np.arange(1, self.tied_wrong[query] + 2)
            none_yet = _none_within(places - 1, self.tied_wrong[query], self.tied_right[query])
            none_still = _none_within(places, self.tied_wrong[query], self.tied_right[query])
            expected[query] = ((none_yet - none_still) / (self.better[query] + places)).sum()
        return expected

    def _none_within(self, room: np.ndarray) -> np.ndarray:
        chance = np.where(room > 0, 0.0, 1.0)
        for query in np.flatnonzero((self.tied_wrong > 0) & (room > 0)):
            chance[query] = _none_within(room[query : query + 1], self.tied_wrong[query], self.tied_right[query])[0]
        return chance


def _none_within(room: np.ndarray, wrong: int, right: int) -> np.ndarray:
    """Probability that the first `room` places of a random order of wrong and right items are all wrong.

    C(wrong, room) / C(wrong + right, room), as a running product.
    """
    drawn = np.arange(wrong + 1)
    factors = np.clip(wrong - drawn, 0, None) / (wrong + right - drawn)
    chances = np.concatenate([[1.0], np.cumprod(factors)])
    return chances[np.minimum(room, wrong + 1)]


def rank(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_groups: Sequence[Groups],
    gallery_groups: Sequence[Groups],
    *,
    keep: int = 5,
    every: bool = False,
    world: World = ALONE,
) -> Ranks:
    """Rank the gallery for every query by the product of their embeddings.

    The best right score is read from the same block product that the others are counted in: a second way of computing
    it would round differently and count an item as better than itself.

    Args:
        queries: float32 [queries, width].
        gallery: float32 [items, width].
        query_groups, gallery_groups: an item is right for a query where their ids intersect (see `labels.py`).
        keep: how many of the first items to remember.
        every: look at every right item, not at the best alone: for average precision.
        world: processes that share the queries; each gets all ranks.

    Raises:
        NonFiniteError: an embedding that is not finite.
    """
    # A sum is finite if all are; it needs no memory, and embeddings are too small for it to overflow.
    if not (torch.isfinite(queries.sum()) and torch.isfinite(gallery.sum())):
        raise NonFiniteError(
            "the model gives embeddings that are not finite numbers",
            hint="a lower --lr or a longer --warmup keeps training finite; --precision fp32 where fp16 overflows",
        )
    right_query, right_item = matching_pairs(query_groups, gallery_groups)
    asked, keep = np.unique(right_query), min(keep, len(gallery))
    mine = asked[world.share(len(asked))]
    block = min(max(1, BLOCK_SCORES[gallery.device.type] // max(1, len(gallery))), max(1, len(mine)))
    # Scores, comparisons and results live in memory taken once: touching fresh memory costs more than the arithmetic.
    buffer, mask = torch.empty(2, block, len(gallery), dtype=gallery.dtype, device=gallery.device)
    counts, top = np.empty((len(mine), 3), np.int64), np.empty((len(mine), keep), np.int64)
    precision = np.empty((len(mine), 1 + len(KS)))
    for start in range(0, len(mine), block):
        chosen = mine[start : start + block]
        low, high = np.searchsorted(right_query, [chosen[0], chosen[-1] + 1])
        rows = torch.from_numpy(np.searchsorted(chosen, right_query[low:high])).to(gallery.device)
        items = torch.from_numpy(right_item[low:high]).to(gallery.device)
        asking = queries[torch.from_numpy(chosen).to(queries.device)]
        scores = torch.mm(asking, gallery.T, out=buffer[: len(chosen)])
        done = slice(start, start + len(chosen))
        counts[done] = _count(scores, rows, items, mask).T.cpu()
        top[done] = scores.topk(keep, dim=1).indices.cpu()
        if every:
            places = Places.of(scores, rows, items, mask)
            precision[done] = np.stack([places.average_precision(), *(places.found(k) for k in KS)], axis=1)
    counts, top, precision = (
        world.gathered(torch.from_numpy(part).to(gallery.device), len(asked)).cpu().numpy()
        for part in (counts, top, precision)
    )
    return Ranks(*counts.T, top, asked, len(gallery), precision if every else None)


def _count(scores: torch.Tensor, rows: torch.Tensor, items: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """int64 [3, queries]: better, tied_wrong and tied_right of a block; (rows, items) are its right scores' places."""
    right = scores[rows, items]
    best = torch.full((len(scores),), -torch.inf, device=scores.device, dtype=scores.dtype)
    best.scatter_reduce_(0, rows, right, "amax")
    better, tied = (counted(compare, scores, best, mask) for compare in (torch.gt, torch.eq))
    tied_right = torch.zeros_like(tied).index_add_(0, rows, (right == best[rows]).to(tied.dtype))
    return torch.stack([better, tied - tied_right, tied_right])


def metric_values(ranks: Ranks) -> dict[str, np.ndarray]:
    """Each metric's value for each query, float64 [queries]; a metric is their mean, median_rank their median."""
    expected = ranks.expected_rank()
    values = {
        **{f"recall@{k}": ranks.recall(k) for k in KS},
        "mrr": ranks.reciprocal(),
        "median_rank": expected,
        "mean_rank": expected,
    }
    if ranks.precision is not None:
        values |= dict(zip(("map", *(f"fraction_recall@{k}" for k in KS)), ranks.precision.T, strict=True))
    return values
