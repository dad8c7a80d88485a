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

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


class Terminated(KeyboardInterrupt):
    """SIGTERM where nobody listens for it: the command ends as by Ctrl-C, and cleans up after itself."""


def end_on_sigterm() -> None:
    """From now on SIGTERM raises `Terminated` in this process; the processes that it starts just end."""
    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            os._exit(128 + number)
        raise Terminated

    signal.signal(signal.SIGTERM, end)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the block the first SIGTERM or SIGINT is only noted; the code asks for it where it can stop."""
    asked = StopRequest()
    listened = (signal.SIGTERM, signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        asked.signal = signal.Signals(number)
        for each in listened:
            signal.signal(each, before[each])
        console.say(f"{asked.signal.name}: finishing this step and saving; once more ends it at once")

    before = {number: signal.signal(number, note) for number in listened}
    try:
        yield asked
    finally:
        for number in listened:
            signal.signal(number, before[number])
