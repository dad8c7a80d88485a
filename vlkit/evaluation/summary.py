"""What eval prints: the tables that people read, and the sentences that say whether to believe them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.config.evaluation import CLASSIFIED
from vlkit.evaluation.comparison import excludes_zero
from vlkit.evaluation.retrieval.retention import retention_sentence
from vlkit.metrics import DIRECTIONS

RETRIEVAL = ("recall@1", "recall@5", "recall@10", "mrr", "median_rank")
SHOWN = {**dict.fromkeys(DIRECTIONS, RETRIEVAL), "classification": CLASSIFIED}
MOST_GAPS = 6


def print_summary(results: dict[str, Any], path: Path) -> None:
    """Everything worth a look before the report."""
    for group, names in SHOWN.items():
        if group in results["metrics"]:
            _table(results, group, names)
    for group, sentence in results["verdict"].items():
        console.print_result(f"{format_direction(group)}: {sentence}")
    for line in (*_one_to_one(results), *_gaps(results), *_shifts(results), *_retention(results)):
        console.print_result(line)
    console.print_result(_cost(results["efficiency"]))
    console.hint(f"all numbers: {path}")


def _table(results: dict[str, Any], group: str, names: tuple[str, ...]) -> None:
    tuned, base = results["metrics"][group], results["baseline"].get(group)
    rows = []
    for metric in names:
        row = [metric_label(metric)]
        if base:
            row.append(format_with_interval(metric, base[metric], results["baseline_intervals"][group][metric]))
        row.append(format_with_interval(metric, tuned[metric], results["intervals"][group][metric]))
        if base:
            change = results["difference"][group][metric]
            row.append(format_with_interval(metric, change["value"], (change["low"], change["high"]), sign="+"))
        rows.append(row)
    console.print_table(_title(group, tuned), ("", "untouched", "tuned", "difference") if base else ("", "value"), rows)


def _title(group: str, tuned: dict[str, Any]) -> str:
    if group == "classification":
        of = tuned["choices_of_10"]
        few = f"; top1 of 10: of {of} here, by luck {1 / of:.2f}" if 0 < of < 10 else ""
        return f"classes by their names: {tuned['pictures']} pictures, {tuned['classes']} classes{few}"
    return f"{format_direction(group)}: {tuned['queries']} queries, {tuned['gallery']} in the gallery"


def _one_to_one(results: dict[str, Any]) -> list[str]:
    """Where scoring one-to-one would say something else."""
    found, lines = results["one_to_one"], []
    for direction, of in found["metrics"].items():
        ours, theirs = results["metrics"][direction]["recall@1"], of["recall@1"]
        if abs(ours - theirs) >= 0.01:
            ceiling = found["ceiling"][direction]
            told = f"{format_direction(direction)}: one-to-one scoring would say recall@1 {theirs:.3f}, not {ours:.3f}"
            drawn = "" if found["rows"] == found["of"] else f", on {found['rows']} rows drawn of {found['of']}"
            lines.append(told + drawn + (f" (it cannot pass {ceiling:.3f})" if ceiling < 1 else ""))
    return lines


def _gaps(results: dict[str, Any]) -> list[str]:
    """The slices that lie below the rest for sure, the widest gap first."""
    found = []
    for name, labels in results["slices"].items():
        for which, directions in labels.items():
            for direction, of in directions.items():
                gap = of["gap"]
                if gap and excludes_zero(gap) and gap["value"] < 0:
                    told = format_with_interval("recall@1", gap["value"], (gap["low"], gap["high"]), sign="+")
                    line = f"weaker, {format_direction(direction)}: {name} {which}: recall@1 {told} against the rest"
                    found.append((gap["value"], f"{line} ({of['queries']} queries)"))
    return [line for _, line in sorted(found)[:MOST_GAPS]]


def _shifts(results: dict[str, Any]) -> list[str]:
    lines = []
    for shift, found in results["shifts"].items():
        for direction in DIRECTIONS:
            of = found[direction]
            told = f"{format_direction(direction)} under {shift} ({found['stated']}): recall@1 {of['recall@1']:.3f}"
            change = of["change"]
            told += f", {format_with_interval('recall@1', change['value'], (change['low'], change['high']), sign='+')}"
            if "baseline" in of:
                told += f"; untouched {of['baseline']:.3f}, {of['baseline_change']['value']:+.3f}"
            lines.append(told)
    return lines


def _retention(results: dict[str, Any]) -> list[str]:
    found = results["retention"]
    if not found:
        return []
    lines = [f"guard, {format_direction(group)}: {sentence}" for group, sentence in found["verdict"].items()]
    if found["retained"] is not None:
        lines.append(retention_sentence(found["retained"], "the guard set"))
    return lines


def _cost(of: dict[str, Any]) -> str:
    speeds = f"{of['images_per_second']:,.0f} pictures/s, {of['texts_per_second']:,.0f} texts/s"
    latency = f"a query's text encoded in {of['latency_ms']:.1f} ms (95 of 100 below {of['latency_ms_p95']:.1f})"
    gpu = "" if of["peak_memory_gpu_gb"] is None else f", {of['peak_memory_gpu_gb']:.2f} GB on the GPU"
    return f"{speeds}, {latency}, {of['peak_memory_process_gb']:.2f} GB{gpu}"


def format_direction(group: str) -> str:
    """text_to_image -> text -> image."""
    return group.replace("_to_", " -> ")


def metric_label(metric: str) -> str:
    """A metric's name for people."""
    return metric.replace("_", " ")


def format_metric(metric: str, value: float | None, *, sign: str = "") -> str:
    """Ranks with one decimal, shares with three; what is not known as a dash."""
    known = value is not None and value == value
    return f"{value:{sign}.1f}" if known and metric.endswith("rank") else f"{value:{sign}.3f}" if known else "-"


def format_with_interval(
    metric: str, value: float | None, interval: tuple[float, float] | list[float], *, sign: str = ""
) -> str:
    """A number with its interval."""
    low, high = (format_metric(metric, end, sign=sign) for end in interval)
    return f"{format_metric(metric, value, sign=sign)} [{low}, {high}]"
