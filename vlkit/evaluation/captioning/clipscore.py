"""CLIPScore and RefCLIPScore of captions: what a dual encoder thinks of them, with and without references.

CLIPScore is 2.5 max(cos(picture, "A photo depicts " + caption), 0). RefCLIPScore is the harmonic mean of it and of the
caption's best cosine to a reference, with the same prefix. Numbers of different models, or of a tuned and an untouched
one, are not comparable: the model is named beside them. The published ones are of openai/clip-vit-base-patch32.

Source: Hessel et al. 2021, arXiv 2104.08718.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlkit.config.data import Decode
from vlkit.data.loading.stores import PixelStore
from vlkit.errors import DataError
from vlkit.evaluation.captioning.score import CaptionSet, normalize_image_id, read_json_file
from vlkit.models.device import best_device, best_precision
from vlkit.models.encode import encode_images, encode_texts
from vlkit.models.loading import load_model

PREFIX, WEIGHT = "A photo depicts ", 2.5


@dataclass(frozen=True)
class ClipScores:
    """float64 [pictures] each."""

    clipscore: np.ndarray
    refclipscore: np.ndarray


class ClipScorer:
    """A dual encoder that has seen some pictures, and is asked what it thinks of captions of them."""

    def __init__(self, model: str, pictures: Sequence[Path], batch_size: int, decode: Decode | None = None) -> None:
        """Look at the pictures.

        Args:
            model: hub name, folder or run.
            decode: see `load_model`.
        """
        self.encoder = load_model(model, decode).to(best_device()).eval()
        self.batch_size = batch_size
        self.precision = best_precision(self.encoder.device, sum(p.numel() for p in self.encoder.model.parameters()))
        store = PixelStore(pictures, self.encoder.pixel_spec)
        self.seen = encode_images(self.encoder, store, batch_size=batch_size, precision=self.precision)

    def __call__(self, captioned: CaptionSet) -> ClipScores:
        """Scores of the pictures' captions, which are in the pictures' order."""
        flat = [text for each in captioned.references for text in each]
        owners = torch.tensor([place for place, each in enumerate(captioned.references) for _ in each])
        said, references = self._told(captioned.captions), self._told(flat)
        alone = WEIGHT * (self.seen * said).sum(dim=1).clamp(min=0)
        alike = (references * said[owners.to(said.device)]).sum(dim=1).cpu()
        best = torch.full((len(said),), -1.0).scatter_reduce(0, owners, alike, "amax").clamp(min=0)
        scores = alone.double().cpu().numpy()
        return ClipScores(scores, _harmonic(scores, best.double().numpy()))

    def _told(self, texts: list[str]) -> torch.Tensor:
        prefixed = [PREFIX + text for text in texts]
        return encode_texts(self.encoder, prefixed, batch_size=self.batch_size, precision=self.precision)


def _harmonic(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    total = one + other
    return np.divide(2 * one * other, total, out=np.zeros_like(total), where=total > 0)


def coco_image_paths(annotations: Path, folder: Path, images: Sequence[str]) -> list[Path]:
    """Where images lie, by the file names of a COCO annotation file.

    Raises:
        DataError: it does not name one of them, or the file is not there.
    """
    listed = read_json_file(annotations)
    rows = listed.get("images") if isinstance(listed, dict) else None
    known = [row for row in rows or [] if isinstance(row, dict) and isinstance(row.get("id"), str | int | float)]
    names = {normalize_image_id(row["id"]): str(row.get("file_name") or "") for row in known}
    found = [folder / names.get(image, "") for image in images]
    for image, path in zip(images, found, strict=True):
        if not names.get(image) or not path.is_file():
            told = f"{annotations} names no file of image {image}" if not names.get(image) else f"no such image: {path}"
            raise DataError(told, hint="--images is the folder of the pictures that --references names")
    return found
