"""What eval prints: the tables, and the sentences that say whether to believe them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlkit import console
from vlkit.evaluation.formatting import (
    format_difference,
    format_direction,
    format_p,
    format_with_interval,
    metric_label,
    retention_sentence,
)
from vlkit.evaluation.results import Difference, Efficiency, Group, Results
from vlkit.metrics import DIRECTIONS, HEADLINES, metric_names

RECALL = HEADLINES["retrieval"]
MOST_GAPS = 6
# From this difference on, one-to-one scoring is mentioned.
ONE_TO_ONE_DIFFERENCE = 0.01
# Captions' metrics are small: their table has one digit more than the report.
CAPTION_DIGITS = 4


def print_summary(results: Results, path: Path) -> None:
    """Print everything worth a look before the report.

    Args:
        path: of results.json.
    """
    for name, group in results.groups.items():
        _print_group(name, group)
    for name, group in results.groups.items():
        if group.verdict is not None:
            console.print_result(f"{format_direction(name)}: {group.verdict}")
    lines = (*_one_to_one_lines(results), *_gap_lines(results), *_corruption_lines(results))
    for line in (*lines, *_retention_lines(results)):
        console.print_result(line)
    if isinstance(results.efficiency, Efficiency):
        console.print_result(_efficiency_line(results.efficiency))
    console.hint(f"all numbers: {path}")


def _print_group(name: str, group: Group) -> None:
    rows = []
    for metric in metric_names(name, "summary"):
        row = [metric_label(metric)]
        if group.baseline:
            row.append(format_with_interval(metric, group.baseline[metric], group.baseline_intervals[metric]))
        row.append(format_with_interval(metric, group.metrics[metric], group.intervals[metric]))
        if group.baseline:
            row.append(format_difference(metric, group.difference[metric]))
        rows.append(row)
    columns = ("", "untouched", "tuned", "difference") if group.baseline else ("", "value")
    console.print_table(_title(name, group), columns, rows)


def _title(name: str, group: Group) -> str:
    counts = group.metrics
    if name == "classification":
        choices = int(counts["choices_of_10"])
        few = f"; top1 of 10: only {choices} to choose from, chance is {1 / choices:.2f}" if 0 < choices < 10 else ""
        return f"classes by their names: {counts['pictures']} images, {counts['classes']} classes{few}"
    return f"{format_direction(name)}: {counts['queries']} queries, {counts['gallery']} in the gallery"


def _one_to_one_lines(results: Results) -> list[str]:
    """Return a line for each direction where scoring one-to-one would give another number."""
    scores, lines = results.one_to_one, []
    if scores is None:
        return []
    for direction, metrics in scores.metrics.items():
        ours, theirs = results.groups[direction].metrics[RECALL], metrics[RECALL]
        if abs(ours - theirs) >= ONE_TO_ONE_DIFFERENCE:
            ceiling = scores.ceiling[direction]
            line = f"{format_direction(direction)}: one-to-one scoring would say {RECALL} {theirs:.3f}, not {ours:.3f}"
            drawn = "" if scores.rows == scores.total else f", on {scores.rows} rows drawn of {scores.total}"
            lines.append(line + drawn + (f" (it cannot pass {ceiling:.3f})" if ceiling < 1 else ""))
    return lines


def _gap_lines(results: Results) -> list[str]:
    """Return a line for each slice that is certainly below the rest, the widest gap first."""
    lines = []
    for name, labels in results.slices.items():
        for label, directions in labels.items():
            for direction, part in directions.items():
                if part.gap and part.gap.excludes_zero and part.gap.value < 0:
                    gap = f"{RECALL} {format_difference(RECALL, part.gap)} against the rest ({part.queries} queries)"
                    lines.append((part.gap.value, f"weaker, {format_direction(direction)}: {name} {label}: {gap}"))
    return [line for _, line in sorted(lines)[:MOST_GAPS]]


def _corruption_lines(results: Results) -> list[str]:
    lines = []
    for name, corruption in results.shifts.items():
        for direction in DIRECTIONS:
            part = corruption.of_direction(direction)
            line = f"{format_direction(direction)} under {name} ({corruption.stated}): {RECALL} {part.recall:.3f}"
            line += f", {format_difference(RECALL, part.change)}"
            if part.baseline is not None and part.baseline_change is not None:
                line += f"; untouched {part.baseline:.3f}, {part.baseline_change.value:+.3f}"
            lines.append(line)
    return lines


def _retention_lines(results: Results) -> list[str]:
    retention = results.retention
    if retention is None:
        return []
    lines = [
        f"guard, {format_direction(name)}: {group.verdict}" for name, group in retention.groups.items() if group.verdict
    ]
    if retention.retained is not None:
        lines.append(retention_sentence(retention.retained, "the guard set"))
    return lines


def _efficiency_line(cost: Efficiency) -> str:
    speeds = f"{cost.images_per_second:,.0f} images/s, {cost.texts_per_second:,.0f} texts/s"
    latency = f"a query's text encoded in {cost.latency_ms:.1f} ms (95 of 100 below {cost.latency_ms_p95:.1f})"
    gpu = "" if cost.peak_memory_gpu_gb is None else f", {cost.peak_memory_gpu_gb:.2f} GB on the GPU"
    return f"{speeds}, {latency}, {cost.peak_memory_process_gb:.2f} GB{gpu}"


def print_caption_summary(results: Results, title: str, path: Path | None) -> None:
    """Print the table of captions' scores.

    Args:
        path: of results.json, if it was written.
    """
    group = results.groups["captions"]
    rows = []
    for metric in (name for name in metric_names("captions", "summary") if name in group.metrics):
        low, high = group.intervals[metric]
        row = [metric_label(metric), _format(group.metrics[metric]), f"[{_format(low)}, {_format(high)}]"]
        if group.difference:
            row += _difference_cells(group.difference.get(metric))
        rows.append(row)
    beside = (f"more than {results.compared_with}", "95 %", "p") if group.difference else ()
    console.print_table(f"{title}: {group.metrics['images']} images", ("", "value", "95 %", *beside), rows)
    if (reliance := results.image_reliance) is not None:
        shuffled = "-" if reliance.shuffled is None else f"{reliance.shuffled:.3f}"
        line = f"loss {reliance.right:.3f} nats a token; with a shuffled image {shuffled}, with a blank one"
        console.print_result(f"{line} {reliance.blank:.3f}")
    if (spread := results.diversity) is not None:
        words = f"{spread['mean_length']:.1f} words on average, {spread['vocabulary']} different ones"
        console.print_result(f"{spread['distinct_captions']:.1%} of the captions are distinct; {words}")
    if path is not None:
        console.hint(f"all numbers, the worst and the best captions: {path}")


def print_captions(
    images: Sequence[str], captions: Sequence[str], references: Sequence[Sequence[str]], count: int
) -> None:
    """Print a few captions beside what a person wrote."""
    rows = list(zip(images, captions, (texts[0] for texts in references), strict=True))[:count]
    if rows:
        console.print_table("captions", ("image", "caption", "a person"), rows, left=3)


def _format(value: float, sign: str = "") -> str:
    return f"{value:{sign}.{CAPTION_DIGITS}f}"


def _difference_cells(difference: Difference | None) -> list[str]:
    if difference is None or difference.value != difference.value:
        return ["-", "", ""]
    low, high = (_format(end, "+") for end in difference.interval)
    p = "" if difference.p_value is None else format_p(difference.p_value)
    return [_format(difference.value, "+"), f"[{low}, {high}]", p]
