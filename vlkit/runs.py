"""The run folder: written here, read here.

    config.yaml  environment.yaml  metrics.jsonl  checkpoints/  best.json  last.json  model/ or adapter/  results.json

A run is *unfinished* from the moment its config.yaml stands until `finish` writes finished.json; the same command then
goes on where it stopped. A folder that is finished, or holds something else, is never written into by a trainer.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.config.base import Settings, read_yaml, yaml_text
from vlkit.errors import ArtifactError, NetworkError, UsageError
from vlkit.remote import MANIFEST, Remote, file_sha256
from vlkit.storage import Location, json_text, write_text

PACKAGES = ("vlkit", "torch", "transformers", "peft", "tokenizers", "numpy", "pandas", "pillow", "simplejpeg")

# What eval writes, of every split and other data.
RESULT_STEMS = ("results", "queries", "examples_top5", "captions")

# Settings that make no other run: how it is carried out and where it lies, not what comes out.
RUNTIME_SETTINGS = ("workers", "cache", "keep", "name", "runs_dir", "extend_to", "replay")


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        writes: of several processes that train it together, one does; for the others its methods write nothing.
    """

    folder: Path
    is_writer: bool = True

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        """Where `checkpoints.py` saves."""
        return self.folder / "checkpoints"

    @property
    def base(self) -> Path:
        """The untouched model, where vlkit made it itself (a tiny one)."""
        return self.folder / "base"

    @property
    def started(self) -> bool:
        """Its settings are written down."""
        return (self.folder / "config.yaml").is_file()

    @property
    def finished(self) -> bool:
        """Trained to its end."""
        return (self.folder / "finished.json").is_file()

    def config(self) -> dict[str, Any]:
        """The snapshot of the settings. One that is older than --decode was trained when there was no other way."""
        if not self.started:
            what = "is no run folder: it has no config.yaml" if self.folder.exists() else "does not exist"
            raise ArtifactError(f"the run {self.folder} {what}", hint=_runs_hint(self.folder.parent))
        settings = _read(self.folder / "config.yaml")
        if not settings.get("data") or not (settings.get("model") or settings.get("llm")):
            raise ArtifactError(f"{self.folder / 'config.yaml'} is damaged: it names no data or no model")
        return {"decode": "exact", **settings}

    @property
    def task(self) -> str:
        """What its model does: retrieval, or captioning."""
        return "captioning" if "llm" in self.config() else "retrieval"

    def begin(self, config: Settings, data: dict[str, Any], before: Settings | None = None) -> None:
        """Write the snapshot, or find that what is there says the same. Call it under the lock.

        config.yaml repeats the run, environment.yaml says what it ran on. Until there is a checkpoint the settings may
        still change; after that they, and the data's fingerprint, are the run.

        Args:
            before: the settings of a finished run that is to go on under others.

        Raises:
            UsageError: names what differs.
        """
        if any(self.checkpoints.glob("step-*")):
            self.refuse_changes(before or config, data)
            if before is not None:
                self._reopen(config)
            return
        shutil.rmtree(self.base, ignore_errors=True)
        write_text(self.folder / "environment.yaml", yaml_text({**_environment(), "data": data}))
        write_text(self.folder / "config.yaml", config.to_yaml())

    def discard(self) -> None:
        """Remove a run that could not begin; one that has a checkpoint stays."""
        if not any(self.checkpoints.glob("step-*")):
            shutil.rmtree(self.folder)

    def refuse_changes(self, config: Settings, data: dict[str, Any] | None = None) -> None:
        """Refuse settings, or data, that are not the run's.

        Raises:
            UsageError: names what differs.
        """
        # A setting that is younger than the run has its default there.
        defaults = {name: field.default for name, field in config.fields().items()}
        before, now = {**type(config).plain(defaults), **self.config()}, config.to_dict()
        trained_on = self.environment().get("data", {})
        keys = {*before, *now}.difference(RUNTIME_SETTINGS)
        changed = {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}
        for name in ("fingerprint", "augmentation") if data is not None else ():
            if trained_on.get(name) != data.get(name):
                changed[f"data {name}"] = (trained_on.get(name), data.get(name))
        if changed:
            told = ", ".join(f"{key} was {was!r}, is {now!r}" for key, (was, now) in sorted(changed.items())[:4])
            hint = "the same settings and data go on with it; others need another --name"
            raise UsageError(f"the run {self.folder} is another one: {told}", hint=hint)

    def environment(self) -> dict[str, Any]:
        """What it ran on; empty where that was not written down."""
        path = self.folder / "environment.yaml"
        return _read(path) if path.is_file() else {}

    def data_location(self) -> Location:
        """Return the prepared folder: as the command named it, or where it was, for calls from another folder."""
        location = Location(self.config()["data"])
        if location.is_remote or location.path.exists():
            return location
        return Location(self.environment().get("data", {}).get("path", location))

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if not self.is_writer:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_text(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a torn last line, left by a kill, is passed over."""
        path = self.folder / "metrics.jsonl"
        # What follows the last line break was torn by a kill, whatever it looks like.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            hint = "take the broken line out; what it told of is taken from the checkpoints"
            raise ArtifactError(f"{path} is damaged: {error}", hint=hint) from None

    def last_step(self) -> int:
        """The last step that metrics.jsonl tells of; 0 where it tells of none."""
        return max((line["step"] for line in self.metrics()), default=0)

    def forget_after(self, step: int, *, evaluation: bool = False) -> None:
        """Drop what metrics.jsonl says of later steps: they will be taken again.

        Args:
            evaluation: that of `step` itself will be made again, too.
        """
        if not self.is_writer:
            return
        again = [line for line in self.metrics() if evaluation and line["step"] == step and "val" in line]
        kept = [json_text(line) + "\n" for line in self.metrics() if line["step"] <= step and line not in again]
        write_text(self.folder / "metrics.jsonl", "".join(kept))

    def write_json(self, name: str, value: dict[str, Any] | list[Any]) -> None:
        """Write best.json, results.json and their like, whole or not at all."""
        if not self.is_writer:
            return
        write_text(self.folder / name, json_text(value, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one of them back; empty where it is not there."""
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if not isinstance(value, dict):
                raise ValueError(f"it holds a {type(value).__name__}")
        except ValueError as error:
            told = f"{path} is damaged: {error}"
            raise ArtifactError(told, hint="remove it and run the same command again") from None
        return value

    def _reopen(self, config: Settings) -> None:
        """Go on with a finished run under other settings. Its results are those of what it was."""
        for name in ("finished.json", "README.md", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        for path in (path for kind in RESULT_STEMS for path in self.folder.glob(f"{kind}*")):
            path.unlink()
        shutil.rmtree(self.folder / "plots", ignore_errors=True)
        write_text(self.folder / "config.yaml", config.to_yaml())

    def finish(self, facts: dict[str, Any]) -> None:
        """The run is done; nothing trains into it again."""
        self.write_json("finished.json", facts)

    def mirror(self, *, required: bool = False) -> None:
        """Copy what is new to where a remote --runs-dir points; without one, nothing happens.

        Args:
            must: the network's failure is raised; otherwise it is told, and the next call tries again.
        """
        runs_dir = Location(self.config().get("runs_dir", "")) if self.is_writer else Location("")
        if not runs_dir.is_remote:
            return
        try:
            self._mirror(Remote(mirror_location(runs_dir, self.name, str(self.config().get("tune", "run")))))
        except NetworkError as error:
            if required:
                hint = f"the run is whole in {self.folder}; vlkit eval --run {self.folder} uploads it again"
                raise NetworkError(error.message, hint=hint) from None
            console.warn(f"not yet uploaded: {error.message}")

    def _mirror(self, remote: Remote) -> None:
        zone = "/experiments/" in remote.location and remote.location.name.startswith("run_")
        here = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*"))}
        here = {name: path for name, path in here.items() if path.is_file() and not _hidden(name)}
        here = {(zone_path(name) if zone else name): path for name, path in here.items()}
        hashes = {name: file_sha256(path) for name, path in here.items()}
        there = remote.listing()
        known = remote.read_manifest(MANIFEST, there) if MANIFEST in there else {}
        remote.upload(
            {name: path for name, path in here.items() if known.get(name) != hashes[name] or name not in there}
        )
        remote.write_manifest(MANIFEST, hashes)
        passing = ("checkpoints/", "plots/", "report.html", "stopped.json", *RESULT_STEMS)
        remote.remove([name for name in there if name.startswith(passing) and name not in here])

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out for as long as the block runs. The lock dies with the process that holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a+", encoding="utf-8") as file:
            if not _try_lock(file):
                file.seek(0)
                raise UsageError(
                    f"{self.folder} is in use by {file.read().strip() or 'another process'}",
                    hint="wait for it, or give another --name",
                )
            _locks.append(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
            file.flush()
            try:
                yield
            finally:
                _locks.remove(file)


def _try_lock(file: Any) -> bool:
    """Take the lock; `vlkit runs`, which looks whether it is held, holds it for an instant itself."""
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.03)
    return False


def _read(path: Path) -> dict[str, Any]:
    """A YAML file of a run; one that vlkit wrote and cannot read is damaged."""
    try:
        return read_yaml(path)
    except UsageError as error:
        raise ArtifactError(f"damaged: {error.message}", hint="bring back the file from a copy of the run") from None


def _release_locks() -> None:
    """In a process that this one forked, such as a loader's: it outlives a kill for a while, and must hold no lock."""
    for file in _locks:
        os.close(file.fileno())
    _locks.clear()


_locks: list[Any] = []
os.register_at_fork(after_in_child=_release_locks)


def local_runs_dir(runs_dir: Location) -> Path:
    """Where runs are written: a remote --runs-dir gets copies of what is under runs/."""
    return Path("runs") if runs_dir.is_remote else runs_dir.path


def resolve_run(runs_dir: Location, name: str, *, extending: bool = False) -> Run:
    """The run folder to train into: a new one, or one that was begun and not finished.

    Args:
        extending: a finished one, too.

    Raises:
        UsageError: the name is taken by a finished run or by something that is no run.
    """
    run = Run(local_runs_dir(Location(runs_dir)) / name)
    if run.folder.exists() and not run.folder.is_dir():
        raise UsageError(f"{run.folder} is a file", hint="choose another --name")
    held = (
        {path.name for path in run.folder.iterdir() if not path.name.startswith(".")} if run.folder.exists() else set()
    )
    if not run.started and held - {"environment.yaml"}:
        raise UsageError(f"{run.folder} exists and is no run", hint="choose another --name")
    if extending and not run.started:
        raise UsageError(f"--extend-to: there is no run {run.folder}", hint=_runs_hint(run.folder.parent))
    if run.finished and not extending:
        hint = f"another --name, --extend-to STEPS to go on with it, or measure it: vlkit eval --run {run.folder}"
        raise UsageError(f"the run {run.folder} is finished", hint=hint)
    return run


def refuse_locked(runs_dir: Location, name: str | None) -> None:
    """Refuse a run that another process works on, before anything else is loaded; `lock` decides for good.

    Raises:
        UsageError: names the owner.
    """
    run = Run(local_runs_dir(Location(runs_dir)) / (name or ""))
    # Of the processes of a torchrun one locks.
    if name and (run.folder / ".lock").is_file() and os.environ.get("RANK", "0") == "0":
        with run.lock():
            pass


def default_run_name(command: str, data: Location) -> str:
    """A name for a run that was given none: date, time, command and data."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{command}-{data.name}"


def mirror_location(runs_dir: Location, name: str, kind: str) -> Location:
    """Where a run's copy lies: in a lake's zone, a whole bucket, under experiments/ by its kind."""
    return runs_dir / "experiments" / kind / f"run_{name}" if runs_dir.is_bucket else runs_dir / name


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def zone_path(name: str) -> str:
    """A run's file under the names of the lake's zones."""
    folders = {"metrics.jsonl": "logs", "environment.yaml": "logs", "finished.json": "logs"}
    measured = ("results", "queries", "report", "plots/")
    kind = "results" if name.startswith(measured) else "examples" if name.startswith("examples") else folders.get(name)
    return f"{kind}/{name}" if kind else name


def _runs_hint(runs_dir: Path) -> str:
    if not any(runs_dir.glob("*/config.yaml")):
        runs_dir = Path("runs")
    known = sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))
    return (
        f"runs in {runs_dir}: {', '.join(known[-8:])}"
        if known
        else f"no runs in {runs_dir}; train one: vlkit train-retrieval"
    )


def _environment() -> dict[str, Any]:
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["vlkit", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": versions,
        "commit_of_the_working_directory": _commit(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
    }


def _commit() -> str | None:
    """The commit of the working directory, where it is a git checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
