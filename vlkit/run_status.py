"""The status of a run: running, finished, or stopped on the way, why, and how to resume."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlkit.errors import ArtifactError, VlkitError
from vlkit.runs import Run

State = Literal["running", "finished", "stopped", "failed", "interrupted", "measured", "damaged"]
STOPPED = "stopped.json"


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        state: stopped: by a signal, its steps saved; failed: by an error; interrupted: killed, or the machine went
            down; measured: not a run but the results of an untouched model; damaged: its files cannot be read.
        step, steps: the last step, and how many are planned.
        why: what stopped it.
        hint: the way out.
        seconds: since it stopped, or since its last step; of results alone, since they were written.
    """

    state: State
    step: int
    steps: int | None
    why: str | None
    hint: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


@contextmanager
def record_failure(run: Run) -> Iterator[None]:
    """Write the error that ends the block, if one does, to stopped.json.

    Of several processes only the main one does this.
    """
    (run.folder / STOPPED).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        # A run that could not begin is removed.
        if run.started:
            message = error.message if isinstance(error, VlkitError) else f"{type(error).__name__}: {error}"
            note = {
                "why": message,
                "hint": getattr(error, "hint", None),
                "exit_code": getattr(error, "exit_code", 1),
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            with suppress(OSError):  # The error may be that the disk is full.
                run.write_json(STOPPED, note)
        raise


def run_status(run: Run) -> RunStatus:
    """Return the status of a run folder, which may be incomplete.

    Raises:
        ArtifactError: it is not a run folder.
    """
    seconds = max(0.0, time.time() - _last_write_time(run.folder))
    if not run.started:
        if (run.folder / "results.json").is_file():
            return RunStatus("measured", 0, None, None, None, seconds)
        raise ArtifactError(f"{run.folder} is not a run folder: it has neither config.yaml nor results.json")
    try:
        settings, step = run.config(), run.last_step()
        finished, running = run.read_json("finished.json"), is_locked(run)
        stopped = run.read_json(STOPPED)
    except ArtifactError as error:
        return RunStatus("damaged", 0, None, error.message, error.hint, seconds)
    steps = settings.get("steps")
    if run.finished:
        return RunStatus("finished", int(finished.get("steps", step)), steps, None, None, seconds)
    if running:
        return RunStatus("running", step, steps, None, None, seconds)
    if stopped:
        state: State = "stopped" if stopped.get("exit_code") == 75 else "failed"
        return RunStatus(state, step, steps, stopped.get("why"), stopped.get("hint"), seconds)
    why = "it was killed, or the machine went down"
    return RunStatus("interrupted", step, steps, why, "the same command resumes from the newest checkpoint", seconds)


def is_locked(run: Run) -> bool:
    """Return whether a process holds the run's lock."""
    path = run.folder / ".lock"
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _last_write_time(folder: Path) -> float:
    """Return when training last wrote something, as seconds since 1970; a report or an evaluation does not count."""
    times = []
    for name in ("config.yaml", "metrics.jsonl", "finished.json", STOPPED):
        with suppress(FileNotFoundError):
            times.append((folder / name).stat().st_mtime)
    with suppress(FileNotFoundError):
        times = times or [(folder / "results.json").stat().st_mtime]
    return max(times, default=time.time())
