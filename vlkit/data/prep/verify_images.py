"""Many pictures checked: on all cores, and each only once as long as it does not change.

What was found of a picture is kept in a cache under its place, size and modification time (a remote one's etag), so a
second prep reads only what is new, also after one that was killed half way.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path

from vlkit import console
from vlkit.data.images.decode import ImageInfo, UnreadableFileError, verify_image
from vlkit.data.parallel import usable_cores, map_in_order
from vlkit.data.prep.source_folder import SourceFolder
from vlkit.errors import DataError
from vlkit.storage import cache_dir

# Fewer pictures than this are checked sooner by one process than a second one starts.
WORTH_PROCESSES = 400
CHUNK = 64
# A file changed this recently may be changed again without its time moving on.
SETTLED_NS = 50_000_000
# Part of every key: what this program, or the library that decodes, makes of a picture may change with them.
RULES = f"1 pillow {metadata.version('pillow')}"


class Unusable(str):
    """Why a picture cannot be used. `passing`: it may be usable the next time, and nothing is remembered of it."""

    passing = False


class TemporarilyUnusable(Unusable):
    """A file that could not be read."""

    passing = True


Finding = ImageInfo | Unusable


class VerifiedImages:
    """What is known of pictures: name -> `ImageInfo`, or the reason why it cannot be used; and how many were read."""

    def __init__(self) -> None:
        self.of: dict[str, Finding] = {}
        self.read = 0


def verify_images(source: SourceFolder, names: Sequence[str], *, workers: int | None = None, rehash: bool = False) -> VerifiedImages:
    """Check pictures of a source, those that the cache knows excepted.

    Args:
        workers: processes; None: as many as there are cores, where there are enough pictures to pay for them.
        rehash: trust no cache; read everything.
    """
    found = VerifiedImages()
    with _opened_cache() as cache:
        if not rehash:
            found.of.update(cache.known(source, names))
        new = [name for name in names if name not in found.of]
        with console.progress("checking pictures", len(new)) as bar:
            for some in _checked(source, new, workers):
                cache.keep(source, some)
                found.of.update(some)
                found.read += len(some)
                bar.update(found.read)
    return found


def _checked(source: SourceFolder, names: Sequence[str], workers: int | None) -> Iterator[dict[str, Finding]]:
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    if workers is None:
        workers = usable_cores() if len(names) >= WORTH_PROCESSES else 1
    fetched = (_paths(source, chunk) for chunk in chunks)
    for chunk, findings in zip(chunks, map_in_order(_findings, fetched, workers=min(workers, len(chunks))), strict=True):
        yield dict(zip(chunk, findings, strict=True))


def _paths(source: SourceFolder, names: Sequence[str]) -> list[Path]:
    source.fetch(names)
    return [source.path(name) for name in names]


def _finding(path: Path) -> Finding:
    try:
        return verify_image(path)
    except UnreadableFileError as error:
        return TemporarilyUnusable(error.message)
    except DataError as error:
        return Unusable(error.message)


def _findings(paths: Sequence[Path]) -> list[Finding]:
    return [_finding(path) for path in paths]


class _Cache:
    """Findings by place, size and stamp, in SQLite. Where it cannot be used, everything is read anew."""

    def __init__(self, path: Path | str) -> None:
        self.base = sqlite3.connect(path, timeout=30)
        self.told = False
        self.base.execute(
            "create table if not exists findings_1 (place text primary key, stamp text, image_id text, width integer,"
            " height integer, looks blob, problem text) without rowid"
        )

    def known(self, source: SourceFolder, names: Sequence[str]) -> dict[str, Finding]:
        found: dict[str, Finding] = {}
        query = "select image_id, width, height, looks, problem from findings_1 where place = ? and stamp = ?"
        try:
            for name in names:
                row = self.base.execute(query, _key(source, name)).fetchone()
                if row is not None:
                    *checked, problem = row
                    found[name] = ImageInfo(*checked) if problem is None else Unusable(problem)
        except sqlite3.Error as error:
            self._tell(error)
        return found

    def keep(self, source: SourceFolder, findings: dict[str, Finding]) -> None:
        rows = []
        for name, finding in findings.items():
            if (source.remote is None and not _settled(source, name)) or getattr(finding, "passing", False):
                continue
            if isinstance(finding, ImageInfo):
                what = (finding.image_id, finding.width, finding.height, finding.perceptual_hash, None)
            else:
                what = (None, None, None, None, str(finding))
            rows.append((*_key(source, name), *what))
        try:
            with self.base:
                self.base.executemany("insert or replace into findings_1 values (?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._tell(error)

    def _tell(self, error: sqlite3.Error) -> None:
        if not self.told:
            console.warn(f"the cache of pictures cannot be used ({error}): they are read anew")
        self.told = True


@contextmanager
def _opened_cache() -> Iterator[_Cache]:
    path = cache_dir() / "pictures.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache = _Cache(path)
    except (OSError, sqlite3.Error) as error:
        console.warn(f"{path} cannot be used ({error}): every picture is read anew")
        cache = _Cache(":memory:")
    with closing(cache.base):
        yield cache


def _key(source: SourceFolder, name: str) -> tuple[str, str]:
    entry = source.files.get(name)
    if entry is None:
        # Reached through a link.
        stat = source.path(name).stat()
        return source.address(name), f"{RULES} {stat.st_size} {stat.st_mtime_ns}"
    return source.address(name), f"{RULES} {entry.size} {entry.stamp}"


def _settled(source: SourceFolder, name: str) -> bool:
    entry = source.files.get(name)
    return entry is not None and time.time_ns() - int(entry.stamp) > SETTLED_NS
