"""Fetch a URL into a file, whole or not at all: resume where the download stopped, and retry.

Received bytes are stored beside the file, under a name that starts with a dot and ends in `.part`. A second such file
holds the server's mark of the version (ETag or date): if the file on the server changes, the download starts over.
Proxies are those of the environment. The reader of a file checks its content; this module looks only at its first
bytes, because some networks answer every request with a page of their own.
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
    OTHER_SOURCES,
    FileRefused,
    NothingLeft,
    TransientError,
    iter_chunks,
    open_url,
    parse_number,
    range_start,
    read_head,
    visible_text,
)
from vlkit.errors import NetworkError
from vlkit.storage import flush, format_bytes

# Seconds before the first new attempt; doubled before each that follows, up to MAX_DELAY. A server may ask for more,
# up to MAX_SERVER_DELAY.
FIRST_DELAY, MAX_DELAY, MAX_SERVER_DELAY = 1.0, 60.0, 600.0
# The first bytes of a file of each kind.
SIGNATURES = {".zip": (b"PK\x03\x04", b"PK\x05\x06"), ".jpg": (b"\xff\xd8\xff",), ".jpeg": (b"\xff\xd8\xff",)}
# If the server refuses this many of the first small files, all of them, the others are not requested.
MAX_FIRST_REFUSALS = 50

OnProgress = Callable[[int], None]


class _Cancelled(Exception):
    """The caller no longer wants the file."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often to retry: `retries` attempts without progress, `timeout` in seconds for each answer."""

    retries: int
    timeout: float


def part_path(target: Path) -> Path:
    """Return the path of the bytes received so far."""
    return target.with_name(f".{target.name}.part")


def local_bytes(target: Path) -> int:
    """Return the bytes of `target` that need not be fetched again."""
    part = part_path(target)
    return target.stat().st_size if target.exists() else part.stat().st_size if part.exists() else 0


def fetch(url: str, target: Path, policy: RetryPolicy, on_progress: OnProgress | None = None) -> int:
    """Fetch `url` into `target`; resume from an earlier part.

    Args:
        on_progress: called with the bytes received so far, those of an earlier part included.

    Returns:
        Bytes that came over the network.

    Raises:
        FileRefused: the server has no such file, or does not give it.
        NetworkError: no connection for longer than `policy` allows, or the content is of another kind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    download = _Download(url, target, policy.timeout, on_progress)
    _retry(download.attempt, policy, url, lambda: download.most_bytes)
    return download.received


def remote_size(url: str, policy: RetryPolicy) -> int | None:
    """Return the bytes of the file at `url`; None where the server does not say.

    Raises:
        FileRefused, NetworkError: as for `fetch`.
    """
    sizes: list[int | None] = []

    def ask() -> None:
        try:
            with open_url(urllib.request.Request(url, method="HEAD"), policy.timeout) as response:
                is_page = "html" in response.headers.get("Content-Type", "")
                sizes.append(None if is_page else parse_number(response.headers.get("Content-Length")))
        except FileRefused as error:
            # Some servers answer GET only; fetching then shows whether the file exists.
            if not isinstance(error.__cause__, HTTPError) or error.__cause__.code not in (403, 405, 501):
                raise
            sizes.append(None)

    _retry(ask, policy, url)
    return sizes[-1]


@dataclass
class FetchedFiles:
    """The outcome of many files: bytes over the network, and URL -> error of files that the server refuses."""

    received: int = 0
    refused: dict[str, FileRefused] = field(default_factory=dict)


def fetch_many(
    targets: Mapping[str, Path], policy: RetryPolicy, *, workers: int, on_progress: OnProgress | None = None
) -> FetchedFiles:
    """Fetch small files, URL -> target, several at once.

    Args:
        on_progress: called with the number of finished files.

    Raises:
        FileRefused: the server refuses all of the first `MAX_FIRST_REFUSALS` files.
        NetworkError: as for `fetch`, for the first file that fails.
    """
    waiting: SimpleQueue[str] = SimpleQueue()
    done: SimpleQueue[tuple[str, int | BaseException]] = SimpleQueue()
    cancelled = threading.Event()

    def work() -> None:
        while not cancelled.is_set():
            try:
                url = waiting.get_nowait()
            except Empty:
                return
            try:
                download = _Download(url, targets[url], policy.timeout, None, resume=False, cancelled=cancelled)
                _retry(download.attempt, policy, url, quiet=True, cancelled=cancelled)
                done.put((url, download.received))
            except BaseException as error:
                done.put((url, error))

    for url in targets:
        targets[url].parent.mkdir(parents=True, exist_ok=True)
        waiting.put(url)
    # Daemon threads: after Ctrl-C the command does not wait for them.
    for _ in range(min(workers, len(targets))):
        threading.Thread(target=work, daemon=True).start()
    fetched = FetchedFiles()
    try:
        for count in range(1, len(targets) + 1):
            url, outcome = done.get()
            if isinstance(outcome, FileRefused):
                fetched.refused[url] = outcome
                if count == len(fetched.refused) == MAX_FIRST_REFUSALS:
                    raise outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                fetched.received += outcome
            if on_progress:
                on_progress(count)
    finally:
        cancelled.set()
    return fetched


def _retry(
    attempt: Callable[[], None],
    policy: RetryPolicy,
    url: str,
    progress: Callable[[], int] = lambda: 0,
    *,
    quiet: bool = False,
    cancelled: threading.Event | None = None,
) -> None:
    """Run `attempt` until it succeeds; progress resets the count of failures."""
    failures, before = 0, progress()
    while True:
        try:
            return attempt()
        except TransientError as error:
            failures = 1 if progress() > before else failures + 1
            before = progress()
            if failures > policy.retries:
                message = f"{url}: {error}; {failures} attempts failed" if policy.retries else f"{url}: {error}"
                hint = f"check the connection, then run the same command again to resume; {OTHER_SOURCES}"
                raise NetworkError(message, hint=hint) from None
            wait = min(MAX_DELAY, FIRST_DELAY * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
            wait = wait if error.wait is None else min(MAX_SERVER_DELAY, error.wait)
            if not quiet:
                console.say(f"{error}; attempt {failures} of {policy.retries} in {wait:.0f} s")
        if cancelled is None:
            time.sleep(wait)
        elif cancelled.wait(wait):
            raise _Cancelled


class _Download:
    """The download of one file.

    Attributes:
        received: bytes that came over the network.
        most_bytes: the most bytes that were ever stored: a file that starts over again and again makes no progress.
    """

    def __init__(
        self,
        url: str,
        target: Path,
        timeout: float,
        on_progress: OnProgress | None,
        *,
        resume: bool = True,
        cancelled: threading.Event | None = None,
    ) -> None:
        self.url, self.target, self.timeout = url, target, timeout
        self.on_progress, self.cancelled = on_progress, cancelled
        self.part, self.resume = part_path(target), resume
        self.version_file = target.with_name(f".{target.name}.etag.part")
        self.received, self.most_bytes = 0, self._stored_bytes()[0] if resume else 0

    def attempt(self) -> None:
        """Request the missing bytes, and store what arrives."""
        stored, version = self._stored_bytes() if self.resume else (0, None)
        headers = {"Range": f"bytes={stored}-", "If-Range": version} if stored and version else {}
        request = urllib.request.Request(self.url, headers=headers)
        try:
            response = open_url(request, self.timeout)
        except NothingLeft as end:
            if end.size == stored:
                return self._finish()
            self._discard()
            raise TransientError(f"{self.target.name} has changed on the server") from None
        with response:
            start = range_start(response)
            if start not in (0, stored):
                self._discard()
                raise TransientError(f"the server sends another part of {self.target.name} than was requested")
            length = parse_number(response.headers.get("Content-Length"))
            chunks = iter_chunks(response)
            head = read_head(chunks)
            if start == 0:
                # Checked before the stored part is discarded for it.
                self._check_kind(head, response.headers.get("Content-Type", ""), chunks)
                self._discard()
                self._save_version(response.headers)
            self._store(start, head, chunks, None if length is None else start + length)
        self._finish()

    def _stored_bytes(self) -> tuple[int, str | None]:
        """Return the stored bytes and their version; without a version they are of no use."""
        try:
            mark = json.loads(self.version_file.read_text(encoding="utf-8"))
            if mark["url"] == self.url and mark["version"]:
                return self.part.stat().st_size, str(mark["version"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return 0, None

    def _save_version(self, headers: Any) -> None:
        if self.resume:
            etag = headers.get("ETag") or ""
            # A weak ETag does not promise the same bytes.
            version = etag if etag.startswith('"') else headers.get("Last-Modified")
            self.version_file.write_text(json.dumps({"url": self.url, "version": version}), encoding="utf-8")

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.version_file.unlink(missing_ok=True)

    def _check_kind(self, head: bytes, content_type: str, chunks: Iterator[bytes]) -> None:
        """Refuse content that does not start as a file of the target's kind does."""
        signatures = SIGNATURES.get(self.target.suffix.lower(), (b"",))
        if not head:
            raise TransientError(f"{self.target.name}: the connection ended before the first byte")
        if head.startswith(signatures):
            return
        text = visible_text(head + next(chunks, b""))
        kind = self.target.suffix.lstrip(".").upper()
        message = f"{self.url} returns {content_type or 'something else'}, not a {kind} file"
        message += f"; it starts with {text!r}" if text else ""
        hint = f"some networks show a sign-in page first: open the address in a browser; {OTHER_SOURCES}"
        raise NetworkError(message, hint=hint)

    def _store(self, start: int, head: bytes, chunks: Iterator[bytes], total: int | None) -> None:
        size = start
        # Without a buffer: received bytes are in the file, however this process ends.
        with self.part.open("ab" if start else "wb", buffering=0) as file:
            for chunk in chain((head,) if head else (), chunks):
                file.write(chunk)
                size += len(chunk)
                self.received += len(chunk)
                self.most_bytes = max(self.most_bytes, size)
                if self.on_progress:
                    self.on_progress(size)
                if self.cancelled is not None and self.cancelled.is_set():
                    raise _Cancelled
        if total is not None and size < total:
            received = f"{format_bytes(size)} of {format_bytes(total)}"
            raise TransientError(f"{self.target.name}: the connection ended at {received}")

    def _finish(self) -> None:
        flush(self.part, self.target.name)
        fault_injection.fault_point("before rename", self.target)
        os.replace(self.part, self.target)
        fault_injection.fault_point("after rename", self.target)
        self.version_file.unlink(missing_ok=True)
