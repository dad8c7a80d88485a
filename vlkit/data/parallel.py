"""Run work on images on all cores, with the results in order.

Worker processes end with the process that started them, however it ends, and leave Ctrl-C to it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from vlkit.errors import DataError

A = TypeVar("A")
B = TypeVar("B")


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(work: Callable[[A], B], chunks: Iterable[A], *, workers: int) -> Iterator[B]:
    """Yield `work(chunk)` in the order of the chunks, computed in this process (one worker) or in several.

    Args:
        work: a function at module level, which other processes can import.
        chunks: read a few ahead of the results.

    Raises:
        DataError: a process was killed.
    """
    if workers < 2:
        yield from map(work, chunks)
        return
    with _pool(workers, work.__module__) as pool:
        ahead: deque[Future[B]] = deque()
        for chunk in chunks:
            ahead.append(pool.submit(work, chunk))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextmanager
def _pool(workers: int, module: str) -> Iterator[ProcessPoolExecutor]:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([module])
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        message = "a process that decodes images was killed: memory ran out, or an image crashes the decoder"
        raise DataError(message, hint="--workers 1 needs the least memory, and stops at the image") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
