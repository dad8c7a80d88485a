"""Pictures, varied: each operation with a probability and a range, all of it a pure function of (seed, epoch, sample).

The operations are OpenCV's, which measures three to twenty times faster here than Pillow. Every one of them has numbers
of its own to draw from, so that switching one off leaves the others as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlkit.config.data import IMAGE_OPERATIONS, IMAGE_OPERATION_RANGES, ImageAugmentSettings
from vlkit.data.images import decode
from vlkit.data.splits import seeded_rng

if TYPE_CHECKING:
    from PIL import Image

# (uint8 [height, width, 3], amount, two further numbers in [0, 1)) -> uint8 [height, width, 3]
Operation = Callable[[np.ndarray, float, np.ndarray], np.ndarray]
NUMBERS_PER_OPERATION = 4  # numbers of an operation: whether, how much, and two further


def _flip_horizontal(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    return _cv2().flip(pixels, 1)


def _flip_vertical(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    return _cv2().flip(pixels, 0)


def _rotate_90(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    """By 90, 180 or 270 degrees."""
    cv2 = _cv2()
    ways = (cv2.ROTATE_90_CLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return cv2.rotate(pixels, ways[int(more[0] * len(ways))])


def _rotate(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    """Counter-clockwise about the centre; the corners that come free have the picture's mean colour."""
    cv2 = _cv2()
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), amount, 1.0)
    mean = [round(value) for value in cv2.mean(pixels)[:3]]
    return cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_CUBIC, borderValue=mean)


def _crop(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    """A window of `amount` of both sides, somewhere, brought back to the size of the whole."""
    cv2 = _cv2()
    sides = pixels.shape[:2]
    window = [max(1, round(amount * side)) for side in sides]
    top, left = (int(share * (side - cut + 1)) for share, side, cut in zip(more, sides, window, strict=True))
    kept = pixels[top : top + window[0], left : left + window[1]]
    return cv2.resize(kept, (sides[1], sides[0]), interpolation=cv2.INTER_CUBIC)


def _brightness(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    return _by_table(pixels, amount * np.arange(256))


def _contrast(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    """About the mean of the grey picture."""
    mean = float(_grey(pixels).mean())
    return _by_table(pixels, mean + amount * (np.arange(256) - mean))


def _saturation(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    """Away from the grey picture, or towards it."""
    cv2 = _cv2()
    grey = cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels, amount, grey, 1.0 - amount, 0.0)


def _blur(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    return _cv2().GaussianBlur(pixels, (0, 0), amount) if amount > 0 else pixels


def _noise(pixels: np.ndarray, amount: float, more: np.ndarray) -> np.ndarray:
    cv2 = _cv2()
    cv2.setRNGSeed(int(more[0] * 2**31))
    # As one channel: a deviation given as one number is that of the first channel alone.
    noise = cv2.randn(np.empty((pixels.size, 1), np.int16), 0.0, amount).reshape(pixels.shape)
    return cv2.add(pixels, noise, dtype=cv2.CV_8U)


# In the order of OPERATIONS: form first, then light and colour, then what a camera adds.
_OPERATION_FUNCTIONS: dict[str, Operation] = {
    "flip_horizontal": _flip_horizontal,
    "flip_vertical": _flip_vertical,
    "turn": _rotate_90,
    "rotate": _rotate,
    "crop": _crop,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "low_light": _brightness,
    "blur": _blur,
    "noise": _noise,
}


@dataclass(frozen=True)
class ImageAugmenter:
    """The operations under their settings.

    Attributes:
        probability: operation -> how often it is applied.
        ranges: operation -> lowest and highest amount; those without one have none.
        seed: decides everything that is drawn.
        max_side: longer pictures are reduced to this many pixels first.
    """

    probability: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]
    seed: int
    max_side: int

    @classmethod
    def from_settings(cls, settings: ImageAugmentSettings) -> ImageAugmenter:
        """From the settings of augment, or of train-retrieval --augment."""
        probability = {name: 0.0 if name in settings.forbid else getattr(settings, name) for name in IMAGE_OPERATIONS}
        ranges = {name: getattr(settings, f"{name}_range") for name in IMAGE_OPERATION_RANGES}
        return cls(probability, ranges, settings.seed, settings.max_side)

    def chosen_operations(self, epoch: int, sample: str) -> dict[str, float]:
        """operation -> amount, of those that this epoch applies to this sample."""
        return {name: amount for name, amount, _ in self._drawn(epoch, sample)}

    def load_image(self, path: Path, epoch: int, sample: str) -> Image.Image:
        """The picture, RGB, as this epoch sees this sample.

        Raises:
            DataError: it is gone or does not decode; names the file.
        """
        from PIL import Image

        return Image.fromarray(self.apply(np.asarray(decode.load_rgb(path, max_side=self.max_side)), epoch, sample))

    def apply(self, pixels: np.ndarray, epoch: int, sample: str) -> np.ndarray:
        """uint8 [height, width, 3] varied; a quarter turn swaps the sides, all else keeps them."""
        for name, amount, more in self._drawn(epoch, sample):
            pixels = _OPERATION_FUNCTIONS[name](pixels, amount, more)
        return pixels

    def _drawn(self, epoch: int, sample: str) -> Iterator[tuple[str, float, np.ndarray]]:
        draws = seeded_rng(f"{self.seed}\0{epoch}\0{sample}").random((len(IMAGE_OPERATIONS), NUMBERS_PER_OPERATION))
        for name, (whether, how_much, *_), more in zip(IMAGE_OPERATIONS, draws.tolist(), draws[:, 2:], strict=True):
            if whether < self.probability[name]:
                low, high = self.ranges.get(name, (0.0, 0.0))
                yield name, low + (high - low) * how_much, more


def _by_table(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Every value replaced by its entry in `values` [256], rounded and clipped to a byte."""
    return _cv2().LUT(pixels, values.round().clip(0, 255).astype(np.uint8))


def _grey(pixels: np.ndarray) -> np.ndarray:
    cv2 = _cv2()
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _cv2():  # type: ignore[no-untyped-def]
    """OpenCV, on this thread alone: the processes share the cores already, and its threads do not survive a fork."""
    import cv2

    cv2.setNumThreads(0)
    return cv2
