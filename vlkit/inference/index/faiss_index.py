"""Nearest neighbours by cosine, behind FAISS: exact, a graph (HNSW), or compressed lists (IVF-PQ).

Rows are unit vectors, so the inner product is the cosine. IVF-PQ only proposes: its candidates are ranked by their rows
in 16 bits, which the same file holds and which are read from the disk as they are needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch  # noqa: F401  (before faiss: the other way round a search in a forked process can hang)

import faiss  # isort: skip
import numpy as np

from vlkit.config.search import IndexType
from vlkit.errors import ArtifactError, UsageError

FLAT_BELOW, GRAPH_BELOW = 200_000, 3_000_000
LINKS, BUILD_EFFORT = 32, 120
# Training an 8-bit code needs 256 rows, and a few more to be any good.
LEAST_FOR_CODES = 1_000
# What k-means learns from, rows a centre, and how often it goes over them.
POINTS, ROUNDS = 64, 12
# Hits that an approximate search is tuned on; for more it tries harder, for fewer as hard.
FIRST = 10
# IVF-PQ proposes this many times the hits that are asked for.
CANDIDATES = 16
# What a filter leaves is compared row by row up to this many: a graph would not find its way through so few.
EXACT_UP_TO = 50_000
PARAMETERS = {"flat": None, "hnsw": "efSearch", "ivf-pq": "nprobe"}


def type_for(count: int) -> IndexType:
    """What suits a number of rows."""
    return "flat" if count < FLAT_BELOW else "hnsw" if count < GRAPH_BELOW else "ivf-pq"


def refuse_few(count: int, kind: IndexType) -> None:
    """Refuse, before anything is embedded, an index that cannot be learned from so few rows.

    Raises:
        UsageError: says how many it needs.
    """
    if kind == "ivf-pq" and count < LEAST_FOR_CODES:
        told = f"--type ivf-pq learns its codes from the rows: {count} are too few, {LEAST_FOR_CODES} the least"
        raise UsageError(told, hint="--type flat is exact, and fast at this size")


def index_bytes(count: int, width: int, kind: IndexType) -> int:
    """Size of the file, about."""
    row = {"flat": 4 * width, "hnsw": 4 * width + 8 * LINKS + 4 * LINKS // 8, "ivf-pq": 2 * width + width // 4 + 8}
    return count * row[kind]


@dataclass(frozen=True)
class Nearest:
    """An index of unit rows.

    Attributes:
        index: FAISS' own.
        effort: how hard an approximate search tries: efSearch or nprobe; 0 where it is exact.
    """

    index: faiss.Index
    type: IndexType
    effort: int = 0

    @classmethod
    def build(cls, rows: np.ndarray, kind: IndexType) -> Nearest:
        """Index float32 unit rows [rows, width]; see `refuse_few`."""
        count, width = rows.shape
        if kind == "flat":
            index: faiss.Index = faiss.IndexFlatIP(width)
        elif kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = BUILD_EFFORT
        else:
            lists = min(int(4 * math.sqrt(count)), count // 39)
            parts = max(part for part in range(1, max(2, width // 4 + 1)) if width % part == 0)
            index = faiss.index_factory(width, f"IVF{lists},PQ{parts}np,Refine(SQfp16)", faiss.METRIC_INNER_PRODUCT)
            coarse = faiss.downcast_index(index.base_index)
            for clusters in (coarse.cp, coarse.pq.cp):
                clusters.min_points_per_centroid, clusters.max_points_per_centroid = 1, POINTS
                clusters.niter = ROUNDS
            index.train(rows)
        index.add(rows)
        return cls(index, kind, 0 if kind == "flat" else FIRST)

    def add(self, rows: np.ndarray) -> None:
        """More rows, behind those that are there."""
        self.index.add(np.ascontiguousarray(rows, np.float32))

    @classmethod
    def read(cls, path: Path, kind: IndexType, effort: int) -> Nearest:
        """Map a file that `write` wrote, without reading it whole.

        Raises:
            ArtifactError: FAISS cannot read it.
        """
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), kind, effort)
        except RuntimeError as error:
            raise ArtifactError(f"{path} is no FAISS index: {str(error).splitlines()[-1]}") from None

    def write(self, path: Path) -> None:
        """As FAISS writes it; `faiss.read_index` reads it."""
        faiss.write_index(self.index, str(path))

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def width(self) -> int:
        """Of a row."""
        return int(self.index.d)

    @property
    def most_effort(self) -> int:
        """More than this changes nothing."""
        if self.type == "ivf-pq":
            return int(faiss.downcast_index(self.index.base_index).nlist)
        return len(self) if self.type == "hnsw" else 0

    def with_effort(self, effort: int) -> Nearest:
        """The same, trying harder or less hard."""
        return replace(self, effort=min(effort, self.most_effort))

    def rows(self, places: np.ndarray | None = None) -> np.ndarray:
        """float32 unit rows: all, or those at `places`."""
        stored = self.index.refine_index if self.type == "ivf-pq" else self.index
        if places is None:
            found = stored.reconstruct_n(0, len(self))
        else:
            found = stored.reconstruct_batch(np.asarray(places, np.int64))
        # Kept in 16 bits they are a little longer or shorter.
        return found / np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-12) if self.type == "ivf-pq" else found

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and places of the nearest rows, best first: float32 and int64 [queries, k].

        Args:
            queries: float32 unit rows [queries, width].
            k: at most as many as may be found.
            allowed: bool [rows]; False: never found.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        k = min(k, len(self) if allowed is None else int(allowed.sum()))
        if not k or not len(queries):
            return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
        if allowed is not None and self.type != "flat" and allowed.sum() <= EXACT_UP_TO:
            return self._among(queries, k, np.flatnonzero(allowed))
        asked = k if self.type == "flat" else min(max(k, FIRST), len(self))
        scores, places = self.index.search(queries, asked, params=self._how(asked, allowed))
        scores, places = scores[:, :k], places[:, :k]
        if allowed is not None and (places < 0).any():
            return self._among(queries, k, np.flatnonzero(allowed))
        return scores, places

    def _among(self, queries: np.ndarray, k: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest of some rows, exactly."""
        scores, found = faiss.knn(queries, self.rows(places), k, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, places[found]

    def _how(self, k: int, allowed: np.ndarray | None) -> faiss.SearchParameters | None:
        """FAISS' parameters; the more hits are wanted, and the fewer rows a filter leaves, the harder is tried."""
        share, chosen = 1.0, {}
        if allowed is not None:
            share = float(allowed.mean())
            bits = np.packbits(allowed, bitorder="little")
            chosen = {"sel": faiss.IDSelectorBitmap(bits)}
        effort = min(self.most_effort, math.ceil(self.effort / share * max(1, k / FIRST)))
        if self.type == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=effort, **chosen)
        if self.type == "ivf-pq":
            coarse = faiss.SearchParametersIVF(nprobe=effort, **chosen)
            return faiss.IndexRefineSearchParameters(k_factor=CANDIDATES, base_index_params=coarse)
        return faiss.SearchParameters(**chosen) if chosen else None
