"""One model on one set of rows: embeddings -> ranks in both directions -> metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from vlkit.config.evaluation import DIRECTIONS
from vlkit.data.loading.retrieval_batches import Inputs, PixelStore, TokenStore
from vlkit.data.pairs import Pairs
from vlkit.distributed import SINGLE, World
from vlkit.evaluation.comparison import PerQueryMetrics
from vlkit.evaluation.retrieval.ranking import Ranks, metric_values, rank_both
from vlkit.models.device import Precision
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.encode import encode_captions, encode_images


@dataclass(frozen=True)
class RetrievalTask:
    """What is asked: every unique picture and every unique text of some rows, and which match."""

    pairs: Pairs
    pictures: pd.DataFrame
    texts: pd.DataFrame

    @classmethod
    def from_pairs(cls, pairs: Pairs) -> RetrievalTask:
        """The retrieval task of these rows; mismatched pairs (match 0) ask nothing."""
        positives = pairs.positives()
        return cls(positives, positives.unique_images(), positives.unique_texts())

    def of_pictures(self, positions: np.ndarray) -> RetrievalTask:
        """The task of some of the pictures, with the texts of their rows."""
        chosen = set(self.pictures["image_id"].iloc[positions])
        kept = self.pairs.frame["image_id"].isin(chosen)
        return RetrievalTask.from_pairs(replace(self.pairs, frame=self.pairs.frame[kept].reset_index(drop=True)))

    def queries(self, direction: str) -> pd.DataFrame:
        """The table that a direction asks with."""
        return self.texts if direction == "text_to_image" else self.pictures

    def groups(self) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
        """For every picture and every text the set that matches where two intersect."""
        image_sets, text_sets = self.pairs.match_sets()
        return [image_sets[key] for key in self.pictures["image_id"]], [text_sets[key] for key in self.texts["text_id"]]


@dataclass(frozen=True)
class Embeddings:
    """A task's pictures and texts in a model's space.

    Attributes:
        images, texts: float32 [pictures, width] and [texts, width].
        brightness: float32 [pictures], mean of what the model sees, 0 (black) to 255; NaN where no pixels were read.
        images_per_second, texts_per_second: of encoding, files read and decoded.
    """

    images: torch.Tensor
    texts: torch.Tensor
    brightness: np.ndarray
    images_per_second: float
    texts_per_second: float


@dataclass(frozen=True)
class RetrievalScores:
    """How a model did.

    Attributes:
        ranks: direction -> Ranks.
    """

    ranks: dict[str, Ranks]

    def values(self) -> dict[tuple[str, str], np.ndarray]:
        """(direction, metric) -> float64 [queries]."""
        return {
            (direction, metric): v
            for direction, ranks in self.ranks.items()
            for metric, v in metric_values(ranks).items()
        }

    def metrics(self) -> dict[str, dict[str, float]]:
        """direction -> metric -> value, as results.json has it."""
        found: dict[str, dict[str, float]] = {}
        for direction, ranks in self.ranks.items():
            measured = PerQueryMetrics.of(ranks)
            found[direction] = {metric: measured.value(metric, len(ranks)) for metric in measured.names}
            found[direction] |= {"queries": len(ranks), "gallery": ranks.gallery}
        return found


def embed_task(
    encoder: DualEncoder,
    task: RetrievalTask,
    *,
    batch_size: int,
    precision: Precision,
    pictures: Inputs | None = None,
    captions: Inputs | None = None,
    texts: torch.Tensor | None = None,
    world: World = SINGLE,
) -> Embeddings:
    """Encode the task's pictures and texts, each once.

    Args:
        pictures, captions: of the task, where they are at hand.
        texts: the texts' embeddings, where they are known already.
        world: processes that share the encoding; each gets all embeddings.
    """
    encoder.eval()
    pictures, captions = pictures or pixel_store(task, encoder), captions or token_store(task, encoder)
    started = time.perf_counter()
    how: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    seen: list[torch.Tensor] = []
    mine = encode_images(encoder, pictures, part=world.shard(len(pictures)), watch=_brightness_into(seen), **how)
    light = torch.cat(seen).to(mine) if seen else mine.new_full((len(mine),), torch.nan)
    images, brightness = (world.all_gather(part, len(pictures)) for part in (mine, light))
    between = time.perf_counter()
    if texts is None:
        own = encode_captions(encoder, captions, part=world.shard(len(captions)), **how)
        texts = world.all_gather(own, len(captions))
    done = time.perf_counter()
    speeds = len(images) / (between - started), len(texts) / (done - between)
    return Embeddings(images, texts, brightness.cpu().numpy(), *speeds)


def _brightness_into(seen: list[torch.Tensor]) -> Callable[[Any], None]:
    """Note the mean light (Rec. 601 luma) of pixels; what frozen parts have made of pictures has none."""
    weights = torch.tensor([0.299, 0.587, 0.114])

    def watch(pixels: Any) -> None:
        if isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8:
            seen.append(pixels.float().mean(dim=(2, 3)) @ weights)

    return watch


def rank_task(task: RetrievalTask, embedded: Embeddings, *, keep: int = 0, every: bool = False, world: World = SINGLE) -> RetrievalScores:
    """Rank in both directions.

    Args:
        keep: how many of the first items to remember.
        every: look at every right item, for average precision (see `rank`).
    """
    image_groups, text_groups = task.groups()
    to_image, to_text = rank_both(
        embedded.texts, embedded.images, text_groups, image_groups, keep=keep, every=every, world=world
    )
    return RetrievalScores({"text_to_image": to_image, "image_to_text": to_text})


def score_task(
    encoder: DualEncoder,
    task: RetrievalTask,
    *,
    batch_size: int,
    precision: Precision,
    pictures: Inputs | None = None,
    captions: Inputs | None = None,
    world: World = SINGLE,
) -> RetrievalScores:
    """`embed_task`, then `rank_task`."""
    how: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "world": world}
    return rank_task(task, embed_task(encoder, task, pictures=pictures, captions=captions, **how), world=world)


def pixel_store(task: RetrievalTask, encoder: DualEncoder) -> PixelStore:
    """The task's pictures as this model wants them."""
    return PixelStore(task.pairs.image_paths(task.pictures), encoder.pixel_spec)


def token_store(task: RetrievalTask, encoder: DualEncoder) -> TokenStore:
    """The task's texts as this model reads them."""
    return TokenStore(encoder.tokenize(list(task.texts["text"]))[0], encoder.pad)


__all__ = ["DIRECTIONS", "Embedded", "Scores", "Task", "embed", "pixel_store", "ranked", "score", "token_store"]
