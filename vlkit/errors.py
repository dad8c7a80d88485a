"""Errors that users understand, each kind with its exit code.

Raise one of these anywhere; `flags.py` catches it once, prints message and hint, and exits with the code. A message
says what happened, to which file and row; the hint is the way out. Any other exception is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

# Names that a hint lists at most.
MAX_SUGGESTIONS = 40


class VlkitError(Exception):
    """A failure that the user can do something about: `hint` says what."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it with its hint: it may be raised in a loader's process."""
        return _rebuild, (type(self), self.message, self.hint)


class UsageError(VlkitError):
    """A flag, a setting or a name that makes no sense."""

    exit_code = 2


class DataError(VlkitError):
    """A table, a row, an image or a folder that cannot be used."""

    exit_code = 3


class NonFiniteError(VlkitError):
    """A loss or a gradient is not a finite number; no weight was changed by it."""

    exit_code = 4


class ResourceError(VlkitError):
    """Disk or memory ran out, or would run out."""

    exit_code = 5


class ArtifactError(VlkitError):
    """A run, checkpoint or index that is damaged or belongs to something else."""

    exit_code = 6


class Stopped(VlkitError):
    """A signal stopped the command after a checkpoint was saved; the same command resumes."""

    exit_code = 75


class NetworkError(VlkitError):
    """A download or an upload failed."""

    exit_code = 7


class QualityError(VlkitError):
    """A demanded quality was missed; all results are written."""

    exit_code = 8


def _rebuild(kind: type[VlkitError], message: str, hint: str | None) -> VlkitError:
    return kind(message, hint=hint)


def suggest_name(word: str, known: Iterable[str]) -> str:
    """Return a hint for a mistyped name: the known name most similar to it, or all known names."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(known) - MAX_SUGGESTIONS} others" if len(known) > MAX_SUGGESTIONS else ""
    return f"known: {', '.join(known[:MAX_SUGGESTIONS])}{more}"
