"""A downloaded COCO folder: where its files are, which images are missing, and the caption files that prep reads.

coco/images/<split>/*.jpg
coco/annotations/captions_<split>.json    captions of the images that are here
coco/annotations/full/                    captions of all images, as COCO publishes them; prep does not read these
coco/archives/                            ZIP files during the download
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

JPEG_SIGNATURE = b"\xff\xd8\xff"
# An image's name in the caption file becomes a path and a part of a URL.
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.jpe?g", re.IGNORECASE)
FETCH_AGAIN = "remove it, and run the same command again to fetch it"


class SplitCounts(NamedTuple):
    """What a split's caption file holds; `bytes`: of its images."""

    images: int
    captions: int
    bytes: int


class CocoFolder:
    """The folder `root`/coco."""

    def __init__(self, root: Path) -> None:
        self.path = root / "coco"
        self.archives = self.path / "archives"
        self._contents: dict[str, dict[str, Any]] = {}

    def images_folder(self, split: str) -> Path:
        """Return the folder of a split's images."""
        return self.path / "images" / split

    def captions_path(self, split: str) -> Path:
        """Return the caption file of the images that are here."""
        return self.path / "annotations" / f"captions_{split}.json"

    def instances_path(self, split: str) -> Path:
        """Return the file of the objects in all images."""
        return self.path / "annotations" / f"instances_{split}.json"

    def full_captions_path(self, split: str) -> Path:
        """Return the caption file of all images."""
        return self.path / "annotations" / "full" / f"captions_{split}.json"

    def full_captions(self, split: str) -> dict[str, Any]:
        """Return the content of the caption file of all images, read once; see `read_captions`."""
        if split not in self._contents:
            self._contents[split] = read_captions(self.full_captions_path(split))
        return self._contents[split]

    def choose_images(self, split: str, limit: int | None, seed: int) -> list[str]:
        """Return the names of the split's images, or of `limit` of them."""
        return choose_names([image["file_name"] for image in self.full_captions(split)["images"]], limit, seed)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder against a second download; the lock ends with the process.

        Raises:
            UsageError: another process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                message = f"{owner} is downloading into {self.path}"
                raise UsageError(message, hint="wait for it, or choose another --root") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def adopt_captions(self, split: str) -> None:
        """Take a complete caption file that the user put here as the one of all images; refuse any other.

        Raises:
            UsageError: the existing file would be overwritten.
        """
        path = self.captions_path(split)
        if self.full_captions_path(split).exists() or not path.exists():
            return
        if len(read_captions(path)["images"]) != COCO_SPLITS[split].images:
            message = f"{path} was not made by download-coco, and lacks images of {split}"
            raise UsageError(message, hint="move it away, or choose another --root")
        self.full_captions_path(split).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(path, self.full_captions_path(split))

    def missing_images(self, split: str, names: Sequence[str]) -> list[str]:
        """Return the names of images that are not here, are empty, or are no JPEG."""
        folder = str(self.images_folder(split))
        return [name for name in names if not _is_jpeg(f"{folder}/{name}")]

    def write_captions(self, split: str, names: Collection[str]) -> SplitCounts:
        """Write the caption file of the images `names`, unless it exists already."""
        selected, path, content = set(names), self.captions_path(split), self.full_captions(split)
        images = [image for image in content["images"] if image["file_name"] in selected]
        ids = {image["id"] for image in images}
        captions = [caption for caption in content["annotations"] if caption["image_id"] in ids]
        if len(images) == len(content["images"]):
            if not path.exists() or not filecmp.cmp(path, self.full_captions_path(split), shallow=False):
                _link_or_copy(self.full_captions_path(split), path)
        else:
            text = json.dumps({**content, "images": images, "annotations": captions})
            # Not rewritten without a change: prep recognises files by their modification time.
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                with atomic_file(path) as aside:
                    aside.write_text(text, encoding="utf-8")
        folder = self.images_folder(split)
        return SplitCounts(len(images), len(captions), sum((folder / name).stat().st_size for name in selected))

    def count_other_images(self, split: str, names: Collection[str]) -> int:
        """Count the images that are here and not among `names`."""
        known = set(names)
        with suppress(FileNotFoundError):
            return sum(
                SAFE_NAME.fullmatch(entry.name) is not None and entry.name not in known
                for entry in os.scandir(self.images_folder(split))
            )
        return 0


def _link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the file system has no hard links."""
    with atomic_file(target) as aside:
        aside.unlink()
        try:
            os.link(source, aside)
        except OSError:
            aside.write_bytes(source.read_bytes())


def _is_jpeg(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(len(JPEG_SIGNATURE)) == JPEG_SIGNATURE
    except (FileNotFoundError, IsADirectoryError):
        return False


def read_captions(path: Path) -> dict[str, Any]:
    """Read a COCO caption file: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}], ...}.

    Raises:
        ArtifactError: it is not one, or names an image outside its folder.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = [image["file_name"] for image in content["images"] if isinstance(image["id"], int)]
        have_ids = all("image_id" in caption for caption in content["annotations"])
        unsafe = [name for name in names if not isinstance(name, str) or not SAFE_NAME.fullmatch(name)]
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path} is not a COCO caption file: {type(error).__name__}: {error}"
        raise ArtifactError(message, hint=FETCH_AGAIN) from None
    if unsafe:
        raise ArtifactError(f"{path} is refused: it names an image {unsafe[0]!r}", hint=FETCH_AGAIN)
    if not names or len(names) != len(content["images"]) or not have_ids:
        raise ArtifactError(f"{path} is refused: it lists no images, or captions without an image", hint=FETCH_AGAIN)
    return content


def choose_names(names: Sequence[str], limit: int | None, seed: int) -> list[str]:
    """Return `limit` of the names, drawn by the seed, in their order; a larger limit contains a smaller one."""
    if limit is None or limit >= len(names):
        return list(names)
    selected = set(sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:limit])
    return [name for name in names if name in selected]
