"""JPEG files decoded by simplejpeg, which is libjpeg-turbo and little else; Pillow wraps the same library in more.

Pillow still opens the file and says how large it is to be decoded, and it decodes whatever makes simplejpeg complain.
So the pixels are Pillow's, and so is the answer to whether a picture is damaged; only the time is less
(`tests/benchmarks/pictures.py`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Pillow's names of what holds a JPEG.
JPEG_FORMATS = ("JPEG", "MPO")
ORIENTATION = 0x0112
# From an orientation in EXIF to the picture as a person sees it: rows and columns change places or not, then the steps
# through rows and columns.
EXIF_TRANSFORMS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


def exif_orientation(picture: Image.Image) -> int:
    """How a picture lies by its EXIF, 1 to 8; 1, upright, also where EXIF cannot be read or makes no sense."""
    with contextlib.suppress(Exception):
        found = picture.getexif().get(ORIENTATION, 1)
        return next((each for each in EXIF_TRANSFORMS if each == found), 1)
    return 1


def decode_jpeg(file: Path | IO[bytes], picture: Image.Image) -> np.ndarray | None:
    """Upright pixels: uint8 [height, width, 3], RGB.

    Args:
        picture: the file, opened by Pillow and not loaded; its size says at which part of it the file is decoded. It
            is closed where pixels are returned.

    Returns:
        None where it is left to Pillow: other formats and colours, and what may be damaged.
    """
    if picture.format not in JPEG_FORMATS or picture.mode != "RGB":
        return None
    import simplejpeg

    width, height = picture.size
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(_content(file), min_height=height, min_width=width)
    except ValueError:
        return None
    if pixels.shape != (height, width, 3):
        return None
    way = EXIF_TRANSFORMS.get(exif_orientation(picture))
    with picture:  # Closes a file that Pillow has opened by its name, and no other.
        pass
    if way is None:
        return pixels
    swapped, down, across = way
    return (pixels.transpose(1, 0, 2) if swapped else pixels)[::down, ::across].copy()


def _content(file: Path | IO[bytes]) -> bytes:
    if isinstance(file, Path):
        return file.read_bytes()
    file.seek(0)
    return file.read()
