"""How long a command takes that does little: `vlkit --help`, and a first `vlkit search`, each a new process.

python tests/benchmarks/start.py [--json] [--size tiny ViT-B/32] [--runs 9]

Help is measured beside a bare Typer program's; a search beside a bare script that imports the same libraries, loads
the same CLIP and its tokenizer from the same folder, encodes the same text and asks the same FAISS file. Programs take
turns, and a ratio is that within a round. CPU s: of all cores. Both searches must find the same text first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import photos

TEXTS = 400
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WANTED = {"vlkit --help": 2.5, "vlkit search": 1.2}

HELP = """
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

SEARCH = """
import json
import sys

import torch
import faiss
import pyarrow.parquet
from transformers import CLIPModel, CLIPTokenizer

folder, index, words = sys.argv[1:]
model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
with torch.inference_mode():
    found = model.get_text_features(**tokenizer([words], return_tensors="pt")).pooler_output
    row = torch.nn.functional.normalize(found, dim=-1).numpy()
scores, places = faiss.read_index(f"{index}/texts.faiss").search(row, 5)
texts = pyarrow.parquet.read_table(f"{index}/docstore.parquet").column("text")
hits = zip(places[0].tolist(), scores[0].tolist())
print(json.dumps([{"text": texts[place].as_py(), "score": score} for place, score in hits]))
"""


def once(program: list[str]) -> tuple[measuring.Numbers, str]:
    """Wall and CPU seconds of one run, and what it printed."""
    began = time.perf_counter()
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **ENVIRONMENT}
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(program)} ended with {process.returncode}")
    return {"seconds": wall, "cpu_seconds": used.ru_utime + used.ru_stime}, printed


def measured(
    programs: dict[str, list[str]], runs: int, look: Callable[[dict[str, str]], None] = lambda printed: None
) -> dict[str, Any]:
    """One table's rows. The first program is what the others are measured by; the first round warms the file cache.

    Args:
        look: is shown what the programs printed in that round.
    """
    found: dict[str, list[measuring.Numbers]] = {name: [] for name in programs}
    for number in range(runs + 1):
        printed = {}
        for name, program in programs.items():
            numbers, printed[name] = once(program)
            if number:
                found[name].append(numbers)
        if not number:
            look(printed)
    bare = next(iter(found.values()))
    return {
        name: {
            "seconds": measuring.middle(taken, "seconds"),
            "spread": measuring.spread(taken, "seconds"),
            "cpu_seconds": measuring.middle(taken, "cpu_seconds"),
            "ratio": measuring.ratio(taken, bare, "seconds"),
            "cpu_ratio": measuring.ratio(taken, bare, "cpu_seconds"),
        }
        for name, taken in found.items()
    }


def help_programs(folder: Path) -> dict[str, list[str]]:
    """Programs that print their help."""
    (folder / "help.py").write_text(HELP)
    return {
        "bare Typer --help": [sys.executable, str(folder / "help.py"), "--help"],
        "vlkit --help": [sys.executable, "-m", "vlkit", "--help"],
        "vlkit train-retrieval --help": [sys.executable, "-m", "vlkit", "train-retrieval", "--help"],
    }


def search_programs(folder: Path, size: str) -> tuple[dict[str, list[str]], str]:
    """Programs that search an index, which is made here, for one of its texts; and that text."""
    texts = photos.captions(TEXTS)
    model, index = folder / "model", folder / "index"
    photos.write_model(model, size, texts)
    (folder / "texts.csv").write_text("\n".join(["text", *texts]) + "\n")
    (folder / "search.py").write_text(SEARCH)
    vlkit = [sys.executable, "-m", "vlkit"]
    once([*vlkit, "index", "--model", str(model), "--data", str(folder / "texts.csv"), "--out", str(index), "--json"])
    return {
        "bare script": [sys.executable, str(folder / "search.py"), str(model), str(index), texts[0]],
        "vlkit search": [*vlkit, "search", texts[0], "--index", str(index), "--json"],
    }, texts[0]


def refuse_another(text: str, printed: dict[str, str]) -> None:
    """Both must have found the text itself."""
    bare, ours = json.loads(printed["bare script"])[0], json.loads(printed["vlkit search"])["queries"][0]["texts"][0]
    if not bare["text"] == ours["text"] == text:
        raise SystemExit(f"asked for {text!r}: the bare script found {bare}, vlkit search {ours}")


def shown(rows: dict[str, Any]) -> str:
    """One table."""
    head = ["", "seconds", "spread", "is", "CPU s", "is"]
    lines, bars = [], []
    for name, row in rows.items():
        low, high = row["spread"]
        wall = [f"{row['seconds']:.2f}", f"{low:.2f}-{high:.2f}", f"{row['ratio']:.2f} x"]
        cpu = [f"{row['cpu_seconds']:.2f}", f"{row['cpu_ratio']:.2f} x"]
        lines.append([name, *wall, *cpu])
        if name in WANTED:
            bars.append(measuring.verdict(name, row["ratio"], WANTED[name], most=True))
    return "\n".join([measuring.table(head, lines), *bars])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All the tables."""
    tables = {}
    with tempfile.TemporaryDirectory() as name:
        tables["help"] = measured(help_programs(Path(name)), options.runs)
        for size in options.size:
            folder = Path(name) / size.replace("/", "-")
            folder.mkdir()
            programs, text = search_programs(folder, size)
            title = f"a first search among {TEXTS} texts, {size}"
            tables[title] = measured(programs, options.runs, partial(refuse_another, text))
    return tables


def main() -> None:
    """Measure and print."""
    parser = measuring.parser(__doc__, rounds=9, peers=False)
    parser.add_argument("--size", nargs="+", choices=photos.SIZES, default=list(photos.SIZES), help="of the CLIP")
    options = parser.parse_args()
    tables = measure(options)
    if options.json:
        print(json.dumps({"machine": measuring.machine(), **tables}, indent=2))
        return
    print(measuring.header(("torch", "transformers", "faiss-cpu", "pyarrow", "typer")))
    print(f"medians of {options.runs} runs, each a new process")
    for title, rows in tables.items():
        print(f"\n{title}\n{shown(rows)}")


if __name__ == "__main__":
    main()
