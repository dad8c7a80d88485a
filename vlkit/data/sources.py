"""A raw folder, local or behind a URL: its files by name, and no name that leads out of it.

Names are relative to the folder, with `/` between their parts. A table may spell a picture's name in its own way: with
backslashes, without its suffix or its folder, with other Unicode or other capitals; `locate` finds the file that is
meant, if there is just one.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from vlkit.data.images import SUFFIXES
from vlkit.errors import DataError
from vlkit.remote import Entry, Remote
from vlkit.storage import Location

LEADS_OUT = "the path leads out of the source"
LINK_LEADS_OUT = "the link leads out of the source"
JUNK = frozenset(["__MACOSX", "Thumbs.db", "desktop.ini"])


class Source:
    """A raw folder.

    Args:
        location: where it lies.
        without: local folders inside it that are not part of it, such as prep's own output.

    Raises:
        DataError: it is missing, a file, or empty.
    """

    def __init__(self, location: str, without: Collection[Path] = ()) -> None:
        self.location = Location(location)
        self.remote = Remote(self.location) if self.location.is_remote else None
        self._without = [os.path.realpath(path) for path in without]
        self._fetched: dict[str, Path] = {}
        self.outside: set[str] = set()
        self.closed: list[OSError] = []
        if self.remote is None:
            self._check_local()

    def _check_local(self) -> None:
        path = self.location.path
        if not path.exists():
            hint = "--source DIR names the raw folder; vlkit sample recipes raw/ makes one to try"
            raise DataError(f"no such folder: {path}", hint=hint)
        if path.is_dir() and not any(path.iterdir()):
            raise DataError(f"{path} is empty")

    @property
    def root(self) -> Path:
        """The local folder."""
        return self.location.path

    @cached_property
    def files(self) -> dict[str, Entry]:
        """name -> size and stamp of every file, sorted by name; hidden ones are left out."""
        if self.remote is not None:
            found = self.remote.listing()
            if not found:
                raise DataError(f"{self.location} is empty")
            return {name: entry for name, entry in found.items() if not _hidden(name)}
        return dict(sorted(self._walk(self.root, "")))

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, Entry]]:
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            self.closed.append(error)
            return
        for entry in entries:
            name = prefix + entry.name
            if _hidden(entry.name):
                continue
            if entry.is_symlink() and not self._within(entry.path):
                self.outside.add(name)
            elif entry.is_dir(follow_symlinks=False):
                if os.path.realpath(entry.path) not in self._without:
                    yield from self._walk(Path(entry.path), name + "/")
            elif entry.is_file():
                stat = entry.stat()
                yield name, Entry(stat.st_size, str(stat.st_mtime_ns))

    def _within(self, path: str | Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root))

    @cached_property
    def pictures(self) -> list[str]:
        """Names that may be pictures: by their suffix, or without one."""
        return [name for name in self.files if PurePosixPath(name).suffix.lower() in {*SUFFIXES, ""}]

    @cached_property
    def folders(self) -> dict[str, list[str]]:
        """folder -> the pictures directly in it; the source itself is ""."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.pictures:
            found[name.rpartition("/")[0]].append(name)
        return found

    def locate(self, name: str, beside: str = "", *, listed: bool = True) -> str:
        """The file that a table means by `name`.

        Args:
            beside: folder of the table, tried first.
            listed: look for it; otherwise only see that the name stays inside.

        Raises:
            DataError: why there is no such file, in words that fit a row of rejects.csv.
        """
        name = self._relative(name.strip())
        candidates = [_joined(folder, each) for each in (name, name.replace("\\", "/")) for folder in (beside, "")]
        inside = [candidate for candidate in candidates if candidate is not None]
        if not inside:
            raise DataError(LEADS_OUT)
        if not listed:
            return inside[-1]
        for candidate in inside:
            if candidate in self.files:
                return candidate
        for candidate in inside:
            if any(candidate == out or candidate.startswith(out + "/") for out in self.outside):
                raise DataError(LINK_LEADS_OUT)
            if self.remote is None and (self.root / candidate).is_file():
                # Through a link that leads to another place inside.
                return candidate
        return self._by_other_spelling(inside)

    def _relative(self, name: str) -> str:
        if not name.startswith("/") or self.remote is not None:
            if "://" in name:
                raise DataError("a URL: pictures are read from the source only")
            return name
        try:
            return Path(os.path.normpath(name)).relative_to(os.path.abspath(self.root)).as_posix()
        except ValueError:
            raise DataError(LEADS_OUT) from None

    def _by_other_spelling(self, candidates: Sequence[str]) -> str:
        for spelling in (_folded, _without_suffix, _last_part, _stem):
            for candidate in candidates:
                if spelling in (_last_part, _stem) and "/" in candidates[-1]:
                    continue
                found = self._spellings[spelling.__name__].get(spelling(candidate), [])
                if len(found) == 1:
                    return found[0]
                if found:
                    raise DataError(f"{len(found)} pictures have this name, for example {found[0]} and {found[1]}")
        raise DataError("no such picture")

    @cached_property
    def _spellings(self) -> dict[str, dict[str, list[str]]]:
        tables: dict[str, dict[str, list[str]]] = {}
        for spelling in (_folded, _without_suffix, _last_part, _stem):
            table = tables.setdefault(spelling.__name__, defaultdict(list))
            for name in self.pictures:
                table[spelling(name)].append(name)
        return tables

    def locate_stem(self, stem: str) -> str | None:
        """The one picture of this name without its suffix, if there is one."""
        found = self._spellings[_without_suffix.__name__].get(_folded(stem), [])
        return found[0] if found else None

    def path(self, name: str) -> Path:
        """The local file: itself, or its copy in the cache."""
        if self.remote is None:
            return self.root / name
        if name not in self._fetched:
            self.fetch([name])
        return self._fetched[name]

    def fetch(self, names: Sequence[str]) -> None:
        """Bring these files here, many at a time; local ones are here."""
        if self.remote is not None:
            self._fetched |= self.remote.fetch({name: self.files[name] for name in names if name not in self._fetched})

    def address(self, name: str) -> str:
        """What stands in the pairs table: an absolute path or a URL."""
        return f"{self.location.rstrip('/')}/{name}" if self.remote is not None else (self._absolute + name)

    @cached_property
    def _absolute(self) -> str:
        return self.root.absolute().as_posix().rstrip("/") + "/"


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part in JUNK for part in name.split("/"))


def _joined(folder: str, name: str) -> str | None:
    """folder/name without dots; None where it leads out."""
    parts: list[str] = []
    for part in f"{folder}/{name}".split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts) or None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _without_suffix(name: str) -> str:
    path = PurePosixPath(_folded(name))
    return str(path.with_suffix("")) if path.suffix in SUFFIXES else str(path)


def _last_part(name: str) -> str:
    return PurePosixPath(_folded(name)).name


def _stem(name: str) -> str:
    return PurePosixPath(_without_suffix(name)).name


def path_id(name: str) -> str:
    """Stands for a picture's hash where pictures are not read: 20 hex digits of the hash of its name."""
    return hashlib.sha256(b"path\0" + os.fsencode(name)).hexdigest()[:20]
