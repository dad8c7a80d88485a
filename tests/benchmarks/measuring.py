"""What every benchmark shares: ways that take turns, each in a process of its own, and one form of table.

A way is a name and what it makes: `prepare(way, options)` gives a function that does the work once and returns numbers.
The parent starts a process for each way, lets each warm up, and then asks one after the other, round after round, so
that what the machine does beside them falls on all alike. No process waits in a busy loop while it is not its turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Numbers = dict[str, float]
Prepare = Callable[[str, argparse.Namespace], Callable[[], Numbers]]
CHILD = "--child"
STARTED = time.perf_counter()
LOAD = os.getloadavg()[0]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    # Of the first core; on other systems nothing.
    known: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip())
    kind = "".join(
        f", {name} {known[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in known
    )
    return {
        "cpu": known.get("model name", platform.processor()) + kind,
        "cores": os.cpu_count(),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in known.get("flags", "").split()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def header(packages: Sequence[str] = ("torch",)) -> str:
    """The machine, the versions of what was measured, what else ran, and how long all of it took, in three lines."""
    from importlib.metadata import PackageNotFoundError, version

    known = machine()
    bf16 = ", ".join(known["bf16"]) or "no bf16 instructions"
    versions = []
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    told = f"{known['cpu']}, {known['cores']} cores, {bf16}; {known['system']}; Python {known['python']}"
    took = (time.perf_counter() - STARTED) / 60
    return f"{known['date']}: {told}\n{', '.join(versions)}\nload {LOAD:.1f} at the start; took {took:.1f} minutes"


def peak_gb() -> float:
    """GB of 2^30 bytes that this process has held at most, since `forget_peak` or its start (Linux)."""
    return _status("VmHWM")


def held_gb() -> float:
    """GB of 2^30 bytes that this process holds now (Linux)."""
    return _status("VmRSS")


def forget_peak() -> None:
    """The peak begins anew, from what is held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def in_turns(
    program: str, ways: Sequence[str], rounds: int, arguments: Sequence[str], *, warm_up: bool = True
) -> dict[str, list[Numbers]]:
    """What each way said in each round. Another way begins each round.

    Args:
        program: the benchmark's own file; its `main` calls `as_child` first.
        arguments: its command line.
        warm_up: a round before them is left out; not where every turn leaves out its own beginning.
    """
    children = {way: _Child(program, way, arguments) for way in ways}
    found: dict[str, list[Numbers]] = {way: [] for way in ways}
    try:
        for number in range(0 if warm_up else 1, rounds + 1):
            first = number % len(ways)
            for way in [*ways[first:], *ways[:first]]:
                numbers = children[way].ask()
                print(f"{way}, {number or 'warm-up'}: {_told(numbers)}", file=sys.stderr)
                if number:
                    found[way].append(numbers)
    finally:
        for child in children.values():
            child.close()
    return found


def as_child(prepare: Prepare, options: argparse.Namespace) -> bool:
    """Whether this process is one of the ways; then it does its work whenever it is asked, until it is closed."""
    if options.child is None:
        return False
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = prepare(options.child, options)
    for _ in sys.stdin:
        print(json.dumps(work()), file=answers, flush=True)
    return True


def parser(doc: str | None, *, rounds: int, peers: bool = True) -> argparse.ArgumentParser:
    """With what every benchmark takes: --json, --runs; and --without-peers, where some must be installed first."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    made.add_argument("--runs", type=int, default=rounds, help="rounds that count")
    if peers:
        made.add_argument("--without-peers", action="store_true", help="leave out what vlkit does not come with")
    made.add_argument(CHILD, help=argparse.SUPPRESS)
    return made


def middle(runs: Sequence[Numbers], key: str) -> float:
    """The median of a number over the rounds."""
    return statistics.median(run[key] for run in runs)


def spread(runs: Sequence[Numbers], key: str) -> tuple[float, float]:
    """Its least and its greatest."""
    values = [run[key] for run in runs]
    return min(values), max(values)


def ratio(ours: Sequence[Numbers], theirs: Sequence[Numbers], key: str) -> float:
    """How many times theirs ours is: the median over the rounds of the quotient within a round."""
    return statistics.median(one[key] / other[key] for one, other in zip(ours, theirs, strict=True))


def compared(found: Mapping[str, Sequence[Numbers]], reference: str) -> dict[str, dict[str, Any]]:
    """Way -> its images a second, their spread, how many times its rate the reference's is, and its highest peak."""
    return {
        way: {
            "images_per_second": middle(runs, "images_per_second"),
            "spread": spread(runs, "images_per_second"),
            "reference_is": ratio(found[reference], runs, "images_per_second"),
            # A peak is what it was at worst.
            "peak_gb": spread(runs, "peak_gb")[1],
        }
        for way, runs in found.items()
    }


def rate_cells(row: Mapping[str, Any]) -> list[str]:
    """The first three of a way that was `compared`, as a table shows them."""
    rates = (row["images_per_second"], *row["spread"])
    rate, low, high = (f"{each:.2f}" if each < 100 else f"{each:.0f}" for each in rates)
    return [rate, f"{low}-{high}", f"{row['reference_is']:.2f} x"]


def verdict(what: str, found: float, wanted: float, *, most: bool = False, more: str = "") -> str:
    """Whether a bar is met, in one line.

    Args:
        found, wanted: how many times something.
        most: wanted is the most, not the least.
        more: what else there is to say where it is missed.
    """
    met = found <= wanted if most else found >= wanted
    told = f"{what}: {found:.3g} x, wanted {'at most ' * most}{wanted:.3g} x: {'met' if met else 'MISSED'}"
    return f"{told}; {more}" if more and not met else told


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(str(row[column])) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [str(row[0]).ljust(widths[0]), *(str(c).rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def matmul_rate(precision: str, seconds: float = 1.0) -> float:
    """FLOP/s of matrix products of a ViT-B/32's size in a batch of 32, on this machine: the best so far of many.

    By oneDNN where vlkit takes it: MKL, which torch takes for float32, is slower on some machines, and no limit.
    """
    import torch

    from vlkit.models.fast.linear import matmul_t

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    best = _BEST.get(precision, 0.0)
    for rows, inner, columns in ((1600, 768, 3072), (1600, 3072, 768), (2048, 2048, 2048)):
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        until = time.perf_counter() + seconds / 3
        while time.perf_counter() < until:
            began = time.perf_counter()
            matmul_t(left, right)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    _BEST[precision] = best
    return best


_BEST: dict[str, float] = {}


class _Child:
    def __init__(self, program: str, way: str, arguments: Sequence[str]) -> None:
        self.way = way
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, program, *arguments, CHILD, way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self) -> Numbers:
        assert self.process.stdin is not None and self.process.stdout is not None
        answer = ""
        # One that has ended by itself takes no more questions; it has said why.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.way}: ended with {self.process.wait()}")
        return dict(json.loads(answer))

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def _told(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _status(name: str) -> float:
    line = next(line for line in _lines("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 2**20
