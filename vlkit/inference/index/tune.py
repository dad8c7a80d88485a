"""Tune an approximate search to a target recall, and measure its recall and latency against exact search."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch  # noqa: F401  (before faiss)

import faiss  # isort: skip
import numpy as np

from vlkit.inference.index.faiss_index import TUNED_K, VectorIndex

# Cosines of the same two rows, summed in another order, differ by less.
COSINE_TOLERANCE = 1e-5
MAX_TIMED_QUERIES = 200


@dataclass(frozen=True)
class ExactNeighbors:
    """Queries and the threshold of their exact nearest neighbours.

    Attributes:
        queries: float32 unit rows [queries, width].
        own: int64 [queries], position of the row that is the query itself and does not count as a hit; -1: none.
        threshold: float32 [queries], cosine of the k-th exact neighbour.
        k: neighbours per query: 10, fewer in a small index.
    """

    queries: np.ndarray
    own: np.ndarray
    threshold: np.ndarray
    k: int

    @classmethod
    def from_rows(cls, rows: np.ndarray, queries: np.ndarray, own: np.ndarray) -> ExactNeighbors:
        """Compare every query with every row."""
        k = max(1, min(TUNED_K, len(rows) - int((own >= 0).any())))
        scores, positions = faiss.knn(queries, rows, min(len(rows), k + 1), metric=faiss.METRIC_INNER_PRODUCT)
        return cls(queries, own, _move_own_last(own, positions, scores)[:, k - 1], k)

    def every_second(self, start: int) -> ExactNeighbors:
        """Return every second query, from `start` on."""
        return ExactNeighbors(self.queries[start::2], self.own[start::2], self.threshold[start::2], self.k)

    def recall(self, vectors: VectorIndex, rows: np.ndarray) -> float:
        """Return the share of the k nearest neighbours that a search finds; of equally near rows any one counts."""
        _, positions = vectors.search(self.queries, self.k + int((self.own >= 0).any()))
        positions = _move_own_last(self.own, positions, positions)[:, : self.k]
        scores = np.einsum("qd,qkd->qk", self.queries, rows[positions])
        return float(((scores >= self.threshold[:, None] - COSINE_TOLERANCE) & (positions >= 0)).mean())

    def __len__(self) -> int:
        return len(self.queries)


def _move_own_last(own: np.ndarray, positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return `values` [queries, k] with the column of the query's own row moved to the end."""
    order = np.argsort(positions == own[:, None], axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1)


@dataclass(frozen=True)
class SearchQuality:
    """Measured on queries that were not used for tuning.

    Attributes:
        recall: at 10, against exact search.
        queries: how many were measured.
        latency_ms, latency_ms_p95: median and 95th percentile of one search, without embedding the query.
        reached: whether the recall reaches the target.
    """

    recall: float
    queries: int
    latency_ms: float
    latency_ms_p95: float
    reached: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of index.yaml."""
        entries = asdict(self)
        return {"recall@10": entries.pop("recall"), **entries}


def tune_and_measure(
    vectors: VectorIndex, rows: np.ndarray, queries: np.ndarray, own: np.ndarray, target: float
) -> tuple[VectorIndex, SearchQuality]:
    """Find the lowest effort that reaches the target recall, then measure.

    One half of the queries tunes, the other half measures.
    """
    exact = ExactNeighbors.from_rows(rows, queries, own)
    tuning, measuring = (exact.every_second(0), exact.every_second(1)) if len(exact) > 1 else (exact, exact)
    if vectors.type != "flat":
        vectors = vectors.with_effort(_lowest_effort(vectors, tuning, rows, target))
    recall = measuring.recall(vectors, rows)
    seconds = np.array([_time_search(vectors, query[None]) for query in measuring.queries[:MAX_TIMED_QUERIES]])
    p95 = float(np.quantile(seconds, 0.95)) * 1000
    return vectors, SearchQuality(recall, len(measuring), float(np.median(seconds)) * 1000, p95, recall >= target)


def _lowest_effort(vectors: VectorIndex, exact: ExactNeighbors, rows: np.ndarray, target: float) -> int:
    """Return the lowest effort that reaches the target, to within a sixteenth; else the largest."""
    low, high = 0, 16
    while exact.recall(vectors.with_effort(high), rows) < target:
        if high >= vectors.max_effort:
            return vectors.max_effort
        low, high = high, 2 * high
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        reached = exact.recall(vectors.with_effort(middle), rows) >= target
        low, high = (low, middle) if reached else (middle, high)
    return high


def _time_search(vectors: VectorIndex, query: np.ndarray) -> float:
    """Return the seconds that one search takes."""
    start = time.perf_counter()
    vectors.search(query, TUNED_K)
    return time.perf_counter() - start
