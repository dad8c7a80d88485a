"""The one console: results on stdout, messages on stderr.

`say`, `warn`, `hint` and `progress` print messages. `print_result` and `print_table` print what the command was called
for; under --json they print nothing, and stdout holds one JSON object that `flags.py` prints at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_LINE_SECONDS = 30.0
_json_mode = _silent = False


def set_json_mode(on: bool) -> None:
    """Keep results off stdout under --json; `print_json` prints the one object there."""
    global _json_mode
    _json_mode = on


@cache
def stderr() -> Console:
    """Return the console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


@cache
def stdout() -> Console:
    """Return the console on stdout. Off a terminal it is wide enough for every table that vlkit prints."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def say(text: str = "") -> None:
    """Print one message."""
    stderr().print(text, markup=False)


def warn(text: str) -> None:
    """Print what the user should know before the work starts, or should not miss."""
    stderr().print("warning:", style="yellow", end=" ")
    stderr().print(text, markup=False)


def hint(text: str) -> None:
    """Print what to do next."""
    stderr().print("  ->", style="cyan", end=" ")
    stderr().print(text, markup=False)


def silence() -> None:
    """Print nothing from now on but an error: of several processes one prints."""
    global _silent
    _silent = True
    stderr().quiet = stdout().quiet = True


def fail(message: str, hint_text: str | None, exit_code: int) -> None:
    """Print why the command stops; under --json, print it on stdout too, as the one object."""
    stderr().quiet = False
    stderr().print("error:", style="bold red", end=" ")
    stderr().print(message, markup=False)
    if hint_text:
        hint(hint_text)
    if _json_mode:
        print_json({"error": {"message": message, "hint": hint_text, "exit_code": exit_code}})


def print_result(renderable: Any) -> None:
    """Print a table or a line on stdout; under --json, print nothing."""
    if not _json_mode:
        stdout().print(renderable, markup=False)


def print_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of a --json command."""
    if _silent:
        return
    from vlkit.storage import json_text

    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print a small table as a result; its first `left` columns are left-aligned, the others hold numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # `Text`, because brackets in names of folders and classes are no markup.
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    if not _json_mode:
        # In a terminal that is too narrow the lines break; a number is never cut.
        width = stdout().measure(table, options=stdout().options.update(width=200)).maximum
        wide = stdout() if width <= stdout().width else Console(highlight=False, width=width)
        wide.print(table)
        wide.print()


class Progress:
    """The progress of long work: a bar in a terminal, elsewhere one plain line every 30 seconds."""

    def __init__(self, description: str, total: int, bar: Any = None) -> None:
        self.description, self.total = description, total
        self._bar = bar
        self._task = bar.add_task(description, total=total, figures="") if bar else None
        self._last_line = time.monotonic()

    def update(self, done: int, **figures: float) -> None:
        """Show that `done` of the total are done, with `figures` beside it."""
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
        if self._bar:
            self._bar.update(self._task, completed=done, figures=text)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            say(f"{self.description} {done}/{self.total}  {text}")


@contextmanager
def progress(description: str, total: int) -> Iterator[Progress]:
    """Show the progress of the block on stderr."""
    if not stderr().is_terminal:
        yield Progress(description, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[figures]}"), console=stderr(), transient=True) as bar:
        yield Progress(description, total, bar)
