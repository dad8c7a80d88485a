"""The untouched model's embeddings, paid once: kept on disk by content, weights and preprocessing, for later runs."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from vlkit.data.loading.retrieval_batches import Inputs, PixelStore
from vlkit.distributed import SINGLE, World
from vlkit.evaluation.retrieval.corruptions import MAX_SIDE, CORRUPTIONS, VERSION, CorruptedPixels
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalTask, embed_task, pixel_store, token_store
from vlkit.models.cache.feature_cache import Kept, keys_of
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder


def embed_cached(
    encoder: DualEncoder,
    task: RetrievalTask,
    *,
    batch_size: int,
    precision: Precision,
    cache: str,
    shift: str | None = None,
    texts: torch.Tensor | None = None,
    world: World = SINGLE,
) -> Embeddings:
    """`embed_task` a task with a model that will not change; what was embedded before is read.

    Args:
        cache: off, auto, or a folder.
        shift: a corruption of the pictures.
        texts: the task's, where they are embedded already.
    """
    encoder.eval().requires_grad_(False)
    pixels: PixelStore = pixel_store(task, encoder)
    if shift is not None:
        pixels = CorruptedPixels(pixels.paths, pixels.spec, shift=shift)
    tokens = token_store(task, encoder)
    pictures: Inputs = pixels
    captions: Inputs = tokens
    if cache != "off":
        frozen = Kept(encoder, precision, max(map(len, tokens.tokens)), cache, world)
        keys = keys_of("pictures", pixels, list(task.pictures["image_id"]), tokens)
        if shift is not None:
            # What it does, and how, is part of what the features are.
            made = f"{shift} {VERSION} {CORRUPTIONS[shift]} {MAX_SIDE}"
            keys = [f"{key}-{shift}-{zlib.crc32(made.encode()):08x}" for key in keys]
        pictures = frozen("pictures", pixels, keys)
        if texts is None:
            captions = frozen("texts", tokens, keys_of("texts", pixels, [], tokens))
    how: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "world": world}
    return embed_task(encoder, task, pictures=pictures, captions=captions, texts=texts, **how)
