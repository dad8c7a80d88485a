"""Every query of an evaluation, with where its answer stood: for the report, for comparing runs, for a look by hand.

`queries.parquet` has a row a query; `examples_top5.json` shows a seeded handful of them.
"""

from __future__ import annotations

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
    """A row a query, both directions: direction, query_id, shown, unit, class_name; then what each model made of it.

    That is rank, mrr, recall@k, top5 and top5_hits, of the untouched model behind baseline_.
    `shown` is the text, or the picture's path as the pairs table has it; top5 are ids, the first ranked first.
    """
    return pd.concat([_of_direction(direction, tuned, base, task) for direction in DIRECTIONS], ignore_index=True)


def _of_direction(
    direction: str, tuned: RetrievalScores, base: RetrievalScores | None, task: RetrievalTask
) -> pd.DataFrame:
    kind, item_kind = ("text", "image") if direction == "text_to_image" else ("image", "text")
    asked = task.queries(direction).iloc[tuned.ranks[direction].query]
    items = task.images if item_kind == "image" else task.texts
    groups = dict(zip(("image", "text"), task.groups(), strict=True))
    of_query = [groups[kind][query] for query in tuned.ranks[direction].query]
    ids = items[f"{item_kind}_id"].to_numpy()
    columns: dict[str, Any] = {
        "direction": direction,
        "query_id": asked[f"{kind}_id"].to_numpy(),
        "shown": asked[kind].to_numpy(),
        "unit": asked["unit"].to_numpy(),
        "class_name": asked["class_name"].to_numpy(),
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
            [bool(groups[item_kind][item] & own) for item in top] for top, own in zip(ranks.top, of_query, strict=True)
        ]
    return pd.DataFrame(columns)


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write queries.parquet, whole or not at all."""
    with atomic_file(path) as aside:
        frame.to_parquet(aside, index=False)


def example_queries(frame: pd.DataFrame, task: RetrievalTask, seed: int) -> dict[str, Any]:
    """A seeded handful of queries a direction, with the five items that either model ranks first."""
    shown = {
        "image": dict(zip(task.images["image_id"], task.images["image"], strict=True)),
        "text": dict(zip(task.texts["text_id"], task.texts["text"], strict=True)),
    }
    found: dict[str, Any] = {}
    for direction, rows in frame.groupby("direction", sort=False):
        kind, item_kind = ("text", "image") if direction == "text_to_image" else ("image", "text")
        places = sorted(range(len(rows)), key=lambda place: hash_order(seed, f"{direction}:{place}"))[:EXAMPLES]
        found[str(direction)] = [_example(rows.iloc[place], kind, item_kind, shown[item_kind]) for place in places]
    return found


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


def recall_curve(scores: RetrievalScores, direction: str) -> dict[str, list[float]]:
    """Recall at every k worth drawing: {"k": [...], "recall": [...]}, up to the gallery."""
    ranks = scores.ranks[direction]
    steps = np.unique(np.round(np.geomspace(1, max(1, min(1000, ranks.gallery)), 25)).astype(int))
    return {"k": steps.tolist(), "recall": [float(ranks.recall(int(k)).mean()) for k in steps]}


def rank_histogram(scores: RetrievalScores, direction: str) -> dict[str, list[float]]:
    """How many queries have their first right item where: {"from": [...], "to": [...], "queries": [...]}.

    The bins double in width. Where scores tie, a query has its share in every place that it may come to.
    """
    ranks = scores.ranks[direction]
    edges = [1]
    while edges[-1] <= ranks.gallery:
        edges.append(edges[-1] * 2)
    reached = [0.0, *(float(ranks.recall(edge - 1).sum()) for edge in edges[1:])]
    counts = [round(more - less, 6) for less, more in pairwise(reached)]
    return {"from": edges[:-1], "to": [edge - 1 for edge in edges[1:]], "queries": counts}
