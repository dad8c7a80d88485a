"""Search unit vectors by cosine with FAISS: exactly, with a graph (HNSW), or with compressed lists (IVF-PQ).

Rows are unit vectors, so the inner product is the cosine. IVF-PQ only proposes candidates; they are ranked by their
rows in 16 bits, which the same file holds and which are read from disk as they are needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (before faiss: in the other order a search in a forked process can hang)

import faiss  # isort: skip
import numpy as np

from vlkit.config.search import IndexType
from vlkit.errors import ArtifactError, UsageError

FLAT_BELOW, HNSW_BELOW = 200_000, 3_000_000
HNSW_LINKS, HNSW_BUILD_EFFORT = 32, 120
# Training an 8-bit code takes 256 rows, and a few more to be of use.
MIN_ROWS_FOR_CODES = 1_000
# Rows per centroid that k-means learns from, and its iterations.
KMEANS_ROWS, KMEANS_ITERATIONS = 64, 12
# Hits for which an approximate search is tuned; it tries harder for more, and as hard for fewer.
TUNED_K = 10
# IVF-PQ proposes this many candidates per hit.
CANDIDATES_PER_HIT = 16
# Where a filter leaves at most this many rows, they are compared one by one: a graph would not find its way to them.
MAX_ROWS_SCANNED = 50_000
# The stubs of faiss know nothing of what its Python layer adds: keywords, numpy arrays, downcast members.
_faiss: Any = faiss
EFFORT_PARAMETERS: dict[IndexType, str | None] = {"flat": None, "hnsw": "efSearch", "ivf-pq": "nprobe"}


def choose_type(count: int) -> IndexType:
    """Return the index type that suits a number of rows."""
    return "flat" if count < FLAT_BELOW else "hnsw" if count < HNSW_BELOW else "ivf-pq"


def refuse_too_few_rows(count: int, index_type: IndexType) -> None:
    """Refuse, before anything is embedded, an index type that cannot be trained on so few rows.

    Raises:
        UsageError: says how many it needs.
    """
    if index_type == "ivf-pq" and count < MIN_ROWS_FOR_CODES:
        message = f"--type ivf-pq learns its codes from the rows: {count} are too few, it needs {MIN_ROWS_FOR_CODES}"
        raise UsageError(message, hint="--type flat is exact, and fast at this size")


def estimate_bytes(count: int, width: int, index_type: IndexType) -> int:
    """Estimate the size of an index file."""
    row = {
        "flat": 4 * width,
        "hnsw": 4 * width + 8 * HNSW_LINKS + 4 * HNSW_LINKS // 8,
        "ivf-pq": 2 * width + width // 4 + 8,
    }
    return count * row[index_type]


@dataclass(frozen=True)
class VectorIndex:
    """A FAISS index of unit rows.

    Attributes:
        index: the index of FAISS.
        effort: how hard an approximate search tries: efSearch or nprobe; 0 for an exact one.
    """

    index: Any
    type: IndexType
    effort: int = 0

    @classmethod
    def build(cls, rows: np.ndarray, index_type: IndexType) -> VectorIndex:
        """Index float32 unit rows [rows, width]; see `refuse_too_few_rows`."""
        count, width = rows.shape
        if index_type == "flat":
            index: Any = faiss.IndexFlatIP(width)
        elif index_type == "hnsw":
            index = faiss.IndexHNSWFlat(width, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = HNSW_BUILD_EFFORT
        else:
            lists = min(int(4 * math.sqrt(count)), count // 39)
            parts = max(part for part in range(1, max(2, width // 4 + 1)) if width % part == 0)
            index = faiss.index_factory(width, f"IVF{lists},PQ{parts}np,Refine(SQfp16)", faiss.METRIC_INNER_PRODUCT)
            coarse = _faiss.downcast_index(index.base_index)
            for clusters in (coarse.cp, coarse.pq.cp):
                clusters.min_points_per_centroid, clusters.max_points_per_centroid = 1, KMEANS_ROWS
                clusters.niter = KMEANS_ITERATIONS
            index.train(rows)
        index.add(rows)
        return cls(index, index_type, 0 if index_type == "flat" else TUNED_K)

    def add(self, rows: np.ndarray) -> None:
        """Append rows."""
        self.index.add(np.ascontiguousarray(rows, np.float32))

    @classmethod
    def read(cls, path: Path, index_type: IndexType, effort: int) -> VectorIndex:
        """Memory-map a file that `write` wrote.

        Raises:
            ArtifactError: FAISS cannot read it.
        """
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), index_type, effort)
        except RuntimeError as error:
            raise ArtifactError(f"{path} is not a FAISS index: {str(error).splitlines()[-1]}") from None

    def write(self, path: Path) -> None:
        """Write the file in FAISS' format; `faiss.read_index` reads it."""
        faiss.write_index(self.index, str(path))

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def width(self) -> int:
        """Width of a row."""
        return int(self.index.d)

    @property
    def max_effort(self) -> int:
        """Effort beyond which a search does not change."""
        if self.type == "ivf-pq":
            return int(_faiss.downcast_index(self.index.base_index).nlist)
        return len(self) if self.type == "hnsw" else 0

    def with_effort(self, effort: int) -> VectorIndex:
        """Return the same index with another search effort."""
        return replace(self, effort=min(effort, self.max_effort))

    def rows(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Return float32 unit rows: all, or those at `positions`."""
        stored = self.index.refine_index if self.type == "ivf-pq" else self.index
        if positions is None:
            rows = stored.reconstruct_n(0, len(self))
        else:
            rows = stored.reconstruct_batch(np.asarray(positions, np.int64))
        if self.type != "ivf-pq":
            return np.asarray(rows)
        # Rounding to 16 bits makes them slightly longer or shorter.
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12))

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and positions of the nearest rows, best first: float32 and int64 [queries, k].

        Args:
            queries: float32 unit rows [queries, width].
            k: hits per query; fewer where fewer rows are allowed.
            allowed: bool [rows]; False excludes a row.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        k = min(k, len(self) if allowed is None else int(allowed.sum()))
        if not k or not len(queries):
            return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
        if allowed is not None and self.type != "flat" and allowed.sum() <= MAX_ROWS_SCANNED:
            return self._scan(queries, k, np.flatnonzero(allowed))
        depth = k if self.type == "flat" else min(max(k, TUNED_K), len(self))
        scores, positions = self.index.search(queries, depth, params=self._search_parameters(depth, allowed))
        scores, positions = scores[:, :k], positions[:, :k]
        if allowed is not None and (positions < 0).any():
            return self._scan(queries, k, np.flatnonzero(allowed))
        return scores, positions

    def _scan(self, queries: np.ndarray, k: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Search the rows at `positions` exactly."""
        scores, nearest = faiss.knn(queries, self.rows(positions), k, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, positions[nearest]

    def _search_parameters(self, k: int, allowed: np.ndarray | None) -> Any:
        """Return `faiss.SearchParameters` or None; effort grows with k, and as a filter leaves fewer rows."""
        share, selection = 1.0, {}
        if allowed is not None:
            share = float(allowed.mean())
            bits = np.packbits(allowed, bitorder="little")
            selection = {"sel": _faiss.IDSelectorBitmap(bits)}
        effort = min(self.max_effort, math.ceil(self.effort / share * max(1, k / TUNED_K)))
        if self.type == "hnsw":
            return _faiss.SearchParametersHNSW(efSearch=effort, **selection)
        if self.type == "ivf-pq":
            coarse = _faiss.SearchParametersIVF(nprobe=effort, **selection)
            return _faiss.IndexRefineSearchParameters(k_factor=CANDIDATES_PER_HIT, base_index_params=coarse)
        return _faiss.SearchParameters(**selection) if selection else None
