"""Pictures brought to a model's size by torch's kernel instead of Pillow's: the same filters, many times as fast.

Both make every row narrower and then every column shorter, with 8 bits in between. torch's weights have 16 bits and
Pillow's 22, so that a value near a half may be rounded the other way: of photographs one in 400 ends 1 beside Pillow's,
one in five million 2, none 3. transformers' image processors do the same wherever torchvision is installed, to the bit.
Where torch is slower, or Pillow goes about it otherwise, Pillow is left to do it.

What torch reads is the memory that was decoded into, not a copy.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

# Pillow's number of a filter -> torch's name. Pillow's other filters torch does not have, or not with antialiasing.
TORCH_FILTERS = {2: "bilinear", 3: "bicubic"}
# A thread of a picture, brought to the height of a model's, is wide beyond all memory: Pillow's answer to it stands.
MAX_RESIZED_PIXELS = 2**24
# Bytes that Pillow takes for a picture at once. Above its default of 16 MB a picture is in pieces, which are no tensor.
BLOCK_BYTES = 2**30


def resize_with_torch(
    picture: Image.Image | np.ndarray, size: tuple[int, int], resample: int, extent: tuple[float, float] | None = None
) -> np.ndarray | None:
    """An RGB picture at another size: uint8 [height, width, 3].

    Args:
        picture: or its pixels, uint8 [height, width, 3].
        size: width and height.
        resample: Pillow's number of a filter.
        extent: width and height of what is to be seen, from the upper left corner, where that is not the whole.

    Returns:
        None where torch cannot do it, or not faster.
    """
    known = resample in TORCH_FILTERS and not _by_columns_first(image_size(picture), size) and size[0] * size[1] <= MAX_RESIZED_PIXELS
    if not known or not _is_quick():
        return None
    pixels = _as_tensor(picture)
    if pixels is None:
        return None
    from torch.nn.functional import interpolate

    how: dict[str, Any] = {"mode": TORCH_FILTERS[resample], "antialias": True}
    if extent is None:
        made = interpolate(pixels, size[::-1], **how)
    else:
        # By a factor, which need not lead to a whole number; what it makes of the rest lies behind the edge. A hair
        # more of it, lest rounding loses the last row or column.
        factors = tuple(side / whole * (1 + 1e-9) for side, whole in zip(size[::-1], extent[::-1], strict=True))
        made = interpolate(pixels, scale_factor=factors, recompute_scale_factor=False, **how)
    return made[0, :3, : size[1], : size[0]].permute(1, 2, 0).numpy()


def image_size(picture: Image.Image | np.ndarray) -> tuple[int, int]:
    """Width and height, of a picture or of its pixels [height, width, 3]."""
    if isinstance(picture, np.ndarray):
        height, width, _ = picture.shape
        return width, height
    return picture.size


def allocate_in_one_block() -> None:
    """Have Pillow decode large pictures, too, where torch can read them. Call it before a picture is decoded."""
    _set_block_size(BLOCK_BYTES)


def _by_columns_first(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Pillow 13 begins with the columns where they lose over twice what the rows do, 12.3 in a thread of a picture.

    What a filter overshoots is cut off between the two, so that rough pictures come out otherwise.
    """
    narrower, shorter = (before - after for before, after in zip(size, wanted, strict=True))
    return shorter > max(0, 2 * narrower) or size[1] > 100 * size[0]


@cache
def _is_quick() -> bool:
    """torch has the kernel for x86 alone; what it does elsewhere takes twice Pillow's time."""
    import torch

    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@cache
def _set_block_size(size: int) -> None:
    from PIL import Image

    Image.core.set_block_size(size)


def _as_tensor(picture: Image.Image | np.ndarray) -> torch.Tensor | None:
    """uint8 [1, 3 or 4, height, width] on the picture's own memory; None: it is in pieces.

    Pillow has a fourth channel, which is idle.
    """
    import torch

    if isinstance(picture, np.ndarray):
        return torch.from_numpy(picture).permute(2, 0, 1)[None]
    import pyarrow as pa

    picture.load()
    try:
        values = pa.array(picture).flatten()
    except ValueError:
        return None
    width, height = picture.size
    return torch.from_dlpack(values).view(1, height, width, 4).permute(0, 3, 1, 2)
