"""caption: write captions of images and folders of images with a run of train-fusion."""

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

# File names by which a folder's images are found; whether a file is an image is decided by its bytes.
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".mpo", ".avif"}
# A caption is {image, caption}; an image that cannot be read is {image, error}.
Line = dict[str, str]


def caption(config: CaptionConfig) -> dict[str, Any]:
    """Run `vlkit caption`: print a table or, with --out, continue a file.

    Raises:
        UsageError: no image is given, or another process writes to --out.
        DataError: an image that was named itself cannot be read, or none of a folder's can.
    """
    images = find_images(config.pictures)[: config.limit]
    run, known = Run(config.run), set[str]()
    if config.out is None:
        lines = _write_captions(run, images, config, lambda batch: None)
        rows = [(line["image"], line.get("caption", f"({line.get('error')})")) for line in lines]
        console.print_table("captions", ("image", "caption"), rows, left=2)
    else:
        refuse_unwritable(config.out.parent, "--out")
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with CaptionFile(config.out, _caption_settings(run, config)) as out:
            left = [path for path in images if str(path.resolve()) not in out.known]
            lines, known = _write_captions(run, left, config, out.append), out.known
        written = sum("caption" in line for line in lines)
        details = f", {len(out.known)} were already there" if out.known else ""
        details += f", {len(lines) - written} images cannot be read" if written < len(lines) else ""
        console.print_result(f"{config.out}: {written} captions written{details}")
    if lines and not known and not any("caption" in line for line in lines):
        raise DataError(f"none of the {len(lines)} images can be read: {lines[0]['error']}")
    return {"run": str(run.folder), "captions": lines, "out": str(config.out) if config.out else None}


def _write_captions(
    run: Run, images: Sequence[Path], config: CaptionConfig, save: Callable[[list[Line]], None]
) -> list[Line]:
    """Return the lines of all images; `save` gets those of each batch as soon as they are written."""
    lines: list[Line] = []
    if not images:
        return lines
    captioner = load_captioner(run, prompt=config.prompt, precision=config.precision, decode=config.decode)
    captioner.check_context_length(config.max_new_tokens, "a smaller --max-new-tokens")
    with console.progress("writing captions", len(images)) as bar:
        for batch in caption_batches(captioner, images, {Path(name) for name in config.pictures}, config):
            save(batch)
            lines += batch
            bar.update(len(lines))
    return lines


def _caption_settings(run: Run, config: CaptionConfig) -> dict[str, Any]:
    """Return what decides a caption beside the image: the hash of the weights, and the settings of generation."""
    weights = run.folder / "fusion" / "fusion.safetensors"
    model = {"model": file_sha256(weights)} if weights.is_file() else {}
    names = ("num_beams", "max_new_tokens", "prompt", "precision")
    # Left out if not given: files written before this setting existed do not have it.
    decoding = {"decode": config.decode} if config.decode else {}
    return {"run": run.name, **model, **{name: getattr(config, name) for name in names}, **decoding}


def caption_batches(
    captioner: Captioner, paths: Sequence[Path], named: set[Path], config: CaptionConfig
) -> Iterator[list[Line]]:
    """Yield the lines of one batch of images after the other.

    Args:
        named: images that the user named one by one: those must be readable; in a folder an unreadable one is skipped.

    Raises:
        DataError: a named image cannot be read.
    """
    spec = captioner.vision.pixel_spec
    for start in range(0, len(paths), config.batch_size):
        signals.raise_if_stopped()
        lines: list[Line] = []
        pixels: list[np.ndarray] = []
        for path in paths[start : start + config.batch_size]:
            try:
                pixels.append(decode.load_pixels(path, spec))
                lines.append({"image": str(path), "caption": ""})
            except DataError as error:
                if path in named:
                    hint = "leave it out, or give its folder: unreadable images of a folder are skipped"
                    raise DataError(error.message, hint=hint) from None
                console.warn(f"skipped: {error.message}")
                lines.append({"image": str(path), "error": error.message})
        if pixels:
            patches = captioner.patches(torch.from_numpy(np.stack(pixels)))
            captions = iter(
                captioner.generate(patches, num_beams=config.num_beams, max_new_tokens=config.max_new_tokens)
            )
            lines = [line | {"caption": next(captions)} if "caption" in line else line for line in lines]
        yield lines


def find_images(names: Sequence[str]) -> list[Path]:
    """Return files, and the images in folders and their subfolders, each once and in order.

    Raises:
        UsageError: nothing is named, or a path does not exist.
    """
    if not names:
        raise UsageError("no image is given", hint="vlkit caption --run RUN image.jpg folder/")
    paths: dict[Path, Path] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not files:
                raise UsageError(f"{path} holds no images", hint=f"their names end in {', '.join(sorted(SUFFIXES))}")
        elif path.is_file():
            files = [path]
        else:
            raise UsageError(f"no such image or folder: {path}")
        for file in files:
            paths.setdefault(file.resolve(), file)
    return list(paths.values())


class CaptionFile:
    """A file of JSON lines that is appended to: first the settings, then one line of {image, caption} per image.

    Images are named by their absolute paths. One process writes at a time. An image that cannot be read gets no line,
    so it is tried again.

    Attributes:
        known: images that have a caption already.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.known = path, settings, set[str]()

    def __enter__(self) -> CaptionFile:
        """Lock the file and read it; a torn last line, left by a killed process, is cut off.

        Raises:
            ArtifactError: it is not a file of captions.
            UsageError: another process writes to it, or it was written with other settings.
        """
        self.file = self.path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process writes to {self.path}", hint="wait for it, or give another --out"
            ) from None
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        # Without a line break it can only be what a killed process left of the very first line.
        torn = self._header().startswith(content) and len(content) > len('{"asked": ')
        if content and not whole and not torn:
            raise self._foreign_file("its first line does not hold the settings")
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines and not isinstance(lines[0]["asked"], dict):
                raise TypeError("its first line does not hold the settings")
            self.known = {str(line["image"]) for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign_file(f"{type(error).__name__}: {error}") from None
        if lines and lines[0]["asked"] != self.settings:
            before = lines[0]["asked"]
            name = next(key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key))
            message = f"{self.path} was written with {name} {before.get(name)}, not {self.settings.get(name)}"
            raise UsageError(message, hint="give another --out, or the same settings as before")
        self.file.truncate(len(whole))
        self.started = bool(whole)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.started:
            self.path.unlink()  # Nothing was written, so nothing is left behind.
        self.file.close()

    def _header(self) -> bytes:
        return (json_text({"asked": self.settings}) + "\n").encode()

    def append(self, lines: Sequence[Line]) -> None:
        """Append captions, skipping images that could not be read; they are on disk when this returns."""
        if not self.started:
            self._write([{"asked": self.settings}])
            self.started = True
        self._write([{**line, "image": str(Path(line["image"]).resolve())} for line in lines if "caption" in line])

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        self.file.write("".join(json_text(line) + "\n" for line in lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        fault_injection.fault_point("after fsync", self.path)

    def _foreign_file(self, reason: str) -> ArtifactError:
        return ArtifactError(f"{self.path} is not a file of vlkit's captions: {reason}", hint="give another --out")
