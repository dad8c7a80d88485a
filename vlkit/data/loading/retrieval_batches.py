"""Rows -> batches, in an order that is a pure function of (seed, epoch, sample).

Nothing here remembers where it is: the stream from any step on can be asked for, and is the same whatever the number
of workers. That is what a resumed run relies on.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.images import decode
from vlkit.data.images.decode import PixelSpec
from vlkit.data.labels import LabelMode, Labels, match_sets, count_false_negatives
from vlkit.data.pairs import AUGMENTED_FOLDER, Pairs
from vlkit.data.parallel import usable_cores
from vlkit.distributed import SINGLE, World
from vlkit.errors import VlkitError

if TYPE_CHECKING:
    import pandas as pd

# Decoded pictures are kept in memory up to this many bytes in all; beyond it they are read again each epoch.
KEEP_PIXELS = 512 * 2**20

# A tensor, or what stands for one: it has a length, and can be sliced.
Item = Any
Tokenize = Callable[[Sequence[str]], tuple[list[list[int]], int]]
Pad = Callable[[Sequence[Sequence[int]]], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Pairs that are contrasted with each other. Of several processes each has its share of what is to be embedded.

    Attributes:
        images: uint8 [share of the pairs, 3, size, size], or what frozen parts have made of them.
        captions: int64 [share of the unique texts, length], or what frozen parts have made of them: a caption that
            repeats is encoded once.
        texts: how many unique texts there are.
        text_index: int64 [columns], the unique text of each column: the pairs' own, then those that
            are there only to be wrong.
        labels: of [pairs, columns].
        pair_ids: who they are.
    """

    images: Item
    captions: Item
    texts: int
    text_index: torch.Tensor
    labels: Labels
    pair_ids: list[str]

    def __len__(self) -> int:
        return len(self.pair_ids)


class Drawn(NamedTuple):
    """What a batch is made of.

    Attributes:
        epoch: counts from 0.
        rows: positions in the table.
        copies: for each, which time in this epoch it is: 0 but for rows of a weight above 1.
    """

    epoch: int
    rows: list[int]
    copies: list[int]


class Inputs(Protocol):
    """Where a tower's inputs come from, by position: pictures, texts, or what frozen parts have made of them."""

    def __getitem__(self, positions: Sequence[int], /) -> Item: ...

    def __len__(self) -> int: ...

    @property
    def small(self) -> bool:
        """They are at hand: no process needs to be paid for fetching them."""


@dataclass
class TokenStore:
    """Texts as token ids, padded together when they are asked for."""

    tokens: Sequence[Sequence[int]]
    pad: Pad

    small = True

    def __getitem__(self, positions: Sequence[int]) -> torch.Tensor:
        """int64 [texts, length]."""
        return self.pad([self.tokens[position] for position in positions])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class PixelStore:
    """Pictures as a model wants them; small collections stay decoded."""

    paths: Sequence[Path]
    spec: PixelSpec
    _kept: dict[int, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, positions: Sequence[int]) -> torch.Tensor:
        """uint8 [pictures, 3, size, size] of the pictures at `positions`."""
        if not len(positions):
            return torch.empty((0, 3, self.spec.size, self.spec.size), dtype=torch.uint8)
        return torch.from_numpy(np.stack([self._one(int(position)) for position in positions]))

    def _one(self, position: int) -> np.ndarray:
        if position in self._kept:
            return self._kept[position]
        pixels = self.pixels(self.paths[position])
        if self.small:
            self._kept[position] = pixels
        return pixels

    def pixels(self, path: Path) -> np.ndarray:
        """uint8 [3, size, size] of a picture."""
        return decode.pixels(path, self.spec)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def small(self) -> bool:
        """All of them fit in memory at ease."""
        return len(self.paths) * 3 * self.spec.size**2 <= KEEP_PIXELS


class Carried(Dataset[Any]):
    """A dataset whose own errors come back as items: a loader's worker would turn them into a traceback.

    `unpacked` raises them again where the user's process can tell them.
    """

    def __init__(self, items: BatchSource | Inputs) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.items[key]
        except VlkitError as error:
            return error


def unpacked(loader: Iterable[Any]) -> Iterator[Any]:
    """What a loader over `Carried` gives, its errors raised."""
    for item in loader:
        if isinstance(item, VlkitError):
            raise item
        yield item


class Rowed(Protocol):
    """A table's rows, by their names, and how often each is drawn."""

    pair_ids: np.ndarray
    weights: list[float] | None


class BatchSource(Protocol):
    """Ask it for what is `Drawn`, get a batch."""

    pictures: Inputs
    variation: ImageAugmenter | None

    def __len__(self) -> int: ...

    def __getitem__(self, drawn: Drawn, /) -> Any: ...


class PairDataset(Dataset[Batch]):
    """A table of pairs as batches: ask it for what is `Drawn`, get a Batch.

    Attributes:
        pixels: the pictures, decoded.
        tokens: the texts, as token ids.
        pictures, captions: what batches are made of: pixels and tokens, unless the caller puts in something that frozen
            parts have made of them.
    """

    def __init__(
        self,
        pairs: Pairs,
        spec: PixelSpec,
        tokenize: Tokenize,
        pad: Pad,
        *,
        labels: LabelMode,
        wrong: pd.DataFrame | None = None,
        variation: ImageAugmenter | None = None,
        world: World = SINGLE,
    ) -> None:
        """Tokenise every text and find every picture.

        Args:
            pairs: rows that match, each an item.
            wrong: rows that do not; each text joins the batches of the row that it was chosen for.
            variation: how pictures are varied in every epoch; None: they stay as they are.
            world: the processes that share every batch.
        """
        import pandas as pd

        frame = pairs.frame
        told = pd.concat([frame, wrong], ignore_index=True) if wrong is not None else frame
        self.pair_ids = frame["pair_id"].to_numpy(dtype=object)
        self.weights = pairs.weights
        unique_images, unique_texts = pairs.unique_images(), told.drop_duplicates("text_id")
        self.image_of = positions_of(frame["image_id"], unique_images["image_id"])
        self.text_of = positions_of(frame["text_id"], unique_texts["text_id"])
        self.image_ids = list(unique_images["image_id"])
        self.pixels = PixelStore(pairs.image_paths(unique_images), spec)
        tokens, self.truncated = tokenize(list(unique_texts["text"]))
        self.tokens = TokenStore(tokens, pad)
        self.pictures: Inputs = self.pixels
        self.captions: Inputs = self.tokens
        image_sets, text_sets = match_sets(told)
        self.image_sets = [image_sets[key] for key in unique_images["image_id"]]
        self.text_sets = [text_sets[key] for key in unique_texts["text_id"]]
        text_at = {text_id: position for position, text_id in enumerate(unique_texts["text_id"])}
        self.wrong_of = _wrong_texts(frame, wrong, text_at) if wrong is not None else {}
        self.label_mode, self.variation, self.world = labels, variation, world
        self.written = sum(Path(image).parent.name == AUGMENTED_FOLDER for image in unique_images["image"])

    def __len__(self) -> int:
        return len(self.pair_ids)

    def count_false_negatives(self, rows: Sequence[int]) -> int:
        """Pairs of a picture and another row's text in a batch of these rows that match all the same."""
        return count_false_negatives(*self._sets(rows))

    def _sets(self, rows: Sequence[int]) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
        return [self.image_sets[self.image_of[r]] for r in rows], [self.text_sets[self.text_of[r]] for r in rows]

    def __getitem__(self, drawn: Drawn) -> Batch:
        rows = drawn.rows
        own = self.text_of[rows].tolist()
        wrong = {text for row in rows for text in self.wrong_of.get(row, ())}
        columns = own + sorted(wrong.difference(own))
        texts, text_index = np.unique(columns, return_inverse=True)
        image_sets = [self.image_sets[image] for image in self.image_of[rows]]
        return Batch(
            images=self._images(drawn, self.world.shard(len(rows))),
            captions=self.captions[texts[self.world.shard(len(texts))]],
            texts=len(texts),
            text_index=torch.from_numpy(text_index),
            labels=Labels.of(image_sets, [self.text_sets[text] for text in columns], self.label_mode),
            pair_ids=[self.pair_ids[row] for row in rows],
        )

    def _images(self, drawn: Drawn, share: slice) -> Item:
        """Some rows' pictures, as their epoch sees them. Every copy of a row, in an epoch, sees another variation."""
        positions, copies = self.image_of[drawn.rows[share]], drawn.copies[share]
        if self.variation is None or not len(positions):
            return self.pictures[positions]
        seen: dict[tuple[int, int], np.ndarray] = {}
        for image, copy in zip(positions.tolist(), copies, strict=True):
            if (image, copy) not in seen:
                sample = f"{self.image_ids[image]}#{copy}" if copy else self.image_ids[image]
                picture = self.variation.picture(self.pixels.paths[image], drawn.epoch, sample)
                seen[image, copy] = decode.fitted(picture, self.pixels.spec)
        return torch.from_numpy(np.stack([seen[each] for each in zip(positions.tolist(), copies, strict=True)]))


def _wrong_texts(frame: pd.DataFrame, wrong: pd.DataFrame, text_at: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """Row -> positions of the texts that were chosen to be wrong for it or, where it is not said, for its picture."""
    found: dict[int, list[int]] = defaultdict(list)
    row_of = {pair_id: row for row, pair_id in enumerate(frame["pair_id"])}
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, image_id in enumerate(frame["image_id"]):
        rows_of[image_id].append(row)
    sources = wrong["source_pair_id"] if "source_pair_id" in wrong else [None] * len(wrong)
    for source, image_id, text_id in zip(sources, wrong["image_id"], wrong["text_id"], strict=True):
        said = isinstance(source, str) and source
        for row in rows_of[image_id] if not said else [row_of[source]] if source in row_of else []:
            found[row].append(text_at[text_id])
    return {row: tuple(texts) for row, texts in found.items()}


@dataclass(frozen=True)
class BatchOrder:
    """Which rows make which batch, from any batch on and without end.

    An epoch goes through the rows, ordered by a hash of (seed, epoch, pair id); its last batch may be smaller. One of
    fewer than `least` rows is left out: a single pair would be contrasted with nothing. A row of weight w stands w
    times in an epoch, the share of a whole left over being rounded, by its hash, to the one or the other side.
    """

    keys: np.ndarray
    rows: np.ndarray
    copies: np.ndarray
    batch_size: int
    seed: int
    first: int = 0
    least: int = 2

    @classmethod
    def of(
        cls,
        pair_ids: Sequence[str],
        batch_size: int,
        seed: int,
        first: int = 0,
        weights: Sequence[float] | None = None,
        least: int = 2,
    ) -> BatchOrder:
        """The order for these rows, beginning with batch number `first`.

        Args:
            least: rows that an epoch's last batch must have; with fewer it is left out.
        """
        keys = np.array([_hashed(str(pair_id)) for pair_id in pair_ids], np.uint64)
        rows, copies = np.arange(len(keys)), np.zeros(len(keys), np.int64)
        if weights is not None:
            whole, share = np.divmod(np.asarray(weights, np.float64), 1.0)
            times = whole.astype(np.int64) + (_scrambled(keys, seed, -1) / 2.0**64 < share)
            rows = np.repeat(rows, np.maximum(times, 1))
            copies = np.arange(len(rows)) - np.searchsorted(rows, rows)
            keys = np.where(copies > 0, _scrambled(keys[rows] ^ copies.astype(np.uint64), seed, -2), keys[rows])
        return cls(keys, rows, copies, batch_size, seed, first, least)

    @classmethod
    def over(cls, rows: Pairs | Rowed, batch_size: int, seed: int, first: int = 0, least: int = 2) -> BatchOrder:
        """The order for a table's rows, their weights obeyed; see `of`."""
        pair_ids = rows.frame["pair_id"] if isinstance(rows, Pairs) else rows.pair_ids
        return cls.of(pair_ids, batch_size, seed, first, rows.weights, least)

    @property
    def per_epoch(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.keys), self.batch_size)
        return whole + (rest >= self.least)

    def epoch(self, number: int) -> np.ndarray:
        """Rows in the order of epoch `number`."""
        return self.rows[self._order(number)]

    def _order(self, epoch: int) -> np.ndarray:
        return np.argsort(_scrambled(self.keys, self.seed, epoch), kind="stable")

    def __iter__(self) -> Iterator[Drawn]:
        epoch, skip = divmod(self.first, self.per_epoch)
        while True:
            order = self._order(epoch)
            for start in range(skip, self.per_epoch):
                some = order[start * self.batch_size : (start + 1) * self.batch_size]
                yield Drawn(epoch, self.rows[some].tolist(), self.copies[some].tolist())
            epoch, skip = epoch + 1, 0


def loader_workers(inputs: Inputs, *, varied: bool = False) -> int:
    """Processes that pay for fetching these pictures: none where they are at hand, and stay as they are."""
    return 0 if inputs.small and not varied else min(8, usable_cores())


def stream(dataset: BatchSource, order: BatchOrder, *, workers: int | None = None) -> Iterator[Any]:
    """Batches in `order`, without end; loaded by `workers` processes (0: by this one; None: as many as pay)."""
    if workers is None:
        workers = loader_workers(dataset.pictures, varied=dataset.variation is not None)
    loader: DataLoader[Any] = DataLoader(Carried(dataset), sampler=order, batch_size=None, num_workers=workers)  # type: ignore[arg-type]
    return unpacked(loader)


def positions_of(values: Sequence[str], unique: Sequence[str]) -> np.ndarray:
    """int64 [values]: where each stands in `unique`."""
    place = {value: position for position, value in enumerate(unique)}
    return np.array([place[value] for value in values], np.int64)


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _scrambled(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """uint64 keys to well-mixed uint64 (the finaliser of splitmix64), another mixture for each (seed, epoch)."""
    mixed = keys ^ np.uint64(_hashed(f"{seed}:{epoch}"))
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
