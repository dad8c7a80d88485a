"""report: one page that holds everything, and the same plots as PNG beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from vlkit import __version__, console
from vlkit.config.base import yaml_text
from vlkit.config.evaluation import RARE, ReportConfig
from vlkit.errors import UsageError
from vlkit.evaluation.comparison import format_p
from vlkit.evaluation.retrieval.retention import retention_sentence
from vlkit.evaluation.summary import format_direction, format_metric, format_with_interval, metric_label
from vlkit.report import charts
from vlkit.report.compare import Comparison, compared, groups_of
from vlkit.report.galleries import galleries
from vlkit.report.load_run import OPTIONAL, LoadedRun
from vlkit.report.sayings import sayings
from vlkit.report.svg import Plot
from vlkit.storage import format_bytes, refuse_unwritable, write_text

HERE = Path(__file__).parent / "templates"
# What a cost is called, where it stands in results.json, and its unit.
COSTS = (
    ("training", "train_seconds", "s"),
    ("training, memory of the process", "train_peak_memory_process_gb", "GB"),
    ("training, memory of the GPU", "train_peak_memory_gpu_gb", "GB"),
    ("pictures a second", "images_per_second", ""),
    ("captions a second", "captions_per_second", ""),
    ("texts a second", "texts_per_second", ""),
    ("a query's text encoded, median", "latency_ms", "ms"),
    ("a query's text encoded, 95 of 100 below", "latency_ms_p95", "ms"),
    ("evaluation, memory of the process", "peak_memory_process_gb", "GB"),
    ("evaluation, memory of the GPU", "peak_memory_gpu_gb", "GB"),
    ("trained parameters", "trainable_parameters", ""),
    ("all parameters", "total_parameters", ""),
)


@dataclass(frozen=True)
class Page:
    """What a page is made of: the run, its plots by section, and the other runs."""

    run: LoadedRun
    plots: dict[str, list[Plot]]
    against: list[Comparison]
    others: list[LoadedRun]


def report(config: ReportConfig) -> dict[str, Any]:
    """Run `vlkit report`: write report.html and plots/*.png into the run's folder, or --out.

    Returns:
        Where they are, and what is missing.
    """
    folder = config.out or config.run
    if not all(name.strip() for name in config.against):
        raise UsageError("--against is empty", hint="give the folder of a run")
    run = LoadedRun.of(config.run)
    others = [LoadedRun.of(Path(name)) for name in config.against]
    if len({each.run.folder.resolve() for each in (run, *others)}) <= len(others):
        raise UsageError("--against names a run twice, or the run itself")
    refuse_unwritable(folder, "--out")
    plots = {name: list(drawn) for name, drawn in _drawn(run, others).items()}
    found = compared(run, others, across_data=config.across_data) if others else []
    page = Page(run, plots, found, others)
    html = rendered(page, config.queries)
    folder.mkdir(parents=True, exist_ok=True)
    for plot in (each for of in plots.values() for each in of):
        plot.write(folder / "plots")
    write_text(folder / "report.html", html)
    for note in dict.fromkeys(run.notes):
        console.warn(note)
    if run.run.started and config.out is None and run.standing.state != "running":
        run.run.mirror(required=True)
    console.print_result(f"{folder / 'report.html'}: {format_bytes(len(html.encode()))}, opens from disk")
    if not run.results and run.standing.state == "finished":
        console.hint(f"it was not measured yet: vlkit eval --run {quote(str(config.run))}")
    names = sorted(f"plots/{plot.name}.png" for of in plots.values() for plot in of)
    return {"report": str(folder / "report.html"), "plots": names, "notes": list(dict.fromkeys(run.notes))}


def _drawn(run: LoadedRun, others: list[LoadedRun]) -> dict[str, Any]:
    """section -> its plots, drawn when they are asked for."""
    measured = run.results
    return {
        "learning": charts.learning(run.lines),
        "against": charts.overlay([run, *others]) if others and not run.captions else (),
        "metrics": charts.bars(measured) if measured and not run.captions else (),
        "ranks": charts.ranks(measured),
        "confusion": charts.confusion(measured),
        "slices": charts.gaps(measured),
        "data": charts.data(run),
    }


def rendered(page: Page, queries: int) -> str:
    """The page.

    Args:
        queries: how many a gallery shows.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "arrow": format_direction,
        "label": metric_label,
        "share": lambda value, sign="": format_metric("", value, sign=sign),
        # Within an interval no line breaks.
        "cell": lambda value, interval, metric="", sign="": format_with_interval(metric, value, interval, sign=sign).replace(
            ", ", ",\u00a0"
        ),
        "amount": _amount,
        "p": format_p,
        "retention_told": retention_sentence,
        "size": format_bytes,
    }
    run = page.run
    shown = list(galleries(run, queries))
    return environment.get_template("page.html.j2").render(
        page=page,
        run=run,
        measured=bool(run.results),
        results=run.results or dict.fromkeys(OPTIONAL),
        galleries=shown,
        sayings=list(sayings(run)),
        described=run.pairs.metadata if run.pairs else {},
        confused=_confused(run.results),
        shown_metrics=_shown_metrics(run.results),
        compared_metrics=groups_of(run),
        costs=COSTS,
        rare=RARE,
        command=_command(run),
        resume=_resume(run),
        settings=yaml_text(run.settings) if run.settings else "",
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        version=__version__,
        elsewhere=run.others(),
        notes=list(dict.fromkeys(run.notes)),
    )


def _shown_metrics(results: dict[str, Any]) -> dict[str, list[str]]:
    """group -> the metrics that have an interval, in their order."""
    return {
        group: [name for name in metrics if name in results["intervals"].get(group, {})]
        for group, metrics in results.get("metrics", {}).items()
    }


def _confused(results: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """The ten commonest confusions of the tuned model: is, taken for, pictures, and of how many."""
    found = results.get("confusion") or {}
    names, counts = found.get("classes", []), found.get("tuned", [])
    pairs = [
        (name, names[column], value, sum(row))
        for place, (name, row) in enumerate(zip(names, counts, strict=True))
        for column, value in enumerate(row)
        if column != place and value > 0
    ]
    return sorted(pairs, key=lambda each: -each[2])[:10]


def _command(run: LoadedRun) -> str:
    """The line that the run was started with."""
    return str(run.environment.get("command") or "")


def _resume(run: LoadedRun) -> str:
    """The line that goes on with it, from anywhere."""
    command = "train-fusion" if run.captions else "train-retrieval"
    return f"vlkit {command} --config {quote(str(run.run.folder.resolve() / 'config.yaml'))}"


def _amount(value: Any) -> str:
    """A number as people read it: whole ones with commas, others with four digits; what is not known as a dash."""
    if value is None or value != value:
        return "-"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
