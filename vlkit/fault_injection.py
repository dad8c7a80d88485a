"""Fault points, where a test can kill the process or fail the disk: after every flush to disk, around every rename.

Outside of tests a fault point costs one look at the environment. VLKIT_FAULT says what happens at which point:

    record=FILE            append the name of every point that is reached to FILE
    kill@POINT             kill the process at once, as by SIGKILL
    enospc@POINT, eio@POINT    raise the error of a full disk, or of a failing one
    kill@POINT#3           the third time that POINT is reached

A point is named after what happens there: "before rename of step-000004", "after fsync of state.json".
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from pathlib import Path

VARIABLE = "VLKIT_FAULT"
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
_reached: Counter[str] = Counter()


def fault_point(event: str, path: Path) -> None:
    """Mark a point where `event` is about to happen to `path`, or just has."""
    fault = os.environ.get(VARIABLE)
    if fault:
        _trigger(fault, f"{event} of {path.name}")


def _trigger(fault: str, name: str) -> None:
    if fault.startswith("record="):
        with open(fault.removeprefix("record="), "a", encoding="utf-8") as file:
            file.write(name + "\n")
        return
    effect, _, point = fault.partition("@")
    point, _, time = point.partition("#")
    if name != point:
        return
    _reached[name] += 1
    if _reached[name] != int(time or 1):
        return
    if effect == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(ERRORS[effect], os.strerror(ERRORS[effect]), name)
