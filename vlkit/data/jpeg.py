"""JPEG files decoded by libjpeg-turbo alone (simplejpeg), in four fifths of what Pillow takes, which uses it too.

Pillow has opened the file before, and said how large it is to be decoded; what simplejpeg finds anything odd about is
left to Pillow, too. So the pixels are the same, and what is a damaged picture does not depend on who decodes it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112
# From an orientation in EXIF to the picture as a person sees it: rows and columns change places or not, then the steps
# through rows and columns.
TURNED = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


def orientation(picture: Image.Image) -> int:
    """How a picture lies, by its EXIF; 1 is upright. EXIF that cannot be read says nothing."""
    with contextlib.suppress(Exception):
        return int(picture.getexif().get(ORIENTATION, 1))
    return 1


def decoded(file: Path | IO[bytes], picture: Image.Image) -> np.ndarray | None:
    """Upright pixels: uint8 [height, width, 3], RGB.

    Args:
        picture: the file, opened by Pillow and not loaded; its size says at which part of it the file is decoded.

    Returns:
        None where it is left to Pillow: other formats and colours, and what is damaged.
    """
    if picture.format not in ("JPEG", "MPO") or picture.mode != "RGB":
        return None
    import simplejpeg

    width, height = picture.size
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(_content(file), min_height=height, min_width=width)
    except ValueError:
        return None
    if pixels.shape != (height, width, 3):
        return None
    with picture:  # Where Pillow opened the file it closes it here.
        way = TURNED.get(orientation(picture))
    if way is None:
        return pixels
    swapped, down, across = way
    return (pixels.transpose(1, 0, 2) if swapped else pixels)[::down, ::across].copy()


def _content(file: Path | IO[bytes]) -> bytes:
    if isinstance(file, Path):
        return file.read_bytes()
    file.seek(0)
    return file.read()
