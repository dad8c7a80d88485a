"""Pictures: what a file really is, and its pixels at the size a model wants.

The preprocessing repeats transformers' image processors, up to the uint8 pixels: bit for bit those that use Pillow, or,
faster, those that use torchvision (`jpeg.py`, `resizing.py`). Scaling to floats and normalising happen on the device,
in `models/towers.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from vlkit.config.data import Decode
from vlkit.data.images import jpeg
from vlkit.data.images.phash import looks
from vlkit.data.images.resize import in_one_piece, quickly_resized, size_of
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
# decode "reduced" keeps at least this many times the pixels a side that a model is shown.
SPARE = 2


@dataclass(frozen=True)
class PixelSpec:
    """How a picture becomes a model's input.

    fit "squash" resizes to size x size whatever the shape (SigLIP); "crop" resizes the short side to `resize` and cuts
    the size x size centre (CLIP). Then (pixel / 255 - mean) / std.

    decode "exact" makes the uint8 pixels that transformers' image processors make in Pillow, bit for bit; "fast" those
    that they make with torchvision, within 1 of the others (one value in five million within 2), or again the others
    where this is no faster. "reduced" also takes a JPEG from its file at a half, a quarter or an eighth of its size
    where that leaves twice the model's: photographs within 10 (48 dB and better), printed text within 30 (38 dB).
    """

    size: int
    fit: Literal["squash", "crop"] = "squash"
    resize: int | None = None
    resample: int = RESAMPLING["bicubic"]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    decode: Decode = "fast"

    def identity(self) -> dict[str, Any]:
        """What a cache or an index says of it. "exact" goes unsaid: once there was nothing else."""
        told = asdict(self)
        if self.decode == "exact":
            del told["decode"]
        return told


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
    try:
        return seen(path, spec)
    except DataError as error:
        raise _named(error, path) from None


def seen(file: Path | IO[bytes], spec: PixelSpec, most_pixels: int | None = None) -> np.ndarray:
    """The same of a file that has no name, or whose name is told elsewhere.

    Args:
        most_pixels: see `decoded`.

    Raises:
        DataError: why it cannot be used; names no file.
    """
    extent: tuple[float, float] | None = None

    def reduce(picture: Image.Image) -> None:
        nonlocal extent
        whole = picture.size
        if most_pixels is not None:
            _refuse_large(picture, most_pixels)
        # A JPEG's size can be chosen once.
        if spec.decode == "reduced" and picture.size == whole:
            extent = _drafted(picture, SPARE * (spec.resize or spec.size))

    with _refusing(file):
        picture = _opened(file, reduce)
        values = None
        if spec.decode != "exact":
            in_one_piece()
            values = jpeg.decoded(file, picture)
        found = _loaded(picture) if values is None else values
    return fitted(found, spec, extent)


def _named(error: DataError, path: Path) -> DataError:
    return DataError(f"{path}: {error.message}", hint="run prep again: it lists such pictures in rejects.csv")


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
        raise _named(error, path) from None
    if at_most is not None and max(picture.size) > at_most:
        picture = picture.resize(_reduced(picture.size, at_most), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return picture


def _reduced(size: tuple[int, int], at_most: int) -> tuple[int, int]:
    width, height = (max(1, round(side * at_most / max(size))) for side in size)
    return width, height


def fitted(picture: Image.Image | np.ndarray, spec: PixelSpec, extent: tuple[float, float] | None = None) -> np.ndarray:
    """An RGB picture at the size a model wants: uint8 [3, size, size].

    Args:
        picture: or its pixels, uint8 [height, width, 3].
        extent: width and height of what of it is to be seen, where a reduced one has a part of a pixel too much.
    """
    size = _resized_to(extent or size_of(picture), spec)
    left, top = ((side - spec.size) // 2 for side in size)
    # A crop wider than the picture has a black border, which Pillow makes.
    if spec.decode != "exact" and min(left, top) >= 0:
        values = quickly_resized(picture, size, spec.resample, extent)
        if values is not None:
            return np.ascontiguousarray(values[top : top + spec.size, left : left + spec.size].transpose(2, 0, 1))
    if isinstance(picture, np.ndarray):
        from PIL import Image

        picture = Image.fromarray(picture)
    resized = picture.resize(size, spec.resample, box=None if extent is None else (0, 0, *extent))
    if spec.fit == "crop":
        resized = resized.crop((left, top, left + spec.size, top + spec.size))
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _resized_to(whole: tuple[float, float], spec: PixelSpec) -> tuple[int, int]:
    """Width and height before the centre is cut."""
    if spec.fit == "squash":
        return spec.size, spec.size
    short = spec.resize or spec.size
    width, height = whole
    # The long side is cut to a whole pixel, not rounded, as transformers does.
    return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)


def decoded(file: Path | IO[bytes], at_most: int | None = None, most_pixels: int | None = None) -> Image.Image:
    """Decoded, upright, RGB; transparent parts on white; of an animation the first frame.

    Args:
        at_most: see `upright`.
        most_pixels: more are refused before they take memory; a JPEG is decoded smaller instead.

    Raises:
        DataError: why it cannot be used; names no file.
    """

    def reduce(picture: Image.Image) -> None:
        if at_most is not None and max(picture.size) > 2 * at_most:
            picture.draft(None, _reduced(picture.size, 2 * at_most))
        if most_pixels is not None:
            _refuse_large(picture, most_pixels)

    with _refusing(file):
        return _loaded(_opened(file, reduce))


def _opened(file: Path | IO[bytes], reduce: Callable[[Image.Image], None]) -> Image.Image:
    """`reduce` is given the picture when its size is known, and nothing is decoded yet."""
    from PIL import Image

    picture = Image.open(file, formats=_formats())
    # Pillow itself warns, and whether a warning is an error is a question for the whole process, threads and all.
    if Image.MAX_IMAGE_PIXELS is not None and math.prod(picture.size) > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    reduce(picture)
    return picture


def _loaded(picture: Image.Image) -> Image.Image:
    """Decoded, upright, RGB."""
    from PIL import ImageOps

    picture.load()
    # EXIF that cannot be read says nothing of how the picture stands.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(picture, in_place=True)
    return _as_rgb(picture)


@contextlib.contextmanager
def _refusing(file: Path | IO[bytes]) -> Iterator[None]:
    """Turns whatever a decoder raises into a DataError that says why the picture cannot be used."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError:
        raise DataError(f"not a picture ({_what_it_is(file)})") from None
    except Image.DecompressionBombError:
        raise DataError("more pixels than is safe to decode") from None
    except FileNotFoundError:
        raise DataError("no such picture") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:
        # A damaged header can make a decoder raise anything at all; none of it is a bug of ours.
        raise DataError(f"does not decode: {error or type(error).__name__}") from None


def _drafted(picture: Image.Image, least: int) -> tuple[float, float] | None:
    """Have a JPEG decoded at the smallest part of its size whose shorter side is still `least`.

    Returns:
        Width and height of the part in its own pixels, where they are not whole: the decoder rounds them up.
    """
    if picture.format not in jpeg.FORMATS:
        return None
    width, height = picture.size
    orientation = jpeg.orientation(picture)
    for part in (8, 4, 2):
        # Once it is turned, the part of a pixel too much may lie on any side.
        even = width % part == height % part == 0
        if (even or orientation == 1) and min(width, height) >= part * least:
            picture.draft(None, (width // part, height // part))
            return None if even else (width / part, height / part)
    return None


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
