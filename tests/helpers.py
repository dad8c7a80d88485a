"""What several tests use: small raw folders, images, tables, and the outcome of a command."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

ROOT = Path(__file__).parents[1]
# Public data sets beside the repository, on machines that have them.
SHARED_DATA = ROOT.parent / "shared/data"

COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 60, 210),
    "yellow": (230, 220, 60),
    "white": (240, 240, 240),
}
FORMS = ("tart", "soup", "pie", "salad", "cake", "bread")


@dataclass
class Outcome:
    """What a command did: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    def json(self) -> dict:
        """stdout as the one JSON object it must be."""
        return json.loads(self.out)


def write_image(path: Path, colour: tuple[int, int, int], seed: int, size: int = 40) -> None:
    """Write a noisy patch of one colour; every seed gives other bytes."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size, size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def write_patterned_image(path: Path, seed: int, size: tuple[int, int] = (96, 72), **save: object) -> Path:
    """Write an image with large forms of its own, so that perceptual hashes tell it from others."""
    small = np.random.default_rng(seed).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, **save)
    return path


def write_recipes(folder: Path, recipes: int = 30, images: int = 2) -> Path:
    """Write a raw folder of recipes: each with `images` images and two texts."""
    lines = []
    for number in range(recipes):
        colour, form = list(COLOURS)[number % 5], FORMS[number // 5 % 6]
        names = [f"images/{number}-{copy}.png" for copy in range(images)]
        for copy, name in enumerate(names):
            write_image(folder / name, COLOURS[colour], seed=number * 10 + copy)
        texts = {
            "title": f"{colour} {form} number {number}",
            "description": f"A {form} that is {colour}, made {number} times.",
        }
        lines.append(json.dumps({"recipe_id": f"r{number:03d}", **texts, "images": names}))
    (folder / "recipes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_class_folders(folder: Path, per_class: int = 10) -> Path:
    """Write a raw folder of classes: one colour for each class."""
    for position, (colour, value) in enumerate(COLOURS.items()):
        for number in range(per_class):
            write_image(folder / f"Leaf___{colour}_spot" / f"{number}.png", value, seed=position * 1000 + number)
    return folder


def read_rejects(tmp_path: Path) -> dict[str, str]:
    """Return the reason of each rejected item of tmp_path/out."""
    table = pd.read_csv(tmp_path / "out/rejects.csv")
    return dict(zip(table["item"], table["reason"], strict=True))


def write_table(folder: Path, rows: list[dict], name: str = "table.csv") -> None:
    """Write rows as CSV; the columns are the keys in the order in which they appear."""
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def rewrite_manifest(index: Path) -> None:
    """Write the manifest of an index anew, from the files that are there now."""
    from vlkit.remote import file_sha256

    files = {path.name: {"sha256": file_sha256(path)} for path in index.iterdir() if path.name != "MANIFEST.json"}
    (index / "MANIFEST.json").write_text(json.dumps({"schema": 1, "files": files}))


def final_state(run: Path) -> tuple:
    """Return everything that the last step left: weights, moments, the loss scaler, and the losses on the way."""
    from vlkit import checkpoints
    from vlkit.remote import file_sha256

    folder = checkpoints.list_checkpoints(run / "checkpoints")[-1]
    scaler = checkpoints.read_verified(folder).state["scaler"]
    hashes = {name: file_sha256(folder / name) for name in ("trainable.safetensors", "optimizer.safetensors")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (
        folder.name,
        hashes | {"scaler": scaler},
        [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line],
    )


def torchrun(processes: int, folder: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run `torchrun -m vlkit train-retrieval` and return its output."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    words = [*program, "vlkit", "train-retrieval", "--model", "tiny-siglip", "--runs-dir", folder, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, env=environment)


def read_metrics(run: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
