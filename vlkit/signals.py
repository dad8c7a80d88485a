"""SIGTERM and SIGINT end a command in order; in training, the step at hand is finished and saved first.

A second signal ends the command at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vlkit import console


class StopRequest:
    """Whether somebody asked for the end, and by which signal."""

    def __init__(self, droppable: bool = True) -> None:
        self.signal: signal.Signals | None = None
        self.droppable = droppable

    def __bool__(self) -> bool:
        return self.signal is not None


class Terminated(KeyboardInterrupt):
    """SIGTERM where nobody listens for it: the command ends as by Ctrl-C, and cleans up after itself."""


def install_sigterm_handler() -> None:
    """From now on SIGTERM raises `Terminated` in this process; the processes that it starts just end."""
    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            os._exit(128 + number)
        raise Terminated

    signal.signal(signal.SIGTERM, end)


class StopRequested(Exception):
    """The end was asked for in the middle of a piece of work that can be dropped."""


_listening: list[StopRequest] = []


def raise_if_stopped() -> None:
    """Raise `StopRequested` where the end was asked for, and whoever listens can drop the work at hand."""
    if _listening and _listening[-1].droppable and _listening[-1]:
        raise StopRequested


@contextmanager
def catch_stop_signals(*, droppable: bool = True) -> Iterator[StopRequest]:
    """Within the block the first SIGTERM or SIGINT is only noted; the code asks for it where it can stop.

    Args:
        droppable: `raise_if_stopped` may end a piece of work; not so where other processes wait for its end.
    """
    asked = StopRequest(droppable)
    listened = (signal.SIGTERM, signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        asked.signal = signal.Signals(number)
        for each in listened:
            signal.signal(each, before[each])
        console.say(f"{asked.signal.name}: what is done will be saved; once more ends it at once")

    before = {number: signal.signal(number, note) for number in listened}
    _listening.append(asked)
    try:
        yield asked
    finally:
        _listening.remove(asked)
        for number in listened:
            signal.signal(number, before[number])
