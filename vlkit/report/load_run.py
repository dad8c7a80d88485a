"""Load a run for its report: check what its folder says, and note everything that is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkit.config.evaluation import SCHEMA
from vlkit.data.pairs import Pairs, read_pairs
from vlkit.errors import ArtifactError, VlkitError
from vlkit.metrics import DIRECTIONS
from vlkit.remote import file_sha256
from vlkit.run_status import RunStatus, run_status
from vlkit.runs import Run
from vlkit.storage import Location

if TYPE_CHECKING:
    import pandas as pd

SECTIONS = ("metrics", "intervals", "data")
# Sections that not every evaluation has.
OPTIONAL = (
    *("baseline", "verdict", "judged", "one_to_one", "folds", "classes", "slices", "shifts", "retention"),
    *("efficiency", "examples", "diversity"),
)


@dataclass
class LoadedRun:
    """A run with everything that its report shows.

    Attributes:
        settings, environment: of its training; empty for the results of a model that is not a run.
        log: lines of metrics.jsonl.
        results: content of results.json; empty where the run is not evaluated.
        notes: what is missing in the report, and why.
    """

    run: Run
    status: RunStatus
    settings: dict[str, Any]
    environment: dict[str, Any]
    log: list[dict[str, Any]]
    results: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> LoadedRun:
        """Read a run folder, or one that holds the results of `eval --model`.

        Raises:
            ArtifactError: it is neither, or its results are damaged or of another schema.
        """
        run = Run(folder)
        started = run.started
        if not started and not (folder / "results.json").is_file():
            run.config()  # Raises an error that lists the runs there are.
        status = run_status(run)
        if status.state == "damaged":
            raise ArtifactError(str(status.why), hint=status.hint)
        return cls(
            run,
            status,
            run.config() if started else {},
            run.environment() if started else {},
            run.metrics() if started else [],
            check_results(run.read_json("results.json"), folder / "results.json"),
        )

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.run.folder.resolve().name

    @cached_property
    def queries(self) -> pd.DataFrame | None:
        """Every query of the evaluation; None where its file does not belong to the results."""
        stored = self.results.get("queries")
        if not stored:
            return None
        path = self.run.folder / str(stored.get("file"))
        if not path.is_file() or file_sha256(path) != stored.get("hash"):
            self.notes.append(
                f"{path.name} does not belong to results.json, so queries are left out: run vlkit eval again"
            )
            return None
        import pandas as pd

        return pd.read_parquet(path)

    @cached_property
    def pairs(self) -> Pairs | None:
        """The prepared folder of the evaluation, else of the training; None where it cannot be read."""
        evaluated_on = self.results.get("data", {}).get("path")
        if "captions" in self.results.get("data", {}):
            return None  # Captions read from files name no images.
        trained_on = (self.environment.get("data") or {}).get("path")
        path = evaluated_on or trained_on or self.settings.get("data")
        if not path:
            return None
        try:
            location = Location(path)
            if not location.is_remote and not location.path.exists() and trained_on:
                location = Location(trained_on)
            pairs = read_pairs(location)
            if evaluated_on and pairs.fingerprint != self.results["data"].get("fingerprint"):
                self.notes.append(f"{location} has changed since the evaluation: data and images are the current ones")
            return pairs
        except VlkitError as error:
            self.notes.append(f"the prepared folder cannot be read, so images and data are left out: {error}")
            return None

    @property
    def is_captioner(self) -> bool:
        """True for a run that writes captions."""
        return bool(self.settings.get("llm")) or self.results.get("task") == "captioning"

    def other_results(self) -> list[dict[str, Any]]:
        """Read further results in the folder: of other splits and other data."""
        found = []
        for path in sorted(self.run.folder.glob("results-*.json")):
            try:
                results = check_results(self.run.read_json(path.name), path)
            except ArtifactError as error:
                self.notes.append(error.message)
                continue
            found.append({"file": path.name, **results})
        return found


def check_results(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return results with their optional sections, empty where they are missing; {} for no results.

    Raises:
        ArtifactError: they are of another schema, or incomplete.
    """
    if not results:
        return {}
    if results.get("schema") != SCHEMA:
        message = f"{path} has schema {results.get('schema')!r}; this version of vlkit reads {SCHEMA}"
        raise ArtifactError(message, hint="evaluate again with this version: vlkit eval")
    missing = [name for name in SECTIONS if not isinstance(results.get(name), dict)]
    sections = [results["metrics"], results["intervals"]] if not missing else []
    groups = ("captions",) if results.get("task") == "captioning" else DIRECTIONS
    missing += [name for section in sections for name in groups if not isinstance(section.get(name), dict)]
    missing += [name for name in ("task", "model") if not results.get(name)]
    if missing:
        raise ArtifactError(f"{path} is damaged: it has no {missing[0]}", hint="evaluate again: vlkit eval")
    return {**{name: {} for name in OPTIONAL}, **results}
