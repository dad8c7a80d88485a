"""runs: what there is under a folder of runs, and how each of them stands."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from vlkit import console
from vlkit.config.evaluation import RunsConfig
from vlkit.errors import ArtifactError, UsageError
from vlkit.evaluation.summary import format_with_interval
from vlkit.metrics import DIRECTIONS
from vlkit.report.load_run import checked
from vlkit.run_status import RunStatus, run_status
from vlkit.runs import Run


def listed(config: RunsConfig) -> dict[str, Any]:
    """Run `vlkit runs`: a table, the newest first.

    Raises:
        UsageError: there is no such folder.
    """
    folder = config.runs_dir
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", hint="train a run first: vlkit train-retrieval")
    found = [_facts(path) for path in sorted(folder.iterdir()) if _is_run(path)]
    found.sort(key=lambda facts: facts["seconds"])
    if not found:
        console.say(f"no runs in {folder}")
        return {"runs": []}
    rows = [_row(facts) for facts in found]
    writes = any(facts["captions"] for facts in found)
    if writes:
        rows = [[*row[:-1], facts["captions"], row[-1]] for row, facts in zip(rows, found, strict=True)]
    columns = ("run", "state", "model", "data", "text -> image recall@1", "image -> text recall@1")
    columns += (*(("captions",) if writes else ()), "age")
    console.print_table(f"runs in {folder}", columns, rows)
    for facts in found:
        if facts["state"] in ("failed", "interrupted", "stopped", "damaged"):
            console.say(f"{facts['name']}: {facts['why']}")
    console.hint(f"what one did: vlkit report --run {quote(str(folder / found[0]['name']))}")
    return {"runs": found}


def _row(facts: dict[str, Any]) -> list[str]:
    numbers = (_key(facts, direction) for direction in DIRECTIONS)
    return [facts["name"], _state(facts), facts["model"] or "", facts["data"] or "", *numbers, _age(facts["seconds"])]


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("config.yaml", "results.json"))


def _facts(path: Path) -> dict[str, Any]:
    """A run as --json prints it; one that cannot be read says why."""
    run = Run(path)
    try:
        found = run_status(run)
        settings = run.config() if run.started and found.state != "damaged" else {}
        results = run.read_json("results.json")
        best = run.read_json("best.json")
        results = checked(results, path / "results.json")
    except ArtifactError as error:
        found = RunStatus("damaged", 0, None, error.message, error.hint, 0.0)
        settings, results, best = {}, {}, {}
    data = settings.get("data") or (results.get("data") or {}).get("path")
    model = settings.get("model") or settings.get("llm") or results.get("model")
    return {
        "name": path.name,
        **found.to_dict(),
        "model": None if model is None else Path(str(model)).name if str(model).startswith("/") else str(model),
        "data": None if data is None else str(data).rstrip("/").rpartition("/")[2],
        "metrics": results.get("metrics") or {},
        "intervals": results.get("intervals") or {},
        "verdict": results.get("verdict") or {},
        "validation": best.get("val") or {},
        "captions": _captions(results.get("metrics") or {}, best.get("val") or {}),
    }


def _state(facts: dict[str, Any]) -> str:
    unfinished = facts["state"] in ("running", "stopped", "failed", "interrupted")
    return f"{facts['state']} {facts['step']}/{facts['steps']}" if unfinished and facts["steps"] else facts["state"]


def _captions(metrics: dict[str, Any], validation: dict[str, Any]) -> str:
    """Of a captioner: CIDEr and loss; before it is measured, validation's loss. Of others nothing."""
    if "captions" in metrics:
        loss = f", {metrics['looking']['right']:.3f} nats a token" if "looking" in metrics else ""
        return f"CIDEr {metrics['captions']['cider']:.3f}{loss}"
    return f"{validation['looking']['right']:.3f} nats a token on validation" if "looking" in validation else ""


def _key(facts: dict[str, Any], direction: str) -> str:
    """recall@1 with its interval; before it is measured, validation's without one."""
    metrics = facts["metrics"].get(direction) or {}
    if "recall@1" in metrics:
        return format_with_interval("recall@1", metrics["recall@1"], facts["intervals"][direction]["recall@1"])
    validation = facts["validation"].get(direction) or {}
    return f"{validation['recall@1']:.3f} on validation" if "recall@1" in validation else ""


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
