"""Augment images: each operation has a probability and a range, and is a pure function of (seed, epoch, sample).

The operations are OpenCV's, which measures three to twenty times faster here than Pillow. Every operation draws its own
random numbers, so switching one off leaves the others as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlkit.config.data import IMAGE_OPERATION_RANGES, IMAGE_OPERATIONS, ImageAugmentSettings
from vlkit.data.images import decode
from vlkit.data.splits import seeded_rng

if TYPE_CHECKING:
    from types import ModuleType

    from PIL import Image

# (uint8 [height, width, 3], amount, two further numbers in [0, 1)) -> uint8 [height, width, 3]
Operation = Callable[[np.ndarray, float, np.ndarray], np.ndarray]
NUMBERS_PER_OPERATION = 4  # whether, how much, and two further


def _flip_horizontal(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    flipped: np.ndarray = _cv2().flip(pixels, 1)
    return flipped


def _flip_vertical(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    flipped: np.ndarray = _cv2().flip(pixels, 0)
    return flipped


def _rotate_90(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    """Rotate by 90, 180 or 270 degrees."""
    cv2 = _cv2()
    rotations = (cv2.ROTATE_90_CLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_COUNTERCLOCKWISE)
    rotated: np.ndarray = cv2.rotate(pixels, rotations[int(numbers[0] * len(rotations))])
    return rotated


def _rotate(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    """Rotate counter-clockwise about the centre; the corners that become free get the image's mean colour."""
    cv2 = _cv2()
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), amount, 1.0)
    mean = [round(value) for value in cv2.mean(pixels)[:3]]
    rotated: np.ndarray = cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_CUBIC, borderValue=mean)
    return rotated


def _crop(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    """Cut a window of `amount` of both sides, somewhere, and resize it to the size of the whole."""
    cv2 = _cv2()
    sides = pixels.shape[:2]
    window = [max(1, round(amount * side)) for side in sides]
    top, left = (int(number * (side - cut + 1)) for number, side, cut in zip(numbers, sides, window, strict=True))
    cropped = pixels[top : top + window[0], left : left + window[1]]
    resized: np.ndarray = cv2.resize(cropped, (sides[1], sides[0]), interpolation=cv2.INTER_CUBIC)
    return resized


def _brightness(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    return _map_values(pixels, amount * np.arange(256))


def _contrast(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    """Scale the distance from the mean of the grey image."""
    mean = float(_grey(pixels).mean())
    return _map_values(pixels, mean + amount * (np.arange(256) - mean))


def _saturation(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    """Scale the distance from the grey image."""
    cv2 = _cv2()
    grey = cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB)
    mixed: np.ndarray = cv2.addWeighted(pixels, amount, grey, 1.0 - amount, 0.0)
    return mixed


def _blur(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    return _cv2().GaussianBlur(pixels, (0, 0), amount) if amount > 0 else pixels


def _noise(pixels: np.ndarray, amount: float, numbers: np.ndarray) -> np.ndarray:
    cv2 = _cv2()
    cv2.setRNGSeed(int(numbers[0] * 2**31))
    # As one channel: OpenCV applies a deviation given as one number to the first channel alone.
    noise = cv2.randn(np.empty((pixels.size, 1), np.int16), 0.0, amount).reshape(pixels.shape)
    noisy: np.ndarray = cv2.add(pixels, noise, dtype=cv2.CV_8U)
    return noisy


# In the order of IMAGE_OPERATIONS: geometry first, then light and colour, then effects of a camera. Append only: an
# operation draws the row of numbers at its index, so one inserted before others changes what they all draw.
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
    """The operations with their settings.

    Attributes:
        probability: operation -> how often it is applied.
        ranges: operation -> lowest and highest amount; operations without an amount are absent.
        seed: decides everything that is drawn.
        max_side: larger images are first reduced to this many pixels on the longer side.
    """

    probability: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]
    seed: int
    max_side: int

    @classmethod
    def from_settings(cls, settings: ImageAugmentSettings) -> ImageAugmenter:
        """Build it from the settings of augment, or of train-retrieval --augment."""
        probability = {name: 0.0 if name in settings.forbid else getattr(settings, name) for name in IMAGE_OPERATIONS}
        ranges = {name: getattr(settings, f"{name}_range") for name in IMAGE_OPERATION_RANGES}
        return cls(probability, ranges, settings.seed, settings.max_side)

    def chosen_operations(self, epoch: int, sample: str) -> dict[str, float]:
        """Return operation -> amount of the operations that an epoch applies to a sample."""
        return {name: amount for name, amount, _ in self._draw_operations(epoch, sample)}

    def load_image(self, path: Path, epoch: int, sample: str) -> Image.Image:
        """Read an image, RGB, and apply the operations of an epoch and a sample.

        Raises:
            DataError: it is gone or does not decode; names the file.
        """
        from PIL import Image

        pixels = np.asarray(decode.load_rgb(path, max_side=self.max_side))
        return Image.fromarray(self.apply(pixels, epoch, sample))

    def apply(self, pixels: np.ndarray, epoch: int, sample: str) -> np.ndarray:
        """Return uint8 [height, width, 3] with the operations applied; a quarter turn swaps the sides."""
        for name, amount, numbers in self._draw_operations(epoch, sample):
            pixels = _OPERATION_FUNCTIONS[name](pixels, amount, numbers)
        return pixels

    def _draw_operations(self, epoch: int, sample: str) -> Iterator[tuple[str, float, np.ndarray]]:
        rows = seeded_rng(f"{self.seed}\0{epoch}\0{sample}").random((len(IMAGE_OPERATIONS), NUMBERS_PER_OPERATION))
        for name, row in zip(IMAGE_OPERATIONS, rows, strict=True):
            chance, fraction = row[:2].tolist()
            if chance < self.probability[name]:
                low, high = self.ranges.get(name, (0.0, 0.0))
                yield name, low + (high - low) * fraction, row[2:]


def _map_values(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replace every value by its entry in `table` [256], rounded and clipped to a byte."""
    mapped: np.ndarray = _cv2().LUT(pixels, table.round().clip(0, 255).astype(np.uint8))
    return mapped


def _grey(pixels: np.ndarray) -> np.ndarray:
    cv2 = _cv2()
    grey: np.ndarray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return grey


def _cv2() -> ModuleType:
    """Return OpenCV with one thread: processes share the cores already, and its threads do not survive a fork."""
    import cv2

    cv2.setNumThreads(0)
    return cv2
