"""The order of rows and batches: a pure function of (seed, epoch, sample).

Nothing here remembers a position: the stream can start at any batch, and is the same for any number of workers.
A resumed run relies on that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import DataLoader

from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.loading.stores import ErrorAsItem, InputStore, loader_workers, reraise_errors
from vlkit.data.pairs import Pairs


class BatchIndices(NamedTuple):
    """The rows of a batch.

    Attributes:
        epoch: counts from 0.
        rows: positions in the table.
        copies: for each row, how often it came before in this epoch: 0 but for rows of a weight above 1.
    """

    epoch: int
    rows: list[int]
    copies: list[int]


class HasPairIds(Protocol):
    """Rows of a table by their ids, and how often each is drawn."""

    pair_ids: np.ndarray
    weights: list[float] | None


class BatchSource(Protocol):
    """A dataset that makes a batch from `BatchIndices`."""

    images: InputStore
    augmenter: ImageAugmenter | None

    def __len__(self) -> int: ...

    def __getitem__(self, indices: BatchIndices, /) -> Any: ...


@dataclass(frozen=True)
class EpochSampler:
    """Which rows make which batch, from any batch on and without end.

    An epoch goes through the rows, ordered by a hash of (seed, epoch, pair id); its last batch may be smaller. One of
    fewer than `min_rows` rows is left out: a single pair would be contrasted with nothing. A row of weight w appears w
    times in an epoch; a fractional part is rounded up or down by the row's hash.
    """

    keys: np.ndarray
    rows: np.ndarray
    copies: np.ndarray
    batch_size: int
    seed: int
    first_batch: int = 0
    min_rows: int = 2

    @classmethod
    def from_pair_ids(
        cls,
        pair_ids: Iterable[str],
        batch_size: int,
        seed: int,
        first_batch: int = 0,
        weights: Sequence[float] | None = None,
        min_rows: int = 2,
    ) -> EpochSampler:
        """Order these rows, beginning with batch number `first_batch`.

        Args:
            min_rows: an epoch's last batch is left out if it has fewer.
        """
        keys = np.array([_hash64(str(pair_id)) for pair_id in pair_ids], np.uint64)
        rows, copies = np.arange(len(keys)), np.zeros(len(keys), np.int64)
        if weights is not None:
            whole, fraction = np.divmod(np.asarray(weights, np.float64), 1.0)
            times = whole.astype(np.int64) + (_mix_keys(keys, seed, -1) / 2.0**64 < fraction)
            rows = np.repeat(rows, np.maximum(times, 1))
            copies = np.arange(len(rows)) - np.searchsorted(rows, rows)
            keys = np.where(copies > 0, _mix_keys(keys[rows] ^ copies.astype(np.uint64), seed, -2), keys[rows])
        return cls(keys, rows, copies, batch_size, seed, first_batch, min_rows)

    @classmethod
    def from_rows(
        cls, rows: Pairs | HasPairIds, batch_size: int, seed: int, first_batch: int = 0, min_rows: int = 2
    ) -> EpochSampler:
        """Order a table's rows by their weights; see `from_pair_ids`."""
        pair_ids = rows.frame["pair_id"] if isinstance(rows, Pairs) else rows.pair_ids
        return cls.from_pair_ids(pair_ids, batch_size, seed, first_batch, rows.weights, min_rows)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.keys), self.batch_size)
        return whole + (rest >= self.min_rows)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.argsort(_mix_keys(self.keys, self.seed, epoch), kind="stable")

    def __iter__(self) -> Iterator[BatchIndices]:
        epoch, skip = divmod(self.first_batch, self.batches_per_epoch)
        while True:
            permutation = self._permutation(epoch)
            for batch in range(skip, self.batches_per_epoch):
                chosen = permutation[batch * self.batch_size : (batch + 1) * self.batch_size]
                yield BatchIndices(epoch, self.rows[chosen].tolist(), self.copies[chosen].tolist())
            epoch, skip = epoch + 1, 0


def batch_stream(dataset: BatchSource, sampler: EpochSampler, *, workers: int | None = None) -> Iterator[Any]:
    """Return batches in the order of `sampler`, without end.

    Args:
        workers: processes that load; 0: this process loads; None: as many as pay off.
    """
    if workers is None:
        workers = loader_workers(dataset.images, augmented=dataset.augmenter is not None)
    loader: DataLoader[Any] = DataLoader(
        ErrorAsItem(dataset),
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
    )
    return reraise_errors(loader)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _mix_keys(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Mix uint64 keys to well-distributed uint64 (the finaliser of splitmix64), differently for each (seed, epoch)."""
    mixed = keys ^ np.uint64(_hash64(f"{seed}:{epoch}"))
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
