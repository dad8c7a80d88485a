"""caption: pictures, and folders of them, described by a run of train-fusion."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlkit import console, fault_injection, signals
from vlkit.config.fusion import CaptionConfig
from vlkit.data.images import decode
from vlkit.errors import ArtifactError, DataError, UsageError
from vlkit.models.captioner.captioner import Captioner
from vlkit.models.captioner.save_load import load_captioner
from vlkit.remote import file_sha256
from vlkit.runs import Run
from vlkit.storage import json_text, refuse_unwritable

# How a folder's pictures end; what a picture is decided by its bytes.
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mpo", ".avif"}


def caption(config: CaptionConfig) -> dict[str, Any]:
    """Run `vlkit caption`: a table or, with --out, a file that goes on where it stopped.

    Raises:
        UsageError: no picture is named, or another process writes into --out.
        DataError: a picture that was named itself cannot be read, or none of a folder can.
    """
    pictures = pictures_of(config.pictures)[: config.limit]
    run, known = Run(config.run), set[str]()
    if config.out is None:
        found = _described(run, pictures, config, lambda lines: None)
        console.print_table(
            "captions", ("picture", "caption"), [(each["image"], _shown(each)) for each in found], left=2
        )
    else:
        refuse_unwritable(config.out.parent, "--out")
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with CaptionFile(config.out, _asked(run, config)) as out:
            left = [path for path in pictures if str(path.resolve()) not in out.known]
            found, known = _described(run, left, config, out.append), out.known
        written = sum("caption" in line for line in found)
        more = f", {len(out.known)} were there" if out.known else ""
        more += f", {len(found) - written} pictures cannot be read" if written < len(found) else ""
        console.print_result(f"{config.out}: {written} captions written{more}")
    if found and not known and not any("caption" in line for line in found):
        raise DataError(f"none of the {len(found)} pictures can be read: {found[0]['error']}")
    return {"run": str(run.folder), "captions": found, "out": str(config.out) if config.out else None}


def _described(
    run: Run, pictures: Sequence[Path], config: CaptionConfig, keep: Callable[[list[dict[str, str]]], None]
) -> list[dict[str, str]]:
    """Lines of all pictures; `keep` is given each batch's."""
    found: list[dict[str, str]] = []
    if not pictures:
        return found
    captioner = load_captioner(run, prompt=config.prompt, precision=config.precision, decode=config.decode)
    captioner.refuse_small_window(config.max_new_tokens, "a smaller --max-new-tokens")
    with console.progress("writing captions", len(pictures)) as bar:
        for lines in described(captioner, pictures, {Path(name) for name in config.pictures}, config):
            keep(lines)
            found += lines
            bar.update(len(found))
    return found


def _asked(run: Run, config: CaptionConfig) -> dict[str, Any]:
    """What decides a caption beside the picture: the weights, by their hash, and how they are asked."""
    weights = run.folder / "fusion" / "fusion.safetensors"
    known = {"model": file_sha256(weights)} if weights.is_file() else {}
    names = ("num_beams", "max_new_tokens", "prompt", "precision")
    # Left out where it is not given: a file may be older than the setting.
    read = {"decode": config.decode} if config.decode else {}
    return {"run": run.name, **known, **{name: getattr(config, name) for name in names}, **read}


def _shown(line: dict[str, str]) -> str:
    return line.get("caption", f"({line.get('error')})")


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
        signals.raise_if_stopped()
        lines: list[dict[str, str]] = []
        pixels: list[np.ndarray] = []
        for path in paths[start : start + config.batch_size]:
            try:
                pixels.append(decode.load_pixels(path, spec))
                lines.append({"image": str(path), "caption": ""})
            except DataError as error:
                if path in named:
                    raise DataError(error.message, hint="leave it out, or give its folder: then it is told") from None
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
    found: dict[Path, Path] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file())
            if not inside:
                raise UsageError(f"{path} holds no pictures", hint=f"they end in {', '.join(sorted(SUFFIXES))}")
        elif path.is_file():
            inside = [path]
        else:
            raise UsageError(f"no such image or folder: {path}")
        for each in inside:
            found.setdefault(each.resolve(), each)
    return list(found.values())


class CaptionFile:
    """JSON lines of {image, caption} that are added to: first how they were asked for, then a picture a line.

    Pictures are named by their whole paths. One process writes at a time. A picture that cannot be read has no line, so
    it is tried again.

    Attributes:
        known: images that have a caption already.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked, self.known = path, asked, set[str]()

    def __enter__(self) -> CaptionFile:
        """Take the file's lock, and read what is there; a torn last line, left by a kill, is cut off.

        Raises:
            ArtifactError: it is no such file. UsageError: in use, of another run, or asked for in another way.
        """
        self.file = self.path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process writes into {self.path}", hint="wait for it, or another --out") from None
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        # Without a line break it can only be what a kill has left of the very first line.
        torn = self._head().startswith(content) and len(content) > len('{"asked": ')
        if content and not whole and not torn:
            raise self._foreign("its first line does not say how it was written")
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines and not isinstance(lines[0]["asked"], dict):
                raise TypeError("its first line does not say how it was written")
            self.known = {str(line["image"]) for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign(f"{type(error).__name__}: {error}") from None
        if lines and lines[0]["asked"] != self.asked:
            before = lines[0]["asked"]
            odd = next(key for key in {**before, **self.asked} if before.get(key) != self.asked.get(key))
            told = f"{self.path} was written with {odd} {before.get(odd)}, not {self.asked.get(odd)}"
            raise UsageError(told, hint="give another --out, or the same command as then")
        self.file.truncate(len(whole))
        self.begun = bool(whole)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.begun:
            self.path.unlink()  # Nothing was written, so nothing is left behind.
        self.file.close()

    def _head(self) -> bytes:
        return (json_text({"asked": self.asked}) + "\n").encode()

    def append(self, lines: Sequence[dict[str, str]]) -> None:
        """Captions more, on the disk when this returns; what could not be read is passed over."""
        if not self.begun:
            self._write([{"asked": self.asked}])
            self.begun = True
        named = [{**line, "image": str(Path(line["image"]).resolve())} for line in lines if "caption" in line]
        self._write(named)

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        self.file.write("".join(json_text(line) + "\n" for line in lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        fault_injection.fault_point("after fsync", self.path)

    def _foreign(self, why: str) -> ArtifactError:
        return ArtifactError(f"{self.path} holds no captions of vlkit: {why}", hint="give another --out")
