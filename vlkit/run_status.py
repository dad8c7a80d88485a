"""How a run stands: running, finished, or ended on the way, why, and how to go on."""

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
    """How a run stands.

    Attributes:
        state: stopped: by a signal, its steps saved; failed: by an error; interrupted: killed, or the machine went
            down; measured: no run, but the results of a model as it is; damaged: its files cannot be read.
        step, steps: the last one taken, and how many there are to be.
        why: what ended it.
        hint: the way out.
        seconds: since it ended, or last took a step; of results alone, since they were written.
    """

    state: State
    step: int
    steps: int | None
    why: str | None
    hint: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


@contextmanager
def record_failure(run: Run) -> Iterator[None]:
    """Write down why the block ends, where it ends by an error, for whoever looks in the morning.

    Of several processes, for the one that writes.
    """
    (run.folder / STOPPED).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        # One that could not begin is gone.
        if run.started:
            told = error.message if isinstance(error, VlkitError) else f"{type(error).__name__}: {error}"
            note = {
                "why": told,
                "hint": getattr(error, "hint", None),
                "exit_code": getattr(error, "exit_code", 1),
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            with suppress(OSError):  # The disk may be what is full.
                run.write_json(STOPPED, note)
        raise


def run_status(run: Run) -> RunStatus:
    """Look at a run folder, which need not be whole.

    Raises:
        ArtifactError: it is no run folder.
    """
    seconds = max(0.0, time.time() - _last_written(run.folder))
    if not run.started:
        if (run.folder / "results.json").is_file():
            return RunStatus("measured", 0, None, None, None, seconds)
        raise ArtifactError(f"{run.folder} is no run folder: it has neither config.yaml nor results.json")
    try:
        settings, step = run.config(), run.last_step()
        finished, working = run.read_json("finished.json"), is_locked(run)
        stopped = run.read_json(STOPPED)
    except ArtifactError as error:
        return RunStatus("damaged", 0, None, error.message, error.hint, seconds)
    steps = settings.get("steps")
    if run.finished:
        return RunStatus("finished", int(finished.get("steps", step)), steps, None, None, seconds)
    if working:
        return RunStatus("running", step, steps, None, None, seconds)
    if stopped:
        state: State = "stopped" if stopped.get("exit_code") == 75 else "failed"
        return RunStatus(state, step, steps, stopped.get("why"), stopped.get("hint"), seconds)
    why = "it was killed, or the machine went down: it ended without a word"
    return RunStatus("interrupted", step, steps, why, "the same command goes on from the newest checkpoint", seconds)


def is_locked(run: Run) -> bool:
    """Whether a process holds the run's lock."""
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


def _last_written(folder: Path) -> float:
    """When the run itself last wrote something; a report, or another measurement, makes it no younger."""
    times = []
    for name in ("config.yaml", "metrics.jsonl", "finished.json", STOPPED):
        with suppress(FileNotFoundError):
            times.append((folder / name).stat().st_mtime)
    with suppress(FileNotFoundError):
        times = times or [(folder / "results.json").stat().st_mtime]
    return max(times, default=time.time())
