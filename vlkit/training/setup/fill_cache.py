"""Decide whether the features of frozen stages are cached; training and validation then read them instead of pixels."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlkit import console
from vlkit.config.base import require_resolved
from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.loading.retrieval_batches import PairDataset
from vlkit.data.loading.stores import InputStore, TokenStore
from vlkit.distributed import SINGLE, World
from vlkit.errors import ResourceError
from vlkit.evaluation.retrieval.task import RetrievalTask, pixel_store, token_store
from vlkit.models.cache import feature_cache
from vlkit.models.cache.feature_cache import (
    CachedFeatures,
    FrozenImages,
    FrozenPrefix,
    FrozenTexts,
    image_keys,
    text_keys,
)
from vlkit.models.cache.feature_store import FeatureStore, cache_folder
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.storage import format_bytes, nearest_existing, refuse_unwritable

# A cache that nobody asked for is worth filling from this many encodings of an item on, on average.
MIN_ENCODINGS = 1.5
# And it takes no more of the free disk than this.
DISK_SHARE = 0.5


@dataclass(frozen=True)
class CachePlan:
    """What is to be cached of a tower's inputs.

    Attributes:
        items: how many images or texts.
        row: shape of what is cached of each.
        size: bytes of all.
        refused: why it is not cached; None: it is.
    """

    prefix: FrozenPrefix
    items: int
    row: tuple[int, ...]
    size: int
    refused: str | None

    def to_dict(self) -> dict[str, Any] | str:
        """Return the plan for --json."""
        return self.refused or {"items": self.items, "row": list(self.row), "gb": self.size / 2**30}

    def __str__(self) -> str:
        modality = self.prefix.modality
        if self.refused:
            return f"cache of {modality}: none, {self.refused}"
        shape = " x ".join(map(str, self.row))
        return f"cache of {modality}: {self.items:,} x {shape} numbers, {format_bytes(self.size)}"

    def fill(self, cache: str, items: InputStore, keys: Sequence[str], world: World = SINGLE) -> CachedFeatures | None:
        """Return the features of all the plan's items; print and return None where they are not cached.

        Args:
            cache: auto or a folder.
            items: pixels or tokens.
            keys: of each item.

        Raises:
            ResourceError: a cache that was asked for does not fit on its disk.
        """
        if self.refused:
            console.say(str(self))
            return None

        def check(store: FeatureStore, missing: int) -> None:
            console.say(f"{self}, in {store.folder}; {missing:,} to be computed")
            _refuse_too_large(self.prefix, store, missing, world)

        return feature_cache.fill(self.prefix, cache, items, keys, world=world, on_open=check)


def _refuse_too_large(prefix: FrozenPrefix, store: FeatureStore, missing: int, world: World) -> None:
    needed, free = missing * store.row_bytes, shutil.disk_usage(store.folder).free
    if needed > free and world.is_main:
        raise ResourceError(
            f"the cache of {prefix.modality} needs {format_bytes(needed)} more, {format_bytes(free)} are free",
            hint="--cache off trains without it; --cache DIR puts it on another disk",
        )


@dataclass(frozen=True)
class CacheDemand:
    """How much there is to cache.

    Attributes:
        images, texts: unique ones in training.
        validation: images or texts, whichever are more.
        longest: tokens of the longest text.
        varied: images change in every epoch.
    """

    images: int
    texts: int
    validation: int
    longest: int
    varied: bool


def plan_caches(config: TrainRetrievalConfig, encoder: DualEncoder, demand: CacheDemand) -> list[CachePlan]:
    """Plan what to cache of images and of texts; compute and write nothing."""
    if config.cache == "off":
        return []
    if config.cache != "auto":
        refuse_unwritable(cache_folder(config.cache), "--cache")
    precision: Precision = require_resolved(config.precision)
    cache, validation = config.cache, demand.validation
    encodings = require_resolved(config.steps) * require_resolved(config.batch_size) * config.grad_accum
    images = FrozenImages.from_encoder(encoder, precision)
    texts = FrozenTexts.from_encoder(encoder, precision, demand.longest)
    plans: list[CachePlan] = []
    if images.worth_caching:
        plans.append(plan_cache(images, cache, demand.images, validation, encodings, varied=demand.varied))
    if texts.worth_caching:
        reserved = sum(plan.size for plan in plans if not plan.refused)
        plans.append(plan_cache(texts, cache, demand.texts, validation, encodings, reserved=reserved))
    return plans


def plan_cache(
    prefix: FrozenPrefix,
    cache: str,
    items: int,
    validation: int,
    encodings: int,
    *,
    varied: bool = False,
    reserved: int = 0,
) -> CachePlan:
    """Plan whether the features of some items are cached.

    Args:
        cache: auto or a folder.
        items, validation: how many unique ones there are.
        encodings: how many the run needs without a cache.
        varied: they change in every epoch.
        reserved: bytes that other caches of this run will take.
    """
    row, dtype = prefix.row()
    size = (items + validation) * math.prod(row) * dtype.itemsize
    available = shutil.disk_usage(nearest_existing(cache_folder(cache))).free * DISK_SHARE - reserved
    refused = None
    if varied:
        refused = "they are varied in every epoch"
    elif cache == "auto" and encodings < MIN_ENCODINGS * items:
        refused = "hardly one is used twice"
    elif cache == "auto" and size > available and not _exists(prefix, cache):
        refused = f"its {format_bytes(size)} are over half of the free disk; --cache DIR fills it anyway"
    return CachePlan(prefix, items, row, size, refused)


def _exists(prefix: FrozenPrefix, cache: str) -> bool:
    """Return whether an earlier run decided for this cache: its rows take no more space."""
    has_weights = all(not p.is_meta for p in prefix.encoder.parameters())
    return has_weights and prefix.folder(cache_folder(cache)).is_dir()


@dataclass
class EvalInputs:
    """Where a task's inputs come from; None: they are read when they are needed."""

    images: InputStore | None = None
    texts: InputStore | None = None


def uncached_inputs(task: RetrievalTask | None, encoder: DualEncoder) -> EvalInputs:
    """Return a task's images and texts without any features."""
    return EvalInputs() if task is None else EvalInputs(pixel_store(task, encoder), token_store(task, encoder))


def fill_cache(
    config: TrainRetrievalConfig,
    encoder: DualEncoder,
    dataset: PairDataset,
    validation: RetrievalTask | None,
    world: World = SINGLE,
) -> EvalInputs:
    """Fill the caches of a run; put features in place of the dataset's pixels and tokens.

    Returns:
        Features, or pixels and tokens, for validation.

    Raises:
        ResourceError: a cache that was asked for does not fit on its disk.
    """
    demand = CacheDemand(
        images=len(dataset.pixels),
        texts=len(dataset.tokens),
        validation=max(len(validation.images), len(validation.texts)) if validation is not None else 0,
        longest=max(map(len, dataset.tokens.tokens)),
        varied=dataset.augmenter is not None,
    )
    inputs = uncached_inputs(validation, encoder)
    # Free disks, and what others have written, change from one look to the next: one process decides.
    plans = plan_caches(config, encoder, demand)
    decisions = world.broadcast([plan.refused for plan in plans])
    for plan, refused in zip(plans, decisions, strict=True):
        plan = dataclasses.replace(plan, refused=refused)
        if isinstance(plan.prefix, FrozenTexts):
            tokens = dataset.tokens
            texts = plan.fill(config.cache, tokens, text_keys(tokens.tokens), world)
            if texts is not None:
                dataset.texts = texts
                if validation is not None:
                    inputs.texts = _text_features(plan.prefix, texts.store, token_store(validation, encoder), world)
        else:
            pixels = dataset.pixels
            images = plan.fill(config.cache, pixels, image_keys(pixels.paths, dataset.image_ids), world)
            if images is not None:
                dataset.images = images
                if validation is not None:
                    pixels = pixel_store(validation, encoder)
                    keys = image_keys(pixels.paths, list(validation.images["image_id"]))
                    inputs.images = plan.prefix.features(images.store, pixels, keys, world)
    return inputs


def _text_features(prefix: FrozenTexts, store: FeatureStore, tokens: TokenStore, world: World) -> InputStore:
    """Return features of the texts; the texts themselves where one is longer than a row of the store."""
    if not prefix.fits(tokens):
        return tokens
    return prefix.features(store, tokens, text_keys(tokens.tokens), world)
