"""Many pictures checked: on all cores, and each only once as long as it does not change.

What was found of a picture is kept in a cache under its place, size and modification time (a remote one's etag), so a
second prep reads only what is new, also after one that was killed half way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.data.images import Checked, UnreadError, check
from vlkit.data.sources import Source
from vlkit.errors import DataError
from vlkit.storage import cache_dir

# Fewer pictures than this are checked sooner by one process than a second one starts.
WORTH_PROCESSES = 400
CHUNK = 64
# A file changed this recently may be changed again without its time moving on.
SETTLED_NS = 50_000_000
# Part of every key: what this program, or the library that decodes, makes of a picture may change with them.
RULES = f"1 pillow {metadata.version('pillow')}"


class Problem(str):
    """Why a picture cannot be used. `passing`: it may be usable the next time, and nothing is remembered of it."""

    passing = False


class PassingProblem(Problem):
    """A file that could not be read."""

    passing = True


Finding = Checked | Problem


class Findings:
    """What is known of pictures: name -> `Checked`, or the reason why it cannot be used; and how many were read."""

    def __init__(self) -> None:
        self.of: dict[str, Finding] = {}
        self.read = 0


def check_all(source: Source, names: Sequence[str], *, workers: int | None = None, rehash: bool = False) -> Findings:
    """Check pictures of a source, those that the cache knows excepted.

    Args:
        workers: processes; None: as many as there are cores, where there are enough pictures to pay for them.
        rehash: trust no cache; read everything.
    """
    found = Findings()
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


def _checked(source: Source, names: Sequence[str], workers: int | None) -> Iterator[dict[str, Finding]]:
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    wanted = cores() if workers is None else workers
    if wanted < 2 or (workers is None and len(names) < WORTH_PROCESSES):
        for chunk in chunks:
            yield dict(zip(chunk, map(_finding, _paths(source, chunk)), strict=True))
        return
    with _pool(min(wanted, len(chunks))) as pool:
        ahead: list[tuple[Sequence[str], Any]] = []
        for chunk in [*chunks, None]:
            if chunk is not None:
                ahead.append((chunk, pool.submit(_findings, _paths(source, chunk))))
            while ahead and (chunk is None or len(ahead) > 2 * wanted):
                names_of, future = ahead.pop(0)
                yield dict(zip(names_of, future.result(), strict=True))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _paths(source: Source, names: Sequence[str]) -> list[Path]:
    source.fetch(names)
    return [source.path(name) for name in names]


def _finding(path: Path) -> Finding:
    try:
        return check(path)
    except UnreadError as error:
        return PassingProblem(error.message)
    except DataError as error:
        return Problem(error.message)


def _findings(paths: Sequence[Path]) -> list[Finding]:
    return [_finding(path) for path in paths]


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, and leave Ctrl-C to it."""
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
    try:
        yield pool
    except BrokenProcessPool:
        told = "a process that decodes pictures was killed: memory ran out, or a picture crashes the decoder"
        raise DataError(told, hint="--workers 1 needs the least memory, and stops at the picture") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Cache:
    """Findings by place, size and stamp, in SQLite. Where it cannot be used, everything is read anew."""

    def __init__(self, path: Path | str) -> None:
        self.base = sqlite3.connect(path, timeout=30)
        self.told = False
        self.base.execute(
            "create table if not exists findings_1 (place text primary key, stamp text, image_id text, width integer,"
            " height integer, looks blob, problem text) without rowid"
        )

    def known(self, source: Source, names: Sequence[str]) -> dict[str, Finding]:
        found: dict[str, Finding] = {}
        query = "select image_id, width, height, looks, problem from findings_1 where place = ? and stamp = ?"
        try:
            for name in names:
                row = self.base.execute(query, _key(source, name)).fetchone()
                if row is not None:
                    *checked, problem = row
                    found[name] = Checked(*checked) if problem is None else Problem(problem)
        except sqlite3.Error as error:
            self._tell(error)
        return found

    def keep(self, source: Source, findings: dict[str, Finding]) -> None:
        rows = []
        for name, finding in findings.items():
            if (source.remote is None and not _settled(source, name)) or getattr(finding, "passing", False):
                continue
            if isinstance(finding, Checked):
                what = (finding.image_id, finding.width, finding.height, finding.looks, None)
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


def _key(source: Source, name: str) -> tuple[str, str]:
    entry = source.files.get(name)
    if entry is None:
        # Reached through a link.
        stat = source.path(name).stat()
        return source.address(name), f"{RULES} {stat.st_size} {stat.st_mtime_ns}"
    return source.address(name), f"{RULES} {entry.size} {entry.stamp}"


def _settled(source: Source, name: str) -> bool:
    entry = source.files.get(name)
    return entry is not None and time.time_ns() - int(entry.stamp) > SETTLED_NS
