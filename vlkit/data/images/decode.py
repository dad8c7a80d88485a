"""Read image files: what a file really is, and its pixels at the size a model needs.

Preprocessing repeats transformers' image processors up to the uint8 pixels: bit for bit those that use Pillow, or,
faster, those that use torchvision (`jpeg.py`, `resize.py`). Scaling to floats and normalising happen on the device,
in `models/dual_encoder.py`.

Functions named `load_` take a path and name it in their errors; those named `decode_` take any file and do not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from vlkit.data.images import jpeg
from vlkit.data.images.phash import perceptual_hash
from vlkit.data.images.resize import allocate_in_one_block, image_size, resize_with_torch
from vlkit.data.images.spec import PixelSpec
from vlkit.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(
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
IMAGE_FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "HEIF", "PPM", "TGA", "ICO"),
    "PCX",
)
# decode "reduced" keeps at least this many times the model's pixels a side.
REDUCED_MARGIN = 2


@dataclass(frozen=True)
class ImageInfo:
    """An image that was read and decoded.

    Attributes:
        image_id: hash of the bytes, 20 hex digits.
        width, height: upright, in pixels.
        perceptual_hash: see `phash.perceptual_hash`; empty where the image has too little detail to be compared.
    """

    image_id: str
    width: int
    height: int
    perceptual_hash: bytes = b""


class UnreadableFileError(DataError):
    """The file could not be read. This may pass, so it is not remembered of the image."""


def verify_image(path: Path) -> ImageInfo:
    """Read and decode an image once.

    Raises:
        DataError: why it cannot be used, in words that fit a row of rejects.csv.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        message = "no such image" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UnreadableFileError(message) from None
    if not content:
        raise DataError("the file is empty")
    with decode_rgb(io.BytesIO(content)) as image:
        width, height = image.size
        return ImageInfo(hashlib.sha256(content).hexdigest()[:20], width, height, perceptual_hash(image))


def load_pixels(path: Path, spec: PixelSpec) -> np.ndarray:
    """Return an image as a model sees it before normalisation: uint8 [3, size, size], RGB.

    Raises:
        DataError: the file is gone or does not decode; names the file.
    """
    try:
        return decode_pixels(path, spec)
    except DataError as error:
        raise _with_path(error, path) from None


def decode_pixels(file: Path | IO[bytes], spec: PixelSpec, max_pixels: int | None = None) -> np.ndarray:
    """Return the pixels of `load_pixels` for a file without a name, or whose name the caller adds.

    Args:
        max_pixels: see `decode_rgb`.

    Raises:
        DataError: why it cannot be used; names no file.
    """
    extent: tuple[float, float] | None = None

    def reduce(image: Image.Image) -> None:
        nonlocal extent
        full_size = image.size
        if max_pixels is not None:
            _limit_pixels(image, max_pixels)
        # Pillow lets a JPEG's decoded size be chosen once.
        if spec.decode == "reduced" and image.size == full_size:
            extent = _draft(image, REDUCED_MARGIN * (spec.resize or spec.size))

    with _decoder_errors_as_data_errors(file):
        image = _open(file, reduce)
        pixels = None
        if spec.decode != "exact":
            allocate_in_one_block()
            pixels = jpeg.decode_jpeg(file, image)
        source = _load_upright_rgb(image) if pixels is None else pixels
    return resize_to_spec(source, spec, extent)


def image_pixels(image: Image.Image, spec: PixelSpec) -> np.ndarray:
    """Return the pixels of `load_pixels` for an image that Pillow has opened or made, which stays as it is.

    Raises:
        DataError: why it cannot be used.
    """
    with _decoder_errors_as_data_errors(io.BytesIO()):
        return resize_to_spec(_load_upright_rgb(image.copy()), spec)


def _with_path(error: DataError, path: Path) -> DataError:
    return DataError(f"{path}: {error.message}", hint="run prep again: it lists such images in rejects.csv")


def load_rgb(path: Path, *, max_side: int | None = None) -> Image.Image:
    """Return an image as a person sees it: decoded, upright, RGB.

    Args:
        max_side: pixels of the longer side; a larger image is reduced to it, a JPEG already while it is decoded.

    Raises:
        DataError: the file is gone or does not decode; names the file.
    """
    from PIL import Image

    try:
        image = decode_rgb(path, max_side)
    except DataError as error:
        raise _with_path(error, path) from None
    if max_side is not None and max(image.size) > max_side:
        image = image.resize(_fit_side(image.size, max_side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return image


def _fit_side(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    width, height = (max(1, round(side * max_side / max(size))) for side in size)
    return width, height


def resize_to_spec(
    image: Image.Image | np.ndarray, spec: PixelSpec, extent: tuple[float, float] | None = None
) -> np.ndarray:
    """Bring an RGB image to the size a model needs: uint8 [3, size, size].

    Args:
        image: or its pixels, uint8 [height, width, 3].
        extent: visible width and height, where a reduced image has a part of a pixel too much.
    """
    size = spec.resized_size(extent or image_size(image))
    left, top = ((side - spec.size) // 2 for side in size)
    # A crop wider than the image has a black border, which Pillow makes.
    if spec.decode != "exact" and min(left, top) >= 0:
        resized = resize_with_torch(image, size, spec.resample, extent)
        if resized is not None:
            return np.ascontiguousarray(resized[top : top + spec.size, left : left + spec.size].transpose(2, 0, 1))
    if isinstance(image, np.ndarray):
        from PIL import Image

        image = Image.fromarray(image)
    image = image.resize(size, spec.resample, box=None if extent is None else (0, 0, *extent))
    if spec.fit == "crop":
        image = image.crop((left, top, left + spec.size, top + spec.size))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode_rgb(file: Path | IO[bytes], max_side: int | None = None, max_pixels: int | None = None) -> Image.Image:
    """Decode an image upright as RGB; transparent parts become white, and an animation its first frame.

    Args:
        max_side: see `load_rgb`.
        max_pixels: larger images are refused before they take memory; a JPEG is decoded smaller instead.

    Raises:
        DataError: why it cannot be used; names no file.
    """

    def reduce(image: Image.Image) -> None:
        if max_side is not None and max(image.size) > 2 * max_side:
            image.draft(None, _fit_side(image.size, 2 * max_side))
        if max_pixels is not None:
            _limit_pixels(image, max_pixels)

    with _decoder_errors_as_data_errors(file):
        return _load_upright_rgb(_open(file, reduce))


def _open(file: Path | IO[bytes], reduce: Callable[[Image.Image], None]) -> Image.Image:
    """Open an image and call `reduce` on it: its size is known then, and nothing is decoded yet."""
    from PIL import Image

    image = Image.open(file, formats=_readable_formats())
    # Pillow itself warns, and whether a warning is an error is a question for the whole process, threads and all.
    if Image.MAX_IMAGE_PIXELS is not None and math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    reduce(image)
    return image


def _load_upright_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    image.load()
    # An image whose EXIF cannot be read is taken as upright.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


@contextlib.contextmanager
def _decoder_errors_as_data_errors(file: Path | IO[bytes]) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError that says why the image cannot be used."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError:
        raise DataError(f"not an image ({_describe_content(file)})") from None
    except Image.DecompressionBombError:
        raise DataError("more pixels than is safe to decode") from None
    except FileNotFoundError:
        raise DataError("no such image") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:
        # A damaged header can make a decoder raise anything at all; none of it is a bug of ours.
        raise DataError(f"does not decode: {error or type(error).__name__}") from None


def _draft(image: Image.Image, min_side: int) -> tuple[float, float] | None:
    """Have a JPEG decoded at the smallest fraction of its size whose shorter side is still `min_side`.

    Returns:
        Width and height in pixels of that fraction if they are not whole: the decoder rounds them up.
    """
    if image.format not in jpeg.JPEG_FORMATS:
        return None
    width, height = image.size
    orientation = jpeg.exif_orientation(image)
    for divisor in (8, 4, 2):
        # After a rotation, the part of a pixel too much may lie on any side.
        divides = width % divisor == height % divisor == 0
        if (divides or orientation == 1) and min(width, height) >= divisor * min_side:
            image.draft(None, (width // divisor, height // divisor))
            return None if divides else (width / divisor, height / divisor)
    return None


@cache
def _readable_formats() -> list[str]:
    """Return the formats that cameras, phones and browsers write, as far as this Pillow reads them.

    Others are programs rather than images (EPS), or a way to other files.
    """
    from PIL import Image

    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _limit_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    divisor = next((n for n in (1, 2, 4, 8) if width // n * (height // n) <= max_pixels), 1)
    # A progressive JPEG is held whole in memory, at whatever size it is decoded.
    if divisor > 1 and not image.info.get("progressive"):
        image.draft(None, (width // divisor, height // divisor))  # Has no effect on other formats.
    if math.prod(image.size) > max_pixels:
        raise DataError(f"it has {width} x {height} pixels; the limit is {max_pixels / 1e6:g} million")


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise DataError("pixels are floating-point numbers: save it with 8 or 16 bits")
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.mode.startswith("I;16") or image.mode == "I":
        return _deep_to_grey(np.asarray(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_to_grey(values: np.ndarray) -> Image.Image:
    """Scale 16-bit values by the bits that are in use: 8, 12 or 16. convert("RGB") would clip them at 255."""
    from PIL import Image

    top = int(values.max(initial=0))
    shift = 0 if top < 2**8 else 4 if top < 2**12 else 8 if top < 2**16 else top.bit_length() - 8
    return Image.fromarray((values.clip(0) >> shift).clip(0, 255).astype(np.uint8))


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def _describe_content(file: Path | IO[bytes]) -> str:
    if isinstance(file, Path):
        file = io.BytesIO(file.read_bytes()[:200])
    file.seek(0)
    head = file.read(200).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer: run git lfs pull"
    if head.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    return "unknown format"
