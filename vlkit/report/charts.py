"""Plots of a report: choose what is drawn of a run's log, results and data. `svg.py` draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlkit.evaluation.formatting import format_direction, metric_label
from vlkit.evaluation.results import Difference, Results
from vlkit.metrics import DIRECTIONS, HEADLINES, METRICS, headline_of
from vlkit.report.load_run import LoadedRun
from vlkit.report.svg import (
    BASE,
    FAINT,
    INK,
    MODEL_COLOURS,
    MODEL_LINES,
    MODEL_MARKERS,
    MODEL_NAMES,
    THIRD,
    TUNED,
    Plot,
    draw_plot,
    legend_below,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 800
# More classes make no confusion matrix, more slices no row of the plot, more class sizes no bar.
MAX_CLASSES, MAX_GAPS, MAX_CLASS_SIZES = 25, 30, 40
# A confusion matrix of more classes has no room for counts.
MAX_CLASSES_WITH_COUNTS = 14
# Colour, line and marker of the first, second ... curve.
CURVE_STYLES = ((TUNED, "-", "o"), (BASE, "--", "s"), (THIRD, "-.", "^"), (INK, ":", "D"), (FAINT, "-", "v"))


def training_plots(log: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    """Draw loss, learning rate, gradient norm and validation over the steps of metrics.jsonl."""
    for name, title, scale in (
        ("loss", "training loss", "linear"),
        ("lr", "learning rate", "linear"),
        ("grad_norm", "gradient norm before clipping", "log"),
    ):
        steps, values = _series(log, name)
        if len(steps):
            yield _curve(name, title, steps, values, scale)
    evaluations = [(line["step"], line["val"]) for line in log if "val" in line]
    if evaluations and "looking" in evaluations[0][1]:
        yield _image_reliance(evaluations)
    elif evaluations:
        yield _validation(evaluations)


def _series(log: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values; more than `MAX_POINTS` are averaged over neighbours."""
    points = [(line["step"], line[name]) for line in log if isinstance(line.get(name), int | float)]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    if len(steps) <= MAX_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return np.array([steps[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def _curve(name: str, title: str, steps: np.ndarray, values: np.ndarray, scale: str) -> Plot:
    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=TUNED, linewidth=1.2)
        axes.set(xlabel="step", ylabel=metric_label(name), title=title)
        if scale == "log" and (values > 0).all():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.margins(x=0.02)

    ends = f"from step {steps[0]:.0f} to {steps[-1]:.0f}: first {values[0]:.4g}, last {values[-1]:.4g}"
    alt_text = f"{title} {ends}, lowest {values.min():.4g}, highest {values.max():.4g}"
    return draw_plot(name, title, alt_text, draw)


def _image_reliance(evaluations: Sequence[tuple[int, Mapping[str, Any]]]) -> Plot:
    title = "loss of validation captions, by the image they are given"
    steps = [step for step, _ in evaluations]
    curves = {
        name: [val["looking"][name] for _, val in evaluations]
        for name in ("right", "shuffled", "blank")
        if evaluations[0][1]["looking"][name] is not None
    }

    def draw(axes: Axes) -> None:
        for (name, values), (colour, line, marker) in zip(curves.items(), CURVE_STYLES, strict=False):
            axes.plot(steps, values, line, color=colour, marker=marker, markersize=4, label=name)
        axes.set(xlabel="step", ylabel="nats per token", title=title, ylim=(0, None))
        legend_below(axes)

    values = "; ".join(f"{name}: first {v[0]:.3f}, last {v[-1]:.3f}" for name, v in curves.items())
    return draw_plot("looking", title, f"{title}, over {len(steps)} evaluations: {values}", draw)


def _validation(evaluations: Sequence[tuple[int, Mapping[str, Any]]]) -> Plot:
    title = "recall@1 on validation"
    steps = [step for step, _ in evaluations]
    curves = {direction: [val[direction][headline_of(direction)] for _, val in evaluations] for direction in DIRECTIONS}

    def draw(axes: Axes) -> None:
        for (direction, values), (colour, line, marker) in zip(curves.items(), CURVE_STYLES, strict=False):
            label = format_direction(direction)
            axes.plot(steps, values, line, color=colour, marker=marker, markersize=4, label=label)
        axes.set(xlabel="step", ylabel=HEADLINES["retrieval"], title=title, ylim=(0, None))
        legend_below(axes)

    values = "; ".join(
        f"{format_direction(d)}: first {v[0]:.3f}, last {v[-1]:.3f}, best {max(v):.3f}" for d, v in curves.items()
    )
    return draw_plot("validation", title, f"{title} over {len(steps)} evaluations: {values}", draw)


def metric_plots(results: Results) -> Iterator[Plot]:
    """Draw every metric between 0 and 1 with its interval, untouched against tuned."""
    for name, group in results.groups.items():
        names = [metric for metric in group.names if metric in METRICS and METRICS[metric].is_share]
        models = {"tuned": (group.metrics, group.intervals)}
        if group.baseline:
            models["base"] = (group.baseline, group.baseline_intervals)
        yield _metrics_with_intervals(name, names, models)


def _metrics_with_intervals(
    group: str, names: Sequence[str], models: Mapping[str, tuple[Mapping[str, float], Mapping[str, Sequence[float]]]]
) -> Plot:
    def draw(axes: Axes) -> None:
        for number, (model, (metrics, intervals)) in enumerate(models.items()):
            shift = (number - (len(models) - 1) / 2) * 0.28
            known = [row for row, name in enumerate(names) if not np.isnan(metrics[name])]
            values = np.array([metrics[names[row]] for row in known])
            ends = np.array([intervals[names[row]] for row in known], dtype=float).reshape(-1, 2)
            error = np.nan_to_num(np.abs(ends - values[:, None])).T
            style: dict[str, Any] = {"color": MODEL_COLOURS[model], "fmt": MODEL_MARKERS[model]}
            style |= {"markersize": 5, "capsize": 2.5, "label": MODEL_NAMES[model]}
            axes.errorbar(values, np.array(known) + shift, xerr=error, **style)
        axes.set_yticks(range(len(names)), [metric_label(name) for name in names])
        axes.invert_yaxis()
        axes.set(xlim=(-0.02, 1.02), title=f"{format_direction(group)}, 95 % intervals")
        axes.grid(axis="y", visible=False)
        if len(models) > 1:
            legend_below(axes)

    values = "; ".join(
        f"{MODEL_NAMES[model]} {metric_label(name)} {metrics[name]:.3f}"
        for model, (metrics, _) in models.items()
        for name in names
        if not np.isnan(metrics[name])
    )
    title = f"{format_direction(group)}: all metrics"
    alt_text, height = f"{title} with their intervals. {values}", 0.6 + 0.36 * len(names)
    return draw_plot(f"metrics-{group}", title, alt_text, draw, height=height)


def rank_plots(results: Results) -> Iterator[Plot]:
    """Draw recall against k, and the rank of the first right item."""
    for direction, models in results.curves.items():
        yield _recall_at_k(direction, models)
        yield _rank_histogram(direction, models)


def _recall_at_k(direction: str, models: Mapping[str, Mapping[str, Any]]) -> Plot:
    title = f"{format_direction(direction)}: recall against k"

    def draw(axes: Axes) -> None:
        for model, curve in models.items():
            style: dict[str, Any] = {"color": MODEL_COLOURS[model], "marker": MODEL_MARKERS[model]}
            style |= {"markersize": 3.5, "label": MODEL_NAMES[model]}
            axes.plot(curve["k"], curve["recall"], MODEL_LINES[model], **style)
        axes.set(xscale="log", xlabel="k", ylabel="recall@k", ylim=(0, 1.02))
        axes.set_title(title)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        legend_below(axes)

    values = "; ".join(
        f"{MODEL_NAMES[model]}: "
        + ", ".join(f"{r:.2f} at {k}" for k, r in list(zip(curve["k"], curve["recall"], strict=True))[::6])
        for model, curve in models.items()
    )
    return draw_plot(f"recall-{direction}", title, f"recall against k. {values}", draw)


def _rank_histogram(direction: str, models: Mapping[str, Mapping[str, Any]]) -> Plot:
    def draw(axes: Axes) -> None:
        for number, (model, curve) in enumerate(models.items()):
            bins = curve["ranks"]
            positions = np.arange(len(bins["from"])) + (number - (len(models) - 1) / 2) * 0.4
            style: dict[str, Any] = {"color": MODEL_COLOURS[model]}
            if model == "base":
                style = {"hatch": "///", "fill": False, "edgecolor": MODEL_COLOURS[model]}
            axes.bar(positions, bins["queries"], width=0.4, label=MODEL_NAMES[model], **style)
        bins = next(iter(models.values()))["ranks"]
        labels = [
            f"{low}" if low == high else f"{low}-{high}" for low, high in zip(bins["from"], bins["to"], strict=True)
        ]
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set(xlabel="rank of the first right item", ylabel="queries", title=f"{format_direction(direction)}: ranks")
        legend_below(axes)

    alt_text = "; ".join(
        f"{MODEL_NAMES[model]}: {curve['ranks']['queries'][0]:g} of {sum(curve['ranks']['queries']):g} queries rank a "
        "right item first"
        for model, curve in models.items()
    )
    title = f"{format_direction(direction)}: rank of the first right item"
    return draw_plot(f"ranks-{direction}", title, alt_text, draw)


def confusion_plots(results: Results) -> Iterator[Plot]:
    """Draw each model's confusion matrix as shares of the true class; none if there are many classes."""
    matrices = results.confusion or {}
    names = matrices.get("classes", [])
    if not names or len(names) > MAX_CLASSES:
        return
    for model in ("base", "tuned"):
        if model in matrices:
            yield _confusion(model, names, np.array(matrices[model]))


def _confusion(model: str, names: Sequence[str], counts: np.ndarray) -> Plot:
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    labels = [_shorten(name, 22) for name in names]

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.35, aspect="auto")
        axes.set_xticks(range(len(names)), labels, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), labels)
        axes.set(xlabel="predicted class", ylabel="true class", title=f"{MODEL_NAMES[model]}: confusion of classes")
        axes.grid(visible=False)
        if len(names) <= MAX_CLASSES_WITH_COUNTS:
            for row, column in zip(*np.nonzero(counts), strict=True):
                ink = "white" if shares[row, column] > 0.75 else "#10151b"
                count = counts[row, column]
                text = f"{count:g}" if count == round(count) else f"{count:.1f}"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)

    right = float(np.trace(counts)) / max(1.0, float(counts.sum()))
    side = 2.2 + 0.3 * len(names)
    alt_text = f"{MODEL_NAMES[model]} model: {right:.0%} of {counts.sum():.0f} images of one class are predicted right"
    title, size = f"confusion of classes, {MODEL_NAMES[model]}", (max(5.2, side), max(3.6, side * 0.85))
    return draw_plot(f"confusion-{model}", title, alt_text, draw, width=size[0], height=size[1])


def slice_plots(results: Results) -> Iterator[Plot]:
    """Draw the gap in recall@1 between each slice and the rest."""
    for direction in DIRECTIONS:
        gaps = [
            (f"{name}: {value}", gap)
            for name, values in results.slices.items()
            for value, cells in values.items()
            if direction in cells and (gap := cells[direction].gap)
        ]
        if gaps:
            yield _gaps(direction, gaps[:MAX_GAPS], len(gaps) - MAX_GAPS)


def _gaps(direction: str, gaps: Sequence[tuple[str, Difference]], more: int) -> Plot:
    def draw(axes: Axes) -> None:
        for row, (_, gap) in enumerate(gaps):
            error = np.abs([[gap.value - gap.low], [gap.high - gap.value]])
            face = TUNED if gap.excludes_zero else "none"
            style: dict[str, Any] = {"color": TUNED, "markerfacecolor": face, "markersize": 5, "capsize": 2.5}
            axes.errorbar([gap.value], [row], xerr=error, fmt="o", **style)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(gaps)), [_shorten(name, 44) for name, _ in gaps])
        axes.invert_yaxis()
        axes.set(title=f"{format_direction(direction)}: recall@1 of the slice minus the rest")
        axes.set_xlabel("filled: the interval excludes 0" + (f"; {more} more in the table" if more > 0 else ""))

    alt_text = "; ".join(f"{name} {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]" for name, gap in gaps)
    title, height = f"{format_direction(direction)}: slices against the rest", 0.9 + 0.3 * len(gaps)
    return draw_plot(f"slices-{direction}", title, alt_text, draw, width=6.4, height=height)


def data_plots(run: LoadedRun) -> Iterator[Plot]:
    """Draw class sizes, image sizes and text lengths of the run's data."""
    pairs = run.pairs
    if pairs is None:
        return
    frame = pairs.frame
    classes = pairs.metadata.get("classes") or {}
    if classes:
        yield _class_sizes(classes)
    images = frame.drop_duplicates("image_id")
    if {"width", "height"} <= set(frame):
        sides = images[["width", "height"]].astype(float).dropna()
        if len(sides):
            shorter = sides.min(axis=1).to_numpy()
            yield _histogram("picture-sizes", "images by their shorter side", shorter, "pixels", "images")
    words = frame.drop_duplicates("text_id")["text"].str.split().str.len().to_numpy(float)
    yield _histogram("caption-lengths", "texts by their length", words, "words", "texts")


def _class_sizes(classes: Mapping[str, Mapping[str, int]]) -> Plot:
    ordered = sorted(classes.items(), key=lambda item: -sum(item[1].values()))
    shown = ordered[:MAX_CLASS_SIZES]

    def draw(axes: Axes) -> None:
        left = np.zeros(len(shown))
        splits = zip(("train", "val", "test"), CURVE_STYLES, ("", "...", "///"), strict=False)
        for split, (colour, _, _), hatch in splits:
            values = np.array([sizes.get(split, 0) for _, sizes in shown], float)
            axes.barh(range(len(shown)), values, left=left, color=colour, hatch=hatch, edgecolor="white", label=split)
            left += values
        axes.set_yticks(range(len(shown)), [_shorten(name, 30) for name, _ in shown])
        axes.invert_yaxis()
        axes.set(xlabel="images", title="classes by size")
        legend_below(axes)

    values = "; ".join(f"{name} {sum(sizes.values())}" for name, sizes in shown[:12])
    more = f"; and {len(ordered) - 12} more" if len(ordered) > 12 else ""
    alt_text, height = f"images per class: {values}{more}", 1.0 + 0.27 * len(shown)
    return draw_plot("class-sizes", "classes by size", alt_text, draw, height=height)


def _histogram(name: str, title: str, values: np.ndarray, unit: str, counted: str) -> Plot:
    def draw(axes: Axes) -> None:
        low, high = float(values.min()), float(values.max())
        if low == high:
            axes.set_xticks([low])
        bins = np.linspace(low - 0.5, high + 0.5, min(30, int(high - low) + 2))
        axes.hist(values, bins=bins.tolist(), color=TUNED)
        axes.set(xlabel=unit, ylabel=counted, title=title)
        if low < high:
            locator: Any = axes.xaxis.get_major_locator()
            locator.set_params(integer=True)

    median, low, high = np.median(values), values.min(), values.max()
    alt_text = f"{title}: {low:.0f} to {high:.0f} {unit}, half of them below {median:.0f}"
    return draw_plot(name, title, alt_text, draw)


def overlay(runs: Sequence[LoadedRun]) -> Iterator[Plot]:
    """Draw training loss and validation recall of several runs, each in one figure."""
    figures: tuple[tuple[str, str, Callable[[LoadedRun], tuple[np.ndarray, np.ndarray]]], ...] = (
        ("loss", "training loss", lambda run: _series(run.log, "loss")),
        ("validation", "mean recall@1 on validation", _mean_recall),
    )
    for name, title, read in figures:
        series = [(run.name, *read(run)) for run in runs]
        series = [curve for curve in series if len(curve[1])]
        if len(series) > 1:
            yield _overlay(name, title, series)


def _mean_recall(run: LoadedRun) -> tuple[np.ndarray, np.ndarray]:
    """Return steps, and recall@1 on validation as the mean of both directions."""
    evaluations = [(line["step"], line["val"]) for line in run.log if "val" in line]
    means = [np.mean([val[direction][headline_of(direction)] for direction in DIRECTIONS]) for _, val in evaluations]
    return np.array([step for step, _ in evaluations]), np.array(means)


def _overlay(name: str, title: str, series: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Plot:
    def draw(axes: Axes) -> None:
        for number, (run, steps, values) in enumerate(series):
            colour, line, marker = CURVE_STYLES[number % len(CURVE_STYLES)]
            marks: dict[str, Any] = {"marker": marker, "markersize": 4} if name == "validation" else {}
            # The space keeps names that begin with _ in the legend.
            axes.plot(steps, values, line, color=colour, label=f" {run}", linewidth=1.2, **marks)
        axes.set(xlabel="step", title=title)
        legend_below(axes)

    alt_text = "; ".join(f"{run}: last {values[-1]:.4g}" for run, _, values in series)
    return draw_plot(f"against-{name}", f"{title} of all runs", alt_text, draw)


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 2] + "\u2026"
