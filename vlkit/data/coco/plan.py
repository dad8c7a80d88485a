"""Plan a download of COCO: what is still to fetch, how large it is, and whether the disk has room for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlkit import console
from vlkit.config.data import COCO_ANNOTATION_BYTES, COCO_SPLITS, DownloadCocoConfig
from vlkit.data.coco.folder import CocoFolder
from vlkit.data.coco.http import RetryPolicy, local_bytes, remote_size
from vlkit.errors import DataError, ResourceError
from vlkit.storage import format_bytes, nearest_existing

# Up to this share of a split's images is fetched singly; more comes faster with the whole archive.
MAX_SHARE_SINGLY = 0.05
# Files occupy whole blocks on a disk.
DISK_OVERHEAD = 1.03


class Piece(NamedTuple):
    """One archive, or a number of single images.

    Attributes:
        name: file name of the archive, or "images of <split>".
        images: images in it that are still missing.
        size: bytes in all.
        local: bytes of `size` that need not be fetched.
        unpacked: bytes that stay on the disk in the end, without the archive.
        url: of an archive that is fetched; else None.
    """

    name: str
    images: int
    size: int
    local: int
    unpacked: int
    url: str | None

    @property
    def is_archive(self) -> bool:
        """An archive, not single images."""
        return self.name.endswith(".zip")


def annotations_archive(split: str) -> str:
    """Return the name of the archive with a split's annotations."""
    return f"annotations_trainval{split[-4:]}.zip"


def archive_url(config: DownloadCocoConfig, name: str) -> str:
    """Return the URL of an archive."""
    return f"{config.url.rstrip('/')}/{'annotations' if name.startswith('annotations') else 'zips'}/{name}"


def archive_path(config: DownloadCocoConfig, folder: CocoFolder, name: str) -> Path:
    """Return where an archive is, or will be, on this machine."""
    return (config.from_archive or folder.archives) / name


def annotation_targets(config: DownloadCocoConfig, folder: CocoFolder, archive: str) -> dict[str, Path]:
    """Return member of an annotations archive -> its path, for missing files; empty if the year lacks none.

    The captions of the year's other split are unpacked too: fetching the archive again for them would take longer.
    """
    year = [split for split in COCO_SPLITS if annotations_archive(split) == archive]
    requested = [split for split in year if split in config.split]
    paths = [folder.instances_path(split) for split in requested] if config.instances else []
    missing = [path for path in paths if not path.exists()]
    if missing or not all(folder.full_captions_path(split).exists() for split in requested):
        captions = [folder.full_captions_path(split) for split in year]
        missing += [path for path in captions if not path.exists()]
    return {f"annotations/{path.name}": path for path in missing}


def uses_archive(config: DownloadCocoConfig, folder: CocoFolder, split: str, missing: int, total: int) -> bool:
    """Return whether `missing` of a split's `total` images come from its archive and not singly."""
    if config.from_archive or (folder.archives / f"{split}.zip").exists():
        return True
    limited = config.limit is not None and config.limit < total
    return not limited and missing > MAX_SHARE_SINGLY * total


def plan_pieces(config: DownloadCocoConfig, folder: CocoFolder) -> list[Piece]:
    """Return what is still to fetch or unpack, with the sizes that COCO has published.

    Raises:
        DataError: an archive is missing in --from-archive.
        ArtifactError: an existing caption file is damaged.
    """
    pieces = []
    for name in dict.fromkeys(annotations_archive(split) for split in config.split):
        targets = annotation_targets(config, folder, name)
        if targets:
            sizes = {f"captions_{split}.json": known.captions for split, known in COCO_SPLITS.items()}
            sizes |= {f"instances_{split}.json": known.instances for split, known in COCO_SPLITS.items()}
            unpacked = sum(sizes[path.name] for path in targets.values())
            pieces.append(_plan_archive(config, folder, name, 0, COCO_ANNOTATION_BYTES[name[-8:-4]], unpacked))
    for split in dict.fromkeys(config.split):
        known = COCO_SPLITS[split]
        missing = min(config.limit or known.images, known.images)
        total = known.images
        if folder.full_captions_path(split).exists():
            names = folder.choose_images(split, config.limit, config.seed)
            missing, total = len(folder.missing_images(split, names)), len(folder.full_captions(split)["images"])
        unpacked = round(known.archive * missing / total)
        if missing and uses_archive(config, folder, split, missing, total):
            pieces.append(_plan_archive(config, folder, f"{split}.zip", missing, known.archive, unpacked))
        elif missing:
            pieces.append(Piece(f"images of {split}", missing, unpacked, 0, unpacked, None))
    return pieces


def _plan_archive(
    config: DownloadCocoConfig, folder: CocoFolder, name: str, images: int, size: int, unpacked: int
) -> Piece:
    path = archive_path(config, folder, name)
    if path.is_file():
        own = path.stat().st_size
        return Piece(name, images, own, own, round(unpacked * own / size), None)
    if config.from_archive:
        raise DataError(f"no such file: {path}", hint="without --from-archive it is fetched")
    return Piece(name, images, size, local_bytes(path), unpacked, archive_url(config, name))


def ask_sizes(pieces: Sequence[Piece], policy: RetryPolicy) -> list[Piece]:
    """Return the pieces with the sizes that the server gives now."""
    updated = []
    for piece in pieces:
        size = remote_size(piece.url, policy) if piece.url else None
        if size:
            piece = piece._replace(size=size, unpacked=round(piece.unpacked * size / piece.size))
        updated.append(piece)
    return updated


def disk_bytes(config: DownloadCocoConfig, pieces: Sequence[Piece]) -> tuple[int, int]:
    """Return the bytes that the pieces need on the disk at most, and the bytes that are free."""
    to_fetch = [max(0, piece.size - piece.local) if piece.url else 0 for piece in pieces]
    archives = sum(to_fetch) if config.keep_archives else max(to_fetch, default=0)
    needed = DISK_OVERHEAD * sum(piece.unpacked for piece in pieces) + archives
    return round(needed), shutil.disk_usage(nearest_existing(config.root.absolute())).free


def check_disk(config: DownloadCocoConfig, pieces: Sequence[Piece]) -> None:
    """Refuse a download that does not fit on the disk.

    Raises:
        ResourceError: states the needed and the free bytes.
    """
    needed, free = disk_bytes(config, pieces)
    if needed > free:
        message = f"{config.root} needs {format_bytes(needed)}, archives included; {format_bytes(free)} are free"
        raise ResourceError(message, hint="--limit 500 takes a part; another --root may have more room")


def describe_pieces(config: DownloadCocoConfig, pieces: Sequence[Piece]) -> list[str]:
    """Return the plan for a person: one line per piece, and the disk space."""
    lines = []
    for piece in pieces:
        if piece.is_archive:
            images = f", {piece.images} images" if piece.images else ""
            line = f"{piece.name}: {format_bytes(piece.size)}{images}"
            if piece.local:
                progress = f"{format_bytes(piece.local)} of it are here"
                line += "; it is here" if piece.local >= piece.size else f"; {progress}"
        else:
            line = f"{piece.images} {piece.name}: about {format_bytes(piece.size)}"
        lines.append(line)
    if config.limit is not None and any(piece.url and piece.name.startswith("annotations") for piece in pieces):
        lines.append("the annotations come in one archive, even for a few images")
    needed, free = disk_bytes(config, pieces)
    lines.append(f"disk: {format_bytes(needed)} needed, archives included; {format_bytes(free)} free")
    return lines


def print_dry_run(config: DownloadCocoConfig, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Print what would be done; return it as --json prints it."""
    if not pieces:
        console.print_result(f"{config.root / 'coco'}: everything is here; nothing would be fetched")
    else:
        for line in describe_pieces(config, pieces):
            console.print_result(line)
    needed, free = disk_bytes(config, pieces)
    return {
        "root": str(config.root / "coco"),
        "dry_run": True,
        "pieces": [
            {
                "name": piece.name if piece.is_archive else piece.name.replace("images", "pictures", 1),
                "pictures": piece.images,
                "bytes": piece.size,
                "here": piece.local,
                "url": piece.url,
            }
            for piece in pieces
        ],
        "bytes_to_fetch": sum(piece.size - piece.local for piece in pieces if piece.local < piece.size),
        "disk": {"needed": needed, "free": free},
    }
