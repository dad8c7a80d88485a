"""What can go wrong, each kind with its exit code.

Raise one of these anywhere; `flags.py` catches it once, prints the message and the hint, and leaves with the code.
A message names the file, the row and what was found; the hint is the way out. Whatever else escapes is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

# Names that a hint lists.
MAX_SUGGESTIONS = 40


class VlkitError(Exception):
    """A failure that the user can understand. `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its hint: it may be raised in a loader's process."""
        return _rebuild, (type(self), self.message, self.hint)


class UsageError(VlkitError):
    """A flag, a setting or a name that cannot be meant."""

    exit_code = 2


class DataError(VlkitError):
    """A table, a row, a picture or a folder that cannot be used."""

    exit_code = 3


class NonFiniteError(VlkitError):
    """A loss or a gradient that is not a finite number; the weights were not touched by it."""

    exit_code = 4


class ResourceError(VlkitError):
    """Disk or memory ran out, or would."""

    exit_code = 5


class ArtifactError(VlkitError):
    """A run, checkpoint or index that is damaged or belongs to something else."""

    exit_code = 6


class Stopped(VlkitError):
    """Asked to end by a signal, with a checkpoint saved: the same command goes on."""

    exit_code = 75


class NetworkError(VlkitError):
    """Something that had to be fetched was not to be had."""

    exit_code = 7


class QualityError(VlkitError):
    """A quality that was demanded is missed; everything is measured and written."""

    exit_code = 8


def _rebuild(kind: type[VlkitError], message: str, hint: str | None) -> VlkitError:
    return kind(message, hint=hint)


def suggest_name(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the known one that looks most like it, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(known) - MAX_SUGGESTIONS} others" if len(known) > MAX_SUGGESTIONS else ""
    return f"known: {', '.join(known[:MAX_SUGGESTIONS])}{more}"
