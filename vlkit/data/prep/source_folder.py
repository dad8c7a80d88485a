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

from vlkit import console
from vlkit.data.images.decode import IMAGE_SUFFIXES
from vlkit.errors import DataError
from vlkit.remote import RemoteFile, Remote
from vlkit.storage import Location

LEADS_OUT = "the path leads out of the source"
LINK_LEADS_OUT = "the link leads out of the source"
PREPARED = "a prepared folder, not part of the raw one"
JUNK = frozenset(["__MACOSX", "Thumbs.db", "desktop.ini"])


class SourceFolder:
    """A raw folder.

    Args:
        location: where it lies.
        without: folders inside it that are not part of it, such as prep's own output.
        what: the setting that names it, for messages.

    Attributes:
        refused: name -> why a file or folder below is not read: links that lead out or nowhere, closed folders.

    Raises:
        DataError: it is missing, a file, or empty.
    """

    def __init__(self, location: Location, without: Collection[Location] = (), what: str = "--source") -> None:
        self.location = Location(location.rstrip("/")) if location.is_remote else location.absolute
        self.remote = Remote(self.location) if self.location.is_remote else None
        self._without = {str(each.absolute).rstrip("/") for each in without}
        self._fetched: dict[str, Path] = {}
        self.refused: dict[str, str] = {}
        if self.remote is None:
            self._check_local(location, what)

    def _check_local(self, given: Location, what: str) -> None:
        path = self.location.path
        if not path.exists():
            hint = f"{what} DIR names an existing folder"
            hint += "; vlkit sample recipes raw/ makes one to try" if what == "--source" else ""
            raise DataError(f"no such folder: {given}", hint=hint)
        if not path.is_dir():
            raise DataError(f"{given} is a file; {what} wants a folder")
        if not any(path.iterdir()):
            raise DataError(f"{given} is empty")

    @property
    def root(self) -> Path:
        """The local folder, without links and dots."""
        return self.location.path

    @cached_property
    def files(self) -> dict[str, RemoteFile]:
        """name -> size and stamp of every file, sorted by name; hidden ones are left out."""
        if self.remote is None:
            return dict(sorted(self._walk(self.root, "")))
        console.say(f"listing {self.location}")
        found = self.remote.listing()
        if not found:
            raise DataError(f"{self.location} is empty")
        out = tuple(f"{each}/" for each in self._without)
        found = {
            name: entry
            for name, entry in found.items()
            if not _hidden(name) and not f"{self.location}/{name}".startswith(out)
        }
        inner = [folder for folder in {name.rpartition("/")[0] for name in found} if _prepared(folder, found)]
        self.refused |= dict.fromkeys(inner, PREPARED)
        return {name: found[name] for name in found if not name.startswith(tuple(f"{folder}/" for folder in inner))}

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, RemoteFile]]:
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            self.refused[prefix.rstrip("/")] = f"the folder cannot be read: {error.strerror}"
            return
        for entry in entries:
            name = prefix + entry.name
            if _hidden(entry.name):
                continue
            if reason := self._not_read(entry):
                self.refused[name] = reason
            elif entry.is_dir(follow_symlinks=False):
                if os.path.realpath(entry.path) in self._without:
                    continue
                if {"pairs.parquet", "data.yaml"} <= set(_names(entry.path)):
                    self.refused[name] = PREPARED
                else:
                    yield from self._walk(Path(entry.path), name + "/")
            else:
                stat = entry.stat()
                yield name, RemoteFile(stat.st_size, str(stat.st_mtime_ns))

    def _not_read(self, entry: os.DirEntry[str]) -> str | None:
        """Why an entry of a folder is passed over."""
        try:
            entry.name.encode("utf-8")
        except UnicodeEncodeError:
            return "its name is not UTF-8"
        if entry.is_symlink():
            if not self._within(entry.path):
                return LINK_LEADS_OUT
            if not os.path.exists(entry.path):
                return "the link leads nowhere"
            return "a link to a folder inside the source: not followed" if entry.is_dir() else None
        return None if entry.is_dir() or entry.is_file() else "neither a file nor a folder"

    def _within(self, path: str | Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.root)

    @cached_property
    def pictures(self) -> list[str]:
        """Names that may be pictures: by their suffix, or without one."""
        return [name for name in self.files if PurePosixPath(name).suffix.lower() in {*IMAGE_SUFFIXES, ""}]

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
            return inside[0]
        for candidate in inside:
            if candidate in self.files:
                return candidate
        for candidate in inside:
            above = [candidate, *(str(parent) for parent in PurePosixPath(candidate).parents)]
            reason = next((self.refused[each] for each in above if each in self.refused), None)
            if self.remote is None and (self.root / candidate).is_file() and self._within(self.root / candidate):
                # Through a link that leads to another place inside; where names have no case, by their own spelling.
                return self._folded_name(candidate) or candidate
            if reason is not None:
                raise DataError(reason)
        return self._by_other_spelling(inside)

    def _folded_name(self, candidate: str) -> str | None:
        found = self._spellings[_folded.__name__].get(_folded(candidate), [])
        return found[0] if len(found) == 1 else None

    def _relative(self, name: str) -> str:
        if "://" in name:
            if not name.startswith(f"{self.location}/"):
                raise DataError("a URL: pictures are read from the source only")
            return name.removeprefix(f"{self.location}/")
        if not name.startswith("/") or self.remote is not None:
            return name
        for spelt in (os.path.normpath(name), os.path.realpath(name)):
            if Path(spelt).is_relative_to(self.root):
                return Path(spelt).relative_to(self.root).as_posix()
        raise DataError(LEADS_OUT)

    def _by_other_spelling(self, candidates: Sequence[str]) -> str:
        for spelling in (_folded, _without_suffix, _last_part, _stem):
            for candidate in candidates:
                if spelling in (_last_part, _stem) and "/" in candidates[-1]:
                    continue
                found = self._spellings[spelling.__name__].get(spelling(candidate), [])
                if len(found) == 1:
                    return found[0]
                if found:
                    raise DataError("several pictures have this name", hint=f"{found[0]}, {found[1]}")
        raise DataError("no such image")

    @cached_property
    def _spellings(self) -> dict[str, dict[str, list[str]]]:
        tables: dict[str, dict[str, list[str]]] = {}
        for spelling in (_folded, _without_suffix, _last_part, _stem):
            table = tables.setdefault(spelling.__name__, defaultdict(list))
            for name in self.pictures:
                table[spelling(name)].append(name)
        return tables

    def has_stem(self, stem: str) -> bool:
        """There is a picture of this name without its suffix."""
        return bool(self._spellings[_without_suffix.__name__].get(_folded(stem)))

    def path(self, name: str) -> Path:
        """The local file: itself, or its copy in the cache."""
        if self.remote is None:
            if name not in self.files and not self._within(self.root / name):
                raise DataError(f"{name}: {LINK_LEADS_OUT}")
            return self.root / name
        if name not in self.files:
            raise DataError(f"no such image: {self.location}/{name}")
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
        return self.root.as_posix().rstrip("/") + "/"


def _prepared(folder: str, names: Collection[str]) -> bool:
    return bool(folder) and f"{folder}/pairs.parquet" in names and f"{folder}/data.yaml" in names


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


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
    return str(path.with_suffix("")) if path.suffix in IMAGE_SUFFIXES else str(path)


def _last_part(name: str) -> str:
    return PurePosixPath(_folded(name)).name


def _stem(name: str) -> str:
    return PurePosixPath(_without_suffix(name)).name


def path_id(name: str) -> str:
    """Stands for a picture's hash where pictures are not read: 20 hex digits of the hash of its name."""
    return hashlib.sha256(b"path\0" + os.fsencode(name)).hexdigest()[:20]
