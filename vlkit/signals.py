"""Stop a command in order on SIGTERM and SIGINT; training first saves its finished steps.

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
    """The signal that asked to stop, if any."""

    def __init__(self, interruptible: bool = True) -> None:
        self.signal: signal.Signals | None = None
        self.interruptible = interruptible

    def __bool__(self) -> bool:
        return self.signal is not None


class Terminated(KeyboardInterrupt):
    """SIGTERM outside of `catch_stop_signals`: the command ends as by Ctrl-C, and cleans up."""


def install_sigterm_handler() -> None:
    """Make SIGTERM raise `Terminated` in this process; the processes that it starts just end."""
    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            os._exit(128 + number)
        raise Terminated

    signal.signal(signal.SIGTERM, end)


class StopRequested(Exception):
    """A signal asked to stop during work that can be repeated."""


_requests: list[StopRequest] = []


def raise_if_stopped() -> None:
    """Raise `StopRequested` if a signal asked to stop and the current work may be interrupted."""
    if _requests and _requests[-1].interruptible and _requests[-1]:
        raise StopRequested


@contextmanager
def catch_stop_signals(*, interruptible: bool = True) -> Iterator[StopRequest]:
    """Only record the first SIGTERM or SIGINT within the block; the code stops where it can.

    Args:
        interruptible: `raise_if_stopped` may raise. False under torchrun: other processes wait for this one.
    """
    request = StopRequest(interruptible)

    def record(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        for caught, handler in previous.items():
            signal.signal(caught, handler)
        console.say(f"{request.signal.name}: saving, then stopping; a second signal stops at once")

    previous = {number: signal.signal(number, record) for number in (signal.SIGTERM, signal.SIGINT)}
    _requests.append(request)
    try:
        yield request
    finally:
        _requests.remove(request)
        for number, handler in previous.items():
            signal.signal(number, handler)
