"""Numbers and names as people read them: in tables, model cards and reports."""

from __future__ import annotations

from collections.abc import Sequence

from vlkit.evaluation.results import Difference
from vlkit.metrics import HEADLINES, METRICS

DIGITS = 3


def format_direction(group: str) -> str:
    """Format the name of a group: text_to_image -> text -> image."""
    return group.replace("_to_", " -> ")


def metric_label(metric: str) -> str:
    """Return a metric's name for people."""
    return (METRICS[metric].title if metric in METRICS else "") or metric.replace("_", " ")


def format_metric(metric: str, value: float | None, *, sign: str = "") -> str:
    """Format a value with its metric's digits; an unknown one as a dash."""
    if value is None or value != value:
        return "-"
    digits = METRICS[metric].digits if metric in METRICS else DIGITS
    return f"{value:{sign}.{digits}f}"


def format_with_interval(metric: str, value: float | None, interval: Sequence[float], *, sign: str = "") -> str:
    """Format a value with its interval: 0.512 [0.480, 0.543]."""
    low, high = (format_metric(metric, end, sign=sign) for end in interval)
    return f"{format_metric(metric, value, sign=sign)} [{low}, {high}]"


def format_difference(metric: str, difference: Difference) -> str:
    """Format a difference with its signs and its interval: +0.031 [+0.012, +0.050]."""
    return format_with_interval(metric, difference.value, difference.interval, sign="+")


def format_p(value: float | None) -> str:
    """Format a p-value: three digits, or < 0.001."""
    return "-" if value is None or value != value else "< 0.001" if value < 0.001 else f"{value:.3f}"


def retention_sentence(share: float, guard: str) -> str:
    """Return a sentence about the share of recall that a tuned model retains on a guard set."""
    name = HEADLINES["retrieval"]
    if share > 1:
        return f"the tuned model has {share:.0%} of the untouched model's {name} on {guard}: more than it"
    return f"{share:.0%} of the untouched model's {name} on {guard} are left"
