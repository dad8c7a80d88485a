"""Work on pictures spread over all cores, its results in order.

The processes end with the one that started them, however it ends, and leave Ctrl-C to it.
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(work: Callable[[A], B], chunks: Iterable[A], *, workers: int) -> Iterator[B]:
    """`work` on every chunk, in this process (one worker) or in several; the results in the order of the chunks.

    Args:
        work: a function of a module, which other processes can import.
        chunks: taken a few ahead of what is worked on.

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
    ways = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([module])
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
