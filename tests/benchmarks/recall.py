"""Does augmentation help, and do honest labels? Recall on sample data, three seeds, against the plain run.

python tests/benchmarks/recall.py [--seeds 1,2,3] [--steps N] [--tasks recipes,agriculture] [--ways A,B] [--folder DIR]

Every run has the same steps and batch size, and is measured on the same test rows, which no augmentation touches.
A row's value is the mean over the seeds; its interval resamples recipes (or pictures), paired with the plain run;
beside it the lowest and the highest seed, because a seed is no recipe. A folder that is given keeps its finished runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measuring
import numpy as np

from vlkit.data.pairs import read_pairs
from vlkit.evaluation.retrieval.task import RetrievalTask, score_task
from vlkit.evaluation.statistics import count_changed_units, interval, p_value, resample
from vlkit.metrics import DIRECTIONS
from vlkit.models.loading import load_model

# Name -> flags of augment (None: the plain folder), flags of train-retrieval. {plain}: the plain run of the same seed.
RECIPES: dict[str, tuple[str | None, str]] = {
    "plain": (None, ""),
    "eye labels": (None, "--labels eye"),
    "texts written": ("--pictures 0 --negatives-per-positive 0", ""),
    "pictures written": ("--texts 0 --negatives-per-positive 0", ""),
    "pictures varied in every epoch": (None, "--augment {augment}"),
    "random negatives": ("--pictures 0 --texts 0", ""),
    "hard negatives": ("--pictures 0 --texts 0 --hard {plain}", ""),
}
LEAVES = {name: RECIPES[name] for name in ("plain", "eye labels", "pictures varied in every epoch")}
TASKS = {
    "recipes": (RECIPES, "--test-share 0.6 --val-share 0.1", "text_to_image"),
    "agriculture": (LEAVES, "--test-share 0.25 --val-share 0.1", "image_to_text"),
}


def vlkit(*words: object) -> None:
    """Run a command; end with what it said where it fails."""
    done = subprocess.run([sys.executable, "-m", "vlkit", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vlkit {' '.join(map(str, words))}:\n{done.stderr}")


def prepared(folder: Path, layout: str, shares: str) -> Path:
    """The task's plain folder."""
    data = folder / "data" / layout
    if not data.is_dir():
        if not (folder / "raw" / layout).is_dir():
            vlkit("sample", layout, folder / "raw" / layout)
        vlkit("prep", "--domain", layout, "--source", folder / "raw" / layout, "--out", data, *shares.split())
    return data


def trained(folder: Path, data: Path, name: str, seed: int, flags: tuple[str | None, str], steps: list[str]) -> Path:
    """One run, on the plain folder or on an augmented copy of it."""
    (folder / "as-it-is.yaml").write_text("{}\n")
    run = folder / "runs" / f"{data.name}-{name.replace(' ', '-')}-{seed}{''.join(steps)}"
    if (run / "finished.json").is_file():
        return run
    plain = run.with_name(f"{data.name}-plain-{seed}{''.join(steps)}")
    known = {"plain": plain, "augment": folder / "as-it-is.yaml"}
    augment, train = (flag.format(**known).split() if flag is not None else None for flag in flags)
    if augment is not None:
        copy = folder / "copies" / run.name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(data, copy)
        vlkit("augment", "--data", copy, "--seed", seed, *augment)
        data = copy
    words = ["--model", "tiny-siglip", "--runs-dir", folder / "runs", "--name", run.name, "--seed", seed, *steps]
    vlkit("train-retrieval", "--data", data, *words, *(train or []))
    return run


def hits(run: Path, task: RetrievalTask) -> dict[str, np.ndarray]:
    """Direction -> recall@1 of every query."""
    scores = score_task(load_model(str(run)), task, batch_size=64, precision="fp32").values()
    return {direction: scores[direction, "recall@1"] for direction in DIRECTIONS}


def measured(folder: Path, layout: str, seeds: list[int], steps: list[str], only: set[str]) -> list[dict[str, Any]]:
    """A row for every way of training: recall@1, its interval, its difference to the plain one's."""
    ways, shares, direction = TASKS[layout]
    ways = {name: flags for name, flags in ways.items() if not only or name in only | {"plain"}}
    data = prepared(folder, layout, shares)
    task = RetrievalTask.from_pairs(read_pairs(data).split("test"))
    units = task.queries(direction)["unit"].to_numpy()
    found: dict[str, np.ndarray] = {}
    for name, flags in ways.items():
        runs = [trained(folder, data, name, seed, flags, steps) for seed in seeds]
        found[name] = np.stack([hits(run, task)[direction] for run in runs])
        print(f"{layout}, {name}: {found[name].mean(1).round(3).tolist()}", file=sys.stderr, flush=True)
    means = {name: values.mean(0) for name, values in found.items()}
    draws = resample(means, {}, units, draws=4000, seed=0)
    count, rows = len(np.unique(units)), []
    for name, values in means.items():
        by_seed = found[name].mean(1)
        row = {"task": f"{layout}, {direction.replace('_to_', ' -> ')}", "way": name, "recall@1": values.mean()}
        row |= {"interval": interval(draws[name], units=count, bounds=(0, 1)), "seeds": (by_seed.min(), by_seed.max())}
        if name != "plain":
            apart = draws[name] - draws["plain"]
            row["difference"] = values.mean() - means["plain"].mean()
            row["difference_interval"] = interval(apart, units=count, bounds=(-1, 1))
            row["p_value"] = p_value(apart, count_changed_units(values, means["plain"], units.tolist()))
        rows.append(row)
    return rows


def main() -> None:
    """Measure and print a Markdown table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tasks", default="recipes,agriculture")
    parser.add_argument("--ways", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    steps = ["--steps", str(options.steps)] if options.steps else []
    with tempfile.TemporaryDirectory() as aside:
        folder = options.folder or Path(aside)
        only = {way for way in options.ways.split(",") if way}
        rows = [row for task in options.tasks.split(",") for row in measured(folder, task, seeds, steps, only)]
    if options.json:
        print(json.dumps({"machine": measuring.machine(), "rows": rows}, indent=2))
        return
    print(f"{measuring.header(('torch', 'transformers'))}\n")
    print("| task | training | recall@1 | lowest, highest seed | against plain |\n|---|---|---|---|---|")
    for row in rows:
        low, high = row["interval"]
        less, more = row["seeds"]
        told = ""
        if "difference" in row:
            start, end = row["difference_interval"]
            told = f"{row['difference']:+.3f} [{start:+.3f}, {end:+.3f}]"
        value = f"{row['recall@1']:.3f} [{low:.3f}, {high:.3f}]"
        print(f"| {row['task']} | {row['way']} | {value} | {less:.3f}, {more:.3f} | {told} |")


if __name__ == "__main__":
    main()
