"""Batches of captions with their images, for training a captioner. `epoch_sampler.py` orders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.images.spec import PixelSpec
from vlkit.data.loading.epoch_sampler import BatchIndices
from vlkit.data.loading.stores import InputStore, PixelStore, TensorLike
from vlkit.data.pairs import Pairs, positions_in
from vlkit.distributed import SINGLE, World


@dataclass(frozen=True)
class CaptionBatch:
    """Captions and their images; with several processes, each has its share of the captions.

    Attributes:
        images: the unique images of this share: uint8 [images, 3, size, size], or cached features of them.
        image_index: int64 [captions], the image of each.
        captions: int64 [captions, longest], token ids with an end, padded on the right.
        lengths: int64 [captions].
        token_count: tokens in the captions of all processes.
        pair_ids: of all processes.
    """

    images: TensorLike
    image_index: torch.Tensor
    captions: torch.Tensor
    lengths: torch.Tensor
    token_count: int
    pair_ids: list[str]

    def __len__(self) -> int:
        return len(self.lengths)


class CaptionDataset(Dataset[CaptionBatch]):
    """A table of pairs that makes a CaptionBatch from `BatchIndices`.

    Attributes:
        pixels: the decoded images.
        images: store that batches are made of: pixels, unless the caller puts in cached features.
        tokens: of each row's caption, its end included.
    """

    augmenter: ImageAugmenter | None = None

    def __init__(
        self, pairs: Pairs, spec: PixelSpec, tokens: Sequence[Sequence[int]], pad: int, world: World = SINGLE
    ) -> None:
        """Locate every image.

        Args:
            pairs: rows that match, each an item.
            tokens: token ids of each row's text.
            pad: id that fills up short captions.
            world: the processes that share every batch.
        """
        self.pair_ids = pairs.frame["pair_id"].to_numpy(dtype=object)
        self.weights = pairs.weights
        unique = pairs.unique_images()
        self.image_of = positions_in(unique["image_id"], pairs.frame["image_id"])
        self.image_ids = list(unique["image_id"])
        self.pixels = PixelStore(pairs.image_paths(unique), spec)
        self.images: InputStore = self.pixels
        self.tokens, self.pad, self.world = list(tokens), pad, world

    def __len__(self) -> int:
        return len(self.pair_ids)

    def __getitem__(self, indices: BatchIndices) -> CaptionBatch:
        return self.batch_of_rows(indices.rows)

    def batch_of_rows(self, rows: Sequence[int], image_rows: Sequence[int] | None = None) -> CaptionBatch:
        """Return the batch of these rows.

        Args:
            image_rows: rows whose images go with the captions; None: the captions' own.
        """
        share = self.world.shard(len(rows))
        own_rows = list(rows[share])
        images, index = np.unique(
            self.image_of[own_rows if image_rows is None else list(image_rows[share])], return_inverse=True
        )
        captions, lengths = pad_captions([self.tokens[row] for row in own_rows], self.pad)
        return CaptionBatch(
            images=self.images[images.tolist()],
            image_index=torch.from_numpy(index),
            captions=captions,
            lengths=lengths,
            token_count=sum(len(self.tokens[row]) for row in rows),
            pair_ids=[self.pair_ids[row] for row in rows],
        )


def pad_captions(captions: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids on the right: int64 [captions, longest]; and int64 [captions], their lengths."""
    lengths = torch.tensor([len(ids) for ids in captions], dtype=torch.long)
    padded = torch.full((len(captions), max(map(len, captions), default=0)), pad, dtype=torch.long)
    for row, ids in enumerate(captions):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return padded, lengths
