"""Scores as others define them, beside ours: one-to-one, and averaged over folds. The gap is why they are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlkit import console
from vlkit.config.evaluation import EvalConfig
from vlkit.distributed import World
from vlkit.evaluation.retrieval.ranking import per_query_metrics, rank_both
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalTask, rank_task
from vlkit.metrics import DIRECTIONS

# A row is contrasted with all others, however often its text stands there: of more rows than this some are drawn.
MOST_ROWS = 5000
FOLD, LEAST_FOLDS = 1000, 2


def one_to_one_metrics(
    task: RetrievalTask, models: Mapping[str, Embeddings], config: EvalConfig, world: World
) -> dict[str, Any]:
    """The numbers that come out where only a row's own partner counts, as scripts with `labels = arange(n)` have it.

    A text that stands in several rows finds the picture of one of them at best, and a picture cannot tell the copies of
    a text apart: recall@1 of the best of models could not pass `ceiling`, K / N for K different texts in N rows of as
    many pictures.
    """
    frame = task.pairs.frame
    if len(frame) > MOST_ROWS:
        frame = frame.sample(MOST_ROWS, random_state=config.seed).sort_index()
    image_at = {key: place for place, key in enumerate(task.images["image_id"])}
    text_at = {key: place for place, key in enumerate(task.texts["text_id"])}
    images = [image_at[key] for key in frame["image_id"]]
    texts = [text_at[key] for key in frame["text_id"]]
    rows = [str(number) for number in range(len(frame))]
    found: dict[str, Any] = {"rows": len(frame), "of": len(task.pairs), "ceiling": {}}
    for direction, own, other in zip(DIRECTIONS, (texts, images), (images, texts), strict=True):
        found["ceiling"][direction] = _ceiling(own, other)
    for who, embedded in models.items():
        sides = embedded.texts[texts], embedded.images[images]
        both = rank_both(*sides, rows, rows, keep=0, world=world)
        for direction, ranks in zip(DIRECTIONS, both, strict=True):
            of = per_query_metrics(ranks)
            values = {metric: of.value(metric, len(ranks)) for metric in ("recall@1", "recall@5", "recall@10", "mrr")}
            found.setdefault("metrics" if who == "tuned" else "baseline", {})[direction] = values
    return found


def _ceiling(own: Sequence[int], other: Sequence[int]) -> float:
    """Best recall@1 of queries `own`, row by row, that rank one item, with all its copies, first."""
    copies, best = Counter(other), dict[int, float]()
    for (query, item), rows in Counter(zip(own, other, strict=True)).items():
        best[query] = max(best.get(query, 0.0), rows / copies[item])
    return sum(best.values()) / len(own)


def choose_fold_size(task: RetrievalTask, asked: int | None) -> int:
    """Pictures a fold; 0: none. By default COCO's 1000, where there are two folds of pictures of several captions."""
    if asked is not None:
        return asked
    several = len(task.texts) >= 2 * len(task.images)
    return FOLD if several and len(task.images) >= LEAST_FOLDS * FOLD else 0


def fold_metrics(task: RetrievalTask, models: Mapping[str, Embeddings], size: int, world: World) -> dict[str, Any]:
    """Means over folds of `size` pictures, in the table's order, each with the texts of its rows; a rest is left out.

    With COCO's 5000 test pictures these are the published 1k numbers; the whole is the 5k set.
    """
    count = len(task.images) // size if size else 0
    if size and not count:
        console.warn(f"--fold-size {size}: there are only {len(task.images)} pictures, so there are no folds")
    if not count:
        return {}
    text_at = {key: place for place, key in enumerate(task.texts["text_id"])}
    found: dict[str, Any] = {"size": size, "folds": count}
    for who, embedded in models.items():
        sums: dict[str, dict[str, list[float]]] = {direction: {} for direction in DIRECTIONS}
        for number in range(count):
            chosen = np.arange(number * size, (number + 1) * size)
            part = task.for_images(chosen)
            texts = [text_at[key] for key in part.texts["text_id"]]
            of_fold = replace(embedded, images=embedded.images[chosen], texts=embedded.texts[texts])
            for direction, ranks in rank_task(part, of_fold, world=world).ranks.items():
                measured = per_query_metrics(ranks)
                for metric in measured.names:
                    sums[direction].setdefault(metric, []).append(measured.value(metric, len(ranks)))
        means = {d: {metric: float(np.mean(v)) for metric, v in of.items()} for d, of in sums.items()}
        found["metrics" if who == "tuned" else "baseline"] = means
    return found
