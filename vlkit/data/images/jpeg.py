"""Decode JPEG files by simplejpeg, a thin wrapper of libjpeg-turbo; Pillow wraps the same library with more overhead.

Pillow still opens the file, says at what size it is decoded, and decodes whatever simplejpeg refuses. So the pixels
are Pillow's, and so is the verdict on whether an image is damaged; only the time is less
(`tests/benchmarks/pictures.py`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Pillow's names of formats that hold a JPEG.
JPEG_FORMATS = ("JPEG", "MPO")
ORIENTATION_TAG = 0x0112
# EXIF orientation -> how to turn the image upright: whether rows and columns are swapped, then the steps through rows
# and columns.
EXIF_TRANSFORMS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


def exif_orientation(image: Image.Image) -> int:
    """Return an image's orientation by its EXIF, 1 to 8; 1 is upright, also for EXIF that is unreadable or invalid."""
    with contextlib.suppress(Exception):
        value = image.getexif().get(ORIENTATION_TAG, 1)
        return next((known for known in EXIF_TRANSFORMS if known == value), 1)
    return 1


def decode_jpeg(file: Path | IO[bytes], image: Image.Image) -> np.ndarray | None:
    """Decode a JPEG upright: uint8 [height, width, 3], RGB.

    Args:
        image: the file, opened by Pillow and not loaded; its size is the one to decode at. It is closed where pixels
            are returned.

    Returns:
        None where Pillow has to decode: other formats and colours, and files that may be damaged.
    """
    if image.format not in JPEG_FORMATS or image.mode != "RGB":
        return None
    import simplejpeg

    width, height = image.size
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(_read(file), min_height=height, min_width=width)
    except ValueError:
        return None
    if pixels.shape != (height, width, 3):
        return None
    transform = EXIF_TRANSFORMS.get(exif_orientation(image))
    with image:  # Closes a file that Pillow has opened by its name, and no other.
        pass
    if transform is None:
        return pixels
    swapped, row_step, column_step = transform
    return (pixels.transpose(1, 0, 2) if swapped else pixels)[::row_step, ::column_step].copy()


def _read(file: Path | IO[bytes]) -> bytes:
    if isinstance(file, Path):
        return file.read_bytes()
    file.seek(0)
    return file.read()
