"""Where a model is weak: its recall on a part of the queries against the rest, each gap with an interval.

A text's slices are about the text, a picture's about the picture; classes and the source's columns are about both.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from vlkit import console
from vlkit.config.evaluation import RARE
from vlkit.data.pairs import RESERVED_COLUMNS, Pairs
from vlkit.errors import UsageError, suggest_name
from vlkit.evaluation.comparison import difference
from vlkit.evaluation.retrieval.classification import Classes, classes_by_id
from vlkit.evaluation.retrieval.ranking import per_query_metrics
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalScores, RetrievalTask
from vlkit.evaluation.statistics import gap, interval, permutation_test, resample
from vlkit.metrics import DIRECTIONS

# Of 255: what is darker on the whole was taken in low light.
LOW_LIGHT = 64.0
SHORT, LONG = 5, 15
# Fewer units say nothing of a gap.
FEW = 5
MOST_VALUES = 12
USUAL = ("words", "script", "light", "shorter side", "class size")
SEVERAL, OTHER = "(several)", "(other)"
METRIC = "recall@1"


@dataclass(frozen=True)
class Slicing:
    """One way of cutting the queries of a direction.

    Attributes:
        of: the slice of each text or picture of the task; None: in none.
    """

    name: str
    direction: str
    of: Sequence[str | None]


def make_slicings(
    task: RetrievalTask, embedded: Embeddings, pairs: Pairs, classes: Classes | None, size: int, columns: Sequence[str]
) -> list[Slicing]:
    """Every way that cuts these queries into two slices at least.

    Args:
        pairs: all splits, for what training has.
        size: pixels of a side as the model sees it.
        columns: of the table (--slice-by).

    Raises:
        UsageError: no such column.
    """
    found = [
        Slicing("words", "text_to_image", [_words(text) for text in task.texts["text"]]),
        Slicing("script", "text_to_image", [script(text) for text in task.texts["text"]]),
        Slicing("light", "image_to_text", [_light(value) for value in embedded.brightness]),
    ]
    if {"width", "height"} <= set(task.images):
        sides = task.images[["width", "height"]].astype(float).min(axis=1)
        labels = [None if np.isnan(s) else f"below {size} pixels" if s < size else f"{size} and more" for s in sides]
        found.append(Slicing("shorter side", "image_to_text", labels))
    if classes is not None:
        counts = dict(zip(classes.names, classes.training.tolist(), strict=True))
        found += _by_key(task, "class size", lambda kind: _class_sizes(task, kind, counts))
    for column in columns:
        if column not in task.pairs.frame and column in USUAL:
            continue  # It is among them anyway.
        if column not in task.pairs.frame:
            named = [str(name) for name in task.pairs.frame.columns if name not in RESERVED_COLUMNS]
            raise UsageError(f"--slice-by {column}: the table has no such column", hint=suggest_name(column, named))
        cut = _cut(task.pairs.frame[column], column)
        name = f"{column} (column)" if column in USUAL else column
        found += _by_key(task, name, lambda kind, cut=cut: _one_value(task.pairs.frame[f"{kind}_id"], cut))  # type: ignore[misc]
        if cut.nunique() == 1 or (not cut.notna().any() and not task.pairs.frame[column].notna().any()):
            console.warn(f"--slice-by {column}: these rows have no two values of it, so there is nothing to compare")
    return [each for each in found if _several(each)]


def _several(each: Slicing) -> bool:
    return len({label for label in each.of if label is not None}) > 1


def _by_key(task: RetrievalTask, name: str, of: Callable[[str], dict[str, str | None]]) -> list[Slicing]:
    """A slicing for each direction, by the ids of texts and of pictures."""
    texts, pictures = of("text"), of("image")
    return [
        Slicing(name, "text_to_image", [texts.get(key) for key in task.texts["text_id"]]),
        Slicing(name, "image_to_text", [pictures.get(key) for key in task.images["image_id"]]),
    ]


def _words(text: str) -> str:
    count = len(text.split())
    few, many = f"up to {SHORT}", f"more than {LONG}"
    return few if count <= SHORT else many if count > LONG else f"{SHORT + 1} to {LONG}"


def script(text: str) -> str | None:
    """The writing system of most of a text's letters: Latin, Arabic, Cyrillic, Han, ...; None without letters."""
    names = (unicodedata.name(letter, "").split(" ")[0].split("-")[0] for letter in text if letter.isalpha())
    counts = Counter("Han" if name == "CJK" else name.capitalize() for name in names if name)
    return counts.most_common(1)[0][0] if counts else None


def _light(value: float) -> str | None:
    return None if np.isnan(value) else "low light" if value < LOW_LIGHT else "normal"


def _class_sizes(task: RetrievalTask, kind: str, counts: dict[str, int]) -> dict[str, str | None]:
    """id -> rare or common, by the rarest of its classes."""
    found = {}
    for key, names in classes_by_id(task.pairs.frame, kind, counts).items():
        least = min((counts[name] for name in names if name in counts), default=None)
        rare = f"rare (below {RARE} training pictures)"
        found[key] = None if least is None else rare if least < RARE else "common"
    return found


def _cut(column: pd.Series[Any], name: str) -> pd.Series[Any]:
    """A column's values as names of slices: quarters of many numbers or dates, else the commonest values.

    Raises:
        UsageError: a cell holds several values.
    """
    if any(isinstance(value, list | dict | np.ndarray) for value in column):
        told = f"--slice-by {name}: its cells hold several values each"
        raise UsageError(told, hint="name a column of single values")
    dates = pd.api.types.is_datetime64_any_dtype(column)
    numbers = column if dates else pd.to_numeric(column, errors="coerce")
    if numbers.notna().sum() == column.notna().sum() and numbers.nunique() > MOST_VALUES:
        quarters = pd.qcut(numbers, 4, labels=False, duplicates="drop")
        ends = numbers.groupby(quarters).agg(["min", "max"])
        named = {of: f"{_number(low)} to {_number(high)}" for of, (low, high) in ends.iterrows()}
        return quarters.map(named).astype(object)
    texts = column.dropna().astype(str)
    many = texts.nunique() > MOST_VALUES
    if many and texts.nunique() > len(texts) / 2:
        console.warn(f"--slice-by {name}: nearly every row has a value of its own: that makes no slices")
        return column.map(lambda value: None)
    kept = set(texts.value_counts().index[: MOST_VALUES - 1] if many else texts)
    return column.map(lambda value: None if pd.isna(value) else str(value) if str(value) in kept else OTHER)


def _number(value: Any) -> str:
    return str(value.date()) if hasattr(value, "date") else f"{value:.10g}"


def _one_value(keys: pd.Series[str], values: pd.Series[Any]) -> dict[str, str | None]:
    """key -> its value; one that stands in rows of several values has none of its own."""
    found: dict[str, str | None] = {}
    for key, value in zip(keys, values, strict=True):
        value = None if value is None or value != value else str(value)
        found[key] = value if found.get(key, value) == value else SEVERAL
    return found


def compare_slices(
    cuts: Sequence[Slicing],
    tuned: RetrievalScores,
    base: RetrievalScores | None,
    task: RetrievalTask,
    *,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """slicing -> slice -> direction -> recall@1 with its interval, the gap to the rest, and the same of the base.

    A gap is {"value", "low", "high"}: the slice less the rest; None where either side has fewer than FEW units.
    """
    found: dict[str, Any] = {}
    for direction in DIRECTIONS:
        asked = tuned.ranks[direction].query
        units = task.queries(direction)["unit"].to_numpy()[asked]
        hits = {"tuned": per_query_metrics(tuned.ranks[direction]).means[METRIC]}
        if base is not None:
            hits["base"] = per_query_metrics(base.ranks[direction]).means[METRIC]
        sides: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for cut in (each for each in cuts if each.direction == direction):
            labels = np.array([cut.of[query] for query in asked], dtype=object)
            cuttable = np.array([label is not None for label in labels])
            for label in sorted(set(labels[cuttable])):
                sides[cut.name, label] = {"in": labels == label, "rest": (labels != label) & cuttable}
        values = {
            (place, who, side): np.where(mask, of, np.nan)
            for place, masks in sides.items()
            for side, mask in masks.items()
            for who, of in hits.items()
        }
        drawn = resample(values, {}, units, draws=draws, seed=seed)
        for (name, label), masks in sides.items():
            own = {key[1:]: (values[key], drawn[key]) for key in values if key[0] == (name, label)}
            counts = {side: len(set(units[mask])) for side, mask in masks.items()}
            cell = {"queries": int(masks["in"].sum()), "units": counts["in"], **_cell(own, counts, units, seed)}
            found.setdefault(name, {}).setdefault(label, {})[direction] = cell
    return found


def _cell(
    own: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]], counts: dict[str, int], units: np.ndarray, seed: int
) -> dict[str, Any]:
    """One slice: of each model and side, "in" or "rest", the values a query and the mean in every draw."""
    means = {key: float(np.nanmean(values)) for key, (values, _) in own.items() if not np.isnan(values).all()}
    cell: dict[str, Any] = {"gap": None}
    for who, value, around in (("tuned", METRIC, "interval"), ("base", "baseline", "baseline_interval")):
        if (who, "in") in means:
            cell[value] = means[who, "in"]
            cell[around] = interval(own[who, "in"][1], units=counts["in"], bounds=(0, 1))
    if min(counts.values()) >= FEW:
        outside = interval(own["tuned", "rest"][1], units=counts["rest"], bounds=(0, 1))
        cell["gap"] = gap(means["tuned", "in"], cell["interval"], means["tuned", "rest"], outside)
    if ("base", "in") in means:
        (now, drawn), (before, drawn_before) = own["tuned", "in"], own["base", "in"]
        between = drawn - drawn_before
        by_luck = permutation_test(now, before, units.tolist(), draws=len(drawn), seed=seed).p_value
        apart = means["tuned", "in"] - means["base", "in"]
        cell["difference"] = difference(apart, between, by_luck, units=counts["in"], bounds=(-1, 1))
    return cell
