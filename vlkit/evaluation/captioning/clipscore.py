"""CLIPScore and RefCLIPScore of captions: their similarity, in a dual encoder, to the image and to the references.

CLIPScore is 2.5 max(cos(image, "A photo depicts " + caption), 0). RefCLIPScore is the harmonic mean of it and of the
caption's best cosine to a reference, with the same prefix. Numbers of different models, or of a tuned and an untouched
one, are not comparable: results name the model. The published ones are of openai/clip-vit-base-patch32.

Source: Hessel et al. 2021, arXiv 2104.08718.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from vlkit.config.data import Decode
from vlkit.data.loading.stores import PixelStore
from vlkit.evaluation.captioning.score import CaptionSet
from vlkit.models.device import best_device, best_precision
from vlkit.models.encode import encode_images, encode_texts
from vlkit.models.loading import load_model

PREFIX, WEIGHT = "A photo depicts ", 2.5


class ClipScorer:
    """A dual encoder that has encoded the images, and scores captions of them."""

    def __init__(self, model: str, images: Sequence[Path], batch_size: int, decode: Decode | None = None) -> None:
        """Encode the images.

        Args:
            model: hub name, folder or run.
            decode: see `load_model`.
        """
        self.encoder = load_model(model, decode).to(best_device()).eval()
        self.batch_size = batch_size
        self.precision = best_precision(self.encoder.device, sum(p.numel() for p in self.encoder.model.parameters()))
        store = PixelStore(images, self.encoder.pixel_spec)
        self.images = encode_images(self.encoder, store, batch_size=batch_size, precision=self.precision)

    def __call__(self, captioned: CaptionSet) -> Mapping[str, np.ndarray]:
        """Score captions, which are in the images' order: metric -> float64 [images]."""
        references = [text for texts in captioned.references for text in texts]
        owners = torch.tensor([index for index, texts in enumerate(captioned.references) for _ in texts])
        captions, others = self._encode(captioned.captions), self._encode(references)
        to_image = WEIGHT * (self.images * captions).sum(dim=1).clamp(min=0)
        to_reference = (others * captions[owners.to(captions.device)]).sum(dim=1).cpu()
        best = torch.full((len(captions),), -1.0).scatter_reduce(0, owners, to_reference, "amax").clamp(min=0)
        scores = to_image.double().cpu().numpy()
        return {"clipscore": scores, "refclipscore": _harmonic_mean(scores, best.double().numpy())}

    def _encode(self, texts: list[str]) -> torch.Tensor:
        prefixed = [PREFIX + text for text in texts]
        return encode_texts(self.encoder, prefixed, batch_size=self.batch_size, precision=self.precision)


def _harmonic_mean(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    total = one + other
    mean: np.ndarray = np.divide(2 * one * other, total, out=np.zeros_like(total), where=total > 0)
    return mean
