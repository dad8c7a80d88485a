"""The product of all queries with the whole gallery, some queries at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from vlkit.data.labels import Groups, matching_pairs
from vlkit.models.fast.linear import matmul_t

# Scores in memory at a time, by device. On a CPU under 32 MB, which glibc reuses: touching fresh memory costs more than
# the arithmetic.
BLOCK_SCORES = {"cpu": 2**21, "cuda": 2**26}
# MKL and oneDNN round a product of fewer columns otherwise than the same columns of a larger product.
LEAST_COLUMNS = 16


@dataclass(frozen=True)
class Matches:
    """Every right item of every query.

    Attributes:
        query, item: int64 [matches], sorted by query and then by item.
    """

    query: np.ndarray
    item: np.ndarray

    @classmethod
    def from_groups(cls, query_groups: Sequence[Groups], gallery_groups: Sequence[Groups]) -> Matches:
        """Find the items that are right for each query: their ids intersect (see `labels.py`)."""
        # The loop over the first argument is the slow one: hand it the shorter.
        if len(query_groups) > len(gallery_groups):
            item, query = matching_pairs(gallery_groups, query_groups)
            order = np.lexsort((item, query))
            return cls(query[order], item[order])
        return cls(*matching_pairs(query_groups, gallery_groups))

    @cached_property
    def matched_queries(self) -> np.ndarray:
        """The queries that have a match, int64, ascending."""
        return np.unique(self.query)

    def by_first(self) -> np.ndarray:
        """Return the queries that have a match, int64, those of the same right items beside each other."""
        first = self.item[np.searchsorted(self.query, self.matched_queries)]
        return self.matched_queries[np.argsort(first, kind="stable")]


@dataclass
class Block:
    """The scores of some queries.

    Attributes:
        scores: float [queries, items].
        spare: memory of that shape and type, to compare the scores in.
        query: int64 [queries], their positions among all, ascending.
        done: positions of these queries among those of all blocks.
        rows, items: int64 [matches], row and column of the right scores, sorted by row and then by item.
        match: int64 [matches], their positions among all matches.
    """

    scores: torch.Tensor
    spare: torch.Tensor
    query: np.ndarray
    done: slice
    rows: torch.Tensor
    items: torch.Tensor
    match: np.ndarray

    @property
    def right(self) -> torch.Tensor:
        """The right scores, float [matches]."""
        return self.scores[self.rows, self.items]


class Blocks:
    """The blocks of some queries, to be iterated any number of times; the next block frees the scores of the last.

    Attributes:
        query: int64, the queries in the order of the blocks; within a block they ascend.
    """

    def __init__(self, queries: torch.Tensor, gallery: torch.Tensor, matches: Matches, query: np.ndarray) -> None:
        """Divide the queries among blocks of about equal size.

        Args:
            queries: float32 [queries, width].
            gallery: float32 [items, width].
            query: int64, positions of the queries to score.
        """
        self.queries, self.gallery = queries.contiguous(), gallery.contiguous()
        most = max(1, BLOCK_SCORES[gallery.device.type] // max(1, len(gallery)))
        # A small block at the end would be rounded otherwise.
        bounds = np.linspace(0, len(query), -(-len(query) // most) + 1).astype(int)
        self.parts = [slice(low, high) for low, high in pairwise(bounds)]
        self.query = np.concatenate([np.sort(query[part]) for part in self.parts] or [query])
        row_of = np.full(len(queries), -1)
        row_of[self.query] = np.arange(len(self.query))
        match = np.flatnonzero(row_of[matches.query] >= 0)
        self._match = match[np.argsort(row_of[matches.query[match]], kind="stable")]
        self._row, self._item = row_of[matches.query[self._match]], matches.item[self._match]
        shape = max((part.stop - part.start for part in self.parts), default=0), len(gallery)
        self._spare = torch.empty(shape, dtype=gallery.dtype, device=gallery.device)

    def __iter__(self) -> Iterator[Block]:
        for part in self.parts:
            match, rows, items = self._matches(part)
            scores = matmul_t(self._queries(part), self.gallery)
            row, item = (torch.from_numpy(index).to(scores.device) for index in (rows, items))
            block = Block(scores, self._spare[: len(scores)], self.query[part], part, row, item, match)
            yield block
            del scores, block.scores

    def predicted_scores(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield positions of matches and their scores, of a product with the right items of each block alone."""
        for part in self.parts:
            match, rows, items = self._matches(part)
            columns = np.union1d(items, np.arange(min(LEAST_COLUMNS, len(self.gallery))))
            scores = matmul_t(self._queries(part), self.gallery[torch.from_numpy(columns).to(self.gallery.device)])
            row, column = (
                torch.from_numpy(index).to(scores.device) for index in (rows, np.searchsorted(columns, items))
            )
            yield match, scores[row, column]

    def _queries(self, part: slice) -> torch.Tensor:
        query = self.query[part]
        # Consecutive rows, as those of one image mostly are, need no copy.
        if query[-1] - query[0] == len(query) - 1:
            return self.queries[query[0] : query[-1] + 1]
        return self.queries[torch.from_numpy(query).to(self.queries.device)]

    def _matches(self, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, high = np.searchsorted(self._row, [part.start, part.stop])
        return self._match[low:high], self._row[low:high] - part.start, self._item[low:high]
