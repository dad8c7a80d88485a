"""Scores -> ranks -> recall@k, MRR, median and mean rank: exact, ties included, without the full score matrix.

A query's rank is that of its first hit. Where scores tie, every metric is its expectation over random orders of the
tied items (the median rank: the median of the expected ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlkit.data.labels import Groups
from vlkit.distributed import SINGLE, World
from vlkit.errors import NonFiniteError
from vlkit.evaluation.comparison import PerQueryMetrics
from vlkit.evaluation.retrieval.average_precision import MatchPositions, best_counts, count_compared
from vlkit.evaluation.retrieval.reverse_ranking import ReverseRanking, too_many_matches
from vlkit.evaluation.retrieval.score_blocks import Block, Blocks, Matches
from vlkit.evaluation.retrieval.topk import items_of, ranking_keys, top_items
from vlkit.evaluation.statistics import weighted_median

KS = (1, 5, 10)


@dataclass(frozen=True)
class Ranks:
    """Counts of a ranking, for each query that has a match.

    Attributes:
        better: int64 [queries], wrong items that score above the best right one.
        tied_wrong: int64 [queries], wrong items that score the same as it.
        tied_right: int64 [queries], right items that score the same, itself included.
        top: int64 [queries, up to `keep`], the items ranked first; of equal scores, the earlier in the gallery.
        query: int64 [queries], position of each of these queries among all; one without a match is left out.
        gallery: number of items.
        precision: float64 [queries, 1 + len(KS)], average precision and the fraction of all right items among the first
            k (see `average_precision.py`); None unless `all_matches` was set.
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
        """Return float64 [queries]: the probability that a right item is among the first k (clamped to the gallery)."""
        room = np.clip(min(k, self.gallery) - self.better, 0, None)
        return 1.0 - self._none_within(room)

    def expected_rank(self) -> np.ndarray:
        """Return float64 [queries]: the rank, from 1, of the first right item.

        In a random order of r right and w wrong items the first right one has, on average, rank (r + w + 1) / (r + 1).
        """
        rank: np.ndarray = self.better + (self.tied_wrong + self.tied_right + 1) / (self.tied_right + 1)
        return rank

    def reciprocal(self) -> np.ndarray:
        """Return float64 [queries]: the expectation of 1 / rank."""
        expected = 1.0 / (self.better + 1)
        for query in np.flatnonzero(self.tied_wrong):
            positions = np.arange(1, self.tied_wrong[query] + 2)
            none_yet = _none_within(positions - 1, self.tied_wrong[query], self.tied_right[query])
            none_still = _none_within(positions, self.tied_wrong[query], self.tied_right[query])
            expected[query] = ((none_yet - none_still) / (self.better[query] + positions)).sum()
        return expected

    def _none_within(self, room: np.ndarray) -> np.ndarray:
        """Return float64 [queries]: the probability that no right item is among `room` positions behind `better`."""
        chance = np.where(room > 0, 0.0, 1.0)
        for query in np.flatnonzero((self.tied_wrong > 0) & (room > 0)):
            chance[query] = _none_within(room[query : query + 1], self.tied_wrong[query], self.tied_right[query])[0]
        return chance


def _none_within(room: np.ndarray, wrong: int, right: int) -> np.ndarray:
    """Return the probability that the first `room` positions of a random order of the items are all wrong.

    C(wrong, room) / C(wrong + right, room), as a running product.
    """
    drawn = np.arange(wrong + 1)
    factors = np.clip(wrong - drawn, 0, None) / (wrong + right - drawn)
    chances = np.concatenate([[1.0], np.cumprod(factors)])
    chance: np.ndarray = chances[np.minimum(room, wrong + 1)]
    return chance


def rank(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_groups: Sequence[Groups],
    gallery_groups: Sequence[Groups],
    *,
    keep: int = 5,
    all_matches: bool = False,
    world: World = SINGLE,
) -> Ranks:
    """Rank the gallery for every query by the product of their embeddings.

    The best right score is read from the same block product that the others are counted in: computed another way it
    would round differently, and an item would count as better than itself.

    Args:
        queries: float32 [queries, width].
        gallery: float32 [items, width].
        query_groups, gallery_groups: an item is right for a query where their ids intersect (see `labels.py`).
        keep: how many of the first items to remember.
        all_matches: count at every right item, not only at the best: for average precision.
        world: processes that share the queries; each gets all ranks.

    Raises:
        NonFiniteError: an embedding that is not finite.
    """
    _refuse_not_finite(queries, gallery)
    matches = Matches.from_groups(query_groups, gallery_groups)
    blocks = Blocks(queries, gallery, matches, matches.matched_queries[world.shard(len(matches.matched_queries))])
    rows = _ForwardRanking(blocks, keep, all_matches)
    for block in blocks:
        rows.add(block)
    return rows.ranks(len(matches.matched_queries), world)


def rank_both(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_groups: Sequence[Groups],
    gallery_groups: Sequence[Groups],
    *,
    keep: int = 5,
    all_matches: bool = False,
    world: World = SINGLE,
) -> tuple[Ranks, Ranks]:
    """Rank in both directions: the gallery for the queries, and the queries for the gallery.

    Both come from one product (see `reverse_ranking.py`) and equal what `rank` gives for each. Arguments as there.

    Raises:
        NonFiniteError: an embedding that is not finite.
    """
    if len(queries) < len(gallery):
        backward, forward = rank_both(
            gallery, queries, gallery_groups, query_groups, keep=keep, all_matches=all_matches, world=world
        )
        return forward, backward
    _refuse_not_finite(queries, gallery)
    matches = Matches.from_groups(query_groups, gallery_groups)
    if not (all_matches and too_many_matches(matches)):
        matched = matches.by_first()
        blocks = Blocks(queries, gallery, matches, matched[world.shard(len(matched))])
        # A query without a match has no ranks of its own, but items rank it.
        unmatched = np.setdiff1d(np.arange(len(queries)), matched)
        other_blocks = Blocks(queries, gallery, matches, unmatched[world.shard(len(unmatched))])
        columns = ReverseRanking(blocks, matches, keep=keep, all_matches=all_matches, world=world)
        for _ in range(2):
            rows = _ForwardRanking(blocks, keep, all_matches)
            for block in blocks:
                rows.add(block)
                columns.add(block)
            for block in other_blocks:
                columns.add(block)
            if columns.predictions_hold():
                return rows.ranks(len(matched), world), _ranks_of_columns(columns, len(queries))
    # Too many right queries an item, or a machine that never rounds the same twice.
    forward = rank(queries, gallery, query_groups, gallery_groups, keep=keep, all_matches=all_matches, world=world)
    backward = rank(gallery, queries, gallery_groups, query_groups, keep=keep, all_matches=all_matches, world=world)
    return forward, backward


def _refuse_not_finite(queries: torch.Tensor, gallery: torch.Tensor) -> None:
    # A sum is finite if all are; it needs no memory, and embeddings are too small for it to overflow.
    if not (torch.isfinite(queries.sum()) and torch.isfinite(gallery.sum())):
        raise NonFiniteError(
            "the model gives embeddings that are not finite numbers",
            hint="a lower --lr or a longer --warmup keeps training finite; --precision fp32 where fp16 overflows",
        )


class _ForwardRanking:
    """The ranks of the queries, which are the rows of some blocks."""

    def __init__(self, blocks: Blocks, keep: int, all_matches: bool) -> None:
        self.query, self.gallery, self.all_matches = blocks.query, blocks.gallery, all_matches
        self.counts = np.empty((len(self.query), 3), np.int64)
        self.top = np.empty((len(self.query), min(keep, len(self.gallery))), np.int64)
        self.precision = np.empty((len(self.query), 1 + len(KS)))

    def add(self, block: Block) -> None:
        """Count a block's scores."""
        if self.all_matches:
            positions = MatchPositions.from_scores(block.scores, block.rows, block.items, block.spare)
            self.counts[block.done], self.precision[block.done] = positions.best(), _precision(positions)
        else:
            self.counts[block.done] = _count(block).cpu()
        if self.top.shape[1]:
            keys = ranking_keys(*top_items(block.scores, self.top.shape[1], block.spare))
            self.top[block.done] = items_of(keys.sort(descending=True).values).cpu()

    def ranks(self, count: int, world: World) -> Ranks:
        """Gather the rows of all processes, by query."""
        query, counts, top, precision = (
            world.all_gather(torch.from_numpy(part).to(self.gallery.device), count).cpu().numpy()
            for part in (self.query, self.counts, self.top, self.precision)
        )
        order = np.argsort(query)
        better, tied_wrong, tied_right = counts[order].T
        return Ranks(
            better,
            tied_wrong,
            tied_right,
            top[order],
            query[order],
            len(self.gallery),
            precision[order] if self.all_matches else None,
        )


def _count(block: Block) -> torch.Tensor:
    """Return int64 [queries, 3]: better, tied_wrong and tied_right of a block."""
    scores, right = block.scores, block.right
    best = torch.full((len(scores),), -torch.inf, device=scores.device, dtype=scores.dtype)
    best.scatter_reduce_(0, block.rows, right, "amax")
    above, tied = (count_compared(compare, scores, best, block.spare) for compare in (torch.gt, torch.eq))
    return best_counts(above, tied, block.rows, right, best)


def _ranks_of_columns(columns: ReverseRanking, gallery: int) -> Ranks:
    positions = columns.positions() if columns.all_matches else None
    better, tied_wrong, tied_right = (columns.counts() if positions is None else positions.best()).T
    precision = None if positions is None else _precision(positions)
    return Ranks(better, tied_wrong, tied_right, columns.top(), columns.item, gallery, precision)


def _precision(positions: MatchPositions) -> np.ndarray:
    return np.stack([positions.average_precision(), *(positions.fraction_recall(k) for k in KS)], axis=1)


def metric_values(ranks: Ranks) -> dict[str, np.ndarray]:
    """Return metric -> float64 [queries]; the metric is their mean, median_rank their median."""
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


def per_query_metrics(ranks: Ranks) -> PerQueryMetrics:
    """Return a direction's metrics, query by query; the median rank is no mean, but a statistic of the queries."""
    values = metric_values(ranks)
    expected = values.pop("median_rank")
    return PerQueryMetrics(values, {"median_rank": weighted_median(expected)}, {"median_rank": expected})
