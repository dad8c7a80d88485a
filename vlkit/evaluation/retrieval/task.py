"""One model on one set of rows: embeddings -> ranks in both directions -> metrics."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from vlkit.data.loading.stores import InputStore, PixelStore, TokenStore
from vlkit.data.pairs import Pairs
from vlkit.distributed import SINGLE, World
from vlkit.evaluation.retrieval.corruptions import CORRUPTIONS, MAX_SIDE, VERSION, CorruptedPixels
from vlkit.evaluation.retrieval.ranking import Ranks, metric_values, per_query_metrics, rank_both
from vlkit.models.cache.feature_cache import FrozenImages, FrozenTexts, fill, image_keys, text_keys
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.encode import encode_images, encode_text_inputs


@dataclass(frozen=True)
class RetrievalTask:
    """Every unique image and every unique text of some rows, and which of them match."""

    pairs: Pairs
    images: pd.DataFrame
    texts: pd.DataFrame

    @classmethod
    def from_pairs(cls, pairs: Pairs) -> RetrievalTask:
        """Build the task of these rows, without mismatched pairs (match 0)."""
        positives = pairs.positives()
        return cls(positives, positives.unique_images(), positives.unique_texts())

    def for_images(self, positions: np.ndarray) -> RetrievalTask:
        """Return the task of the images at some positions, with the texts of their rows."""
        image_ids = set(self.images["image_id"].iloc[positions])
        rows = self.pairs.frame["image_id"].isin(image_ids)
        return RetrievalTask.from_pairs(replace(self.pairs, frame=self.pairs.frame[rows].reset_index(drop=True)))

    def queries(self, direction: str) -> pd.DataFrame:
        """Return the table whose rows are a direction's queries."""
        return self.texts if direction == "text_to_image" else self.images

    def groups(self) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
        """Return a set for every image and for every text; an image and a text match where their sets intersect."""
        image_sets, text_sets = self.pairs.match_sets()
        return [image_sets[key] for key in self.images["image_id"]], [text_sets[key] for key in self.texts["text_id"]]


@dataclass(frozen=True)
class Embeddings:
    """A task's images and texts in a model's space.

    Attributes:
        images, texts: float32 [images, width] and [texts, width].
        brightness: float32 [images], mean of what the model sees, 0 (black) to 255; NaN if no pixels were read.
        images_per_second, texts_per_second: of encoding, with reading and decoding files.
    """

    images: torch.Tensor
    texts: torch.Tensor
    brightness: np.ndarray
    images_per_second: float
    texts_per_second: float


@dataclass(frozen=True)
class RetrievalScores:
    """A model's ranks.

    Attributes:
        ranks: direction -> Ranks.
    """

    ranks: dict[str, Ranks]

    def values(self) -> dict[tuple[str, str], np.ndarray]:
        """Return (direction, metric) -> float64 [queries]."""
        return {
            (direction, metric): values
            for direction, ranks in self.ranks.items()
            for metric, values in metric_values(ranks).items()
        }

    def metrics(self) -> dict[str, dict[str, float]]:
        """Return direction -> metric -> value, as results.json has it."""
        metrics: dict[str, dict[str, float]] = {}
        for direction, ranks in self.ranks.items():
            per_query = per_query_metrics(ranks)
            metrics[direction] = {metric: per_query.value(metric, len(ranks)) for metric in per_query.names}
            metrics[direction] |= {"queries": len(ranks), "gallery": ranks.gallery}
        return metrics


def embed_task(
    encoder: DualEncoder,
    task: RetrievalTask,
    *,
    batch_size: int,
    precision: Precision,
    image_inputs: InputStore | None = None,
    text_inputs: InputStore | None = None,
    texts: torch.Tensor | None = None,
    world: World = SINGLE,
) -> Embeddings:
    """Encode the task's images and texts, each once.

    Args:
        image_inputs, text_inputs: the encoder's inputs in the task's order; None: read and tokenized here.
        texts: the texts' embeddings, if known already.
        world: processes that share the encoding; each gets all embeddings.
    """
    encoder.eval()
    image_inputs, text_inputs = image_inputs or pixel_store(task, encoder), text_inputs or token_store(task, encoder)
    brightness: list[torch.Tensor] = []
    started = time.perf_counter()
    own_images = encode_images(
        encoder,
        image_inputs,
        batch_size=batch_size,
        precision=precision,
        part=world.shard(len(image_inputs)),
        watch=_record_brightness(brightness),
    )
    own_light = (
        torch.cat(brightness).to(own_images) if brightness else own_images.new_full((len(own_images),), torch.nan)
    )
    images, light = (world.all_gather(part, len(image_inputs)) for part in (own_images, own_light))
    between = time.perf_counter()
    if texts is None:
        part = world.shard(len(text_inputs))
        own_texts = encode_text_inputs(encoder, text_inputs, batch_size=batch_size, precision=precision, part=part)
        texts = world.all_gather(own_texts, len(text_inputs))
    done = time.perf_counter()
    speeds = len(images) / (between - started), len(texts) / (done - between)
    return Embeddings(images, texts, light.cpu().numpy(), *speeds)


def _record_brightness(brightness: list[torch.Tensor]) -> Callable[[Any], None]:
    """Return a callback that appends the mean light (Rec. 601 luma) of pixels; cached features have none."""
    weights = torch.tensor([0.299, 0.587, 0.114])

    def watch(pixels: Any) -> None:
        if isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8:
            brightness.append(pixels.float().mean(dim=(2, 3)) @ weights)

    return watch


def embed_cached(
    encoder: DualEncoder,
    task: RetrievalTask,
    *,
    batch_size: int,
    precision: Precision,
    cache: str,
    corruption: str | None = None,
    texts: torch.Tensor | None = None,
    world: World = SINGLE,
) -> Embeddings:
    """Encode a task with a frozen model; what an earlier evaluation cached is read from disk.

    Args:
        cache: off, auto, or a folder.
        corruption: of the images: one of CORRUPTIONS.
        texts: the task's, if embedded already.
    """
    encoder.eval().requires_grad_(False)
    pixels: PixelStore = pixel_store(task, encoder)
    if corruption is not None:
        pixels = CorruptedPixels(pixels.paths, pixels.spec, corruption=corruption)
    tokens = token_store(task, encoder)
    image_inputs: InputStore = pixels
    text_inputs: InputStore = tokens
    if cache != "off":
        keys = image_keys(pixels.paths, list(task.images["image_id"]))
        if corruption is not None:
            # What the corruption does is part of what the features are.
            recipe = f"{corruption} {VERSION} {CORRUPTIONS[corruption]} {MAX_SIDE}"
            keys = [f"{key}-{corruption}-{zlib.crc32(recipe.encode()):08x}" for key in keys]
        frozen_images = FrozenImages.from_encoder(encoder, precision)
        image_inputs = fill(frozen_images, cache, pixels, keys, world=world) or pixels
        if texts is None:
            frozen_texts = FrozenTexts.from_encoder(encoder, precision, max(map(len, tokens.tokens)))
            text_inputs = fill(frozen_texts, cache, tokens, text_keys(tokens.tokens), world=world) or tokens
    return embed_task(
        encoder,
        task,
        batch_size=batch_size,
        precision=precision,
        image_inputs=image_inputs,
        text_inputs=text_inputs,
        texts=texts,
        world=world,
    )


def rank_task(
    task: RetrievalTask,
    embeddings: Embeddings,
    *,
    keep: int = 0,
    all_matches: bool = False,
    world: World = SINGLE,
) -> RetrievalScores:
    """Rank in both directions.

    Args:
        keep: how many of the first items to remember.
        all_matches: look at every right item, for average precision (see `rank`).
    """
    image_groups, text_groups = task.groups()
    to_image, to_text = rank_both(
        embeddings.texts,
        embeddings.images,
        text_groups,
        image_groups,
        keep=keep,
        all_matches=all_matches,
        world=world,
    )
    return RetrievalScores({"text_to_image": to_image, "image_to_text": to_text})


def score_task(
    encoder: DualEncoder,
    task: RetrievalTask,
    *,
    batch_size: int,
    precision: Precision,
    image_inputs: InputStore | None = None,
    text_inputs: InputStore | None = None,
    world: World = SINGLE,
) -> RetrievalScores:
    """Encode and rank: `embed_task`, then `rank_task`."""
    embeddings = embed_task(
        encoder,
        task,
        batch_size=batch_size,
        precision=precision,
        image_inputs=image_inputs,
        text_inputs=text_inputs,
        world=world,
    )
    return rank_task(task, embeddings, world=world)


def pixel_store(task: RetrievalTask, encoder: DualEncoder) -> PixelStore:
    """Return the task's images, resized as this encoder needs them."""
    return PixelStore(task.pairs.image_paths(task.images), encoder.pixel_spec)


def token_store(task: RetrievalTask, encoder: DualEncoder) -> TokenStore:
    """Return the task's texts as this encoder's tokens."""
    return TokenStore(encoder.tokenize(list(task.texts["text"]))[0], encoder.pad)
