"""Where a model is weak: its recall on a part of the queries against the rest, each gap with an interval.

A text's slices are about the text, an image's about the image; classes and columns of the table are about both.
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
from vlkit.evaluation.comparison import difference_from_draws
from vlkit.evaluation.results import Difference, Slice
from vlkit.evaluation.retrieval.classification import Classes, classes_by_id
from vlkit.evaluation.retrieval.ranking import per_query_metrics
from vlkit.evaluation.retrieval.task import Embeddings, RetrievalScores, RetrievalTask
from vlkit.evaluation.statistics import interval, newcombe_interval, permutation_test, resample
from vlkit.metrics import DIRECTIONS, HEADLINES, METRICS

RECALL = METRICS[HEADLINES["retrieval"]]
# Of 255: a darker image on the whole was taken in low light.
LOW_LIGHT = 64.0
SHORT_TEXT, LONG_TEXT = 5, 15
# No gap is computed of fewer units.
LEAST_UNITS = 5
MOST_VALUES = 12
USUAL = ("words", "script", "light", "shorter side", "class size")
SEVERAL, OTHER = "(several)", "(other)"

# The queries of a slice, or the rest of them, and its model -> recall of each query, and its mean in every draw.
Side = tuple[str, str]
Recalls = dict[Side, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Slicing:
    """One way of dividing the queries of a direction.

    Attributes:
        labels: the slice of each text or image of the task; None: in none.
    """

    name: str
    direction: str
    labels: Sequence[str | None]

    @property
    def divides(self) -> bool:
        """Whether there are two slices at least."""
        return len({label for label in self.labels if label is not None}) > 1


def make_slicings(
    task: RetrievalTask,
    embeddings: Embeddings,
    pairs: Pairs,
    classes: Classes | None,
    size: int,
    columns: Sequence[str],
) -> list[Slicing]:
    """Return every way that divides these queries into two slices at least.

    Args:
        pairs: all splits, to count training images.
        size: pixels of a side as the model sees it.
        columns: of the table (--slice-by).

    Raises:
        UsageError: no such column.
    """
    slicings = [
        Slicing("words", "text_to_image", [_word_count(text) for text in task.texts["text"]]),
        Slicing("script", "text_to_image", [script(text) for text in task.texts["text"]]),
        Slicing("light", "image_to_text", [_light(value) for value in embeddings.brightness]),
    ]
    if {"width", "height"} <= set(task.images):
        sides = task.images[["width", "height"]].astype(float).min(axis=1)
        labels = [
            None if np.isnan(side) else f"below {size} pixels" if side < size else f"{size} and more" for side in sides
        ]
        slicings.append(Slicing("shorter side", "image_to_text", labels))
    if classes is not None:
        counts = dict(zip(classes.names, classes.training.tolist(), strict=True))
        slicings += _slice_by_id(task, "class size", lambda kind: _class_sizes(task, kind, counts))
    for column in columns:
        slicings += _slice_by_column(task, column)
    return [slicing for slicing in slicings if slicing.divides]


def _slice_by_column(task: RetrievalTask, column: str) -> list[Slicing]:
    """Return the slicings of a column of the table, one a direction; none of a usual one that is no column."""
    frame = task.pairs.frame
    if column not in frame:
        if column in USUAL:
            return []
        names = [str(name) for name in frame.columns if name not in RESERVED_COLUMNS]
        raise UsageError(f"--slice-by {column}: the table has no such column", hint=suggest_name(column, names))
    values = _label_values(frame[column], column)
    if values.nunique() == 1 or (not values.notna().any() and not frame[column].notna().any()):
        console.warn(f"--slice-by {column}: these rows have one value only, so nothing to compare")
    name = f"{column} (column)" if column in USUAL else column
    return _slice_by_id(task, name, lambda kind: _one_value_by_id(frame[f"{kind}_id"], values))


def _slice_by_id(task: RetrievalTask, name: str, label: Callable[[str], dict[str, str | None]]) -> list[Slicing]:
    """Return a slicing for each direction, by the ids of texts and of images.

    Args:
        label: "text" or "image" -> id -> slice.
    """
    texts, images = label("text"), label("image")
    return [
        Slicing(name, "text_to_image", [texts.get(key) for key in task.texts["text_id"]]),
        Slicing(name, "image_to_text", [images.get(key) for key in task.images["image_id"]]),
    ]


def _word_count(text: str) -> str:
    count = len(text.split())
    if count <= SHORT_TEXT:
        return f"up to {SHORT_TEXT}"
    return f"more than {LONG_TEXT}" if count > LONG_TEXT else f"{SHORT_TEXT + 1} to {LONG_TEXT}"


def script(text: str) -> str | None:
    """Return the script of most of a text's letters: Latin, Arabic, Cyrillic, Han, ...; None without letters."""
    names = (unicodedata.name(letter, "").split(" ")[0].split("-")[0] for letter in text if letter.isalpha())
    counts = Counter("Han" if name == "CJK" else name.capitalize() for name in names if name)
    return counts.most_common(1)[0][0] if counts else None


def _light(value: float) -> str | None:
    return None if np.isnan(value) else "low light" if value < LOW_LIGHT else "normal"


def _class_sizes(task: RetrievalTask, kind: str, counts: dict[str, int]) -> dict[str, str | None]:
    """Return id -> rare or common, by the rarest of its classes."""
    # A key of results.json, which scripts read.
    rare = f"rare (below {RARE} training pictures)"
    sizes: dict[str, str | None] = {}
    for key, names in classes_by_id(task.pairs.frame, kind, counts).items():
        least = min((counts[name] for name in names if name in counts), default=None)
        sizes[key] = None if least is None else rare if least < RARE else "common"
    return sizes


def _label_values(column: pd.Series[Any], name: str) -> pd.Series[Any]:
    """Return a column's values as names of slices: quarters of many numbers or dates, else the commonest values.

    Raises:
        UsageError: a cell holds several values.
    """
    if any(isinstance(value, list | dict | np.ndarray) for value in column):
        message = f"--slice-by {name}: its cells hold several values each"
        raise UsageError(message, hint="name a column of single values")
    dates = pd.api.types.is_datetime64_any_dtype(column)
    numbers = column if dates else pd.to_numeric(column, errors="coerce")
    if numbers.notna().sum() == column.notna().sum() and numbers.nunique() > MOST_VALUES:
        quarters = pd.qcut(numbers, 4, labels=False, duplicates="drop")
        ends = numbers.groupby(quarters).agg(["min", "max"])
        names = {quarter: f"{_format_end(low)} to {_format_end(high)}" for quarter, (low, high) in ends.iterrows()}
        return quarters.map(names).astype(object)
    texts = column.dropna().astype(str)
    many = texts.nunique() > MOST_VALUES
    if many and texts.nunique() > len(texts) / 2:
        console.warn(f"--slice-by {name}: nearly every row has its own value: there are no slices")
        return column.map(lambda value: None)
    common = set(texts.value_counts().index[: MOST_VALUES - 1] if many else texts)
    return column.map(lambda value: None if pd.isna(value) else str(value) if str(value) in common else OTHER)


def _format_end(value: Any) -> str:
    return str(value.date()) if hasattr(value, "date") else f"{value:.10g}"


def _one_value_by_id(keys: pd.Series[str], values: pd.Series[Any]) -> dict[str, str | None]:
    """Return id -> its value; an id whose rows have several values gets SEVERAL."""
    labels: dict[str, str | None] = {}
    for key, value in zip(keys, values, strict=True):
        label = None if value is None or value != value else str(value)
        labels[key] = label if labels.get(key, label) == label else SEVERAL
    return labels


def compare_slices(
    slicings: Sequence[Slicing],
    tuned: RetrievalScores,
    base: RetrievalScores | None,
    task: RetrievalTask,
    *,
    draws: int,
    seed: int,
) -> dict[str, dict[str, dict[str, Slice]]]:
    """Return slicing -> slice -> direction -> recall with its interval, the gap to the rest, and the base's recall.

    The gap is the slice less the rest; None where either side has fewer than LEAST_UNITS units.
    """
    slices: dict[str, dict[str, dict[str, Slice]]] = {}
    for direction in DIRECTIONS:
        queries = tuned.ranks[direction].query
        units = task.queries(direction)["unit"].to_numpy()[queries]
        recalls = {"tuned": per_query_metrics(tuned.ranks[direction]).means[RECALL.name]}
        if base is not None:
            recalls["base"] = per_query_metrics(base.ranks[direction]).means[RECALL.name]
        masks = _side_masks([slicing for slicing in slicings if slicing.direction == direction], queries)
        values = {
            (part, model, side): np.where(mask, recall, np.nan)
            for part, sides in masks.items()
            for side, mask in sides.items()
            for model, recall in recalls.items()
        }
        drawn = resample(values, {}, units, draws=draws, seed=seed)
        for (name, label), sides in masks.items():
            own = {key[1:]: (values[key], drawn[key]) for key in values if key[0] == (name, label)}
            counts = {side: len(set(units[mask])) for side, mask in sides.items()}
            measured = _measure_slice(own, int(sides["in"].sum()), counts, units, seed)
            slices.setdefault(name, {}).setdefault(label, {})[direction] = measured
    return slices


def _side_masks(slicings: Sequence[Slicing], queries: np.ndarray) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Return (slicing, slice) -> "in" and "rest" -> bool [queries]; queries without a label are in neither."""
    masks: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for slicing in slicings:
        labels = np.array([slicing.labels[query] for query in queries], dtype=object)
        has_label = np.array([label is not None for label in labels])
        for label in sorted(set(labels[has_label])):
            masks[slicing.name, label] = {"in": labels == label, "rest": (labels != label) & has_label}
    return masks


def _measure_slice(own: Recalls, queries: int, counts: dict[str, int], units: np.ndarray, seed: int) -> Slice:
    """Measure one slice.

    Args:
        own: of each model and side, "in" or "rest".
        counts: units of each side.
    """
    means = {key: float(np.nanmean(values)) for key, (values, _) in own.items() if not np.isnan(values).all()}
    recall = means["tuned", "in"]
    around = interval(own["tuned", "in"][1], units=counts["in"], bounds=RECALL.bounds)
    gap = None
    if min(counts.values()) >= LEAST_UNITS:
        rest = means["tuned", "rest"]
        rest_interval = interval(own["tuned", "rest"][1], units=counts["rest"], bounds=RECALL.bounds)
        gap = Difference(recall - rest, *newcombe_interval(recall, around, rest, rest_interval))
    if ("base", "in") not in means:
        return Slice(queries, counts["in"], gap, recall, around)
    (values, drawn), (base_values, base_drawn) = own["tuned", "in"], own["base", "in"]
    p = permutation_test(values, base_values, units.tolist(), draws=len(drawn), seed=seed).p_value
    return Slice(
        queries,
        counts["in"],
        gap,
        recall,
        around,
        baseline=means["base", "in"],
        baseline_interval=interval(base_drawn, units=counts["in"], bounds=RECALL.bounds),
        difference=difference_from_draws(
            recall - means["base", "in"], drawn - base_drawn, p, units=counts["in"], bounds=RECALL.difference_bounds
        ),
    )
