"""Rows -> batches of captions under their pictures, for a model that writes. Their order is that of `batches.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from vlkit.data.images.decode import PixelSpec
from vlkit.data.loading.retrieval_batches import Drawn, Inputs, Item, PixelStore, positions_of
from vlkit.data.pairs import Pairs
from vlkit.distributed import SINGLE, World


@dataclass(frozen=True)
class CaptionBatch:
    """Captions and their pictures; of several processes each has its share of the captions.

    Attributes:
        images: the unique pictures of this share: uint8 [pictures, 3, size, size], or what a cache has of them.
        image_index: int64 [captions], the picture of each.
        captions: int64 [captions, longest], token ids and their ends, padded behind.
        lengths: int64 [captions].
        words: tokens of all processes' captions.
        pair_ids: of all processes.
    """

    images: Item
    image_index: torch.Tensor
    captions: torch.Tensor
    lengths: torch.Tensor
    words: int
    pair_ids: list[str]

    def __len__(self) -> int:
        return len(self.lengths)


class CaptionDataset(Dataset[CaptionBatch]):
    """A table of pairs as batches: ask it for what is `Drawn`, get a CaptionBatch.

    Attributes:
        pixels: the pictures, decoded.
        pictures: what batches are made of: pixels, unless the caller puts in what a cache has of them.
        tokens: of each row's caption, its end included.
    """

    variation = None

    def __init__(
        self, pairs: Pairs, spec: PixelSpec, tokens: Sequence[Sequence[int]], pad: int, world: World = SINGLE
    ) -> None:
        """Find every picture.

        Args:
            pairs: rows that match, each an item.
            tokens: token ids of each row's text.
            pad: what short captions are filled up with.
            world: the processes that share every batch.
        """
        self.pair_ids = pairs.frame["pair_id"].to_numpy(dtype=object)
        self.weights = pairs.weights
        unique = pairs.unique_images()
        self.image_of = positions_of(pairs.frame["image_id"], unique["image_id"])
        self.image_ids = list(unique["image_id"])
        self.pixels = PixelStore(pairs.image_paths(unique), spec)
        self.pictures: Inputs = self.pixels
        self.tokens, self.pad, self.world = list(tokens), pad, world

    def __len__(self) -> int:
        return len(self.pair_ids)

    def __getitem__(self, drawn: Drawn) -> CaptionBatch:
        return self.of(drawn.rows)

    def of(self, rows: Sequence[int], pictured: Sequence[int] | None = None) -> CaptionBatch:
        """The batch of some rows.

        Args:
            pictured: the rows whose pictures stand with their captions; None: their own.
        """
        share = self.world.shard(len(rows))
        mine, seen = list(rows[share]), list((rows if pictured is None else pictured)[share])
        images, index = np.unique(self.image_of[seen], return_inverse=True)
        captions, lengths = padded([self.tokens[row] for row in mine], self.pad)
        words = sum(len(self.tokens[row]) for row in rows)
        return CaptionBatch(
            images=self.pictures[images],
            image_index=torch.from_numpy(index),
            captions=captions,
            lengths=lengths,
            words=words,
            pair_ids=[self.pair_ids[row] for row in rows],
        )


def padded(captions: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids as int64 [captions, longest], padded behind; and int64 [captions], their lengths."""
    lengths = torch.tensor([len(ids) for ids in captions], dtype=torch.long)
    filled = torch.full((len(captions), max(map(len, captions), default=0)), pad, dtype=torch.long)
    for row, ids in enumerate(captions):
        filled[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return filled, lengths
