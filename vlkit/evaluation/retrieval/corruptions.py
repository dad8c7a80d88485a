"""Corruptions of images, each stated in words, the same for every model and every run."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlkit.config.data import IMAGE_OPERATIONS
from vlkit.data.augment.image_ops import ImageAugmenter
from vlkit.data.images import decode
from vlkit.data.images.spec import PixelSpec
from vlkit.data.loading.stores import PixelStore

# Larger images are first reduced to this many pixels, so that a corruption means the same for all.
MAX_SIDE = 640
# Counts up when a corruption is computed in another way: features cached before are then of no use.
VERSION = 1
LIGHT_LEFT, BLUR, QUALITY, DEGREES = 0.35, 0.015, 10, 15.0
CORRUPTIONS = {
    "low-light": f"{LIGHT_LEFT:.0%} of the light",
    "blur": f"Gaussian blur, its radius {BLUR:.1%} of the longer side",
    "jpeg": f"saved as JPEG of quality {QUALITY}",
    "rotate": f"turned by {DEGREES:g} degrees, the corners filled with the mean colour",
}
OPERATIONS = {"low-light": "low_light", "blur": "blur", "rotate": "rotate"}


@dataclass
class CorruptedPixels(PixelStore):
    """Images under a corruption, resized as a model needs them."""

    corruption: str = field(kw_only=True)

    def load_pixels(self, path: Path) -> np.ndarray:
        """Return uint8 [3, size, size]."""
        return corrupt(path, self.corruption, self.spec)


def corrupt(path: Path, corruption: str, spec: PixelSpec) -> np.ndarray:
    """Read an image and corrupt it: uint8 [3, size, size].

    Args:
        corruption: one of CORRUPTIONS.
    """
    from PIL import Image

    image = decode.load_rgb(path, max_side=MAX_SIDE)
    if corruption == "jpeg":
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=QUALITY)
        image = Image.open(encoded).convert("RGB")
    else:
        amount = {"low-light": LIGHT_LEFT, "blur": BLUR * max(image.size), "rotate": DEGREES}[corruption]
        name = OPERATIONS[corruption]
        probability = {operation: float(operation == name) for operation in IMAGE_OPERATIONS}
        always = ImageAugmenter(probability, {name: (amount, amount)}, seed=0, max_side=MAX_SIDE)
        image = Image.fromarray(always.apply(np.asarray(image), 0, ""))
    return decode.resize_to_spec(image, spec)
