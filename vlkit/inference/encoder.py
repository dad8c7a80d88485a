"""Encode images and texts from Python: the model that `vlkit.load` returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlkit.config.data import Decode
from vlkit.data.images import decode as decoding
from vlkit.data.images.spec import PixelSpec
from vlkit.data.loading.stores import PIXEL_CACHE_BYTES
from vlkit.errors import DataError, UsageError
from vlkit.models import encode
from vlkit.models.device import Precision, best_device, best_precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.loading import load_model
from vlkit.runs import Run

if TYPE_CHECKING:
    from PIL import Image

BATCH_SIZE = 64


@dataclass
class _ImageStore:
    """Images by position: files, or images that Pillow has opened or made."""

    images: Sequence[Path | Image.Image]
    spec: PixelSpec

    def __getitem__(self, positions: Sequence[int]) -> torch.Tensor:
        """Return uint8 [images, 3, size, size]."""
        return torch.from_numpy(np.stack([self._pixels_at(position) for position in positions]))

    def _pixels_at(self, position: int) -> np.ndarray:
        image = self.images[position]
        if isinstance(image, Path):
            try:
                return decoding.load_pixels(image, self.spec)
            except DataError as error:
                # Its hint belongs to the rows of a prepared folder.
                raise DataError(error.message) from None
        return decoding.image_pixels(image, self.spec)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def in_memory(self) -> bool:
        """Whether there are too few images for loader processes to pay off."""
        return len(self.images) * 3 * self.spec.size**2 <= PIXEL_CACHE_BYTES


class Encoder:
    """A trained or untouched dual encoder, which turns images and texts into unit vectors of one space.

    Attributes:
        dual_encoder: the model itself, a `torch.nn.Module`.
        precision: of the matrix products.
    """

    def __init__(self, dual_encoder: DualEncoder, precision: Precision | None = None) -> None:
        self.dual_encoder = dual_encoder.to(best_device()).eval().requires_grad_(False)
        count = sum(parameter.numel() for parameter in dual_encoder.model.parameters())
        self.precision: Precision = precision or best_precision(dual_encoder.device, count)

    def __repr__(self) -> str:
        return f"Encoder({self.dual_encoder.source!r}, width={self.width}, precision={self.precision!r})"

    @property
    def width(self) -> int:
        """Numbers in an embedding."""
        return self.dual_encoder.width

    @property
    def logit_scale(self) -> float:
        """Factor of a cosine in a logit, the exponential of the trained parameter."""
        return float(self.dual_encoder.model.logit_scale.detach().float().exp())

    @property
    def logit_bias(self) -> float | None:
        """Added to every logit; None for a model without one, such as CLIP."""
        return self.dual_encoder.logit_values().get("logit_bias")

    def encode_images(self, images: Sequence[str | Path | Image.Image], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Return unit rows float32 [images, width], in order.

        Args:
            images: paths, or images of Pillow.

        Raises:
            UsageError: `images` is one image, not a list.
            DataError: a file is missing or does not decode.
        """
        if not isinstance(images, Iterable) or isinstance(images, str | Path):
            example = repr(str(images)) if isinstance(images, str | Path) else "image"
            raise UsageError("encode_images takes a list of images", hint=f"encode_images([{example}])")
        paths_or_images = [Path(image) if isinstance(image, str) else image for image in images]
        store = _ImageStore(paths_or_images, self.dual_encoder.pixel_spec)
        rows = encode.encode_images(self.dual_encoder, store, batch_size=batch_size, precision=self.precision)
        return rows.float().cpu().numpy()

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Return unit rows float32 [texts, width], in order; tokens beyond the model's limit are cut off."""
        if isinstance(texts, str):
            raise UsageError("encode_texts takes a list of texts", hint=f"encode_texts([{texts[:40]!r}])")
        rows = encode.encode_texts(self.dual_encoder, texts, batch_size=batch_size, precision=self.precision)
        return rows.float().cpu().numpy()

    def logits(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Return scale * cosine + bias of encoded images and texts, float32 [images, texts]."""
        return self.dual_encoder.logits(*map(self._to_device, (images, texts))).detach().cpu().numpy()

    def _to_device(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(rows, np.float32)).to(self.dual_encoder.device)


def load(run_or_model: str | Path, *, precision: Precision | None = None, decode: Decode | None = None) -> Encoder:
    """Load the model that a run trained, or an untouched model, on the best device.

    Args:
        run_or_model: folder of a finished run of train-retrieval, folder of a model, or hub name.
        precision: of the matrix products; None: the run's, for an untouched model the device's best.
        decode: how image files are decoded; None: as the run decoded them, for an untouched model fast.

    Raises:
        ArtifactError: the run is not finished, or its files are damaged.
        UsageError: there is no such model, or it is not a dual encoder.
        NetworkError: the hub cannot be reached and the model is not in its cache.
    """
    run = Run(Path(run_or_model))
    if run.started and run.task != "retrieval":
        raise UsageError(f"{run.folder} is a captioner", hint=f"vlkit caption --run {run.folder} IMAGE")
    if precision is None and run.started:
        precision = run.config().get("precision")
    return Encoder(load_model(str(run_or_model), decode), precision)
