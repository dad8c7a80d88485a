"""A run as a report needs it: what its folder says, checked, with a note on everything that is missing."""

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
# Those that not every evaluation has.
OPTIONAL = (
    *("baseline", "verdict", "judged", "one_to_one", "folds", "classes", "slices", "shifts", "retention"),
    *("efficiency", "examples", "diversity"),
)


@dataclass
class LoadedRun:
    """One run.

    Attributes:
        settings, environment: of its training; empty where it has none.
        lines: of metrics.jsonl.
        results: of eval; empty where it was not measured.
        notes: what a reader of the report should know is missing, and why.
    """

    run: Run
    run_status: RunStatus
    settings: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]
    results: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> LoadedRun:
        """Read a run folder, or one that holds the results of `eval --model`.

        Raises:
            ArtifactError: it is neither, or its results are damaged or of another schema.
        """
        run = Run(folder)
        if not run.started and not (folder / "results.json").is_file():
            run.config()  # Says that there is none, and which there are.
        found = run_status(run)
        if found.state == "damaged":
            raise ArtifactError(str(found.why), hint=found.hint)
        results = checked(run.read_json("results.json"), folder / "results.json")
        begun = run.started
        return cls(
            run,
            found,
            run.config() if begun else {},
            run.environment() if begun else {},
            run.metrics() if begun else [],
            results,
        )

    @property
    def name(self) -> str:
        """The folder's."""
        return self.run.folder.resolve().name

    @cached_property
    def queries(self) -> pd.DataFrame | None:
        """Every query of the evaluation; None where its file is not that of the results."""
        told = self.results.get("queries")
        if not told:
            return None
        path = self.run.folder / str(told.get("file"))
        if not path.is_file() or file_sha256(path) != told.get("hash"):
            self.notes.append(f"{path.name} is not the one that results.json speaks of: evaluate again for galleries")
            return None
        import pandas as pd

        return pd.read_parquet(path)

    @cached_property
    def pairs(self) -> Pairs | None:
        """The prepared folder that was measured on, or trained on; None where it is not to be had."""
        measured = self.results.get("data", {}).get("path")
        if "captions" in self.results.get("data", {}):
            return None  # Captions from files, whose pictures are nowhere named.
        where = measured or (self.environment.get("data") or {}).get("path") or self.settings.get("data")
        if not where:
            return None
        try:
            place = Location(where)
            trained = (self.environment.get("data") or {}).get("path")
            if not place.is_remote and not place.path.exists() and trained:
                place = Location(trained)
            found = read_pairs(place)
            if measured and found.fingerprint != self.results["data"].get("fingerprint"):
                self.notes.append(f"{place} has changed since it was measured on: data and pictures are those of today")
            return found
        except VlkitError as error:
            self.notes.append(f"the prepared folder is not to be read, so pictures and data are left out: {error}")
            return None

    @property
    def captions(self) -> bool:
        """It is a captioner's."""
        return bool(self.settings.get("llm")) or self.results.get("task") == "captioning"

    def others(self) -> list[dict[str, Any]]:
        """Further results in the folder: of other splits and other data."""
        found = []
        for path in sorted(self.run.folder.glob("results-*.json")):
            try:
                results = checked(self.run.read_json(path.name), path)
            except ArtifactError as error:
                self.notes.append(error.message)
                continue
            found.append({"file": path.name, **results})
        return found


def checked(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """Results that this version can read; empty ones are none.

    Raises:
        ArtifactError: of another schema, or not whole.
    """
    if not results:
        return {}
    if results.get("schema") != SCHEMA:
        told = f"{path} has schema {results.get('schema')!r}; this vlkit reads {SCHEMA}"
        raise ArtifactError(told, hint="measure again with this version: vlkit eval")
    missing = [name for name in SECTIONS if not isinstance(results.get(name), dict)]
    groups = [results["metrics"], results["intervals"]] if not missing else []
    wanted = ("captions",) if results.get("task") == "captioning" else DIRECTIONS
    missing += [name for of in groups for name in wanted if not isinstance(of.get(name), dict)]
    missing += [name for name in ("task", "model") if not results.get(name)]
    if missing:
        raise ArtifactError(f"{path} is damaged: it has no {missing[0]}", hint="measure again: vlkit eval")
    return {**{name: {} for name in OPTIONAL}, **results}
