"""The untouched model's embeddings, paid once: kept on disk by content, weights and preprocessing, for later runs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from vlkit import console
from vlkit.data.batches import Inputs, PixelStore, TokenStore
from vlkit.distributed import ALONE, World
from vlkit.errors import UsageError
from vlkit.evaluation.scoring import Embedded, Task, embed, pixel_store, token_store
from vlkit.evaluation.shifts import STATED, ShiftedPixels
from vlkit.models.device import Precision
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
    pictures: Inputs = pixels
    tokens = token_store(task, towers)
    captions: Inputs = tokens
    if cache != "off":
        pictures = _kept("pictures", towers, pixels, list(task.pictures["image_id"]), tokens, precision, cache, world)
        if texts is None:
            captions = _kept("texts", towers, pixels, [], tokens, precision, cache, world)
    how: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "world": world}
    return embed(towers, task, pictures=pictures, captions=captions, texts=texts, **how)


def _kept(
    kind: Kind,
    towers: Towers,
    pixels: PixelStore,
    image_ids: Sequence[str],
    tokens: TokenStore,
    precision: Precision,
    cache: str,
    world: World,
) -> Inputs:
    """What the whole tower makes of the pictures or texts, out of the store."""
    items: Inputs = pixels if kind == "pictures" else tokens
    try:
        frozen = Frozen.of(towers, kind, precision, max(map(len, tokens.tokens)))
        keys = keys_of(kind, pixels, image_ids, tokens)
        if isinstance(items, ShiftedPixels):
            keys = [f"{key}-{items.shift}-{zlib.crc32(STATED[items.shift].encode()):08x}" for key in keys]
        return frozen.features(frozen.opened(cache), items, keys, world)
    except (UsageError, OSError) as error:
        # Nobody asked for it, so nothing fails for want of it.
        if cache != "auto" or world.size > 1:
            raise
        console.warn(f"the untouched model's embeddings are not kept: {error}")
        return items
