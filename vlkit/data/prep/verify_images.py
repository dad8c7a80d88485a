"""Verify many images: on all cores, and each only once as long as it does not change.

Results are cached by address, size and modification time (a remote file's etag). A second prep reads only what is new,
even after a first one that was killed half way.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from vlkit import console
from vlkit.data.images.decode import ImageInfo, UnreadableFileError, verify_image
from vlkit.data.parallel import map_in_order, usable_cores
from vlkit.data.prep.source_folder import SourceFolder
from vlkit.errors import DataError
from vlkit.storage import cache_dir

# One process verifies fewer images than this sooner than a second one starts.
MIN_IMAGES_FOR_PROCESSES = 400
CHUNK = 64
# A file changed this recently may change again without a new modification time.
SETTLED_NS = 50_000_000
# Part of every key: the result may change with this program's rules, and with the library that decodes.
RULES = f"1 pillow {metadata.version('pillow')}"


@dataclass(frozen=True)
class Unusable:
    """An image that cannot be used. `temporary`: it may be usable next time, so the result is not cached."""

    reason: str
    temporary: bool = False


Result = ImageInfo | Unusable


@dataclass
class VerifiedImages:
    """The result for each image name, and how many images were read, not taken from the cache."""

    results: dict[str, Result] = field(default_factory=dict)
    images_read: int = 0


def verify_images(
    source: SourceFolder, names: Sequence[str], *, workers: int | None = None, rehash: bool = False
) -> VerifiedImages:
    """Verify images of a source, except those that the cache knows.

    Args:
        workers: processes; None: one per core, if there are enough images.
        rehash: ignore the cache and read everything.
    """
    verified = VerifiedImages()
    with _open_cache() as cache:
        if not rehash:
            verified.results.update(cache.load(source, names))
        new = [name for name in names if name not in verified.results]
        with console.progress("verifying images", len(new)) as bar:
            for results in _verify_chunks(source, new, workers):
                cache.save(source, results)
                verified.results.update(results)
                verified.images_read += len(results)
                bar.update(verified.images_read)
    return verified


def _verify_chunks(source: SourceFolder, names: Sequence[str], workers: int | None) -> Iterator[dict[str, Result]]:
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    if workers is None:
        workers = usable_cores() if len(names) >= MIN_IMAGES_FOR_PROCESSES else 1
    paths = (_fetch_paths(source, chunk) for chunk in chunks)
    results_of_chunks = map_in_order(_verify_paths, paths, workers=min(workers, len(chunks)))
    for chunk, results in zip(chunks, results_of_chunks, strict=True):
        yield dict(zip(chunk, results, strict=True))


def _fetch_paths(source: SourceFolder, names: Sequence[str]) -> list[Path]:
    source.fetch(names)
    return [source.local_path(name) for name in names]


def _verify_paths(paths: Sequence[Path]) -> list[Result]:
    return [_verify_path(path) for path in paths]


def _verify_path(path: Path) -> Result:
    try:
        return verify_image(path)
    except UnreadableFileError as error:
        return Unusable(error.message, temporary=True)
    except DataError as error:
        return Unusable(error.message)


class _Cache:
    """Results by address, size and stamp, in SQLite. Where it cannot be used, every image is read again."""

    def __init__(self, path: Path | str) -> None:
        self.database = sqlite3.connect(path, timeout=30)
        self._warned = False
        self.database.execute(
            "create table if not exists findings_1 (place text primary key, stamp text, image_id text, width integer,"
            " height integer, looks blob, problem text) without rowid"
        )

    def load(self, source: SourceFolder, names: Sequence[str]) -> dict[str, Result]:
        """Return the results of those images that are known and have not changed."""
        results: dict[str, Result] = {}
        query = "select image_id, width, height, looks, problem from findings_1 where place = ? and stamp = ?"
        try:
            for name in names:
                row = self.database.execute(query, _key(source, name)).fetchone()
                if row is not None:
                    *info, reason = row
                    results[name] = ImageInfo(*info) if reason is None else Unusable(reason)
        except sqlite3.Error as error:
            self._warn_once(error)
        return results

    def save(self, source: SourceFolder, results: dict[str, Result]) -> None:
        """Remember results, except temporary ones and those of files that were changed just now."""
        rows: list[tuple[str | int | bytes | None, ...]] = []
        for name, result in results.items():
            if source.remote is None and not _is_settled(source, name):
                continue
            if isinstance(result, ImageInfo):
                info = (result.image_id, result.width, result.height, result.perceptual_hash)
                rows.append((*_key(source, name), *info, None))
            elif not result.temporary:
                rows.append((*_key(source, name), None, None, None, None, result.reason))
        try:
            with self.database:
                self.database.executemany("insert or replace into findings_1 values (?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._warn_once(error)

    def _warn_once(self, error: sqlite3.Error) -> None:
        if not self._warned:
            console.warn(f"the cache of verified images cannot be used ({error}): images are read again")
        self._warned = True


@contextmanager
def _open_cache() -> Iterator[_Cache]:
    path = cache_dir() / "pictures.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache = _Cache(path)
    except (OSError, sqlite3.Error) as error:
        console.warn(f"{path} cannot be used ({error}): every image is read again")
        cache = _Cache(":memory:")
    with closing(cache.database):
        yield cache


def _key(source: SourceFolder, name: str) -> tuple[str, str]:
    entry = source.files.get(name)
    if entry is None:
        # Reached through a link.
        stat = source.local_path(name).stat()
        return source.address(name), f"{RULES} {stat.st_size} {stat.st_mtime_ns}"
    return source.address(name), f"{RULES} {entry.size} {entry.stamp}"


def _is_settled(source: SourceFolder, name: str) -> bool:
    entry = source.files.get(name)
    return entry is not None and time.time_ns() - int(entry.stamp) > SETTLED_NS
