"""report: write one self-contained page about a run, and its plots as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from vlkit import __version__, console
from vlkit.config.base import yaml_text
from vlkit.config.evaluation import RARE, ReportConfig
from vlkit.errors import UsageError
from vlkit.evaluation.formatting import (
    format_difference,
    format_direction,
    format_metric,
    format_p,
    format_with_interval,
    metric_label,
    retention_sentence,
)
from vlkit.evaluation.results import Difference, Results
from vlkit.report import charts
from vlkit.report.compare import Comparison, compare_runs, compared_metrics
from vlkit.report.galleries import caption_galleries, query_galleries
from vlkit.report.load_run import LoadedRun
from vlkit.report.svg import Plot
from vlkit.storage import format_bytes, refuse_unwritable, write_text

TEMPLATES = Path(__file__).parent / "templates"
MAX_CONFUSIONS = 10
# Title, key in results.json, and unit.
COSTS = (
    ("training", "train_seconds", "s"),
    ("training, memory of the process", "train_peak_memory_process_gb", "GB"),
    ("training, memory of the GPU", "train_peak_memory_gpu_gb", "GB"),
    ("images per second", "images_per_second", ""),
    ("captions per second", "captions_per_second", ""),
    ("texts per second", "texts_per_second", ""),
    ("encoding a query text, median", "latency_ms", "ms"),
    ("encoding a query text, 95th percentile", "latency_ms_p95", "ms"),
    ("evaluation, memory of the process", "peak_memory_process_gb", "GB"),
    ("evaluation, memory of the GPU", "peak_memory_gpu_gb", "GB"),
    ("trainable parameters", "trainable_parameters", ""),
    ("all parameters", "total_parameters", ""),
)


@dataclass(frozen=True)
class Page:
    """Content of a page: the run, its plots by section, and the runs it is compared with."""

    run: LoadedRun
    plots: dict[str, list[Plot]]
    comparisons: list[Comparison]
    others: list[LoadedRun]


def report(config: ReportConfig) -> dict[str, Any]:
    """Run `vlkit report`: write report.html and plots/*.png into the run's folder, or --out.

    Returns:
        Their paths, and notes on what is missing.

    Raises:
        UsageError: --against cannot be compared. ArtifactError: see `LoadedRun.read`.
    """
    folder = config.out or config.run
    if not all(name.strip() for name in config.against):
        raise UsageError("--against is empty", hint="give the folder of a run")
    run = LoadedRun.read(config.run)
    others = [LoadedRun.read(Path(name)) for name in config.against]
    if len({loaded.run.folder.resolve() for loaded in (run, *others)}) <= len(others):
        raise UsageError("--against names a run twice, or the run itself")
    refuse_unwritable(folder, "--out")
    plots = {section: list(drawn) for section, drawn in _draw_plots(run, others).items()}
    comparisons = compare_runs(run, others, across_data=config.across_data) if others else []
    html = render_page(Page(run, plots, comparisons, others), config.queries)
    folder.mkdir(parents=True, exist_ok=True)
    every = [plot for section in plots.values() for plot in section]
    for plot in every:
        plot.write(folder / "plots")
    write_text(folder / "report.html", html)
    notes = list(dict.fromkeys(run.notes))
    for note in notes:
        console.warn(note)
    if run.run.started and config.out is None and run.status.state != "running":
        run.run.mirror(required=True)
    size = format_bytes(len(html.encode()))
    console.print_result(f"{folder / 'report.html'}: {size}, self-contained: open it in a browser")
    if not run.results and run.status.state == "finished":
        console.hint(f"the run is not evaluated yet: vlkit eval --run {quote(str(config.run))}")
    names = sorted(f"plots/{plot.name}.png" for plot in every)
    return {"report": str(folder / "report.html"), "plots": names, "notes": notes}


def _draw_plots(run: LoadedRun, others: Sequence[LoadedRun]) -> dict[str, Iterable[Plot]]:
    """Return section of the page -> its plots, drawn while they are iterated."""
    results = run.results
    return {
        "learning": charts.training_plots(run.log),
        "against": charts.overlay([run, *others]) if others and not run.is_captioner else (),
        "metrics": charts.metric_plots(results) if results and not run.is_captioner else (),
        "ranks": charts.rank_plots(results) if results else (),
        "confusion": charts.confusion_plots(results) if results else (),
        "slices": charts.slice_plots(results) if results else (),
        "data": charts.data_plots(run),
    }


def render_page(page: Page, queries: int) -> str:
    """Return the page as HTML.

    Args:
        queries: examples per gallery.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "direction": format_direction,
        "label": metric_label,
        "share": _share,
        "cell": _cell,
        "difference": _difference,
        "amount": _amount,
        "p": format_p,
        "retention_sentence": retention_sentence,
        "size": format_bytes,
    }
    run = page.run
    # Galleries read queries and data, which may add to the notes.
    galleries, captions = list(query_galleries(run, queries)), list(caption_galleries(run))
    return environment.get_template("page.html.j2").render(
        page=page,
        run=run,
        results=run.results,
        galleries=galleries,
        captions=captions,
        metadata=run.pairs.metadata if run.pairs else {},
        confusions=_most_confused(run.results),
        compared_metrics=compared_metrics(run),
        costs=COSTS,
        rare=RARE,
        command=str(run.environment.get("command") or ""),
        resume=run.run.resume_command if run.settings else "",
        settings=yaml_text(run.settings) if run.settings else "",
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        version=__version__,
        other_results=run.other_results(),
        notes=list(dict.fromkeys(run.notes)),
    )


def _most_confused(results: Results | None) -> list[tuple[str, str, float, float]]:
    """Return the commonest confusions of the tuned model: true class, predicted class, images, and of how many."""
    matrix = (results.confusion if results else None) or {}
    names, counts = matrix.get("classes", []), matrix.get("tuned", [])
    confusions = [
        (name, names[column], value, sum(row))
        for number, (name, row) in enumerate(zip(names, counts, strict=True))
        for column, value in enumerate(row)
        if column != number and value > 0
    ]
    return sorted(confusions, key=lambda confusion: -confusion[2])[:MAX_CONFUSIONS]


def _share(value: float | None) -> str:
    """Return a share with three digits."""
    return format_metric("", value)


def _cell(value: float | None, interval: Sequence[float], metric: str = "") -> str:
    """Return a value with its interval, which no line break may part."""
    return format_with_interval(metric, value, interval).replace(", ", ",\u00a0")


def _difference(difference: Difference, metric: str = "") -> str:
    """Return a difference with its interval, which no line break may part."""
    return format_difference(metric, difference).replace(", ", ",\u00a0")


def _amount(value: Any) -> str:
    """Return a number for reading: integers with commas, others with three digits, a dash for a missing one."""
    if value is None or value != value:
        return "-"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
