"""The untouched model's embeddings, paid once: kept on disk by content, weights and preprocessing, for later runs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlkit import console
from vlkit.data.batches import Inputs, PixelStore
from vlkit.distributed import ALONE, World
from vlkit.errors import VlkitError
from vlkit.evaluation.scoring import Embedded, Task, embed, pixel_store, token_store
from vlkit.evaluation.shifts import MAX_SIDE, STATED, VERSION, ShiftedPixels
from vlkit.models.device import Precision
from vlkit.models.feature_store import folder_of
from vlkit.models.features import Frozen, Kind, keys_of
from vlkit.models.towers import Towers


def embedded_once(
    towers: Towers,
    task: Task,
    *,
    batch_size: int,
    precision: Precision,
    cache: str,
    shift: str | None = None,
    texts: torch.Tensor | None = None,
    world: World = ALONE,
) -> Embedded:
    """`embed` a task with a model that will not change; what was embedded before is read.

    Args:
        cache: off, auto, or a folder.
        shift: a corruption of the pictures.
        texts: the task's, where they are embedded already.
    """
    towers.eval().requires_grad_(False)
    pixels: PixelStore = pixel_store(task, towers)
    if shift is not None:
        pixels = ShiftedPixels(pixels.paths, pixels.spec, shift=shift)
    tokens = token_store(task, towers)
    pictures: Inputs = pixels
    captions: Inputs = tokens
    if cache != "off":
        frozen = Kept(towers, precision, max(map(len, tokens.tokens)), cache, world)
        keys = keys_of("pictures", pixels, list(task.pictures["image_id"]), tokens)
        if shift is not None:
            # What it does, and how, is part of what the features are.
            made = f"{shift} {VERSION} {STATED[shift]} {MAX_SIDE}"
            keys = [f"{key}-{shift}-{zlib.crc32(made.encode()):08x}" for key in keys]
        pictures = frozen("pictures", pixels, keys)
        if texts is None:
            captions = frozen("texts", tokens, keys_of("texts", pixels, [], tokens))
    how: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "world": world}
    return embed(towers, task, pictures=pictures, captions=captions, texts=texts, **how)


@dataclass(frozen=True)
class Kept:
    """A whole model's features, in the folder of --cache.

    Attributes:
        longest: tokens of the longest text.
    """

    towers: Towers
    precision: Precision
    longest: int
    cache: str
    world: World

    def __call__(self, kind: Kind, items: Inputs, keys: Sequence[str]) -> Inputs:
        """Features of the items; where a cache that nobody asked for fails, the items as they are.

        Under torchrun it fails all: the processes would no longer do the same.
        """
        try:
            frozen = Frozen.of(self.towers, kind, self.precision, self.longest)
            if self.world.first:
                frozen.opened(self.cache)
            self.world.wait()
            store = frozen.store(folder_of(self.cache))
            found = frozen.features(store, items, keys, self.world)
            store.read(found.places)  # Damage shows now, while there is another way.
            return found
        except (VlkitError, OSError) as error:
            if self.cache != "auto" or self.world.size > 1:
                raise
            console.warn(f"the untouched model's embeddings are not kept: {error}")
            return items
