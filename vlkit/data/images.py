"""Pictures: what a file really is, and its pixels at the size a model wants.

The preprocessing repeats transformers' image processors in plain Pillow, bit for bit up to the uint8 pixels; scaling to
floats and normalising happen on the device, in `models/towers.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from vlkit.data.perceptual import looks
from vlkit.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".mpo",
        ".avif",
        ".jp2",
        ".heic",
        ".heif",
    ]
)
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "HEIF", "PPM", "TGA", "ICO"),
    "PCX",
)
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class PixelSpec:
    """How a picture becomes a model's input.

    fit "squash" resizes to size x size whatever the shape (SigLIP); "crop" resizes the short side to `resize` and cuts
    the size x size centre (CLIP). Then (pixel / 255 - mean) / std.
    """

    size: int
    fit: Literal["squash", "crop"] = "squash"
    resize: int | None = None
    resample: int = RESAMPLING["bicubic"]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Checked:
    """A picture that was read and decoded.

    Attributes:
        image_id: hash of the bytes, 20 hex digits.
        width, height: upright, in pixels.
        looks: `perceptual.looks` of the picture; empty where it has too little detail to be compared.
    """

    image_id: str
    width: int
    height: int
    looks: bytes = b""


class UnreadError(DataError):
    """The file could not even be read; that may pass, so it is not remembered of the picture."""


def check(path: Path) -> Checked:
    """Read and decode a picture once.

    Raises:
        DataError: why it cannot be used, in words that fit a row of rejects.csv.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        told = "no such picture" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UnreadError(told) from None
    if not content:
        raise DataError("the file is empty")
    with decoded(io.BytesIO(content)) as picture:
        width, height = picture.size
        return Checked(hashlib.sha256(content).hexdigest()[:20], width, height, looks(picture))


def pixels(path: Path, spec: PixelSpec) -> np.ndarray:
    """The picture as a model sees it before normalisation: uint8 [3, size, size], RGB.

    Raises:
        DataError: the file is gone or does not decode; names the file.
    """
    return fitted(upright(path), spec)


def upright(path: Path, *, at_most: int | None = None) -> Image.Image:
    """The picture as a person sees it: decoded, upright, RGB.

    Args:
        at_most: pixels of the longer side; a larger picture is reduced to it, a JPEG already while it is decoded.

    Raises:
        DataError: the file is gone or does not decode; names the file.
    """
    from PIL import Image

    try:
        picture = decoded(path, at_most)
    except DataError as error:
        raise DataError(
            f"{path}: {error.message}", hint="run prep again: it lists such pictures in rejects.csv"
        ) from None
    if at_most is not None and max(picture.size) > at_most:
        picture = picture.resize(_reduced(picture.size, at_most), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return picture


def _reduced(size: tuple[int, int], at_most: int) -> tuple[int, int]:
    width, height = (max(1, round(side * at_most / max(size))) for side in size)
    return width, height


def fitted(picture: Image.Image, spec: PixelSpec) -> np.ndarray:
    """An RGB picture at the size a model wants: uint8 [3, size, size]."""
    resized = _squashed(picture, spec) if spec.fit == "squash" else _cropped(picture, spec)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def decoded(file: Path | IO[bytes], at_most: int | None = None, most_pixels: int | None = None) -> Image.Image:
    """Decoded, upright, RGB; transparent parts on white; of an animation the first frame.

    Args:
        at_most: see `upright`.
        most_pixels: more are refused before they take memory; a JPEG is decoded smaller instead.

    Raises:
        DataError: why it cannot be used; names no file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(file, formats=_formats())
            if at_most is not None and max(picture.size) > 2 * at_most:
                width, height = _reduced(picture.size, 2 * at_most)
                picture.draft(None, (width, height))
            if most_pixels is not None:
                _refuse_large(picture, most_pixels)
            picture.load()
        # EXIF that cannot be read says nothing of how the picture stands.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(picture, in_place=True)
        return _as_rgb(picture)
    except UnidentifiedImageError:
        raise DataError(f"not a picture ({_what_it_is(file)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError("more pixels than is safe to decode") from None
    except FileNotFoundError:
        raise DataError("no such picture") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:
        # A damaged header can make a decoder raise anything at all; none of it is a bug of ours.
        raise DataError(f"does not decode: {error or type(error).__name__}") from None


@cache
def _formats() -> list[str]:
    """Those of pictures that a camera, a phone or a browser writes, as far as this Pillow reads them.

    Others are programs rather than pictures (EPS), or a way to other files.
    """
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _refuse_large(picture: Image.Image, most: int) -> None:
    width, height = picture.size
    part = next((part for part in (1, 2, 4, 8) if width // part * (height // part) <= most), 1)
    # A progressive JPEG is held whole, however small it is decoded.
    if part > 1 and not picture.info.get("progressive"):
        picture.draft(None, (width // part, height // part))  # Of other formats it changes nothing.
    if math.prod(picture.size) > most:
        raise DataError(f"it has {width} x {height} pixels: more than {most / 1e6:g} million are not taken")


def _as_rgb(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode == "F":
        raise DataError("pixels are floating-point numbers: save it with 8 or 16 bits")
    if picture.mode == "LAB":
        return _from_lab(picture)
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return _from_deep(np.asarray(picture)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_deep(values: np.ndarray) -> Image.Image:
    """16-bit values by the bits that are in use: 8, 12 or 16 of them. convert("RGB") would clip them at 255."""
    from PIL import Image

    most = int(values.max(initial=0))
    shift = 0 if most < 2**8 else 4 if most < 2**12 else 8 if most < 2**16 else most.bit_length() - 8
    return Image.fromarray((values.clip(0) >> shift).clip(0, 255).astype(np.uint8))


def _from_lab(picture: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _what_it_is(file: Path | IO[bytes]) -> str:
    if isinstance(file, Path):
        file = io.BytesIO(file.read_bytes()[:200])
    file.seek(0)
    head = file.read(200).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer: run git lfs pull"
    if head.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    return "its content is no known image format"


def _squashed(picture: Image.Image, spec: PixelSpec) -> Image.Image:
    return picture.resize((spec.size, spec.size), spec.resample)


def _cropped(picture: Image.Image, spec: PixelSpec) -> Image.Image:
    short = spec.resize or spec.size
    width, height = picture.size
    # The long side is cut to a whole pixel, not rounded, as transformers does.
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    picture = picture.resize(size, spec.resample)
    left, top = (size[0] - spec.size) // 2, (size[1] - spec.size) // 2
    return picture.crop((left, top, left + spec.size, top + spec.size))
