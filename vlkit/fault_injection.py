"""Places where a test may let the process die or the disk fail: after every flush to the disk, around every rename.

Off, which is always but in tests, a place costs one look at the environment. VLKIT_FAULT says what happens where:

    record=FILE            every place that is passed goes into FILE, a line each
    kill@PLACE             the process dies at once, as by SIGKILL
    enospc@PLACE, eio@PLACE    the disk is full, or fails
    kill@PLACE#3           the third time that PLACE is passed

A place is called after what happens there: "before rename of step-000004", "after fsync of state.json".
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from pathlib import Path

VARIABLE = "VLKIT_FAULT"
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
_passed: Counter[str] = Counter()


def fault_point(event: str, path: Path) -> None:
    """Something is about to happen to `path`, or just has."""
    told = os.environ.get(VARIABLE)
    if told:
        _trigger(told, f"{event} of {path.name}")


def _trigger(told: str, name: str) -> None:
    if told.startswith("record="):
        with open(told.removeprefix("record="), "a", encoding="utf-8") as file:
            file.write(name + "\n")
        return
    what, _, where = told.partition("@")
    where, _, time = where.partition("#")
    if name != where:
        return
    _passed[name] += 1
    if _passed[name] != int(time or 1):
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(ERRORS[what], os.strerror(ERRORS[what]), name)
