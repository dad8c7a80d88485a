"""How an image becomes the input of a model: fit, size, filter, normalisation and decoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlkit.config.data import Decode

# Name of a filter -> Pillow's number of it.
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


@dataclass(frozen=True)
class PixelSpec:
    """How an image becomes a model's input.

    fit "squash" resizes to size x size whatever the shape (SigLIP); "crop" resizes the short side to `resize` and cuts
    the size x size centre (CLIP). Then (pixel / 255 - mean) / std.

    decode "exact" makes the uint8 pixels that transformers' image processors make in Pillow, bit for bit; "fast" those
    that they make with torchvision, within 1 of the exact ones (one value in five million within 2), or the exact ones
    where torchvision is no faster. "reduced" also decodes a JPEG at a half, a quarter or an eighth of its size where
    that leaves twice the model's: photographs within 10 (48 dB and better), printed text within 30 (38 dB).
    """

    size: int
    fit: Literal["squash", "crop"] = "squash"
    resize: int | None = None
    resample: int = RESAMPLING["bicubic"]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    decode: Decode = "fast"

    def identity(self) -> dict[str, Any]:
        """Return the fields that a cache or an index stores; "exact" is left out, as older files know nothing else."""
        fields = asdict(self)
        if self.decode == "exact":
            del fields["decode"]
        return fields

    def resized_size(self, size: tuple[float, float]) -> tuple[int, int]:
        """Return width and height after resizing an image of `size` (width, height), before the centre is cut."""
        if self.fit == "squash":
            return self.size, self.size
        short = self.resize or self.size
        width, height = size
        # The long side is cut to a whole pixel, not rounded, as transformers does.
        return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
