"""Compute what the frozen stages of an encoder make of an image or a text once, and keep it on disk.

Frozen is whatever comes before the first trained parameter: a whole tower, or its lower layers. The key is the content
of the image or text, the frozen weights, the preprocessing, the precision and the depth, so a cache is never wrong,
only useless, and several runs share one. Images that are varied in every epoch never come twice: they are not cached.

Training, eval and index all come through `fill`. This module knows no model, only a `FrozenSource`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from torch.utils.data import DataLoader

from vlkit import console, signals
from vlkit.data.images.spec import PixelSpec
from vlkit.data.loading.stores import ErrorAsItem, InputStore, TokenStore, loader_workers, reraise_errors
from vlkit.distributed import SINGLE, World
from vlkit.errors import ArtifactError, DataError, UsageError, VlkitError
from vlkit.models.cache.feature_store import FeatureStore, cache_folder
from vlkit.models.device import Precision, autocast
from vlkit.models.stages import Modality, PartialForward, Stage, frozen_depth, run_stages

SCHEMA = 2
BLOCK = 64  # items computed at once
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16}

# What is cached, as the names of folders and the keys of --json have it since their first version.
Kind = Literal["pictures", "texts"]


class FrozenSource(Protocol):
    """An encoder of images whose frozen stages are cached. `source` is the name that it was loaded by."""

    pixel_spec: PixelSpec
    source: str

    @property
    def image_chain(self) -> list[Stage]: ...
    @property
    def device(self) -> torch.device: ...
    def tower_config(self, modality: Modality) -> Any: ...
    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor: ...
    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def eval(self) -> Self: ...


class FrozenTextSource(FrozenSource, Protocol):
    """An encoder that embeds texts, too."""

    @property
    def text_chain(self) -> list[Stage]: ...
    @property
    def text_limit(self) -> int: ...
    @property
    def text_pooling(self) -> str | None: ...
    @property
    def pads_to_max_length(self) -> bool: ...
    @property
    def pad_id(self) -> int: ...
    def pool_positions(self, input_ids: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class CachedFeatures:
    """Features of some images or texts, out of the cache.

    Attributes:
        depth: how many stages made them.
        rows: int64 [items], each item's row in `store`.
        pool_positions: int64 [items], where each text is pooled and what comes after it may be cut; None for images,
            behind the pooling, and for texts that are pooled at the limit.
    """

    store: FeatureStore
    depth: int
    rows: np.ndarray
    pool_positions: np.ndarray | None = None

    in_memory = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: Sequence[int]) -> PartialForward:
        """Return the features of the items at `positions`; texts are cut to the longest of them."""
        index = np.asarray(positions, np.int64)
        values = torch.from_numpy(self.store.read(self.rows[index]))
        if self.pool_positions is None:
            return PartialForward(values, self.depth)
        pooled_at = torch.from_numpy(self.pool_positions[index])
        values = values[:, : int(pooled_at.max()) + 1] if len(pooled_at) else values
        return PartialForward(values, self.depth, pooled_at)


@dataclass(frozen=True)
class FrozenPrefix(ABC):
    """The frozen stages of one tower: `FrozenImages` or `FrozenTexts`.

    Attributes:
        precision: of their products.
        depth: how many there are.
    """

    encoder: FrozenSource
    precision: Precision
    depth: int

    kind: ClassVar[Kind]
    modality: ClassVar[Modality]

    @property
    @abstractmethod
    def chain(self) -> list[Stage]:
        """All stages of the tower."""

    @abstractmethod
    def begin(self, inputs: torch.Tensor) -> PartialForward:
        """Return what the chain begins with: of uint8 pixels or padded token ids."""

    @abstractmethod
    def shape_input(self, device: torch.device) -> PartialForward:
        """Return one item for the chain to begin with, whose values do not matter."""

    @abstractmethod
    def settings(self) -> tuple[Any, dict[str, Any]]:
        """Return the tower's configuration and the preprocessing: parts of the identity."""

    @abstractmethod
    def pool_positions(self, items: InputStore, row_shape: Sequence[int]) -> np.ndarray | None:
        """Return where items are pooled, int64 [items]; None where a row of features does not depend on it."""

    @property
    def worth_caching(self) -> bool:
        """It has an encoder layer: embeddings alone cost less than reading their results."""
        return any(stage.layers for stage in self.chain[: self.depth])

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map uint8 pixels or padded token ids to features, on the encoder's device."""
        with torch.inference_mode(), autocast(self.encoder.device, self.precision):
            return run_stages(self.chain, self.begin(inputs), self.depth).values

    def row(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and type of what is cached of one item: float32 where that is the precision, else float16."""
        dtype = np.dtype(np.float32 if self.precision == "fp32" else np.float16)
        if (width := self.chain[self.depth - 1].width) is not None:
            return (width,), dtype
        # Wherever the weights are: on the meta device, without any weights, shapes are known all the same.
        device = next(self.encoder.parameters()).device
        with torch.inference_mode():
            values = run_stages(self.chain, self.shape_input(device), self.depth).values
        return tuple(values.shape[1:]), dtype

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the features of an item, but the item."""
        config, preprocessing = self.settings()
        about = {"schema": SCHEMA, "kind": self.kind, "depth": self.depth, "precision": self.precision}
        return {
            **about,
            "weights": _hash_weights(self.chain[: self.depth]),
            "preprocessing": preprocessing,
            "config": {k: v for k, v in config.to_dict().items() if not k.startswith("_")},
        }

    def folder(self, parent: Path) -> Path:
        """Return the folder of its rows below a cache's folder: named by its identity."""
        identity = json.dumps(self.identity, sort_keys=True, default=str)
        return parent / f"{self.kind}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}"

    def open_store(self, cache: str) -> FeatureStore:
        """Open its store in the folder of --cache; a damaged one that nobody asked for is emptied.

        Args:
            cache: auto or a folder.
        """
        folder = self.folder(cache_folder(cache))
        about = {**self.identity, "model": self.encoder.source}
        try:
            return FeatureStore(folder, *self.row(), about)
        except ArtifactError as error:
            if cache != "auto":
                raise
            console.warn(f"{error.message}; vlkit fills it again")
            shutil.rmtree(folder)
            return FeatureStore(folder, *self.row(), about)

    def features(
        self, store: FeatureStore, items: InputStore, keys: Sequence[str], world: World = SINGLE
    ) -> CachedFeatures:
        """Return the items' features; compute those that the store lacks, each process its share.

        Args:
            items: pixels or tokens.
            keys: of each item, see `image_keys` and `text_keys`.
        """
        # A share of all: what is missing is another list for every process that looks while others write.
        share = range(len(keys))[world.shard(len(keys))]
        missing = [share[position] for position in store.missing([keys[position] for position in share])]
        self.encoder.eval()
        self._compute(store, items, keys, missing)
        world.barrier()
        store.reload()
        # Another machine of the same run may have written to a disk of its own.
        self._compute(store, items, keys, store.missing(keys))
        rows = np.array([store.row_of[key] for key in keys], np.int64)
        return CachedFeatures(store, self.depth, rows, self.pool_positions(items, store.shape))

    def _compute(self, store: FeatureStore, items: InputStore, keys: Sequence[str], positions: Sequence[int]) -> None:
        """Compute the items at `positions` and store them. Texts of similar lengths go together."""
        if isinstance(items, TokenStore):
            tokens = items.tokens
            positions = sorted(positions, key=lambda position: len(tokens[position]))
        blocks = [list(positions[start : start + BLOCK]) for start in range(0, len(positions), BLOCK)]
        if not blocks:
            return
        loader: DataLoader[Any] = DataLoader(
            ErrorAsItem(items), sampler=blocks, batch_size=None, num_workers=loader_workers(items)
        )
        with console.progress(f"caching {self.modality}", len(positions)) as bar:
            for number, (block, inputs) in enumerate(zip(blocks, reraise_errors(loader), strict=True), start=1):
                values = self(inputs).to(TORCH_DTYPES[store.dtype.name]).cpu().numpy()
                if not np.isfinite(values).all():
                    raise UsageError(
                        f"the frozen part of {self.encoder.source} makes numbers that {store.dtype} cannot hold",
                        hint="--precision fp32, or --cache off",
                    )
                store.append([keys[position] for position in block], values)
                signals.raise_if_stopped()
                bar.update(min(number * BLOCK, len(positions)))


@dataclass(frozen=True)
class FrozenImages(FrozenPrefix):
    """The frozen stages of a vision tower."""

    kind = "pictures"
    modality = "images"

    @classmethod
    def from_encoder(cls, encoder: FrozenSource, precision: Precision) -> FrozenImages:
        """Return the stages that are frozen now."""
        return cls(encoder, precision, frozen_depth(encoder.image_chain))

    @property
    def chain(self) -> list[Stage]:
        """All stages of the tower."""
        return self.encoder.image_chain

    def begin(self, inputs: torch.Tensor) -> PartialForward:
        """Return normalised pixels, of uint8 [images, 3, size, size]."""
        return PartialForward(self.encoder.normalize_pixels(inputs), 0)

    def shape_input(self, device: torch.device) -> PartialForward:
        """Return one image for the chain to begin with."""
        size = self.encoder.pixel_spec.size
        return PartialForward(torch.zeros((1, 3, size, size), device=device), 0)

    def settings(self) -> tuple[Any, dict[str, Any]]:
        """Return the tower's configuration and the preprocessing."""
        return self.encoder.tower_config(self.modality), self.encoder.pixel_spec.identity()

    def pool_positions(self, items: InputStore, row_shape: Sequence[int]) -> None:
        """Return None: images are pooled where the model says."""


@dataclass(frozen=True)
class FrozenTexts(FrozenPrefix):
    """The frozen stages of a text tower.

    Attributes:
        length: tokens that every text is padded to; None where each text ends as one row.
    """

    encoder: FrozenTextSource
    length: int | None = None

    kind = "texts"
    modality = "texts"

    @classmethod
    def from_encoder(cls, encoder: FrozenTextSource, precision: Precision, longest: int) -> FrozenTexts:
        """Return the stages that are frozen now.

        Args:
            longest: tokens of the longest text.
        """
        depth, limit = frozen_depth(encoder.text_chain), encoder.text_limit
        if encoder.pads_to_max_length:
            return cls(encoder, precision, depth, limit)
        if depth and encoder.text_chain[depth - 1].width is not None:
            return cls(encoder, precision, depth)
        # In steps of 8, so that data sets whose longest texts are similar share a cache.
        return cls(encoder, precision, depth, min(limit, -(-longest // 8) * 8))

    @property
    def chain(self) -> list[Stage]:
        """All stages of the tower."""
        return self.encoder.text_chain

    def begin(self, inputs: torch.Tensor) -> PartialForward:
        """Return token ids [texts, length], padded further to the length of a row."""
        positions = self.encoder.pool_positions(inputs)
        missing = (self.length or 0) - inputs.shape[1]
        padded = torch.nn.functional.pad(inputs, (0, missing), value=self.encoder.pad_id) if missing > 0 else inputs
        return PartialForward(padded.to(self.encoder.device), 0, positions)

    def shape_input(self, device: torch.device) -> PartialForward:
        """Return one text for the chain to begin with."""
        assert self.length is not None  # Else a row's shape is known without a run.
        ids = torch.zeros((1, self.length), dtype=torch.long, device=device)
        return PartialForward(ids, 0, torch.zeros(1, dtype=torch.long))

    def settings(self) -> tuple[Any, dict[str, Any]]:
        """Return the tower's configuration and the preprocessing."""
        preprocessing = {"length": self.length, "pad": self.encoder.pad_id, "pooling": self.encoder.text_pooling}
        return self.encoder.tower_config(self.modality), preprocessing

    def pool_positions(self, items: InputStore, row_shape: Sequence[int]) -> np.ndarray | None:
        """Return where texts are pooled, int64 [texts]; None behind the pooling, and where that is the limit."""
        if len(row_shape) == 1 or self.encoder.pads_to_max_length:
            return None
        positions = range(len(items))
        blocks = [positions[start : start + 1024] for start in range(0, len(items), 1024)]
        return torch.cat([self.encoder.pool_positions(_token_ids(items, block)) for block in blocks]).numpy()

    def fits(self, tokens: TokenStore) -> bool:
        """Return whether no text is longer than a row of the cache."""
        return self.length is None or max(map(len, tokens.tokens), default=0) <= self.length


def _token_ids(items: InputStore, positions: Sequence[int]) -> torch.Tensor:
    ids = items[positions]
    assert isinstance(ids, torch.Tensor)
    return ids


def fill(
    prefix: FrozenPrefix,
    cache: str,
    items: InputStore,
    keys: Sequence[str],
    *,
    world: World = SINGLE,
    on_open: Callable[[FeatureStore, int], None] | None = None,
) -> CachedFeatures | None:
    """Return the items' features; compute those that the cache lacks.

    Args:
        cache: auto or a folder.
        items: pixels or tokens.
        keys: of each item, see `image_keys` and `text_keys`.
        world: the processes that share the work.
        on_open: gets the store and how many rows are missing, before the first is computed.

    Returns:
        None where a cache that nobody asked for fails, which is a warning. Under torchrun that ends all processes: they
        would no longer do the same.
    """
    try:
        if world.is_main:
            prefix.open_store(cache)  # One process empties a damaged one.
        world.barrier()
        store = prefix.open_store(cache)
        if on_open:
            on_open(store, len(store.missing(keys)))
        features = prefix.features(store, items, keys, world)
        if len(store.shape) == 1:
            store.read(features.rows)  # Small, and damage shows now, while there is another way.
        return features
    except (VlkitError, OSError) as error:
        if cache != "auto" or world.size > 1:
            raise
        console.warn(f"the features of {prefix.modality} are not cached: {error}")
        return None


def weights_hash(chain: Sequence[Stage]) -> str:
    """Return what tells a tower from every other one: SHA-256 of its weights, adapters included.

    Those in 4 bits are left out: another device packs them in another way.
    """
    return _hash_weights(chain, packed=False)


def _hash_weights(stages: Sequence[Stage], *, packed: bool = True) -> str:
    digest = hashlib.sha256()
    for module in (module for stage in stages for module in stage.modules):
        for name, value in sorted(module.state_dict().items()):
            if not packed and (value.dtype == torch.uint8 or ".weight." in name):
                continue
            digest.update(name.encode() + str(tuple(value.shape)).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_keys(paths: Sequence[Path], image_ids: Sequence[str]) -> list[str]:
    """Return each image's key: the hash of its bytes, and size and time of its file, in case it was changed since.

    Raises:
        DataError: a file is gone.
    """
    stats = ((image_id, _stat(path)) for path, image_id in zip(paths, image_ids, strict=True))
    return [f"{image_id}-{stat.st_size}-{stat.st_mtime_ns}" for image_id, stat in stats]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"no such image: {path} ({error.strerror})", hint="run prep again") from None


def text_keys(tokens: Sequence[Sequence[int]]) -> list[str]:
    """Return each text's key: a hash of its tokens."""
    return [hashlib.blake2b(np.asarray(ids, "<i8").tobytes(), digest_size=12).hexdigest() for ids in tokens]
