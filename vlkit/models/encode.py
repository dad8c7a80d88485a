"""Many pictures or texts through the towers, block by block."""

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

ALL = slice(None)


@torch.inference_mode()
def encode_images(
    encoder: DualEncoder,
    store: InputStore,
    *,
    batch_size: int,
    precision: Precision,
    part: slice = ALL,
    watch: Callable[[TensorLike], None] | None = None,
) -> torch.Tensor:
    """Embeddings of pictures, all or a part: float32 [pictures, width], in order, on the towers' device.

    Args:
        watch: is shown every batch that goes in.
    """
    positions = range(len(store))[part]
    order = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    loader: DataLoader[Any] = DataLoader(
        ErrorAsItem(store), sampler=order, batch_size=None, num_workers=loader_workers(store)
    )
    blocks = [torch.zeros((0, encoder.width), device=encoder.device)]
    with console.progress("encoding pictures", len(positions)) as bar:
        for number, pixels in enumerate(reraise_errors(loader), start=1):
            signals.raise_if_stopped()
            if watch:
                watch(pixels)
            with autocast(encoder.device, precision):
                blocks.append(encoder.embed_images(pixels))
            bar.update(min(number * batch_size, len(positions)))
    return torch.cat(blocks)


def text_encoder(encoder: DualEncoder, *, batch_size: int = 64) -> Callable[[Sequence[str]], np.ndarray]:
    """Texts -> float32 [texts, width], for rooms that know no model."""
    encoder.to(best_device()).eval()
    precision = best_precision(encoder.device, sum(p.numel() for p in encoder.model.parameters()))

    def encode(texts: Sequence[str]) -> np.ndarray:
        return encode_texts(encoder, texts, batch_size=batch_size, precision=precision).float().cpu().numpy()

    return encode


def encode_texts(encoder: DualEncoder, texts: Sequence[str], *, batch_size: int, precision: Precision) -> torch.Tensor:
    """Embeddings of texts: float32 [texts, width], in their order."""
    captions = TokenStore(encoder.tokenize(texts)[0], encoder.pad)
    return encode_captions(encoder, captions, batch_size=batch_size, precision=precision)


@torch.inference_mode()
def encode_captions(
    encoder: DualEncoder, captions: InputStore, *, batch_size: int, precision: Precision, part: slice = ALL
) -> torch.Tensor:
    """The same of texts that are tokens already, or more than that. Like lengths go together: little is padded."""
    positions = list(range(len(captions))[part])
    if isinstance(captions, TokenStore):
        positions.sort(key=lambda position: len(captions.tokens[position]))
    blocks = [torch.zeros((0, encoder.width), device=encoder.device)]
    for start in range(0, len(positions), batch_size):
        signals.raise_if_stopped()
        with autocast(encoder.device, precision):
            blocks.append(encoder.embed_texts(captions[positions[start : start + batch_size]]))
    embedded = torch.cat(blocks)
    return embedded[torch.argsort(torch.tensor(positions, dtype=torch.long)).to(embedded.device)]
