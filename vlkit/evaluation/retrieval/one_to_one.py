"""Scores as others define them, to show the difference to ours: one-to-one, and averaged over folds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from vlkit import console
from vlkit.data.pairs import index_of_ids
from vlkit.distributed import World
from vlkit.evaluation.results import Folds, OneToOne, Values
from vlkit.evaluation.retrieval.ranking import per_query_metrics, rank_both
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalTask, rank_task
from vlkit.metrics import DIRECTIONS, metric_names

# A row is contrasted with all others, however often its text is repeated: of more rows than this some are drawn.
MOST_ROWS = 5000
FOLD, LEAST_FOLDS = 1000, 2


def one_to_one_metrics(task: RetrievalTask, models: Mapping[str, Embeddings], *, seed: int, world: World) -> OneToOne:
    """Score as scripts with `labels = arange(n)` do: only a row's own partner counts.

    A text of several rows finds the image of one of them at best, and an image cannot tell the copies of a text apart:
    recall@1 of a perfect model cannot pass `ceiling`, K / N for K different texts in N rows of as many images.

    Args:
        models: tuned and base -> embeddings of the task.
        seed: of the draw, if there are too many rows.
    """
    frame = task.pairs.frame
    if len(frame) > MOST_ROWS:
        frame = frame.sample(MOST_ROWS, random_state=seed).sort_index()
    image_index, text_index = index_of_ids(task.images["image_id"]), index_of_ids(task.texts["text_id"])
    images = [image_index[key] for key in frame["image_id"]]
    texts = [text_index[key] for key in frame["text_id"]]
    rows = [str(number) for number in range(len(frame))]
    metrics: dict[str, dict[str, Values]] = {}
    for name, embeddings in models.items():
        both = rank_both(embeddings.texts[texts], embeddings.images[images], rows, rows, keep=0, world=world)
        metrics[name] = {}
        for direction, ranks in zip(DIRECTIONS, both, strict=True):
            per_query, names = per_query_metrics(ranks), metric_names(direction, "comparison")
            metrics[name][direction] = {metric: per_query.value(metric, len(ranks)) for metric in names}
    sides = zip(DIRECTIONS, (texts, images), (images, texts), strict=True)
    ceiling = {direction: _ceiling(own, other) for direction, own, other in sides}
    return OneToOne(len(frame), len(task.pairs), ceiling, metrics["tuned"], metrics.get("base"))


def _ceiling(own: Sequence[int], other: Sequence[int]) -> float:
    """Return the best recall@1 of queries `own`, row by row, that rank one item, with all its copies, first."""
    copies, best = Counter(other), dict[int, float]()
    for (query, item), rows in Counter(zip(own, other, strict=True)).items():
        best[query] = max(best.get(query, 0.0), rows / copies[item])
    return sum(best.values()) / len(own)


def choose_fold_size(task: RetrievalTask, fold_size: int | None) -> int:
    """Return images a fold; 0: no folds. Default: COCO's 1000, if two folds have images of several captions each."""
    if fold_size is not None:
        return fold_size
    several = len(task.texts) >= 2 * len(task.images)
    return FOLD if several and len(task.images) >= LEAST_FOLDS * FOLD else 0


def fold_metrics(task: RetrievalTask, models: Mapping[str, Embeddings], size: int, world: World) -> Folds | None:
    """Average over folds of `size` images, in the table's order, each with the texts of its rows; drop the remainder.

    With COCO's 5000 test images these are the published 1k numbers; the whole is the 5k set.

    Args:
        models: tuned and base -> embeddings of the task.
    """
    count = len(task.images) // size if size else 0
    if size and not count:
        console.warn(f"--fold-size {size}: only {len(task.images)} images: too few for a fold")
    if not count:
        return None
    text_index = index_of_ids(task.texts["text_id"])
    means: dict[str, dict[str, Values]] = {}
    for name, embeddings in models.items():
        values: dict[str, dict[str, list[float]]] = {direction: {} for direction in DIRECTIONS}
        for number in range(count):
            images = np.arange(number * size, (number + 1) * size)
            fold = task.for_images(images)
            texts = [text_index[key] for key in fold.texts["text_id"]]
            part = replace(embeddings, images=embeddings.images[images], texts=embeddings.texts[texts])
            for direction, ranks in rank_task(fold, part, world=world).ranks.items():
                per_query = per_query_metrics(ranks)
                for metric in per_query.names:
                    values[direction].setdefault(metric, []).append(per_query.value(metric, len(ranks)))
        means[name] = {
            direction: {metric: float(np.mean(folds)) for metric, folds in metrics.items()}
            for direction, metrics in values.items()
        }
    return Folds(size, count, means["tuned"], means.get("base"))
