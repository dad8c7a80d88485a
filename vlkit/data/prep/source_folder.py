"""List a raw folder, local or behind a URL, and find the image that a table names; no name leads out of the folder.

Names are relative to the folder, with `/` between their parts. A table may spell an image's name in its own way: with
backslashes, without suffix or folder, in other Unicode or other capitals. `locate` finds the file if only one fits.
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
from vlkit.remote import Remote, RemoteFile
from vlkit.storage import Location

PATH_LEADS_OUT = "the path leads out of the source"
LINK_LEADS_OUT = "the link leads out of the source"
PREPARED_FOLDER = "a prepared folder, not part of the raw one"
SAMPLE_HINT = "; vlkit sample recipes raw/ makes one to try"
JUNK_NAMES = frozenset(["__MACOSX", "Thumbs.db", "desktop.ini"])


def _empty_folder(location: Location, flag: str) -> DataError:
    """Return the error of a folder without a file."""
    hint = f"{flag} DIR names a folder that holds them{SAMPLE_HINT if flag == '--source' else ''}"
    return DataError(f"no images or tables in {str(location).rstrip('/')}/", hint=hint)


class SourceFolder:
    """A raw folder.

    Args:
        location: its path or URL.
        exclude: folders inside it that are not part of it, such as prep's own output.
        flag: the setting that names it, for messages.

    Attributes:
        skipped: name -> why a file or folder is not read: a link that leads out or nowhere, a folder without access.

    Raises:
        DataError: it is missing, a file, or empty.
    """

    def __init__(self, location: Location, exclude: Collection[Location] = (), flag: str = "--source") -> None:
        self.location = Location(location.rstrip("/")) if location.is_remote else location.absolute
        self.remote = Remote(self.location) if self.location.is_remote else None
        self._flag = flag
        self._exclude = {str(folder.absolute).rstrip("/") for folder in exclude}
        self._fetched: dict[str, Path] = {}
        self.skipped: dict[str, str] = {}
        if self.remote is None:
            self._check_local(location, flag)

    def _check_local(self, location: Location, flag: str) -> None:
        path = self.location.path
        if not path.exists():
            hint = f"{flag} DIR names an existing folder{SAMPLE_HINT if flag == '--source' else ''}"
            raise DataError(f"no such folder: {location}", hint=hint)
        if not path.is_dir():
            raise DataError(f"{location} is a file; {flag} wants a folder")
        if not any(path.iterdir()):
            raise _empty_folder(location, flag)

    @property
    def root(self) -> Path:
        """The local folder, without links and dots."""
        return self.location.path

    @cached_property
    def files(self) -> dict[str, RemoteFile]:
        """The name -> size and stamp of every file, sorted by name; hidden ones are left out."""
        if self.remote is None:
            return dict(sorted(self._walk(self.root, "")))
        console.say(f"listing {self.location}")
        files = self.remote.listing()
        if not files:
            raise _empty_folder(self.location, self._flag)
        excluded = tuple(f"{folder}/" for folder in self._exclude)
        files = {
            name: entry
            for name, entry in files.items()
            if not _is_hidden(name) and not f"{self.location}/{name}".startswith(excluded)
        }
        prepared = [folder for folder in {name.rpartition("/")[0] for name in files} if _is_prepared(folder, files)]
        self.skipped |= dict.fromkeys(prepared, PREPARED_FOLDER)
        inside = tuple(f"{folder}/" for folder in prepared)
        return {name: entry for name, entry in files.items() if not name.startswith(inside)}

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, RemoteFile]]:
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            self.skipped[prefix.rstrip("/")] = f"the folder cannot be read: {error.strerror}"
            return
        for entry in entries:
            name = prefix + entry.name
            if _is_hidden(entry.name):
                continue
            if reason := self._skip_reason(entry):
                self.skipped[name] = reason
            elif entry.is_dir(follow_symlinks=False):
                if os.path.realpath(entry.path) in self._exclude:
                    continue
                if {"pairs.parquet", "data.yaml"} <= set(_list_names(entry.path)):
                    self.skipped[name] = PREPARED_FOLDER
                else:
                    yield from self._walk(Path(entry.path), name + "/")
            else:
                stat = entry.stat()
                yield name, RemoteFile(stat.st_size, str(stat.st_mtime_ns))

    def _skip_reason(self, entry: os.DirEntry[str]) -> str | None:
        """Return why an entry of a folder is skipped; None for files and folders to read."""
        try:
            entry.name.encode("utf-8")
        except UnicodeEncodeError:
            return "its name is not UTF-8"
        if entry.is_symlink():
            if not self._contains(entry.path):
                return LINK_LEADS_OUT
            if not os.path.exists(entry.path):
                return "the link leads nowhere"
            return "a link to a folder inside the source: not followed" if entry.is_dir() else None
        return None if entry.is_dir() or entry.is_file() else "neither a file nor a folder"

    def _contains(self, path: str | Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self.root)

    @cached_property
    def image_names(self) -> list[str]:
        """Names of files that may be images: with an image's suffix, or without any."""
        return [name for name in self.files if PurePosixPath(name).suffix.lower() in {*IMAGE_SUFFIXES, ""}]

    @cached_property
    def images_by_folder(self) -> dict[str, list[str]]:
        """The images directly in each folder; the source itself is ""."""
        folders: dict[str, list[str]] = defaultdict(list)
        for name in self.image_names:
            folders[name.rpartition("/")[0]].append(name)
        return folders

    def locate(self, name: str, beside: str = "", *, must_exist: bool = True) -> str:
        """Return the file that a table means by `name`.

        Args:
            beside: folder of the table, tried first.
            must_exist: look the file up; False only checks that the name stays inside the source.

        Raises:
            DataError: why there is no such file, in words that fit a row of rejects.csv.
        """
        name = self._relative(name.strip())
        candidates = [_join(folder, path) for path in (name, name.replace("\\", "/")) for folder in (beside, "")]
        inside = [candidate for candidate in candidates if candidate is not None]
        if not inside:
            raise DataError(PATH_LEADS_OUT)
        if not must_exist:
            return inside[0]
        for candidate in inside:
            if candidate in self.files:
                return candidate
        for candidate in inside:
            levels = [candidate, *(str(parent) for parent in PurePosixPath(candidate).parents)]
            reason = next((self.skipped[level] for level in levels if level in self.skipped), None)
            if self.remote is None and (self.root / candidate).is_file() and self._contains(self.root / candidate):
                # Reached through a link inside, or on a disk that ignores case: then by the name that the disk has.
                return self._name_on_disk(candidate) or candidate
            if reason is not None:
                raise DataError(reason)
        return self._locate_by_spelling(inside)

    def _name_on_disk(self, candidate: str) -> str | None:
        names = self._spellings[_fold_case.__name__].get(_fold_case(candidate), [])
        return names[0] if len(names) == 1 else None

    def _relative(self, name: str) -> str:
        if "://" in name:
            if not name.startswith(f"{self.location}/"):
                raise DataError("a URL: images are read only from the source")
            return name.removeprefix(f"{self.location}/")
        if not name.startswith("/") or self.remote is not None:
            return name
        for path in (os.path.normpath(name), os.path.realpath(name)):
            if Path(path).is_relative_to(self.root):
                return Path(path).relative_to(self.root).as_posix()
        raise DataError(PATH_LEADS_OUT)

    def _locate_by_spelling(self, candidates: Sequence[str]) -> str:
        for spelling in (_fold_case, _strip_suffix, _last_part, _stem):
            for candidate in candidates:
                if spelling in (_last_part, _stem) and "/" in candidates[-1]:
                    continue
                names = self._spellings[spelling.__name__].get(spelling(candidate), [])
                if len(names) == 1:
                    return names[0]
                if names:
                    raise DataError("several images have this name", hint=f"{names[0]}, {names[1]}")
        raise DataError("no such image")

    @cached_property
    def _spellings(self) -> dict[str, dict[str, list[str]]]:
        """The images by the name that each way of spelling gives them."""
        spellings: dict[str, dict[str, list[str]]] = {}
        for spelling in (_fold_case, _strip_suffix, _last_part, _stem):
            names = spellings.setdefault(spelling.__name__, defaultdict(list))
            for name in self.image_names:
                names[spelling(name)].append(name)
        return spellings

    def has_stem(self, stem: str) -> bool:
        """Return whether there is an image of this name, whatever its suffix."""
        return bool(self._spellings[_strip_suffix.__name__].get(_fold_case(stem)))

    def local_path(self, name: str) -> Path:
        """Return the local file: itself, or its copy in the cache."""
        if self.remote is None:
            if name not in self.files and not self._contains(self.root / name):
                raise DataError(f"{name}: {LINK_LEADS_OUT}")
            return self.root / name
        if name not in self.files:
            raise DataError(f"no such image: {self.location}/{name}")
        if name not in self._fetched:
            self.fetch([name])
        return self._fetched[name]

    def fetch(self, names: Sequence[str]) -> None:
        """Copy remote files into the cache, many at a time; local ones stay where they are."""
        if self.remote is not None:
            self._fetched |= self.remote.fetch({name: self.files[name] for name in names if name not in self._fetched})

    def address(self, name: str) -> str:
        """Return what the pairs table holds for an image: an absolute path or a URL."""
        return f"{self.location.rstrip('/')}/{name}" if self.remote is not None else (self._prefix + name)

    @cached_property
    def _prefix(self) -> str:
        return self.root.as_posix().rstrip("/") + "/"


def _is_prepared(folder: str, names: Collection[str]) -> bool:
    return bool(folder) and f"{folder}/pairs.parquet" in names and f"{folder}/data.yaml" in names


def _list_names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in JUNK_NAMES for part in name.split("/"))


def _join(folder: str, name: str) -> str | None:
    """Return folder/name without dots; None if it leads out."""
    parts: list[str] = []
    for part in f"{folder}/{name}".split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts) or None


def _fold_case(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _strip_suffix(name: str) -> str:
    path = PurePosixPath(_fold_case(name))
    return str(path.with_suffix("")) if path.suffix in IMAGE_SUFFIXES else str(path)


def _last_part(name: str) -> str:
    return PurePosixPath(_fold_case(name)).name


def _stem(name: str) -> str:
    return PurePosixPath(_strip_suffix(name)).name


def path_id(name: str) -> str:
    """Return 20 hex digits of the hash of an image's name, which stand for its content where images are not opened."""
    return hashlib.sha256(b"path\0" + os.fsencode(name)).hexdigest()[:20]
