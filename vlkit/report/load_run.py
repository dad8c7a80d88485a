"""Load a run for its report: check what its folder says, and note everything that is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkit.data.pairs import Pairs, read_pairs
from vlkit.errors import ArtifactError, VlkitError
from vlkit.evaluation.results import Results
from vlkit.remote import file_sha256
from vlkit.run_status import RunStatus, run_status
from vlkit.runs import Run
from vlkit.storage import Location

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class LoadedRun:
    """A run with everything that its report shows.

    Attributes:
        settings, environment: of its training; empty for the results of a model that is not a run.
        log: lines of metrics.jsonl.
        results: of results.json; None where the run is not evaluated.
        notes: what is missing in the report, and why.
    """

    run: Run
    status: RunStatus
    settings: dict[str, Any]
    environment: dict[str, Any]
    log: list[dict[str, Any]]
    results: Results | None
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
            Results.read(folder / "results.json"),
        )

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.run.folder.resolve().name

    @cached_property
    def queries(self) -> pd.DataFrame | None:
        """Every query of the evaluation; None where its file does not belong to the results."""
        if self.results is None or not self.results.queries:
            return None
        stored = self.results.queries
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
        """The prepared folder of the evaluation, else of the training; None if it cannot be read."""
        data = self.results.data if self.results else {}
        evaluated_on = data.get("path")
        if "captions" in data:
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
            if evaluated_on and pairs.fingerprint != data.get("fingerprint"):
                self.notes.append(f"{location} has changed since the evaluation: data and images are the current ones")
            return pairs
        except VlkitError as error:
            self.notes.append(f"the prepared folder cannot be read, so images and data are left out: {error}")
            return None

    @property
    def is_captioner(self) -> bool:
        """True for a run that writes captions."""
        return bool(self.settings.get("llm")) or (self.results is not None and self.results.task == "captioning")

    def other_results(self) -> dict[str, Results]:
        """Read further results in the folder, of other splits and other data: file name -> results."""
        others = {}
        for path in sorted(self.run.folder.glob("results-*.json")):
            try:
                results = Results.read(path)
            except ArtifactError as error:
                self.notes.append(error.message)
                continue
            if results is not None:
                others[path.name] = results
        return others
