"""runs: list the runs of a folder with their status and their most important metrics."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from vlkit import console
from vlkit.config.evaluation import RunsConfig
from vlkit.errors import ArtifactError, UsageError
from vlkit.evaluation.formatting import format_with_interval, metric_label
from vlkit.evaluation.results import Results
from vlkit.metrics import DIRECTIONS, headline_of
from vlkit.run_status import RunStatus, run_status
from vlkit.runs import Run

UNFINISHED = ("running", "stopped", "failed", "interrupted")


def list_runs(config: RunsConfig) -> dict[str, Any]:
    """Run `vlkit runs`: print a table, the newest run first.

    Raises:
        UsageError: the folder does not exist.
    """
    folder = config.runs_dir
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}", hint="train a run first: vlkit train-retrieval")
    runs = [_describe_run(path) for path in sorted(folder.iterdir()) if _is_run(path)]
    runs.sort(key=lambda run: run["seconds"])
    if not runs:
        console.say(f"no runs in {folder}")
        return {"runs": []}
    with_captions = any(run["captions"] for run in runs)
    columns = ("run", "state", "model", "data", "text -> image recall@1", "image -> text recall@1")
    columns += (*(("captions",) if with_captions else ()), "age")
    console.print_table(f"runs in {folder}", columns, [_row(run, with_captions) for run in runs])
    for run in runs:
        if run["state"] in ("failed", "interrupted", "stopped", "damaged"):
            console.say(f"{run['name']}: {run['why']}")
    console.hint(f"details of the newest: vlkit report --run {quote(str(folder / runs[0]['name']))}")
    return {"runs": runs}


def _row(run: dict[str, Any], with_captions: bool) -> list[str]:
    recalls = (_recall(run, direction) for direction in DIRECTIONS)
    captions = (run["captions"],) if with_captions else ()
    return [run["name"], _state(run), run["model"] or "", run["data"] or "", *recalls, *captions, _age(run["seconds"])]


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("config.yaml", "results.json"))


def _describe_run(path: Path) -> dict[str, Any]:
    """Return a run as --json prints it; a run that cannot be read says why."""
    run = Run(path)
    try:
        status = run_status(run)
        settings = run.config() if run.started and status.state != "damaged" else {}
        results = Results.read(path / "results.json")
        best = run.read_json("best.json")
    except ArtifactError as error:
        status = RunStatus("damaged", 0, None, error.message, error.hint, 0.0)
        settings, results, best = {}, None, {}
    evaluated = results.to_dict() if results else {}
    data = settings.get("data") or evaluated.get("data", {}).get("path")
    model = settings.get("model") or settings.get("llm") or evaluated.get("model")
    return {
        "name": path.name,
        **status.to_dict(),
        "model": None if model is None else Path(str(model)).name if str(model).startswith("/") else str(model),
        "data": None if data is None else str(data).rstrip("/").rpartition("/")[2],
        "metrics": evaluated.get("metrics", {}),
        "intervals": evaluated.get("intervals", {}),
        "verdict": evaluated.get("verdict", {}),
        "validation": best.get("val") or {},
        "captions": _caption_scores(evaluated.get("metrics", {}), best.get("val") or {}),
    }


def _state(run: dict[str, Any]) -> str:
    unfinished = run["state"] in UNFINISHED and run["steps"]
    return f"{run['state']} {run['step']}/{run['steps']}" if unfinished else str(run["state"])


def _caption_scores(metrics: dict[str, Any], validation: dict[str, Any]) -> str:
    """Return CIDEr and loss of a captioner, or the validation loss before an evaluation; else an empty text."""
    if "captions" in metrics:
        loss = f", {metrics['looking']['right']:.3f} nats per token" if "looking" in metrics else ""
        name = headline_of("captions")
        return f"{metric_label(name)} {metrics['captions'][name]:.3f}{loss}"
    return f"{validation['looking']['right']:.3f} nats per token on validation" if "looking" in validation else ""


def _recall(run: dict[str, Any], direction: str) -> str:
    """Return recall@1 with its interval, or that of validation where the run is not evaluated."""
    name = headline_of(direction)
    metrics, validation = run["metrics"].get(direction) or {}, run["validation"].get(direction) or {}
    if name in metrics:
        return format_with_interval(name, metrics[name], run["intervals"][direction][name])
    return f"{validation[name]:.3f} on validation" if name in validation else ""


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
