"""Batches of image-text pairs for contrastive training: images, unique texts, and the labels between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.images import decode
from vlkit.data.images.spec import PixelSpec
from vlkit.data.labels import LabelMode, Labels, count_false_negatives, match_sets
from vlkit.data.loading.epoch_sampler import BatchIndices
from vlkit.data.loading.stores import InputStore, Pad, PixelStore, TensorLike, TokenStore
from vlkit.data.pairs import AUGMENTED_FOLDER, Pairs, index_of_ids, positions_in
from vlkit.distributed import SINGLE, World

if TYPE_CHECKING:
    import pandas as pd

# Texts -> the token ids of each, and how many texts were cut.
Tokenize = Callable[[Sequence[str]], tuple[list[list[int]], int]]


@dataclass(frozen=True)
class Batch:
    """Pairs that are contrasted with each other. With several processes, each has its share of what is embedded.

    Attributes:
        images: uint8 [share of the pairs, 3, size, size], or cached features of them.
        texts: int64 [share of the unique texts, length], or cached features of them: a repeated text is encoded once.
        text_count: number of unique texts, of all processes.
        text_index: int64 [columns], the unique text of each column: first the pairs' own, then the negatives.
        labels: of [pairs, columns].
        pair_ids: of the rows.
    """

    images: TensorLike
    texts: TensorLike
    text_count: int
    text_index: torch.Tensor
    labels: Labels
    pair_ids: list[str]

    def __len__(self) -> int:
        return len(self.pair_ids)


class PairDataset(Dataset[Batch]):
    """A table of pairs that makes a Batch from `BatchIndices`.

    Attributes:
        pixels: the decoded images.
        tokens: the texts, as token ids.
        images, texts: stores that batches are made of: pixels and tokens, unless the caller puts in cached features.
        truncated: how many texts were cut at the model's limit.
        augmented_image_count: how many images `vlkit augment` wrote.
    """

    def __init__(
        self,
        pairs: Pairs,
        spec: PixelSpec,
        tokenize: Tokenize,
        pad: Pad,
        *,
        labels: LabelMode,
        negatives: pd.DataFrame | None = None,
        augmenter: ImageAugmenter | None = None,
        world: World = SINGLE,
    ) -> None:
        """Tokenise every text and locate every image.

        Args:
            pairs: rows that match, each an item.
            negatives: rows that do not match; each text joins the batches of the row that it was chosen for.
            augmenter: changes the images in every epoch; None: they stay as they are.
            world: the processes that share every batch.
        """
        import pandas as pd

        frame = pairs.frame
        all_rows = pd.concat([frame, negatives], ignore_index=True) if negatives is not None else frame
        self.pair_ids = frame["pair_id"].to_numpy(dtype=object)
        self.weights = pairs.weights
        unique_images, unique_texts = pairs.unique_images(), all_rows.drop_duplicates("text_id")
        self.image_of = positions_in(unique_images["image_id"], frame["image_id"])
        self.text_of = positions_in(unique_texts["text_id"], frame["text_id"])
        self.image_ids = list(unique_images["image_id"])
        self.pixels = PixelStore(pairs.image_paths(unique_images), spec)
        tokens, self.truncated = tokenize(list(unique_texts["text"]))
        self.tokens = TokenStore(tokens, pad)
        self.images: InputStore = self.pixels
        self.texts: InputStore = self.tokens
        image_sets, text_sets = match_sets(all_rows)
        self.image_sets = [image_sets[key] for key in unique_images["image_id"]]
        self.text_sets = [text_sets[key] for key in unique_texts["text_id"]]
        self.negative_texts = (
            _negative_texts(frame, negatives, index_of_ids(unique_texts["text_id"])) if negatives is not None else {}
        )
        self.label_mode, self.augmenter, self.world = labels, augmenter, world
        self.augmented_image_count = sum(
            Path(image).parent.name == AUGMENTED_FOLDER for image in unique_images["image"]
        )

    def __len__(self) -> int:
        return len(self.pair_ids)

    def count_false_negatives(self, rows: Sequence[int]) -> int:
        """Count the pairs of an image and another row's text that match, in a batch of these rows."""
        image_sets = [self.image_sets[self.image_of[row]] for row in rows]
        return count_false_negatives(image_sets, [self.text_sets[self.text_of[row]] for row in rows])

    def __getitem__(self, indices: BatchIndices) -> Batch:
        rows = indices.rows
        own_texts = self.text_of[rows].tolist()
        negative_texts = {text for row in rows for text in self.negative_texts.get(row, ())}
        columns = own_texts + sorted(negative_texts.difference(own_texts))
        texts, text_index = np.unique(columns, return_inverse=True)
        image_sets = [self.image_sets[image] for image in self.image_of[rows]]
        return Batch(
            images=self._read_images(indices, self.world.shard(len(rows))),
            texts=self.texts[texts[self.world.shard(len(texts))].tolist()],
            text_count=len(texts),
            text_index=torch.from_numpy(text_index),
            labels=Labels.from_groups(image_sets, [self.text_sets[text] for text in columns], self.label_mode),
            pair_ids=[self.pair_ids[row] for row in rows],
        )

    def _read_images(self, indices: BatchIndices, share: slice) -> TensorLike:
        """Return the images of a share of the rows, augmented for the epoch: differently for every copy of a row."""
        positions, copies = self.image_of[indices.rows[share]].tolist(), indices.copies[share]
        if self.augmenter is None or not len(positions):
            return self.images[positions]
        pixels: dict[tuple[int, int], np.ndarray] = {}
        for key in zip(positions, copies, strict=True):
            if key not in pixels:
                position, copy = key
                sample = f"{self.image_ids[position]}#{copy}" if copy else self.image_ids[position]
                image = self.augmenter.load_image(self.pixels.paths[position], indices.epoch, sample)
                pixels[key] = decode.resize_to_spec(image, self.pixels.spec)
        return torch.from_numpy(np.stack([pixels[key] for key in zip(positions, copies, strict=True)]))


def _negative_texts(
    frame: pd.DataFrame, negatives: pd.DataFrame, position_of: Mapping[str, int]
) -> dict[int, tuple[int, ...]]:
    """Map each row to the positions of its negative texts: chosen for the row or, where no row is named, its image."""
    texts_of: dict[int, list[int]] = defaultdict(list)
    row_of = index_of_ids(frame["pair_id"])
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, image_id in enumerate(frame["image_id"]):
        rows_of[image_id].append(row)
    sources = negatives["source_pair_id"] if "source_pair_id" in negatives else [None] * len(negatives)
    for source, image_id, text_id in zip(sources, negatives["image_id"], negatives["text_id"], strict=True):
        has_source = isinstance(source, str) and source
        for row in rows_of[image_id] if not has_source else [row_of[source]] if source in row_of else []:
            texts_of[row].append(position_of[text_id])
    return {row: tuple(texts) for row, texts in texts_of.items()}
