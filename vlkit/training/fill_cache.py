"""Whether the frozen parts' features are kept, and where; then training and validation read them instead of pixels."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlkit import console
from vlkit.config.training import TrainRetrievalConfig
from vlkit.data.loading.retrieval_batches import PairDataset
from vlkit.data.loading.stores import InputStore
from vlkit.distributed import SINGLE, World
from vlkit.errors import ResourceError, UsageError
from vlkit.evaluation.retrieval.task import RetrievalTask, pixel_store, token_store
from vlkit.models.cache.feature_cache import FrozenPrefix, Modality, keys_of
from vlkit.models.cache.feature_store import FeatureStore, folder_of
from vlkit.models.dual_encoder import DualEncoder
from vlkit.storage import format_bytes, nearest_existing, refuse_unwritable

# What the two kinds are called in batches.
ATTRIBUTE: dict[Modality, str] = {"pictures": "images", "texts": "texts"}
# Below this many encodings of an item, on average, a cache that nobody asked for is not worth filling.
LEAST_PASSES = 1.5
# And it takes no more of the free disk than this.
SHARE_OF_DISK = 0.5


@dataclass(frozen=True)
class CachePlan:
    """What is to be kept of one kind of input.

    Attributes:
        items: how many of them.
        row: shape of what is kept of each.
        size: bytes of all.
        refused: why it is not kept; None: it is.
    """

    frozen: FrozenPrefix
    items: int
    row: tuple[int, ...]
    size: int
    refused: str | None

    def facts(self) -> dict[str, Any] | str:
        """For --json."""
        return self.refused or {"items": self.items, "row": list(self.row), "gb": self.size / 2**30}

    def __str__(self) -> str:
        kind = self.frozen.kind
        if self.refused:
            return f"cache of {kind}: none, {self.refused}"
        shape = " x ".join(map(str, self.row))
        return f"cache of {kind}: {self.items:,} x {shape} numbers, {format_bytes(self.size)}"


@dataclass(frozen=True)
class Amounts:
    """How much there is to be kept.

    Attributes:
        pictures, texts: different ones in training.
        validation: pictures or texts, whichever are more.
        longest: tokens of the longest text.
        varied: pictures change in every epoch.
    """

    pictures: int
    texts: int
    validation: int
    longest: int
    varied: bool


def plans(config: TrainRetrievalConfig, encoder: DualEncoder, amounts: Amounts) -> list[CachePlan]:
    """What is kept, of pictures and of texts; nothing is computed or written yet."""
    if config.cache == "off":
        return []
    if config.cache != "auto":
        refuse_unwritable(folder_of(config.cache), "--cache")
    encodings = config.steps * config.batch_size * config.grad_accum
    found: list[CachePlan] = []
    for kind, items in (("pictures", amounts.pictures), ("texts", amounts.texts)):
        frozen = FrozenPrefix.of(encoder, kind, config.precision, amounts.longest)
        if frozen.pays:
            taken = sum(plan.size for plan in found if not plan.refused)
            varied = kind == "pictures" and amounts.varied
            found.append(
                planned(frozen, config.cache, items, amounts.validation, encodings, varied=varied, taken=taken)
            )
    return found


def planned(
    frozen: FrozenPrefix,
    cache: str,
    items: int,
    validation: int,
    encodings: int,
    *,
    varied: bool = False,
    taken: int = 0,
) -> CachePlan:
    """Whether some items' features are kept.

    Args:
        cache: auto or a folder.
        items, validation: how many different ones there are.
        encodings: how many the run asks for without a cache.
        varied: they change in every epoch.
        taken: bytes that other caches of this run will have taken.
    """
    row, dtype = frozen.row()
    size = (items + validation) * math.prod(row) * dtype.itemsize
    room = shutil.disk_usage(nearest_existing(folder_of(cache))).free * SHARE_OF_DISK - taken
    refused = None
    if varied:
        refused = "they are varied in every epoch"
    elif cache == "auto" and encodings < LEAST_PASSES * items:
        refused = "hardly one is used twice"
    elif cache == "auto" and size > room and not _begun(frozen, cache):
        refused = f"its {format_bytes(size)} are over half of the free disk; --cache DIR keeps it anyway"
    return CachePlan(frozen, items, row, size, refused)


def _begun(frozen: FrozenPrefix, cache: str) -> bool:
    """It was decided for before: what is there already takes no more room."""
    known = all(not p.is_meta for p in frozen.encoder.parameters())
    return known and frozen.folder(folder_of(cache)).is_dir()


@dataclass
class Sources:
    """Where a task's inputs come from; None: they are read when they are asked for."""

    images: InputStore | None = None
    texts: InputStore | None = None


def decoded(task: RetrievalTask | None, encoder: DualEncoder) -> Sources:
    """A task's pictures and texts as they are: read, but not computed with."""
    return Sources() if task is None else Sources(pixel_store(task, encoder), token_store(task, encoder))


def cached(
    config: TrainRetrievalConfig,
    encoder: DualEncoder,
    dataset: PairDataset,
    validation: RetrievalTask | None,
    world: World = SINGLE,
) -> Sources:
    """Fill the cache where there is one to fill; put features in place of the dataset's pixels and tokens.

    Returns:
        The same for validation.

    Raises:
        ResourceError: a cache that was asked for does not fit on its disk.
    """
    plain = decoded(validation, encoder)
    sources = Sources(plain.images, plain.texts)
    amounts = Amounts(
        pictures=len(dataset.pixels),
        texts=len(dataset.tokens),
        validation=max(len(validation.images), len(validation.texts)) if validation is not None else 0,
        longest=max(map(len, dataset.tokens.tokens)),
        varied=dataset.augmenter is not None,
    )
    # Free disks, and what others have written, change from one look to the next: one process decides.
    found = plans(config, encoder, amounts)
    decided = world.broadcast([plan.refused for plan in found])
    for plan, refused in zip(found, decided, strict=True):
        frozen, kind = plan.frozen, plan.frozen.kind
        keys = keys_of(kind, dataset.pixels, dataset.image_ids, dataset.tokens)
        items = dataset.pixels if kind == "pictures" else dataset.tokens
        store = filled(dataclasses.replace(plan, refused=refused), config.cache, items, keys, world)
        if store is None:
            continue
        setattr(dataset, ATTRIBUTE[kind], frozen.features(store, items, keys, world))
        if validation is not None and (kind == "pictures" or frozen.fits(plain.texts)):
            keys = keys_of(kind, plain.images, list(validation.images["image_id"]), plain.texts)
            items = getattr(plain, ATTRIBUTE[kind])
            setattr(sources, ATTRIBUTE[kind], frozen.features(store, items, keys, world))
    return sources


def filled(
    plan: CachePlan, cache: str, items: InputStore, keys: Sequence[str], world: World = SINGLE
) -> FeatureStore | None:
    """The store of a plan with all the items in it; None where there is none, which is told.

    Args:
        cache: auto or a folder.
        items: pixels or tokens.
        keys: of each item.

    Raises:
        ResourceError: a cache that was asked for does not fit on its disk.
    """
    if plan.refused:
        console.say(str(plan))
        return None
    try:
        store = plan.frozen.opened(cache)
        missing = len(store.missing(keys))
        console.say(f"{plan}, in {store.folder}; {missing:,} to be computed")
        _refuse_too_large(plan.frozen.kind, store, missing, world)
        plan.frozen.features(store, items, keys, world)
    except (UsageError, OSError) as error:
        # Nobody asked for it, so nothing fails for want of it.
        if cache != "auto" or world.size > 1:
            raise
        console.warn(f"no cache of {plan.frozen.kind}: {error}")
        return None
    return store


def _refuse_too_large(kind: Modality, store: FeatureStore, missing: int, world: World) -> None:
    needed, free = missing * store.row_bytes, shutil.disk_usage(store.folder).free
    if needed > free and world.is_main:
        told = f"the cache of {kind} needs {format_bytes(needed)} more, {format_bytes(free)} are free"
        raise ResourceError(told, hint="--cache off trains without it; --cache DIR keeps it on another disk")
