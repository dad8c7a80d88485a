"""Stores: where the inputs of an encoder come from, by position.

Protocol of all of them, the pixel and token stores, and how a loader's processes read one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from vlkit.data.images import decode
from vlkit.data.images.spec import PixelSpec
from vlkit.data.parallel import usable_cores
from vlkit.errors import VlkitError

# Decoded images stay in memory up to this many bytes in all; beyond it they are read again each epoch.
PIXEL_CACHE_BYTES = 512 * 2**20
MAX_LOADER_WORKERS = 8

# A tensor, or what stands for one: it has a length, and can be sliced.
TensorLike = Any
Pad = Callable[[Sequence[Sequence[int]]], torch.Tensor]


class InputStore(Protocol):
    """Inputs of an encoder by position: images, texts, or the cached features of them."""

    def __getitem__(self, positions: Sequence[int], /) -> TensorLike: ...

    def __len__(self) -> int: ...

    @property
    def in_memory(self) -> bool:
        """Whether reading is cheap enough to need no loader processes."""


@dataclass
class TokenStore:
    """Texts as token ids, padded together when they are read."""

    tokens: Sequence[Sequence[int]]
    pad: Pad

    in_memory = True

    def __getitem__(self, positions: Sequence[int]) -> torch.Tensor:
        """Return int64 [texts, length]."""
        return self.pad([self.tokens[position] for position in positions])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class PixelStore:
    """Images as a model needs them; small collections stay decoded."""

    paths: Sequence[Path]
    spec: PixelSpec
    _cache: dict[int, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, positions: Sequence[int]) -> torch.Tensor:
        """Return uint8 [images, 3, size, size] of the images at `positions`."""
        if not len(positions):
            return torch.empty((0, 3, self.spec.size, self.spec.size), dtype=torch.uint8)
        return torch.from_numpy(np.stack([self._pixels_at(int(position)) for position in positions]))

    def _pixels_at(self, position: int) -> np.ndarray:
        if position in self._cache:
            return self._cache[position]
        pixels = self.load_pixels(self.paths[position])
        if self.in_memory:
            self._cache[position] = pixels
        return pixels

    def load_pixels(self, path: Path) -> np.ndarray:
        """Return uint8 [3, size, size] of one image."""
        return decode.load_pixels(path, self.spec)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def in_memory(self) -> bool:
        """Whether all images, decoded, fit into the pixel cache."""
        return len(self.paths) * 3 * self.spec.size**2 <= PIXEL_CACHE_BYTES


class _Items(Protocol):
    def __getitem__(self, key: Any, /) -> Any: ...

    def __len__(self) -> int: ...


class ErrorAsItem(Dataset[Any]):
    """A dataset whose own errors come back as items: a loader's worker would turn them into a traceback.

    `reraise_errors` raises them again in the user's process.
    """

    def __init__(self, items: _Items) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.items[key]
        except VlkitError as error:
            return error


def reraise_errors(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of a loader over `ErrorAsItem`; raise those that are errors."""
    for item in loader:
        if isinstance(item, VlkitError):
            raise item
        yield item


def loader_workers(store: InputStore, *, augmented: bool = False) -> int:
    """Return how many processes pay off for reading a store: none if it is in memory and not augmented."""
    return 0 if store.in_memory and not augmented else min(MAX_LOADER_WORKERS, usable_cores())
