"""What the frozen part of a tower makes of a picture or a text is computed once, and kept on disk.

Frozen is whatever comes before the first trained parameter: the whole tower, or its lower layers. The key is the
content of the picture or text, the frozen weights, the preprocessing, the precision and the depth, so a cache is never
wrong, only useless, and several runs share one. Pictures that are varied in every epoch never come twice, and are not
kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from vlkit import console, signals
from vlkit.data.loading.stores import ErrorAsItem, InputStore, PixelStore, TokenStore, loader_workers, reraise_errors
from vlkit.distributed import SINGLE, World
from vlkit.errors import ArtifactError, DataError, UsageError, VlkitError
from vlkit.models.cache.feature_store import FeatureStore, folder_of
from vlkit.models.captioner.vision_encoder import VisionEncoder
from vlkit.models.device import Precision, autocast
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.stages import PartialForward, Stage, frozen_depth, run_stages

SCHEMA = 2
BLOCK = 64
TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16}

Modality = Literal["pictures", "texts"]


@dataclass(frozen=True)
class CachedFeatures:
    """Some pictures or texts out of the cache: for their positions what the frozen stages made of them.

    Attributes:
        places: of the items, in `store`.
        ends: int64 [items], where each text is pooled and what comes after it may be cut; None for pictures, behind the
            pooling, and for texts that are pooled at the limit.
    """

    store: FeatureStore
    depth: int
    places: np.ndarray
    pool_positions: np.ndarray | None = None

    in_memory = True

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, positions: Sequence[int]) -> PartialForward:
        """What the stages made of the items at `positions`; texts are cut to the longest of them."""
        positions = np.asarray(positions, np.int64)
        values = torch.from_numpy(self.store.read(self.places[positions]))
        if self.pool_positions is None:
            return PartialForward(values, self.depth)
        ends = torch.from_numpy(self.pool_positions[positions])
        return PartialForward(values[:, : int(ends.max()) + 1] if len(ends) else values, self.depth, ends)


@dataclass(frozen=True)
class FrozenPrefix:
    """The frozen part of one tower.

    Attributes:
        depth: how many stages it has.
        length: tokens that every text is padded to; None for pictures, and where each text ends as one row.
    """

    encoder: DualEncoder | VisionEncoder
    kind: Modality
    precision: Precision
    depth: int
    length: int | None = None

    @classmethod
    def of(cls, encoder: DualEncoder | VisionEncoder, kind: Modality, precision: Precision, longest: int = 0) -> FrozenPrefix:
        """What of the tower is frozen now.

        Args:
            longest: tokens of the longest text.
        """
        depth = frozen_depth(cls._chain_of(encoder, kind))
        if kind == "pictures":
            return cls(encoder, kind, precision, depth)
        limit = encoder.text_limit
        if encoder.pads_to_max_length:
            return cls(encoder, kind, precision, depth, limit)
        if depth and cls._chain_of(encoder, kind)[depth - 1].width is not None:
            return cls(encoder, kind, precision, depth)
        # In steps of 8, so that data sets whose longest texts are alike share a cache.
        return cls(encoder, kind, precision, depth, min(limit, -(-longest // 8) * 8))

    @staticmethod
    def _chain_of(encoder: DualEncoder | VisionEncoder, kind: Modality) -> list[Stage]:
        return encoder.image_chain if kind == "pictures" else encoder.text_chain

    @property
    def pays(self) -> bool:
        """An encoder layer is in it: embeddings alone cost less than reading what they make."""
        return any(stage.layers for stage in self._chain_of(self.encoder, self.kind)[: self.depth])

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Pixels or token ids -> what the frozen stages make of them, on the towers' device."""
        encoder, chain = self.encoder, self._chain_of(self.encoder, self.kind)
        if self.kind == "pictures":
            begun = PartialForward(encoder.normalize_pixels(inputs), 0)
        else:
            ends = encoder.pool_positions(inputs)
            begun = PartialForward(self._padded(inputs).to(encoder.device), 0, ends)
        with torch.inference_mode(), autocast(encoder.device, self.precision):
            return run_stages(chain, begun, self.depth).values

    def _padded(self, input_ids: torch.Tensor) -> torch.Tensor:
        more = (self.length or 0) - input_ids.shape[1]
        return torch.nn.functional.pad(input_ids, (0, more), value=self.encoder.pad_id) if more > 0 else input_ids

    def row(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of what is kept of one item: float32 where that is the precision, else float16."""
        kept = np.dtype(np.float32 if self.precision == "fp32" else np.float16)
        if (width := self._chain_of(self.encoder, self.kind)[self.depth - 1].width) is not None:
            return (width,), kept
        # Wherever the weights are: of a model without any, on the meta device, shapes are known all the same.
        device = next(self.encoder.parameters()).device
        size = self.encoder.pixel_spec.size
        shape, dtype = ((3, size, size), torch.float32) if self.kind == "pictures" else ((self.length,), torch.long)
        begun = PartialForward(
            torch.zeros((1, *shape), dtype=dtype, device=device), 0, torch.zeros(1, dtype=torch.long)
        )
        with torch.inference_mode():
            found = run_stages(self._chain_of(self.encoder, self.kind), begun, self.depth).values
        return tuple(found.shape[1:]), kept

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides what it makes of an item, but the item."""
        stages = self._chain_of(self.encoder, self.kind)[: self.depth]
        half = self.encoder.tower_config(self.kind)
        config = {k: v for k, v in half.to_dict().items() if not k.startswith("_")}
        if self.kind == "pictures":
            spec = self.encoder.pixel_spec.identity()
        else:
            pooling = getattr(self.encoder.model.config, "pooling", None)
            spec = {"length": self.length, "pad": self.encoder.pad_id, "pooling": pooling}
        about = {"schema": SCHEMA, "kind": self.kind, "depth": self.depth, "precision": self.precision}
        return {**about, "weights": _weights(stages), "preprocessing": spec, "config": config}

    def folder(self, below: Path) -> Path:
        """Where its rows are kept below a cache's folder: named by its identity."""
        told = json.dumps(self.identity, sort_keys=True, default=str)
        return below / f"{self.kind}-{hashlib.sha256(told.encode()).hexdigest()[:20]}"

    def store(self, below: Path) -> FeatureStore:
        """That folder, opened."""
        about = {**self.identity, "model": self.encoder.source}
        return FeatureStore(self.folder(below), *self.row(), about)

    def opened(self, cache: str) -> FeatureStore:
        """Its store in the folder of --cache; one that nobody asked for and that is damaged begins anew."""
        try:
            return self.store(folder_of(cache))
        except ArtifactError as error:
            if cache != "auto":
                raise
            console.warn(f"{error.message}; it is filled again")
            shutil.rmtree(self.folder(folder_of(cache)))
            return self.store(folder_of(cache))

    def features(self, store: FeatureStore, items: InputStore, keys: Sequence[str], world: World = SINGLE) -> CachedFeatures:
        """The items' features; what is not yet in the store is computed, each process its share."""
        # A share of all: what is missing is another list for every process that looks while others write.
        share = range(len(keys))[world.shard(len(keys))]
        mine = [share[position] for position in store.missing([keys[position] for position in share])]
        self.encoder.eval()
        self._compute(store, items, keys, mine)
        world.barrier()
        store.reload()
        # Another machine of the same run may have written to a disk of its own.
        self._compute(store, items, keys, store.missing(keys))
        places = np.array([store.places[key] for key in keys], np.int64)
        whole = self.kind == "pictures" or len(store.shape) == 1 or self.encoder.pads_to_max_length
        return CachedFeatures(store, self.depth, places, None if whole else self._ends(items))

    def _compute(self, store: FeatureStore, items: InputStore, keys: Sequence[str], mine: Sequence[int]) -> None:
        """Compute the items at the positions `mine`, and keep them. Texts of like lengths go together."""
        if isinstance(items, TokenStore):
            mine = sorted(mine, key=lambda position: len(items.tokens[position]))
        blocks = [list(mine[start : start + BLOCK]) for start in range(0, len(mine), BLOCK)]
        if not blocks:
            return
        loader: DataLoader[Any] = DataLoader(
            ErrorAsItem(items), sampler=blocks, batch_size=None, num_workers=loader_workers(items)
        )
        with console.progress(f"caching {self.kind}", len(mine)) as bar:
            for number, (block, inputs) in enumerate(zip(blocks, reraise_errors(loader), strict=True), start=1):
                values = self(inputs).to(TORCH_TYPES[store.dtype.name]).cpu().numpy()
                if not np.isfinite(values).all():
                    told = f"the frozen part of {self.encoder.source} makes numbers that {store.dtype} cannot hold"
                    raise UsageError(told, hint="--precision fp32, or --cache off")
                store.append([keys[position] for position in block], values)
                signals.raise_if_stopped()
                bar.update(min(number * BLOCK, len(mine)))

    def fits(self, tokens: TokenStore) -> bool:
        """No text is longer than what is kept of one."""
        return self.length is None or max(map(len, tokens.tokens), default=0) <= self.length

    def _ends(self, items: InputStore) -> np.ndarray:
        positions = range(len(items))
        blocks = [
            self.encoder.pool_positions(items[positions[start : start + 1024]]) for start in range(0, len(items), 1024)
        ]
        return torch.cat(blocks).numpy()


def weights_hash(encoder: DualEncoder | VisionEncoder, kind: Modality) -> str:
    """What tells a tower from every other one: SHA-256 of its weights, adapters included.

    Those in 4 bits are left out: another device packs them in another way.
    """
    return _weights(encoder.image_chain if kind == "pictures" else encoder.text_chain, packed=False)


def _weights(stages: Sequence[Stage], *, packed: bool = True) -> str:
    digest = hashlib.sha256()
    for module in (module for stage in stages for module in stage.modules):
        for name, value in sorted(module.state_dict().items()):
            if not packed and (value.dtype == torch.uint8 or ".weight." in name):
                continue
            digest.update(name.encode() + str(tuple(value.shape)).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Kept:
    """A whole model's features, in the folder of --cache.

    Attributes:
        longest: tokens of the longest text.
    """

    encoder: DualEncoder
    precision: Precision
    longest: int
    cache: str
    world: World

    def __call__(self, kind: Modality, items: InputStore, keys: Sequence[str]) -> InputStore:
        """Features of the items; where a cache that nobody asked for fails, the items as they are.

        Under torchrun it fails all: the processes would no longer do the same.
        """
        try:
            frozen = FrozenPrefix.of(self.encoder, kind, self.precision, self.longest)
            if self.world.is_main:
                frozen.opened(self.cache)
            self.world.barrier()
            store = frozen.store(folder_of(self.cache))
            found = frozen.features(store, items, keys, self.world)
            store.read(found.places)  # Damage shows now, while there is another way.
            return found
        except (VlkitError, OSError) as error:
            if self.cache != "auto" or self.world.size > 1:
                raise
            console.warn(f"the embeddings of {kind} are not kept: {error}")
            return items


def keys_of(kind: Modality, pixels: PixelStore, image_ids: Sequence[str], tokens: TokenStore) -> list[str]:
    """What names each picture, or each text, in a store."""
    return image_keys(pixels.paths, image_ids) if kind == "pictures" else text_keys(tokens.tokens)


def image_keys(paths: Sequence[Path], image_ids: Sequence[str]) -> list[str]:
    """The hash of each picture's bytes, and size and time of its file, lest it was changed since it was hashed."""
    found = ((image_id, _stat(path)) for path, image_id in zip(paths, image_ids, strict=True))
    return [f"{image_id}-{stat.st_size}-{stat.st_mtime_ns}" for image_id, stat in found]


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"no such image: {path} ({error.strerror})", hint="run prep again") from None


def text_keys(tokens: Sequence[Sequence[int]]) -> list[str]:
    """A hash of each text's tokens."""
    return [hashlib.blake2b(np.asarray(ids, "<i8").tobytes(), digest_size=12).hexdigest() for ids in tokens]
