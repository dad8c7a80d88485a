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

# Scores held at a time, by device. On a CPU under 32 MB, which glibc keeps: touching fresh memory costs more than the
# arithmetic.
BLOCK_SCORES = {"cpu": 2**21, "cuda": 2**26}
# Of fewer columns than this, MKL and oneDNN round a product otherwise than as a part of a larger one.
NARROWEST = 16


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
        """An item is right for a query where their ids intersect (see `labels.py`)."""
        # Its loop has the more to do for each of the first.
        if len(query_groups) > len(gallery_groups):
            item, query = matching_pairs(gallery_groups, query_groups)
            order = np.lexsort((item, query))
            return cls(query[order], item[order])
        return cls(*matching_pairs(query_groups, gallery_groups))

    @cached_property
    def asked(self) -> np.ndarray:
        """int64: the queries that have a match, ascending."""
        return np.unique(self.query)

    def by_first(self) -> np.ndarray:
        """int64: the queries that have a match, those of the same right items beside each other."""
        first = self.item[np.searchsorted(self.query, self.asked)]
        return self.asked[np.argsort(first, kind="stable")]


@dataclass
class Block:
    """The scores of some queries.

    Attributes:
        scores: float [queries, items].
        spare: memory of that shape and type, for whoever looks at the scores.
        query: int64 [queries], their positions among all, ascending.
        done: where these queries stand among those that the blocks are of.
        rows, items: int64 [matches], places of the right scores, sorted by row and then by item.
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
        """float [matches]: the right scores."""
        return self.scores[self.rows, self.items]


class Blocks:
    """The blocks of some queries, as often as they are asked for. When the next comes, the one before has no scores.

    Attributes:
        query: int64, the queries in the order of the blocks; within a block they ascend.
    """

    def __init__(self, queries: torch.Tensor, gallery: torch.Tensor, matches: Matches, query: np.ndarray) -> None:
        """
        Args:
            queries: float32 [queries, width].
            gallery: float32 [items, width].
            query: int64, positions of those that are asked.
        """
        self.queries, self.gallery = queries.contiguous(), gallery.contiguous()
        most = max(1, BLOCK_SCORES[gallery.device.type] // max(1, len(gallery)))
        # Of about equal size: a small one at the end would be rounded otherwise.
        bounds = np.linspace(0, len(query), -(-len(query) // most) + 1).astype(int)
        self.parts = [slice(low, high) for low, high in pairwise(bounds)]
        self.query = np.concatenate([np.sort(query[part]) for part in self.parts] or [query])
        place = np.full(len(queries), -1)
        place[self.query] = np.arange(len(self.query))
        found = np.flatnonzero(place[matches.query] >= 0)
        self._match = found[np.argsort(place[matches.query[found]], kind="stable")]
        self._place, self._item = place[matches.query[self._match]], matches.item[self._match]
        shape = max((part.stop - part.start for part in self.parts), default=0), len(gallery)
        self._spare = torch.empty(shape, dtype=gallery.dtype, device=gallery.device)

    def __iter__(self) -> Iterator[Block]:
        for part in self.parts:
            match, rows, items = self._matches(part)
            scores = matmul_t(self._asking(part), self.gallery)
            rows, items = (torch.from_numpy(places).to(scores.device) for places in (rows, items))
            block = Block(scores, self._spare[: len(scores)], self.query[part], part, rows, items, match)
            yield block
            del scores, block.scores

    def guessed(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Positions of matches and their scores, of a product with the right items of each block alone."""
        for part in self.parts:
            match, rows, items = self._matches(part)
            some = np.union1d(items, np.arange(min(NARROWEST, len(self.gallery))))
            scores = matmul_t(self._asking(part), self.gallery[torch.from_numpy(some).to(self.gallery.device)])
            rows, columns = (torch.from_numpy(at).to(scores.device) for at in (rows, np.searchsorted(some, items)))
            yield match, scores[rows, columns]

    def _asking(self, part: slice) -> torch.Tensor:
        query = self.query[part]
        # Beside each other, as rows mostly are that share a picture, they need no copy.
        if query[-1] - query[0] == len(query) - 1:
            return self.queries[query[0] : query[-1] + 1]
        return self.queries[torch.from_numpy(query).to(self.queries.device)]

    def _matches(self, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, high = np.searchsorted(self._place, [part.start, part.stop])
        return self._match[low:high], self._place[low:high] - part.start, self._item[low:high]
