"""Every number that eval reports, written once: its name, task, range, direction, digits, and where it is shown.

A new metric takes the line that computes it and one entry here. This module imports nothing of vlkit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["retrieval", "classification", "captioning"]
# Where a metric is shown beside results.json: the tables of eval, the model card, `report --against`.
View = Literal["summary", "card", "comparison"]

DIRECTIONS = ("text_to_image", "image_to_text")
# The groups of results.json.
GROUPS: dict[str, Task] = {
    **dict.fromkeys(DIRECTIONS, "retrieval"),
    "classification": "classification",
    "captions": "captioning",
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that eval reports. The order of declaration is the order of display.

    Attributes:
        name: the key in results.json and in --fail-under.
        title: in tables; by default the name with spaces.
        low, high: what it lies between; high None: unbounded.
        higher_is_better: what "better" means in a verdict; only such a metric can be demanded by --fail-under.
        is_share: a mean of shares, one a query: its interval is cut at 0 and 1, and widened where resampling
            shows no spread (see `statistics.interval`).
        centre_draws: its bootstrap draws lie beside its value, because draws of few images a class miss some classes
            and repeat others; they are moved back to it.
        digits: after the point.
        shown: where it is shown.
        headline: the one metric of its task that verdicts, slices and model selection are about.
    """

    name: str
    task: Task
    title: str = ""
    low: float = 0.0
    high: float | None = 1.0
    higher_is_better: bool = True
    is_share: bool = True
    centre_draws: bool = False
    digits: int = 3
    shown: tuple[View, ...] = ()
    headline: bool = False

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The ends of its intervals; None: it is no share."""
        return (0.0, 1.0) if self.is_share else None

    @property
    def difference_bounds(self) -> tuple[float, float] | None:
        """The ends of the intervals of its differences; None: it is no share."""
        return (-1.0, 1.0) if self.is_share else None


EVERYWHERE: tuple[View, ...] = ("summary", "card", "comparison")
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="recall@1", task="retrieval", shown=EVERYWHERE, headline=True),
        Metric(name="recall@5", task="retrieval", shown=EVERYWHERE),
        Metric(name="recall@10", task="retrieval", shown=EVERYWHERE),
        Metric(name="mrr", task="retrieval", shown=EVERYWHERE),
        Metric(
            name="median_rank",
            task="retrieval",
            low=1.0,
            high=None,
            higher_is_better=False,
            is_share=False,
            digits=1,
            shown=("summary",),
        ),
        Metric(
            name="mean_rank", task="retrieval", low=1.0, high=None, higher_is_better=False, is_share=False, digits=1
        ),
        Metric(name="map", task="retrieval"),
        Metric(name="fraction_recall@1", task="retrieval"),
        Metric(name="fraction_recall@5", task="retrieval"),
        Metric(name="fraction_recall@10", task="retrieval"),
        Metric(name="accuracy", task="classification", shown=("summary", "card"), headline=True),
        Metric(name="top1_of_10", task="classification", shown=("summary", "card")),
        Metric(name="precision_macro", task="classification", centre_draws=True, shown=("summary",)),
        Metric(name="recall_macro", task="classification", centre_draws=True, shown=("summary",)),
        Metric(name="f1_macro", task="classification", centre_draws=True, shown=("summary", "card")),
        Metric(name="average_precision_macro", task="classification", centre_draws=True, shown=("summary",)),
        Metric(name="bleu_1", task="captioning", title="BLEU-1", is_share=False, shown=("summary",)),
        Metric(name="bleu_2", task="captioning", title="BLEU-2", is_share=False, shown=("summary",)),
        Metric(name="bleu_3", task="captioning", title="BLEU-3", is_share=False, shown=("summary",)),
        Metric(name="bleu_4", task="captioning", title="BLEU-4", is_share=False, shown=("summary", "comparison")),
        Metric(name="rouge_l", task="captioning", title="ROUGE_L", is_share=False, shown=("summary", "comparison")),
        Metric(
            name="cider",
            task="captioning",
            title="CIDEr",
            high=10.0,
            is_share=False,
            shown=("summary", "comparison"),
            headline=True,
        ),
        Metric(name="exact", task="captioning", title="word for word", shown=("summary", "comparison")),
        Metric(name="clipscore", task="captioning", title="CLIPScore", high=2.5, is_share=False, shown=("summary",)),
        Metric(
            name="refclipscore", task="captioning", title="RefCLIPScore", high=2.5, is_share=False, shown=("summary",)
        ),
    )
}
# Model selection goes by these, the sum over both directions: the first decides, the second breaks ties.
SELECTION = ("recall@1", "mrr")
HEADLINES: dict[Task, str] = {metric.task: name for name, metric in METRICS.items() if metric.headline}


def metric_names(group: str, view: View | None = None) -> tuple[str, ...]:
    """Return the metrics of a group of results.json, in order of display; with a view, those shown in it."""
    return tuple(
        name
        for name, metric in METRICS.items()
        if metric.task == GROUPS[group] and (view is None or view in metric.shown)
    )


def demandable_names(group: str) -> tuple[str, ...]:
    """Return the metrics of a group that --fail-under takes."""
    return tuple(name for name in metric_names(group) if METRICS[name].higher_is_better)


def headline_of(group: str) -> str:
    """Return the metric that a group's verdict is about."""
    return HEADLINES[GROUPS[group]]
