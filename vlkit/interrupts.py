"""SIGTERM and SIGINT: the step at hand is finished and saved. A second signal ends the command at once."""

from __future__ import annotations

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
