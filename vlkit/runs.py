"""Write and read a run folder.

    config.yaml  environment.yaml  metrics.jsonl  checkpoints/  best.json  last.json  model/ or adapter/  results.json

A run is *unfinished* from the moment its config.yaml exists until `finish` writes finished.json; the same command then
resumes it. A trainer never writes into a folder that is finished or holds something else.
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
from typing import IO, Any

from vlkit import console
from vlkit.config.base import Settings, read_yaml, yaml_text
from vlkit.errors import ArtifactError, NetworkError, UsageError
from vlkit.remote import MANIFEST, Remote, file_sha256
from vlkit.storage import Location, json_text, write_text

PACKAGES = ("vlkit", "torch", "transformers", "peft", "tokenizers", "numpy", "pandas", "pillow", "simplejpeg")

# How the names of eval's files begin, for every split and other data.
RESULT_STEMS = ("results", "queries", "examples_top5", "captions")

# Settings that do not change what a run computes: how it is carried out, and where it is written.
RUNTIME_SETTINGS = ("workers", "cache", "keep", "name", "runs_dir", "extend_to", "replay")


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        is_writer: of several processes that train it together one writes; for the others its methods write nothing.
    """

    folder: Path
    is_writer: bool = True

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints (see `checkpoints.py`)."""
        return self.folder / "checkpoints"

    @property
    def base(self) -> Path:
        """Folder of the base model, if vlkit made it itself (a tiny one)."""
        return self.folder / "base"

    @property
    def started(self) -> bool:
        """True once its settings are written."""
        return (self.folder / "config.yaml").is_file()

    @property
    def finished(self) -> bool:
        """True once it is trained to its end."""
        return (self.folder / "finished.json").is_file()

    def config(self) -> dict[str, Any]:
        """Read the snapshot of the settings. A run that is older than --decode was trained with exact.

        Raises:
            ArtifactError: it is no run folder, or config.yaml is damaged.
        """
        if not self.started:
            problem = f"{self.folder} is not a run: it has no config.yaml"
            message = problem if self.folder.exists() else f"no such run: {self.folder}"
            raise ArtifactError(message, hint=_runs_hint(self.folder.parent))
        settings = _read_yaml(self.folder / "config.yaml")
        if not settings.get("data") or not (settings.get("model") or settings.get("llm")):
            raise ArtifactError(f"{self.folder / 'config.yaml'} is damaged: it names no data or no model")
        return {"decode": "exact", **settings}

    @property
    def task(self) -> str:
        """The task of its model: retrieval or captioning."""
        return "captioning" if "llm" in self.config() else "retrieval"

    @property
    def resume_command(self) -> str:
        """The command that trains it to its end, called from the folder that it was started in."""
        command = "train-fusion" if self.task == "captioning" else "train-retrieval"
        return f"vlkit {command} --config {shlex.quote(str(self.folder.resolve() / 'config.yaml'))}"

    def begin(self, config: Settings, data: dict[str, Any], previous: Settings | None = None) -> None:
        """Write the snapshot, or check that the one that is there says the same. Call it under the lock.

        config.yaml repeats the run, environment.yaml says what it ran on. Until there is a checkpoint the settings may
        still change; after that, they and the data's fingerprint define the run.

        Args:
            previous: the settings of a finished run that is to continue under others.

        Raises:
            UsageError: names what differs.
        """
        if any(self.checkpoints.glob("step-*")):
            self.refuse_changes(previous or config, data)
            if previous is not None:
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
        """Refuse settings, or data, that are not the run's. Settings without effect do not count.

        Raises:
            UsageError: names what differs.
        """
        before, now = self._settings_as(type(config)), config.to_dict()
        active = config.drop_idle(now)
        keys = {*before, *now}.difference(RUNTIME_SETTINGS)
        changes = {
            key: (before.get(key), now.get(key))
            for key in keys
            if before.get(key) != now.get(key) and (key in active or key not in now)
        }
        if data is not None:
            trained_on = self.environment().get("data", {})
            for name in ("fingerprint", "augmentation"):
                if trained_on.get(name) != data.get(name):
                    changes[f"data {name}"] = (trained_on.get(name), data.get(name))
        if changes:
            listed = ", ".join(f"{key} was {was!r}, now {value!r}" for key, (was, value) in sorted(changes.items())[:4])
            hint = "give the same settings and data to resume it, or another --name"
            raise UsageError(f"the run {self.folder} was started with other settings: {listed}", hint=hint)

    def _settings_as(self, config_class: type[Settings]) -> dict[str, Any]:
        """Return the snapshot as today's settings write it; a setting that is younger than the run has its default."""
        fields = config_class.fields()
        settings: dict[str, Any] = {name: field.default for name, field in fields.items()}
        for name, value in self.config().items():
            settings[name] = fields[name].read(value, f"{self.folder / 'config.yaml'}") if name in fields else value
        return config_class.to_plain(settings)

    def environment(self) -> dict[str, Any]:
        """Read what it ran on; empty if that was not written."""
        path = self.folder / "environment.yaml"
        return _read_yaml(path) if path.is_file() else {}

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
        """Read the lines of metrics.jsonl; a torn last line, left by a kill, is skipped."""
        path = self.folder / "metrics.jsonl"
        # A kill tore whatever follows the last line break.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            hint = "delete the broken line; the checkpoints hold what it said"
            raise ArtifactError(f"{path} is damaged: {error}", hint=hint) from None

    def last_step(self) -> int:
        """Return the last step in metrics.jsonl; 0 if there is none."""
        return max((line["step"] for line in self.metrics()), default=0)

    def forget_after(self, step: int, *, evaluation: bool = False) -> None:
        """Drop the lines of metrics.jsonl about later steps, which will be repeated.

        Args:
            evaluation: the evaluation of `step` itself will be repeated too.
        """
        if not self.is_writer:
            return
        repeated = [line for line in self.metrics() if evaluation and line["step"] == step and "val" in line]
        lines = [json_text(line) + "\n" for line in self.metrics() if line["step"] <= step and line not in repeated]
        write_text(self.folder / "metrics.jsonl", "".join(lines))

    def write_json(self, name: str, value: dict[str, Any] | list[Any]) -> None:
        """Write best.json, results.json and similar files, whole or not at all."""
        if not self.is_writer:
            return
        write_text(self.folder / name, json_text(value, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one of them back; empty if it does not exist.

        Raises:
            ArtifactError: it is damaged.
        """
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if not isinstance(value, dict):
                raise ValueError(f"it holds a {type(value).__name__}")
        except ValueError as error:
            hint = "remove it and run the same command again"
            raise ArtifactError(f"{path} is damaged: {error}", hint=hint) from None
        return value

    def _reopen(self, config: Settings) -> None:
        """Continue a finished run under other settings; remove the results, which describe what it was."""
        for name in ("finished.json", "README.md", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        for path in (path for kind in RESULT_STEMS for path in self.folder.glob(f"{kind}*")):
            path.unlink()
        shutil.rmtree(self.folder / "plots", ignore_errors=True)
        write_text(self.folder / "config.yaml", config.to_yaml())

    def finish(self, facts: dict[str, Any]) -> None:
        """Mark the run as finished: no trainer writes into it again."""
        self.write_json("finished.json", facts)

    def mirror(self, *, required: bool = False) -> None:
        """Copy new files to a remote --runs-dir; without one, do nothing.

        Args:
            required: raise a failure of the network; otherwise warn, and let the next call try again.
        """
        runs_dir = Location(self.config().get("runs_dir", "")) if self.is_writer else Location("")
        if not runs_dir.is_remote:
            return
        try:
            self._mirror(Remote(mirror_location(runs_dir, self.name, str(self.config().get("tune", "run")))))
        except NetworkError as error:
            if required:
                hint = f"the run is complete in {self.folder}; vlkit eval --run {self.folder} uploads it again"
                raise NetworkError(error.message, hint=hint) from None
            console.warn(f"not yet uploaded: {error.message}")

    def _mirror(self, remote: Remote) -> None:
        zone = "/experiments/" in remote.location and remote.location.name.startswith("run_")
        files = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*"))}
        files = {name: path for name, path in files.items() if path.is_file() and not _is_hidden(name)}
        files = {(zone_path(name) if zone else name): path for name, path in files.items()}
        hashes = {name: file_sha256(path) for name, path in files.items()}
        listing = remote.listing()
        known = remote.read_manifest(MANIFEST, listing) if MANIFEST in listing else {}
        remote.upload(
            {name: path for name, path in files.items() if known.get(name) != hashes[name] or name not in listing}
        )
        remote.write_manifest(MANIFEST, hashes)
        temporary = ("checkpoints/", "plots/", "report.html", "stopped.json", *RESULT_STEMS)
        remote.remove([name for name in listing if name.startswith(temporary) and name not in files])

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out while the block runs. The lock dies with the process that holds it.

        Raises:
            UsageError: another process has it; names that process.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a+", encoding="utf-8") as file:
            if not _try_lock(file):
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UsageError(f"{self.folder} is in use by {owner}", hint="wait for it, or give another --name")
            _locks.append(file)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
            file.flush()
            try:
                yield
            finally:
                _locks.remove(file)


def _try_lock(file: IO[str]) -> bool:
    """Return whether the lock could be taken. `vlkit runs`, which tests it, holds it for an instant: try again."""
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.03)
    return False


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of a run; one that vlkit wrote and cannot read is damaged."""
    try:
        return read_yaml(path)
    except UsageError as error:
        raise ArtifactError(f"damaged: {error.message}", hint="restore the file from a copy of the run") from None


def _release_locks() -> None:
    """Close the locks in a forked process, such as a loader's: it may outlive a kill of this one."""
    for file in _locks:
        os.close(file.fileno())
    _locks.clear()


_locks: list[IO[str]] = []
os.register_at_fork(after_in_child=_release_locks)


def local_runs_dir(runs_dir: Location) -> Path:
    """Return the folder that runs are written to: a remote --runs-dir gets copies of runs/."""
    return Path("runs") if runs_dir.is_remote else runs_dir.path


def resolve_run(runs_dir: Location, name: str, *, extending: bool = False) -> Run:
    """Return the run folder to train into: a new one, or an unfinished one.

    Args:
        extending: return a finished one too.

    Raises:
        UsageError: the name belongs to a finished run, or to something that is not a run.
    """
    run = Run(local_runs_dir(Location(runs_dir)) / name)
    if run.folder.exists() and not run.folder.is_dir():
        raise UsageError(f"{run.folder} is a file", hint="choose another --name")
    contents = {path.name for path in run.folder.iterdir()} if run.folder.exists() else set()
    contents = {entry for entry in contents if not entry.startswith(".")}
    if not run.started and contents - {"environment.yaml"}:
        raise UsageError(f"{run.folder} exists and is not a run", hint="choose another --name")
    if extending and not run.started:
        raise UsageError(f"--extend-to: no such run: {run.folder}", hint=_runs_hint(run.folder.parent))
    if run.finished and not extending:
        hint = f"give another --name, continue it with --extend-to STEPS, or measure it: vlkit eval --run {run.folder}"
        raise UsageError(f"the run {run.folder} is finished", hint=hint)
    return run


def refuse_locked(runs_dir: Location, name: str | None) -> None:
    """Refuse a run that another process trains, before torch is loaded; `lock` decides for good.

    Raises:
        UsageError: names the owner.
    """
    run = Run(local_runs_dir(Location(runs_dir)) / (name or ""))
    # Among the processes of torchrun only the first locks.
    if name and (run.folder / ".lock").is_file() and os.environ.get("RANK", "0") == "0":
        with run.lock():
            pass


def default_run_name(command: str, data: Location) -> str:
    """Return the name of a run that was given none: date, time, command and data."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{command}-{data.name}"


def mirror_location(runs_dir: Location, name: str, kind: str) -> Location:
    """Return where a run is copied to: in a lake's zone, which is a whole bucket, to experiments/ by its kind."""
    return runs_dir / "experiments" / kind / f"run_{name}" if runs_dir.is_bucket else runs_dir / name


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def zone_path(name: str) -> str:
    """Return the name of a run's file under the folders of a lake's zone."""
    folders = {"metrics.jsonl": "logs", "environment.yaml": "logs", "finished.json": "logs"}
    results = ("results", "queries", "report", "plots/")
    kind = "results" if name.startswith(results) else "examples" if name.startswith("examples") else folders.get(name)
    return f"{kind}/{name}" if kind else name


def _runs_hint(runs_dir: Path) -> str:
    if not any(runs_dir.glob("*/config.yaml")):
        runs_dir = Path("runs")
    known = sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))
    if not known:
        return f"there are no runs in {runs_dir}; train one: vlkit train-retrieval"
    return f"runs in {runs_dir}: {', '.join(known[-8:])}"


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
    """Return the commit of the working directory, if it is a git checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
