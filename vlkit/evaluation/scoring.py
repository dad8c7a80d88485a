"""One model on one set of rows: embeddings -> ranks in both directions -> metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from vlkit.data.batches import Inputs, PixelStore, TokenStore
from vlkit.data.pairs import Pairs
from vlkit.distributed import ALONE, World
from vlkit.evaluation.ranking import Ranks, metric_values, rank
from vlkit.models.device import Precision
from vlkit.models.encode import encode_captions, encode_images
from vlkit.models.towers import Towers

DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class Task:
    """What is asked: every unique picture and every unique text of some rows, and which match."""

    pairs: Pairs
    pictures: pd.DataFrame
    texts: pd.DataFrame

    @classmethod
    def of(cls, pairs: Pairs) -> Task:
        """The retrieval task of these rows; mismatched pairs (match 0) ask nothing."""
        positives = pairs.positives()
        return cls(positives, positives.unique_images(), positives.unique_texts())

    def queries(self, direction: str) -> pd.DataFrame:
        """The table that a direction asks with."""
        return self.texts if direction == "text_to_image" else self.pictures


@dataclass(frozen=True)
class Scores:
    """How a model did.

    Attributes:
        ranks: direction -> Ranks.
        images_per_second, texts_per_second: of encoding, files read and decoded.
    """

    ranks: dict[str, Ranks]
    images_per_second: float
    texts_per_second: float

    def values(self) -> dict[tuple[str, str], np.ndarray]:
        """(direction, metric) -> float64 [queries]."""
        return {
            (direction, metric): v
            for direction, ranks in self.ranks.items()
            for metric, v in metric_values(ranks).items()
        }

    def metrics(self) -> dict[str, dict[str, float]]:
        """direction -> metric -> value, as results.json has it."""
        found: dict[str, dict[str, float]] = {direction: {} for direction in self.ranks}
        for (direction, metric), values in self.values().items():
            found[direction][metric] = summary(metric, values)
        for direction, ranks in self.ranks.items():
            found[direction] |= {"queries": len(ranks), "gallery": ranks.gallery}
        return found


def summary(metric: str, values: np.ndarray) -> float:
    """A metric from its values a query: the median for median_rank, else the mean."""
    return float(np.median(values) if metric == "median_rank" else np.mean(values))


def score(
    towers: Towers,
    task: Task,
    *,
    batch_size: int,
    precision: Precision,
    pictures: Inputs | None = None,
    captions: Inputs | None = None,
    world: World = ALONE,
) -> Scores:
    """Encode the task's pictures and texts once, rank in both directions.

    Args:
        pictures, captions: of the task, where they are at hand.
        world: processes that share the encoding; each gets all scores.
    """
    towers.eval()
    pictures, captions = pictures or pixel_store(task, towers), captions or token_store(task, towers)
    started = time.perf_counter()
    how: dict[str, Any] = {"batch_size": batch_size, "precision": precision}
    images = world.gathered(encode_images(towers, pictures, part=world.share(len(pictures)), **how), len(pictures))
    between = time.perf_counter()
    texts = world.gathered(encode_captions(towers, captions, part=world.share(len(captions)), **how), len(captions))
    done = time.perf_counter()
    image_sets, text_sets = task.pairs.match_sets()
    image_groups = [image_sets[key] for key in task.pictures["image_id"]]
    text_groups = [text_sets[key] for key in task.texts["text_id"]]
    ranks = {
        "text_to_image": rank(texts, images, text_groups, image_groups),
        "image_to_text": rank(images, texts, image_groups, text_groups),
    }
    return Scores(ranks, len(images) / (between - started), len(texts) / (done - between))


def pixel_store(task: Task, towers: Towers) -> PixelStore:
    """The task's pictures as this model wants them."""
    return PixelStore(task.pairs.image_paths(task.pictures), towers.pixel_spec)


def token_store(task: Task, towers: Towers) -> TokenStore:
    """The task's texts as this model reads them."""
    return TokenStore(towers.tokenize(list(task.texts["text"]))[0], towers.pad)
