"""Locations, and files and folders that appear complete or not at all.

The content is written to a temporary path, flushed to disk, and renamed. A reader sees the old state or the new one,
never half of it, even after a kill. What a kill leaves behind begins with a dot and ends in `.part`.
"""

from __future__ import annotations

import ctypes
import glob
import json
import math
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlkit import fault_injection
from vlkit.errors import UsageError


class Location(str):
    """The location of a folder or file: a local path, or a URL such as s3://bucket/prefix."""

    @property
    def is_remote(self) -> bool:
        """True for a URL, which `remote.py` reads and writes."""
        return re.match(r"[a-z0-9+.]+://", self) is not None

    @property
    def path(self) -> Path:
        """The local path."""
        assert not self.is_remote, self
        return Path(self)

    @property
    def name(self) -> str:
        """The last part; the bucket, if there is no prefix."""
        return self.rstrip("/").rpartition("/")[2] if self.is_remote else self.path.resolve().name

    @property
    def absolute(self) -> Location:
        """The same location, from any working directory."""
        return self if self.is_remote else Location(self.path.resolve())

    @property
    def is_bucket(self) -> bool:
        """True for a whole bucket, such as a zone of a lake."""
        return self.is_remote and "/" not in self.split("://", 1)[1].strip("/")

    @property
    def parent(self) -> Location:
        """The folder that contains it."""
        return Location(self.rstrip("/").rpartition("/")[0] if self.is_remote else self.path.parent)

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.rstrip('/')}/{name}" if self.is_remote else self.path / name)


def cache_dir() -> Path:
    """Return the folder of what vlkit can compute or download again; it may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlkit"


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return path if path.exists() else nearest_existing(path.parent) if path.parent != path else Path()


def format_bytes(count: float) -> str:
    """Return a number of bytes as people read it, such as "1.2 GB"."""
    for unit, size in (("GB", 2**30), ("MB", 2**20), ("kB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def refuse_unwritable(folder: Path, flag: str) -> None:
    """Refuse, before any work starts, a folder that cannot be written or created.

    Args:
        flag: what the user should change.

    Raises:
        UsageError: names the folder that denies it.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", hint=f"choose another {flag}")
    existing = nearest_existing(folder.resolve())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be written: no permission in {existing}", hint=f"choose another {flag}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` if the block succeeds, else remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o666 & ~_umask())
        flush(aside, path.name)
        fault_injection.fault_point("before rename", path)
        os.replace(aside, path)
        fault_injection.fault_point("after rename", path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Do the same for a folder. The old folder at `path` stays until the new one is complete; then they are swapped."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f".{path.name}.{socket.gethostname()}-"
    _remove_abandoned(path.parent, owner)
    aside = Path(tempfile.mkdtemp(prefix=f"{owner}{os.getpid()}.", suffix=".part", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        for content in sorted(aside.rglob("*")):
            if not content.is_symlink():
                flush(content)
        flush(aside, path.name)
        fault_injection.fault_point("before rename", path)
        if path.exists():
            _exchange(aside, path)
        else:
            os.rename(aside, path)
        fault_injection.fault_point("after rename", path)
        flush(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def atomic_update(path: Path, without: Collection[str]) -> Iterator[Path]:
    """Do the same for a folder that keeps its contents, except for the entries named `without`, which are rewritten.

    Kept files are linked, not copied, and must not be written into.
    """

    def ignore(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if os.path.samefile(folder, path) and name in without]

    with atomic_folder(path) as aside:
        shutil.copytree(path, aside, symlinks=True, ignore=ignore, copy_function=_link_or_copy, dirs_exist_ok=True)
        yield aside


def _link_or_copy(source: str, target: str) -> None:
    """Hard-link a file; copy it where the system cannot link."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _remove_abandoned(parent: Path, owner: str) -> None:
    """Remove the temporary folders of killed processes of this machine."""
    for folder in parent.glob(f"{glob.escape(owner)}*.part"):
        process = folder.name.removeprefix(owner).split(".")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders: atomically where the system can (Linux, macOS), else by three renames."""
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, which macOS calls RENAME_SWAP
    names = (os.fsencode(one), os.fsencode(other))
    system = ctypes.CDLL(None, use_errno=True)
    if hasattr(system, "renameat2") and system.renameat2(here, names[0], here, names[1], swap) == 0:
        return
    if hasattr(system, "renamex_np") and system.renamex_np(*names, swap) == 0:
        return
    old = one.with_suffix(".old")
    os.rename(other, old)
    os.rename(one, other)
    os.rename(old, one)


def write_text(path: Path, text: str) -> None:
    """Write a small text file in UTF-8, complete or not at all."""
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def flush(path: Path, name: str | None = None) -> None:
    """Flush a file or a folder to disk, so that no later rename overtakes its content.

    Args:
        name: its final name, for the fault point.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        fault_injection.fault_point("after fsync", Path(name or path.name))
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return JSON that every parser reads: non-finite numbers become null, paths become strings."""
    return json.dumps(_replace_non_finite(value), ensure_ascii=False, allow_nan=False, indent=indent, default=str)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
