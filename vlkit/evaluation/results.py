"""What eval refuses: a folder that is another's, before; and, afterwards, results that miss what was demanded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlkit.config.evaluation import demanded
from vlkit.errors import QualityError, UsageError
from vlkit.runs import Run
from vlkit.storage import refuse_unwritable

NOT_MEASURED = {"classification": "not measured: too few of these rows have classes"}


def refuse_foreign(out: Path, run: Run | None) -> None:
    """Refuse, before any work is done, a folder that cannot be written, and another run's: its results stay its own.

    Raises:
        UsageError: names the folder.
    """
    refuse_unwritable(out, "--out")
    if Run(out).started and not (run and out.resolve() == run.folder.resolve()):
        raise UsageError(f"--out {out} is a run's folder: its results would no longer be its own", hint="give another")


def refuse_missed(results: Mapping[str, Any], lines: tuple[str, ...]) -> None:
    """Hold results against --fail-under.

    Raises:
        QualityError: names what is below.
    """
    missed = []
    for group, metric, least in demanded(lines):
        value = results["metrics"].get(group, {}).get(metric)
        if value is None or not value >= least:
            shown = f"{value:.4f}" if value is not None and value == value else NOT_MEASURED.get(group, "not measured")
            missed.append(f"{group}.{metric} is {shown}, {least:g} was demanded")
    if missed:
        raise QualityError("; ".join(missed))
