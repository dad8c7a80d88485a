"""caption: pictures, and folders of them, described by a run of train-fusion."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlkit import console, faults, interrupts
from vlkit.config_fusion import CaptionConfig
from vlkit.data import images
from vlkit.errors import ArtifactError, DataError, UsageError
from vlkit.models.captioner import Captioner
from vlkit.models.captioner_folder import open_captioner
from vlkit.runs import Run
from vlkit.storage import json_text, refuse_unwritable

# How a folder's pictures end; what a picture is decided by its bytes.
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mpo", ".avif"}


def caption(config: CaptionConfig) -> dict[str, Any]:
    """Run `vlkit caption`: a table or, with --out, a file that goes on where it stopped.

    Raises:
        UsageError: no picture is named. DataError: a picture that was named itself cannot be read.
    """
    pictures = pictures_of(config.pictures)[: config.limit]
    if config.out is not None:
        refuse_unwritable(config.out.parent, "--out")
    run = Run(config.run)
    asked = {"run": str(run.folder.resolve()), **_manner(config)}
    known = {} if config.out is None else _written(config.out, asked)
    left = [path for path in pictures if str(path) not in known]
    named = {Path(name) for name in config.pictures}
    found: list[dict[str, str]] = []
    if left:
        captioner = open_captioner(run, prompt=config.prompt, precision=config.precision)
        captioner.refuse_small_window(config.max_new_tokens)
        with console.progress("writing captions", len(left)) as bar:
            for lines in described(captioner, left, named, config):
                found += lines
                if config.out is not None:
                    _append(config.out, lines, asked)
                bar.update(len(found))
    if config.out is None:
        console.table("captions", ("picture", "caption"), [(each["image"], _shown(each)) for each in found], left=2)
    else:
        already = f", {len(known)} were there" if known else ""
        console.result(f"{config.out}: {len(found)} captions written{already}")
    told = [line for line in found if "caption" in line]
    if found and not told:
        raise DataError(f"none of the {len(found)} pictures can be read: {found[0]['error']}")
    return {"run": str(run.folder), "captions": found, "out": str(config.out) if config.out else None}


def _shown(line: dict[str, str]) -> str:
    return line.get("caption", f"({line.get('error')})")


def _manner(config: CaptionConfig) -> dict[str, Any]:
    """What decides a caption beside the run and the picture."""
    return {name: getattr(config, name) for name in ("num_beams", "max_new_tokens", "prompt", "precision")}


def described(
    captioner: Captioner, paths: Sequence[Path], named: set[Path], config: CaptionConfig
) -> Iterator[list[dict[str, str]]]:
    """Lines of {image, caption}, or {image, error}, a batch at a time.

    Args:
        named: those that the user named one by one: what cannot be read of them is an error, in a folder it is told.
    """
    assert captioner.vision is not None
    spec = captioner.vision.pixel_spec
    for start in range(0, len(paths), config.batch_size):
        interrupts.check()
        lines: list[dict[str, str]] = []
        pixels: list[np.ndarray] = []
        for path in paths[start : start + config.batch_size]:
            try:
                pixels.append(images.pixels(path, spec))
                lines.append({"image": str(path), "caption": ""})
            except DataError as error:
                if path in named:
                    raise
                console.warn(f"left out: {error.message}")
                lines.append({"image": str(path), "error": error.message})
        how = {"num_beams": config.num_beams, "max_new_tokens": config.max_new_tokens}
        if pixels:
            patches = captioner.patches(torch.from_numpy(np.stack(pixels)))
            texts = iter(captioner.generate(patches, **how))
            lines = [line | {"caption": next(texts)} if "caption" in line else line for line in lines]
        yield lines


def pictures_of(names: Sequence[str]) -> list[Path]:
    """Files, and what lies in folders below, each once, in order.

    Raises:
        UsageError: nothing is named, or nothing is there.
    """
    if not names:
        raise UsageError("no picture is named", hint="vlkit caption --run RUN picture.jpg folder/")
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
            if not inside:
                raise UsageError(f"{path} holds no pictures", hint=f"they end in {', '.join(sorted(SUFFIXES))}")
            found |= dict.fromkeys(inside)
        elif path.is_file():
            found[path] = None
        else:
            raise UsageError(f"no such picture or folder: {path}")
    return list(found)


def _written(out: Path, asked: dict[str, Any]) -> dict[str, str]:
    """What stands in --out already: image -> caption. A torn last line, left by a kill, is cut off.

    Raises:
        ArtifactError: it is no such file. UsageError: of another run, or written in another way.
    """
    if not out.is_file():
        return {}
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and "asked" not in lines[0]:
            raise ValueError("its first line does not say how it was written")
        known = {line["image"]: line.get("caption", "") for line in lines[1:]}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{out} holds no captions of vlkit: {error}", hint="give another --out") from None
    if lines and lines[0]["asked"] != asked:
        odd = next(key for key in asked if lines[0]["asked"].get(key) != asked[key])
        told = f"{out} was written with {odd} {lines[0]['asked'].get(odd)}, not {asked[odd]}"
        raise UsageError(told, hint="give another --out, or the same command as then")
    if len(whole) < len(content):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return known


def _append(out: Path, lines: Sequence[dict[str, str]], asked: dict[str, Any]) -> None:
    """Some lines more, on the disk when this returns."""
    begin = not out.is_file() or out.stat().st_size == 0
    with out.open("a", encoding="utf-8") as file:
        head = [{"asked": asked}] if begin else []
        file.write("".join(json_text(line) + "\n" for line in (*head, *lines)))
        file.flush()
        os.fsync(file.fileno())
        faults.place("after fsync", out)
