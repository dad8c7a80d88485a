"""How long `vlkit --help` takes beside a bare Typer program's help: the ratio of medians, runs alternating.

python tests/benchmarks/start.py [--json] [--runs 15]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import typer
app = typer.Typer()

@app.command()
def train(data: str = "data", steps: int = 100):
    "Train."

@app.command()
def evaluate(run: str = "runs"):
    "Evaluate."

app()
"""


def seconds(program: list[str]) -> float:
    """Wall seconds of one run."""
    started = time.perf_counter()
    subprocess.run(program, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE)
        programs = {
            "bare Typer --help": [sys.executable, str(bare), "--help"],
            "vlkit --help": [sys.executable, "-m", "vlkit", "--help"],
            "vlkit train-retrieval --help": [sys.executable, "-m", "vlkit", "train-retrieval", "--help"],
        }
        taken: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(options.runs + 1):
            for name, program in programs.items():
                taken[name].append(seconds(program))
    # The first round warms the file cache.
    medians = {name: statistics.median(values[1:]) for name, values in taken.items()}
    ratios = {name: median / medians["bare Typer --help"] for name, median in medians.items()}
    if options.json:
        print(json.dumps({"machine": platform.platform(), "seconds": medians, "ratios": ratios}))
        return
    print(f"{platform.platform()}, Python {platform.python_version()}, {options.runs} runs each")
    for name, median in medians.items():
        spread = f"{min(taken[name][1:]):.3f} to {max(taken[name][1:]):.3f}"
        print(f"{name:32} {median:.3f} s   {ratios[name]:.2f} x   spread {spread}")


if __name__ == "__main__":
    main()
