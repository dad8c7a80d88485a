"""Pictures as they come on a bad day: stated corruptions, the same for every model and every run."""

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

# Longer pictures are brought to this many pixels first, so that a corruption means the same for all.
MAX_SIDE = 640
# Counts up when a corruption is made in another way: what is kept of it is then of no use.
VERSION = 1
LIGHT_LEFT, BLUR, QUALITY, DEGREES = 0.35, 0.015, 10, 15.0
CORRUPTIONS = {
    "low-light": f"{LIGHT_LEFT:.0%} of the light",
    "blur": f"Gaussian blur, its radius {BLUR:.1%} of the longer side",
    "jpeg": f"saved as JPEG of quality {QUALITY}",
    "rotate": f"turned by {DEGREES:g} degrees, the corners filled with the mean colour",
}
OPERATION = {"low-light": "low_light", "blur": "blur", "rotate": "rotate"}


@dataclass
class CorruptedPixels(PixelStore):
    """Pictures under a corruption, as a model wants them."""

    corruption: str = field(kw_only=True)

    def load_pixels(self, path: Path) -> np.ndarray:
        """uint8 [3, size, size]."""
        return corrupt(path, self.corruption, self.spec)


def corrupt(path: Path, shift: str, spec: PixelSpec) -> np.ndarray:
    """A picture under a corruption: uint8 [3, size, size].

    Args:
        shift: one of STATED.
    """
    from PIL import Image

    picture = decode.load_rgb(path, max_side=MAX_SIDE)
    if shift == "jpeg":
        packed = io.BytesIO()
        picture.save(packed, "JPEG", quality=QUALITY)
        picture = Image.open(packed).convert("RGB")
    else:
        amount = {"low-light": LIGHT_LEFT, "blur": BLUR * max(picture.size), "rotate": DEGREES}[shift]
        name = OPERATION[shift]
        probability = {each: float(each == name) for each in IMAGE_OPERATIONS}
        always = ImageAugmenter(probability, {name: (amount, amount)}, seed=0, max_side=MAX_SIDE)
        picture = Image.fromarray(always.apply(np.asarray(picture), 0, ""))
    return decode.resize_to_spec(picture, spec)
