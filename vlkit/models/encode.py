"""Embed many images or texts with a dual encoder, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from vlkit import console, signals
from vlkit.data.loading.stores import ErrorAsItem, InputStore, TensorLike, TokenStore, loader_workers, reraise_errors
from vlkit.models.device import Precision, autocast, best_device, best_precision
from vlkit.models.dual_encoder import DualEncoder

EVERYTHING = slice(None)


@torch.inference_mode()
def encode_images(
    encoder: DualEncoder,
    store: InputStore,
    *,
    batch_size: int,
    precision: Precision,
    part: slice = EVERYTHING,
    watch: Callable[[TensorLike], None] | None = None,
) -> torch.Tensor:
    """Return embeddings of images, all or a part: float32 [images, width], in order, on the encoder's device.

    Args:
        watch: gets every batch before it is embedded.
    """
    positions = range(len(store))[part]
    order = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    loader: DataLoader[Any] = DataLoader(
        ErrorAsItem(store), sampler=order, batch_size=None, num_workers=loader_workers(store)
    )
    blocks = [torch.zeros((0, encoder.width), device=encoder.device)]
    with console.progress("encoding images", len(positions)) as bar:
        for number, pixels in enumerate(reraise_errors(loader), start=1):
            signals.raise_if_stopped()
            if watch:
                watch(pixels)
            with autocast(encoder.device, precision):
                blocks.append(encoder.embed_images(pixels))
            bar.update(min(number * batch_size, len(positions)))
    return torch.cat(blocks)


def text_encoder(encoder: DualEncoder, *, batch_size: int = 64) -> Callable[[Sequence[str]], np.ndarray]:
    """Return a function from texts to float32 [texts, width], for modules that know no model."""
    encoder.to(best_device()).eval()
    precision = best_precision(encoder.device, sum(p.numel() for p in encoder.model.parameters()))

    def encode(texts: Sequence[str]) -> np.ndarray:
        return encode_texts(encoder, texts, batch_size=batch_size, precision=precision).float().cpu().numpy()

    return encode


def encode_texts(encoder: DualEncoder, texts: Sequence[str], *, batch_size: int, precision: Precision) -> torch.Tensor:
    """Return embeddings of texts: float32 [texts, width], in their order."""
    tokens = TokenStore(encoder.tokenize(texts)[0], encoder.pad)
    return encode_text_inputs(encoder, tokens, batch_size=batch_size, precision=precision)


@torch.inference_mode()
def encode_text_inputs(
    encoder: DualEncoder, store: InputStore, *, batch_size: int, precision: Precision, part: slice = EVERYTHING
) -> torch.Tensor:
    """Return the same for tokens, or cached features. Texts of similar lengths go together: little is padded."""
    positions = list(range(len(store))[part])
    if isinstance(store, TokenStore):
        tokens = store.tokens
        positions.sort(key=lambda position: len(tokens[position]))
    blocks = [torch.zeros((0, encoder.width), device=encoder.device)]
    for start in range(0, len(positions), batch_size):
        signals.raise_if_stopped()
        with autocast(encoder.device, precision):
            blocks.append(encoder.embed_texts(store[positions[start : start + batch_size]]))
    embedded = torch.cat(blocks)
    return embedded[torch.argsort(torch.tensor(positions, dtype=torch.long)).to(embedded.device)]
