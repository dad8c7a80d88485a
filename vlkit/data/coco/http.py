"""One URL becomes one file, whole or not at all: resumed where it broke off, and tried again.

What has come so far lies beside the file, under a name that begins with a dot and ends in `.part`; a second such file
holds the server's mark of the version (ETag or date), so that a file that has changed begins anew. Proxies are
those of the environment. Whether a file's content is right is for its reader to say; here its first bytes are looked
at, for networks that answer everything with a page of their own.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any
from urllib.error import HTTPError

from vlkit import console, fault_injection
from vlkit.data.coco.responses import (
    WAY_OUT,
    Broken,
    Complete,
    Refused,
    chunks_of,
    first_of,
    number,
    opened,
    start_of,
    words_of,
)
from vlkit.errors import NetworkError
from vlkit.storage import flush, format_bytes

# Seconds: before the first new attempt, twice as many before each that follows, never more than; and the most that
# the server may ask for.
FIRST_DELAY, LONGEST_DELAY, LONGEST_ASKED = 1.0, 60.0, 600.0
# What a file of this kind begins with.
BEGINNINGS = {".zip": (b"PK\x03\x04", b"PK\x05\x06"), ".jpg": (b"\xff\xd8\xff",), ".jpeg": (b"\xff\xd8\xff",)}
# With none of this many single files to be had, the others are not asked for.
HOPELESS = 50
Told = Callable[[int], None]


class _Dropped(Exception):
    """Whoever wanted the file has left."""


@dataclass(frozen=True)
class Patience:
    """How long to insist: `retries` without progress, `timeout` in seconds for each answer."""

    retries: int
    timeout: float


def part_of(target: Path) -> Path:
    """Where the bytes lie that have come so far."""
    return target.with_name(f".{target.name}.part")


def fetched_so_far(target: Path) -> int:
    """Bytes of `target` that need not be fetched again."""
    part = part_of(target)
    return target.stat().st_size if target.exists() else part.stat().st_size if part.exists() else 0


def fetch(url: str, target: Path, patience: Patience, told: Told | None = None) -> int:
    """Fetch `url` into `target`; a part that is there is gone on with.

    Args:
        told: called with the bytes that are here.

    Returns:
        Bytes that came over the network.

    Raises:
        Refused: the server has no such file, or gives none.
        NetworkError: no connection, for longer than `patience` lasts; or something else came than was asked for.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _Download(url, target, patience.timeout, told)
    _insist(work.attempt, patience, url, lambda: work.farthest)
    return work.received


def size_at(url: str, patience: Patience) -> int | None:
    """Bytes of what lies at `url`; None where the server does not say.

    Raises:
        NetworkError: as `fetch` does.
    """
    found: list[int | None] = []

    def ask() -> None:
        try:
            with opened(urllib.request.Request(url, method="HEAD"), patience.timeout) as response:
                is_page = "html" in response.headers.get("Content-Type", "")
                found.append(None if is_page else number(response.headers.get("Content-Length")))
        except Refused as error:
            # Some servers answer GET only; whether the file is there is then seen when it is fetched.
            if not isinstance(error.__cause__, HTTPError) or error.__cause__.code not in (403, 405, 501):
                raise
            found.append(None)

    _insist(ask, patience, url)
    return found[-1]


@dataclass
class Many:
    """What came of many files: bytes over the network, and those that the server does not give."""

    received: int = 0
    refused: dict[str, Refused] = field(default_factory=dict)


def fetch_many(
    targets: Mapping[str, Path], patience: Patience, *, workers: int, told: Callable[[int], None] | None = None
) -> Many:
    """Fetch small files, URL -> target, several at once.

    Args:
        told: called with the number of files that are dealt with.

    Raises:
        Refused: none of them is to be had.
        NetworkError: as `fetch` does, for the first that fails.
    """
    waiting: SimpleQueue[str] = SimpleQueue()
    done: SimpleQueue[tuple[str, int | BaseException]] = SimpleQueue()
    dropped = threading.Event()

    def work() -> None:
        while not dropped.is_set():
            try:
                url = waiting.get_nowait()
            except Empty:
                return
            try:
                download = _Download(url, targets[url], patience.timeout, None, resume=False, dropped=dropped)
                _insist(download.attempt, patience, url, quiet=True, dropped=dropped)
                done.put((url, download.received))
            except BaseException as error:
                done.put((url, error))

    for url in targets:
        targets[url].parent.mkdir(parents=True, exist_ok=True)
        waiting.put(url)
    # Daemons: after Ctrl-C the command does not wait for them.
    for _ in range(min(workers, len(targets))):
        threading.Thread(target=work, daemon=True).start()
    result = Many()
    try:
        for count in range(1, len(targets) + 1):
            url, outcome = done.get()
            if isinstance(outcome, Refused):
                result.refused[url] = outcome
                if count == len(result.refused) == HOPELESS:
                    raise outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                result.received += outcome
            if told:
                told(count)
    finally:
        dropped.set()
    return result


def _insist(
    attempt: Callable[[], None],
    patience: Patience,
    url: str,
    progress: Callable[[], int] = lambda: 0,
    *,
    quiet: bool = False,
    dropped: threading.Event | None = None,
) -> None:
    """Run `attempt` until it ends well; the count of failures begins anew when there was progress."""
    failures, before = 0, progress()
    while True:
        try:
            return attempt()
        except Broken as error:
            failures = 1 if progress() > before else failures + 1
            before = progress()
            if failures > patience.retries:
                told = f"{url}: {error}; {failures} attempts failed" if patience.retries else f"{url}: {error}"
                hint = f"the same command goes on where this ends, when there is a connection; {WAY_OUT}"
                raise NetworkError(told, hint=hint) from None
            wait = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
            wait = wait if error.wait is None else min(LONGEST_ASKED, error.wait)
            if not quiet:
                console.say(f"{error}; attempt {failures} of {patience.retries} in {wait:.0f} s")
        if dropped is None:
            time.sleep(wait)
        elif dropped.wait(wait):
            raise _Dropped


class _Download:
    """One file on its way.

    Attributes:
        received: bytes that came over the network.
        farthest: the most bytes that were ever here at once, so that a file that begins anew for ever is no progress.
    """

    def __init__(
        self,
        url: str,
        target: Path,
        timeout: float,
        told: Told | None,
        *,
        resume: bool = True,
        dropped: threading.Event | None = None,
    ) -> None:
        self.url, self.target, self.timeout, self.told, self.dropped = url, target, timeout, told, dropped
        self.part, self.resume = part_of(target), resume
        self.mark = target.with_name(f".{target.name}.etag.part")
        self.received, self.farthest = 0, self._left()[0] if resume else 0

    def attempt(self) -> None:
        """Ask for what is missing, and keep what comes."""
        here, version = self._left() if self.resume else (0, None)
        headers = {"Range": f"bytes={here}-", "If-Range": version} if here and version else {}
        request = urllib.request.Request(self.url, headers=headers)
        try:
            response = opened(request, self.timeout)
        except Complete as complete:
            if complete.size == here:
                return self._finish()
            self._forget()
            raise Broken(f"{self.target.name} on the server is not what it was") from None
        with response:
            start = start_of(response)
            if start not in (0, here):
                self._forget()
                raise Broken(f"the server sends another part of {self.target.name} than was asked for")
            length = number(response.headers.get("Content-Length"))
            chunks = chunks_of(response)
            first = first_of(chunks)
            if start == 0:
                # Looked at before what is already here is given up for it.
                self._check(first, response.headers.get("Content-Type", ""), chunks)
                self._forget()
                self._note(response.headers)
            self._keep(start, first, chunks, None if length is None else start + length)
        self._finish()

    def _left(self) -> tuple[int, str | None]:
        """Bytes that are here, and the version that they are of; without one they are of no use."""
        try:
            noted = json.loads(self.mark.read_text(encoding="utf-8"))
            if noted["url"] == self.url and noted["version"]:
                return self.part.stat().st_size, str(noted["version"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return 0, None

    def _note(self, headers: Any) -> None:
        if self.resume:
            etag = headers.get("ETag") or ""
            # A weak ETag does not promise the same bytes.
            version = etag if etag.startswith('"') else headers.get("Last-Modified")
            self.mark.write_text(json.dumps({"url": self.url, "version": version}), encoding="utf-8")

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.mark.unlink(missing_ok=True)

    def _check(self, first: bytes, kind: str, chunks: Iterator[bytes]) -> None:
        begins = BEGINNINGS.get(self.target.suffix.lower(), (b"",))
        if not first:
            raise Broken(f"{self.target.name}: the connection ended before the first byte")
        if first.startswith(begins):
            return
        words = words_of(first + next(chunks, b""))
        told = f"{self.url} gives no {self.target.suffix.lstrip('.').upper()} file, but {kind or 'something else'}"
        told += f", which begins: {words!r}" if words else ""
        hint = f"some networks want a sign-in page to be clicked first: open the address in a browser; {WAY_OUT}"
        raise NetworkError(told, hint=hint)

    def _keep(self, start: int, first: bytes, chunks: Iterator[bytes], total: int | None) -> None:
        size = start
        # Without a buffer: what has come is in the file, however this process ends.
        with self.part.open("ab" if start else "wb", buffering=0) as file:
            for chunk in chain((first,) if first else (), chunks):
                file.write(chunk)
                size += len(chunk)
                self.received += len(chunk)
                self.farthest = max(self.farthest, size)
                if self.told:
                    self.told(size)
                if self.dropped is not None and self.dropped.is_set():
                    raise _Dropped
        if total is not None and size < total:
            raise Broken(f"{self.target.name}: the connection ended at {format_bytes(size)} of {format_bytes(total)}")

    def _finish(self) -> None:
        flush(self.part, self.target.name)
        fault_injection.fault_point("before rename", self.target)
        os.replace(self.part, self.target)
        fault_injection.fault_point("after rename", self.target)
        self.mark.unlink(missing_ok=True)
