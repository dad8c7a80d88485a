"""How much of the exact answer an approximate search finds, how fast it is, and how hard it must try."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch  # noqa: F401  (before faiss)

import faiss  # isort: skip
import numpy as np

from vlkit.inference.index.faiss_index import FIRST, Nearest

# Cosines of the same two rows, summed in another order, differ by less.
SAME = 1e-5
TIMED = 200


@dataclass(frozen=True)
class Exact:
    """Queries with their exact answer.

    Attributes:
        queries: float32 unit rows [queries, width].
        own: int64 [queries], the row that is the query itself and is no answer to it; -1: none.
        last: float32 [queries], the cosine of the last of the exact ten first.
        first: how many those are, in a small index fewer.
    """

    queries: np.ndarray
    own: np.ndarray
    last: np.ndarray
    first: int

    @classmethod
    def of(cls, rows: np.ndarray, queries: np.ndarray, own: np.ndarray) -> Exact:
        """Compare every query with every row."""
        first = max(1, min(FIRST, len(rows) - int((own >= 0).any())))
        scores, places = faiss.knn(queries, rows, min(len(rows), first + 1), metric=faiss.METRIC_INNER_PRODUCT)
        return cls(queries, own, _without(own, places, scores)[:, first - 1], first)

    def half(self, number: int) -> Exact:
        """Every second one."""
        return Exact(self.queries[number::2], self.own[number::2], self.last[number::2], self.first)

    def recall(self, nearest: Nearest, rows: np.ndarray) -> float:
        """Share of the exact ten first that is found; of equals any one counts."""
        _, places = nearest.search(self.queries, self.first + int((self.own >= 0).any()))
        places = _without(self.own, places, places)[:, : self.first]
        found = np.einsum("qd,qkd->qk", self.queries, rows[places])
        return float(((found >= self.last[:, None] - SAME) & (places >= 0)).mean())

    def __len__(self) -> int:
        return len(self.queries)


def _without(own: np.ndarray, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` [queries, k], the column of the query's own row moved to the end: [queries, k], of others untouched."""
    order = np.argsort(places == own[:, None], axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1)


@dataclass(frozen=True)
class Found:
    """What was measured, on queries that nothing was tuned on.

    Attributes:
        recall: at 10, against exact search.
        queries: how many.
        latency_ms, latency_ms_p95: of one search, its embedding at hand: median, and what 95 of 100 stay below.
        reached: the demanded recall.
    """

    recall: float
    queries: int
    latency_ms: float
    latency_ms_p95: float
    reached: bool

    def facts(self) -> dict[str, Any]:
        """For index.yaml."""
        facts = asdict(self)
        return {"recall@10": facts.pop("recall"), **facts}


def tuned(
    nearest: Nearest, rows: np.ndarray, queries: np.ndarray, own: np.ndarray, target: float
) -> tuple[Nearest, Found]:
    """Try just hard enough to find `target` of the exact ten first, then measure.

    One half of the queries tunes, the other measures.
    """
    asked = Exact.of(rows, queries, own)
    tunes, measures = (asked.half(0), asked.half(1)) if len(asked) > 1 else (asked, asked)
    if nearest.type != "flat":
        nearest = nearest.with_effort(_least_effort(nearest, tunes, rows, target))
    recall = measures.recall(nearest, rows)
    seconds = np.array([_seconds(nearest, query[None]) for query in measures.queries[:TIMED]])
    late = float(np.quantile(seconds, 0.95)) * 1000
    return nearest, Found(recall, len(measures), float(np.median(seconds)) * 1000, late, recall >= target)


def _least_effort(nearest: Nearest, asked: Exact, rows: np.ndarray, target: float) -> int:
    """The smallest effort, to a sixteenth, that reaches the target; the largest where none does."""
    low, high = 0, 16
    while asked.recall(nearest.with_effort(high), rows) < target:
        if high >= nearest.most_effort:
            return nearest.most_effort
        low, high = high, 2 * high
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        reached = asked.recall(nearest.with_effort(middle), rows) >= target
        low, high = (low, middle) if reached else (middle, high)
    return high


def _seconds(nearest: Nearest, query: np.ndarray) -> float:
    began = time.perf_counter()
    nearest.search(query, FIRST)
    return time.perf_counter() - began
