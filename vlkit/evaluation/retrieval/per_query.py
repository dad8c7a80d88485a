"""Every query of an evaluation with its rank: for the report, for comparing runs, for inspection.

`queries.parquet` has a row a query; `examples_top5.json` shows a seeded handful of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlkit.data.splits import hash_order
from vlkit.evaluation.retrieval.ranking import KS, metric_values
from vlkit.evaluation.retrieval.task import RetrievalScores, RetrievalTask
from vlkit.metrics import DIRECTIONS
from vlkit.storage import atomic_file

EXAMPLES = 20


def query_table(tuned: RetrievalScores, base: RetrievalScores | None, task: RetrievalTask) -> pd.DataFrame:
    """Return a row a query, both directions: direction, query_id, shown, unit, class_name; then each model's columns.

    These are rank, mrr, recall@k, top5 and top5_hits; those of the untouched model begin with baseline_.
    `shown` is the text, or the image's path as the pairs table has it; top5 are ids, the first ranked first.
    """
    return pd.concat([_direction_table(direction, tuned, base, task) for direction in DIRECTIONS], ignore_index=True)


def _direction_table(
    direction: str, tuned: RetrievalScores, base: RetrievalScores | None, task: RetrievalTask
) -> pd.DataFrame:
    kind, item_kind = ("text", "image") if direction == "text_to_image" else ("image", "text")
    queries = task.queries(direction).iloc[tuned.ranks[direction].query]
    items = task.images if item_kind == "image" else task.texts
    groups = dict(zip(("image", "text"), task.groups(), strict=True))
    query_groups = [groups[kind][query] for query in tuned.ranks[direction].query]
    ids = items[f"{item_kind}_id"].to_numpy()
    columns: dict[str, Any] = {
        "direction": direction,
        "query_id": queries[f"{kind}_id"].to_numpy(),
        "shown": queries[kind].to_numpy(),
        "unit": queries["unit"].to_numpy(),
        "class_name": queries["class_name"].to_numpy(),
    }
    for prefix, scores in (("", tuned), ("baseline_", base)):
        if scores is None:
            continue
        ranks = scores.ranks[direction]
        values = metric_values(ranks)
        columns |= {f"{prefix}rank": values["mean_rank"], f"{prefix}mrr": values["mrr"]}
        columns |= {f"{prefix}recall@{k}": values[f"recall@{k}"] for k in KS}
        columns[f"{prefix}top5"] = [ids[top].tolist() for top in ranks.top]
        columns[f"{prefix}top5_hits"] = [
            [bool(groups[item_kind][item] & own) for item in top]
            for top, own in zip(ranks.top, query_groups, strict=True)
        ]
    return pd.DataFrame(columns)


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write queries.parquet, whole or not at all."""
    with atomic_file(path) as temporary:
        frame.to_parquet(temporary, index=False)


def example_queries(frame: pd.DataFrame, task: RetrievalTask, seed: int) -> dict[str, Any]:
    """Return a seeded handful of queries a direction, with the five items that each model ranks first."""
    shown = {
        "image": dict(zip(task.images["image_id"], task.images["image"], strict=True)),
        "text": dict(zip(task.texts["text_id"], task.texts["text"], strict=True)),
    }
    examples: dict[str, Any] = {}
    for direction, rows in frame.groupby("direction", sort=False):
        kind, item_kind = ("text", "image") if direction == "text_to_image" else ("image", "text")
        keys = [hash_order(seed, f"{direction}:{index}") for index in range(len(rows))]
        order = sorted(range(len(rows)), key=keys.__getitem__)
        examples[str(direction)] = [
            _example(rows.iloc[index], kind, item_kind, shown[item_kind]) for index in order[:EXAMPLES]
        ]
    return examples


def _example(row: pd.Series[Any], kind: str, item_kind: str, shown: dict[str, str]) -> dict[str, Any]:
    example = {f"{kind}_id": row["query_id"], kind: row["shown"]}
    for prefix in ("", "baseline_"):
        if f"{prefix}rank" in row:
            example[f"{prefix}rank"] = float(row[f"{prefix}rank"])
            example[f"{prefix}top5"] = [
                {f"{item_kind}_id": item, item_kind: shown[item], "hit": bool(hit)}
                for item, hit in zip(row[f"{prefix}top5"], row[f"{prefix}top5_hits"], strict=True)
            ]
    return example


def recall_curve(scores: RetrievalScores, direction: str) -> dict[str, Sequence[float]]:
    """Return recall at every k worth drawing: {"k": [...], "recall": [...]}, up to the gallery."""
    ranks = scores.ranks[direction]
    steps = np.unique(np.round(np.geomspace(1, max(1, min(1000, ranks.gallery)), 25)).astype(int))
    return {"k": steps.tolist(), "recall": [float(ranks.recall(int(k)).mean()) for k in steps]}


def rank_histogram(scores: RetrievalScores, direction: str) -> dict[str, Sequence[float]]:
    """Count queries by the rank of their first right item: {"from": [...], "to": [...], "queries": [...]}.

    The bins double in width. Where scores tie, a query is shared among the ranks that it may have.
    """
    ranks = scores.ranks[direction]
    edges = [1]
    while edges[-1] <= ranks.gallery:
        edges.append(edges[-1] * 2)
    reached = [0.0, *(float(ranks.recall(edge - 1).sum()) for edge in edges[1:])]
    counts = [round(more - less, 6) for less, more in pairwise(reached)]
    return {"from": edges[:-1], "to": [edge - 1 for edge in edges[1:]], "queries": counts}
