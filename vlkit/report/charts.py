"""The figures of a report: what is drawn of a run's metrics, results and data. `plots.py` says how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlkit.evaluation.comparison import excludes_zero
from vlkit.evaluation.summary import format_direction, metric_label
from vlkit.metrics import DIRECTIONS
from vlkit.report.load_run import LoadedRun
from vlkit.report.svg import BASE, COLOURS, FAINT, INK, LINES, MARKERS, NAMES, THIRD, TUNED, Plot, legend_below, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 800
MOST_CLASSES, MOST_GAPS = 25, 30
WAYS = ((TUNED, "-", "o"), (BASE, "--", "s"), (THIRD, "-.", "^"), (INK, ":", "D"), (FAINT, "-", "v"))


def learning(lines: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    """Loss, recall on validation, learning rate and gradient norm over the steps."""
    for name, title, scale in (
        ("loss", "training loss", "linear"),
        ("lr", "learning rate", "linear"),
        ("grad_norm", "gradient norm, before it is clipped", "log"),
    ):
        steps, values = _series(lines, name)
        if len(steps):
            yield _curve(name, title, steps, values, scale)
    found = [(line["step"], line["val"]) for line in lines if "val" in line]
    if found and "looking" in found[0][1]:
        yield _looking(found)
    elif found:
        yield _validation(found)


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values; of very many, means of neighbours."""
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    steps, values = (np.array(column, np.float64) for column in zip(*points, strict=True)) if points else ([], [])
    if len(steps) <= MOST_POINTS:
        return np.asarray(steps), np.asarray(values)
    parts = np.array_split(np.arange(len(steps)), MOST_POINTS)
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

    told = f"{title} from step {steps[0]:.0f} to {steps[-1]:.0f}: first {values[0]:.4g}, last {values[-1]:.4g}, "
    return plot(name, title, told + f"lowest {values.min():.4g}, highest {values.max():.4g}", draw)


def _looking(found: Sequence[tuple[int, Mapping[str, Any]]]) -> Plot:
    title = "loss of validation captions, by the picture beside them"
    steps = [step for step, _ in found]
    curves = {
        name: [val["looking"][name] for _, val in found]
        for name in ("right", "shuffled", "blank")
        if found[0][1]["looking"][name] is not None
    }

    def draw(axes: Axes) -> None:
        for (name, values), (colour, line, marker) in zip(curves.items(), WAYS, strict=False):
            axes.plot(steps, values, line, color=colour, marker=marker, markersize=4, label=name)
        axes.set(xlabel="step", ylabel="nats a token", title=title, ylim=(0, None))
        legend_below(axes)

    told = "; ".join(f"{name}: first {v[0]:.3f}, last {v[-1]:.3f}" for name, v in curves.items())
    return plot("looking", title, f"{title}, over {len(steps)} evaluations: {told}", draw)


def _validation(found: Sequence[tuple[int, Mapping[str, Any]]]) -> Plot:
    steps = [step for step, _ in found]
    curves = {direction: [val[direction]["recall@1"] for _, val in found] for direction in DIRECTIONS}

    def draw(axes: Axes) -> None:
        for (direction, values), (colour, line, marker) in zip(curves.items(), WAYS, strict=False):
            axes.plot(steps, values, line, color=colour, marker=marker, markersize=4, label=format_direction(direction))
        axes.set(xlabel="step", ylabel="recall@1", title="recall@1 on validation", ylim=(0, None))
        legend_below(axes)

    told = "; ".join(f"{format_direction(d)}: first {v[0]:.3f}, last {v[-1]:.3f}, best {max(v):.3f}" for d, v in curves.items())
    return plot(
        "validation", "recall@1 on validation", f"recall@1 on validation over {len(steps)} evaluations: {told}", draw
    )


def bars(results: Mapping[str, Any]) -> Iterator[Plot]:
    """Every metric between 0 and 1, untouched against tuned, with intervals."""
    for group, metrics in results["metrics"].items():
        names = [name for name in metrics if name in results["intervals"].get(group, {}) and not name.endswith("rank")]
        models = {"tuned": (metrics, results["intervals"][group])}
        if results.get("baseline", {}).get(group):
            models["base"] = (results["baseline"][group], results["baseline_intervals"][group])
        yield _bars(group, names, models)


def _bars(group: str, names: Sequence[str], models: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Plot:
    def draw(axes: Axes) -> None:
        for number, (who, (values, intervals)) in enumerate(models.items()):
            shift = (number - (len(models) - 1) / 2) * 0.28
            known = [place for place, name in enumerate(names) if values.get(name) is not None]
            at = np.array([values[names[place]] for place in known])
            ends = np.array([intervals[names[place]] for place in known], dtype=float).reshape(-1, 2)
            around = np.nan_to_num(np.abs(ends - at[:, None])).T
            style = {"color": COLOURS[who], "fmt": MARKERS[who], "markersize": 5, "capsize": 2.5}
            axes.errorbar(at, np.array(known) + shift, xerr=around, label=NAMES[who], **style)
        axes.set_yticks(range(len(names)), [metric_label(name) for name in names])
        axes.invert_yaxis()
        axes.set(xlim=(-0.02, 1.02), title=f"{format_direction(group)}, 95 % intervals")
        axes.grid(axis="y", visible=False)
        if len(models) > 1:
            legend_below(axes)

    told = "; ".join(
        f"{NAMES[who]} {metric_label(name)} {values[name]:.3f}"
        for who, (values, _) in models.items()
        for name in names
        if values.get(name) is not None
    )
    title = f"{format_direction(group)}: every metric"
    return plot(f"metrics-{group}", title, f"{title} with its interval. {told}", draw, height=0.6 + 0.36 * len(names))


def ranks(results: Mapping[str, Any]) -> Iterator[Plot]:
    """Recall against k, and where the first right item stood."""
    for direction, models in (results.get("curves") or {}).items():
        yield _recall_at_k(direction, models)
        yield _histogram(direction, models)


def _recall_at_k(direction: str, models: Mapping[str, Mapping[str, Any]]) -> Plot:
    def draw(axes: Axes) -> None:
        for who, curve in models.items():
            style = {"color": COLOURS[who], "marker": MARKERS[who], "markersize": 3.5, "label": NAMES[who]}
            axes.plot(curve["k"], curve["recall"], LINES[who], **style)
        axes.set(xscale="log", xlabel="k", ylabel="recall@k", ylim=(0, 1.02))
        axes.set_title(f"{format_direction(direction)}: recall against k")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        legend_below(axes)

    told = "; ".join(
        f"{NAMES[who]}: " + ", ".join(f"{r:.2f} at {k}" for k, r in list(zip(of["k"], of["recall"], strict=True))[::6])
        for who, of in models.items()
    )
    return plot(f"recall-{direction}", f"{format_direction(direction)}: recall against k", f"recall against k. {told}", draw)


def _histogram(direction: str, models: Mapping[str, Mapping[str, Any]]) -> Plot:
    def draw(axes: Axes) -> None:
        for number, (who, curve) in enumerate(models.items()):
            found = curve["ranks"]
            places = np.arange(len(found["from"])) + (number - (len(models) - 1) / 2) * 0.4
            look: dict[str, Any] = {"color": COLOURS[who]}
            if who == "base":
                look = {"hatch": "///", "fill": False, "edgecolor": COLOURS[who]}
            axes.bar(places, found["queries"], width=0.4, label=NAMES[who], **look)
        of = next(iter(models.values()))["ranks"]
        named = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(of["from"], of["to"], strict=True)]
        axes.set_xticks(range(len(named)), named, rotation=45, ha="right")
        axes.set(xlabel="rank of the first right item", ylabel="queries", title=f"{format_direction(direction)}: ranks")
        legend_below(axes)

    told = "; ".join(
        f"{NAMES[who]}: {of['ranks']['queries'][0]:g} of {sum(of['ranks']['queries']):g} queries have it first"
        for who, of in models.items()
    )
    return plot(f"ranks-{direction}", f"{format_direction(direction)}: where the first right item stood", told, draw)


def confusion(results: Mapping[str, Any]) -> Iterator[Plot]:
    """Pictures of the row's class that were taken for the column's, as shares of the row; of few classes only."""
    found = results.get("confusion") or {}
    names = found.get("classes", [])
    if not names or len(names) > MOST_CLASSES:
        return
    for who in ("base", "tuned"):
        if who in found:
            yield _confusion(who, names, np.array(found[who]))


def _confusion(who: str, names: Sequence[str], counts: np.ndarray) -> Plot:
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    short = [name if len(name) <= 22 else name[:20] + "\u2026" for name in names]

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.35, aspect="auto")
        axes.set_xticks(range(len(names)), short, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), short)
        axes.set(xlabel="taken for", ylabel="is", title=f"{NAMES[who]}: classes confused")
        axes.grid(visible=False)
        if len(names) <= 14:
            for row, column in zip(*np.nonzero(counts), strict=True):
                ink = "white" if shares[row, column] > 0.75 else "#10151b"
                value = counts[row, column]
                shown = f"{value:g}" if value == round(value) else f"{value:.1f}"
                axes.text(column, row, shown, ha="center", va="center", color=ink, fontsize=8)

    right = float(np.trace(counts)) / max(1.0, float(counts.sum()))
    side = 2.2 + 0.3 * len(names)
    told = f"{NAMES[who]} model: {right:.0%} of {counts.sum():.0f} pictures of one class lie on the diagonal"
    return plot(
        f"confusion-{who}",
        f"classes confused, {NAMES[who]}",
        told,
        draw,
        width=max(5.2, side),
        height=max(3.6, side * 0.85),
    )


def gaps(results: Mapping[str, Any]) -> Iterator[Plot]:
    """Each slice's recall@1 less the rest's."""
    for direction in DIRECTIONS:
        cells = [
            (f"{name}: {which}", of[direction]["gap"])
            for name, labels in (results.get("slices") or {}).items()
            for which, of in labels.items()
            if of.get(direction, {}).get("gap")
        ]
        if cells:
            yield _gaps(direction, cells[:MOST_GAPS], len(cells) - MOST_GAPS)


def _gaps(direction: str, cells: Sequence[tuple[str, Mapping[str, float]]], more: int) -> Plot:
    def draw(axes: Axes) -> None:
        for place, (_, gap) in enumerate(cells):
            sure = excludes_zero(gap)
            around = [[gap["value"] - gap["low"]], [gap["high"] - gap["value"]]]
            look = {"color": TUNED, "markerfacecolor": TUNED if sure else "none", "markersize": 5, "capsize": 2.5}
            axes.errorbar([gap["value"]], [place], xerr=np.abs(around), fmt="o", **look)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(cells)), [name if len(name) <= 44 else name[:42] + "\u2026" for name, _ in cells])
        axes.invert_yaxis()
        axes.set(title=f"{format_direction(direction)}: recall@1 less the rest's")
        axes.set_xlabel("filled: the interval leaves out 0" + (f"; {more} more in the table" if more > 0 else ""))

    told = "; ".join(f"{name} {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" for name, gap in cells)
    height = 0.9 + 0.3 * len(cells)
    return plot(
        f"slices-{direction}", f"{format_direction(direction)}: slices against the rest", told, draw, width=6.4, height=height
    )


def data(collected: LoadedRun) -> Iterator[Plot]:
    """Class sizes, picture sizes, caption lengths."""
    pairs = collected.pairs
    if pairs is None:
        return
    frame = pairs.frame
    classes = pairs.metadata.get("classes") or {}
    if classes:
        yield _class_sizes(classes)
    pictures = frame.drop_duplicates("image_id")
    if {"width", "height"} <= set(frame):
        sides = pictures[["width", "height"]].astype(float).dropna()
        if len(sides):
            yield _hist(
                "picture-sizes", "pictures by their shorter side", sides.min(axis=1).to_numpy(), "pixels", "pictures"
            )
    words = frame.drop_duplicates("text_id")["text"].str.split().str.len().to_numpy(float)
    yield _hist("caption-lengths", "texts by their length", words, "words", "texts")


def _class_sizes(classes: Mapping[str, Mapping[str, int]]) -> Plot:
    ordered = sorted(classes.items(), key=lambda each: -sum(each[1].values()))
    shown = ordered[:40]

    def draw(axes: Axes) -> None:
        left = np.zeros(len(shown))
        for split, (colour, _, _), hatch in zip(("train", "val", "test"), WAYS, ("", "...", "///"), strict=False):
            values = np.array([of.get(split, 0) for _, of in shown], float)
            axes.barh(range(len(shown)), values, left=left, color=colour, hatch=hatch, edgecolor="white", label=split)
            left += values
        axes.set_yticks(range(len(shown)), [name if len(name) <= 30 else name[:28] + "\u2026" for name, _ in shown])
        axes.invert_yaxis()
        axes.set(xlabel="pictures", title="classes by size")
        legend_below(axes)

    told = "; ".join(f"{name} {sum(of.values())}" for name, of in shown[:12])
    more = f"; and {len(ordered) - 12} more" if len(ordered) > 12 else ""
    return plot(
        "class-sizes", "classes by size", f"pictures a class: {told}{more}", draw, height=1.0 + 0.27 * len(shown)
    )


def _hist(name: str, title: str, values: np.ndarray, unit: str, what: str) -> Plot:
    def draw(axes: Axes) -> None:
        low, high = float(values.min()), float(values.max())
        if low == high:
            axes.set_xticks([low])
        axes.hist(values, bins=np.linspace(low - 0.5, high + 0.5, min(30, int(high - low) + 2)), color=TUNED)
        axes.set(xlabel=unit, ylabel=what, title=title)
        if low < high:
            axes.xaxis.get_major_locator().set_params(integer=True)

    median, low, high = np.median(values), values.min(), values.max()
    return plot(name, title, f"{title}: {low:.0f} to {high:.0f} {unit}, half of them below {median:.0f}", draw)


def overlay(runs: Sequence[LoadedRun]) -> Iterator[Plot]:
    """Loss and validation recall of several runs in one figure each."""
    for name, title, of in (
        ("loss", "training loss", lambda run: _series(run.lines, "loss")),
        ("validation", "mean recall@1 on validation", _mean_recall),
    ):
        series = [(run.name, *of(run)) for run in runs]  # type: ignore[no-untyped-call]
        series = [each for each in series if len(each[1])]
        if len(series) > 1:
            yield _overlaid(name, title, series)


def _mean_recall(run: LoadedRun) -> tuple[np.ndarray, np.ndarray]:
    found = [(line["step"], line["val"]) for line in run.lines if "val" in line]
    return np.array([s for s, _ in found]), np.array(
        [np.mean([v[d]["recall@1"] for d in DIRECTIONS]) for _, v in found]
    )


def _overlaid(name: str, title: str, series: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Plot:
    def draw(axes: Axes) -> None:
        for number, (run, steps, values) in enumerate(series):
            colour, line, marker = WAYS[number % len(WAYS)]
            marks = {"marker": marker, "markersize": 4} if name == "validation" else {}
            # What begins with _ would be left out of the legend.
            axes.plot(steps, values, line, color=colour, label=f" {run}", linewidth=1.2, **marks)
        axes.set(xlabel="step", title=title)
        legend_below(axes)

    told = "; ".join(f"{run}: last {values[-1]:.4g}" for run, _, values in series)
    return plot(f"against-{name}", f"{title}, beside each other", told, draw)
