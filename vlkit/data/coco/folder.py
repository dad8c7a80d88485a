"""A downloaded COCO folder: where its files lie, what is missing, and the caption files that `vlkit prep` reads.

coco/images/<split>/*.jpg
coco/annotations/captions_<split>.json    the pictures that are here
coco/annotations/full/                    the same of all pictures, as COCO gives them; prep does not read it
coco/archives/                            ZIP files on their way
"""

from __future__ import annotations

import fcntl
import filecmp
import hashlib
import json
import os
import re
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vlkit.config.data import COCO_SPLITS
from vlkit.errors import ArtifactError, UsageError
from vlkit.storage import atomic_file

JPEG = b"\xff\xd8\xff"
# A picture's name in the caption file becomes a path and a part of a URL.
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.jpe?g", re.IGNORECASE)


class Published(NamedTuple):
    """What a split's caption file holds."""

    pictures: int
    captions: int
    bytes: int


class CocoFolder:
    """The folder `root`/coco."""

    def __init__(self, root: Path) -> None:
        self.path = root / "coco"
        self.archives = self.path / "archives"
        self._read: dict[str, dict[str, Any]] = {}

    def pictures(self, split: str) -> Path:
        """The folder of a split's pictures."""
        return self.path / "images" / split

    def captions(self, split: str) -> Path:
        """The caption file of the pictures that are here."""
        return self.path / "annotations" / f"captions_{split}.json"

    def instances(self, split: str) -> Path:
        """The file of the objects, of all pictures."""
        return self.path / "annotations" / f"instances_{split}.json"

    def complete(self, split: str) -> Path:
        """The caption file of all pictures."""
        return self.path / "annotations" / "full" / f"captions_{split}.json"

    def content(self, split: str) -> dict[str, Any]:
        """The complete caption file, read once; see `read_captions`."""
        if split not in self._read:
            self._read[split] = read_captions(self.complete(split))
        return self._read[split]

    def wanted(self, split: str, limit: int | None, seed: int) -> list[str]:
        """Names of the split's pictures, or of `limit` of them."""
        return choose_names([image["file_name"] for image in self.content(split)["images"]], limit, seed)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second download; let go however the process ends.

        Raises:
            UsageError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UsageError(
                    f"{self.path} is being downloaded by {owner}", hint="wait for it, or give another --root"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def adopt(self, split: str) -> None:
        """Take a whole caption file that somebody put here by hand for the complete one; refuse any other.

        Raises:
            UsageError: what is there would be overwritten.
        """
        found = self.captions(split)
        if self.complete(split).exists() or not found.exists():
            return
        if len(read_captions(found)["images"]) != COCO_SPLITS[split].pictures:
            told = f"{found} was not made by download-coco, and has not all pictures of {split}"
            raise UsageError(told, hint="move it away, or choose another --root")
        self.complete(split).parent.mkdir(parents=True, exist_ok=True)
        _second_name(found, self.complete(split))

    def lacking(self, split: str, names: Sequence[str]) -> list[str]:
        """Those of the pictures `names` that are not here, are empty, or are no JPEG."""
        folder = str(self.pictures(split))
        return [name for name in names if not _is_jpeg(f"{folder}/{name}")]

    def publish(self, split: str, names: Collection[str]) -> Published:
        """Write the caption file of the pictures `names`, where it is not there already."""
        kept, here, content = set(names), self.captions(split), self.content(split)
        images = [image for image in content["images"] if image["file_name"] in kept]
        ids = {image["id"] for image in images}
        captions = [each for each in content["annotations"] if each["image_id"] in ids]
        if len(images) == len(content["images"]):
            if not here.exists() or not filecmp.cmp(here, self.complete(split), shallow=False):
                _second_name(self.complete(split), here)
        else:
            text = json.dumps({**content, "images": images, "annotations": captions})
            # Left as it is where nothing changes: prep knows files again by their dates.
            if not here.exists() or here.read_text(encoding="utf-8") != text:
                with atomic_file(here) as aside:
                    aside.write_text(text, encoding="utf-8")
        folder = self.pictures(split)
        return Published(len(images), len(captions), sum((folder / name).stat().st_size for name in kept))

    def others(self, split: str, names: Collection[str]) -> int:
        """Pictures that lie here besides `names`."""
        kept = set(names)
        with suppress(FileNotFoundError):
            return sum(
                SAFE_NAME.fullmatch(each.name) is not None and each.name not in kept
                for each in os.scandir(self.pictures(split))
            )
        return 0


def _second_name(source: Path, target: Path) -> None:
    """`target` becomes the same file as `source`; a copy where the system gives no second name."""
    with atomic_file(target) as aside:
        aside.unlink()
        try:
            os.link(source, aside)
        except OSError:
            aside.write_bytes(source.read_bytes())


def _is_jpeg(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(len(JPEG)) == JPEG
    except (FileNotFoundError, IsADirectoryError):
        return False


def read_captions(path: Path) -> dict[str, Any]:
    """A COCO caption file: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}], ...}.

    Raises:
        ArtifactError: it is not one, or names a picture that would lie elsewhere.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = [image["file_name"] for image in content["images"] if isinstance(image["id"], int)]
        whole = len(names) == len(content["images"]) > 0 and all("image_id" in each for each in content["annotations"])
        odd = [name for name in names if not isinstance(name, str) or not SAFE_NAME.fullmatch(name)]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is not a COCO caption file: {type(error).__name__}: {error}",
            hint="remove it, and the same command brings it again",
        ) from None
    if not whole or odd:
        what = f"names a picture {odd[0]!r}" if odd else "lists no pictures"
        raise ArtifactError(f"{path} is refused: it {what}", hint="remove it, and the same command brings it again")
    return content


def choose_names(names: Sequence[str], limit: int | None, seed: int) -> list[str]:
    """`limit` of the names, drawn by the seed, in their order here; a larger limit has those of a smaller one."""
    if limit is None or limit >= len(names):
        return list(names)
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:limit]
    kept = set(drawn)
    return [name for name in names if name in kept]
