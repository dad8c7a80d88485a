"""What a download of COCO still has to fetch, how large it is, and whether the disk has room for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlkit import console
from vlkit.config.data import COCO_ANNOTATION_BYTES, COCO_SPLITS, DownloadCocoConfig
from vlkit.data.coco.folder import CocoFolder
from vlkit.data.coco.http import RetryPolicy, fetched_so_far, size_at
from vlkit.errors import DataError, ResourceError
from vlkit.storage import nearest_existing, format_bytes

# Of a split's pictures: when no more are missing, they are fetched singly rather than with the whole archive.
FEW = 0.05
# Files take whole blocks on a disk.
SLACK = 1.03


class Piece(NamedTuple):
    """One archive, or a number of single pictures.

    Attributes:
        size: bytes of all of it; `here`: those of them that need not be fetched.
        kept: bytes that it takes on the disk in the end, archive aside.
        url: of the archive; None for single pictures.
    """

    name: str
    pictures: int
    size: int
    here: int
    kept: int
    url: str | None


def annotations_archive(split: str) -> str:
    """Name of the archive that has a split's annotations."""
    return f"annotations_trainval{split[-4:]}.zip"


def archive_url(config: DownloadCocoConfig, name: str) -> str:
    """Where the server has an archive."""
    return f"{config.url.rstrip('/')}/{'annotations' if name.startswith('annotations') else 'zips'}/{name}"


def archive_place(config: DownloadCocoConfig, folder: CocoFolder, name: str) -> Path:
    """Where an archive lies on this machine, or is to."""
    return (config.from_archive or folder.archives) / name


def annotation_targets(config: DownloadCocoConfig, folder: CocoFolder, archive: str) -> dict[str, Path]:
    """Member of an annotations archive -> its place, for what is missing; empty where nothing of the year is.

    The captions of the year's other split come along: fetching the archive again for them would take longer.
    """
    year = [split for split in COCO_SPLITS if annotations_archive(split) == archive]
    asked = [split for split in year if split in config.split]
    found = {}
    if config.instances:
        places = {split: folder.instances(split) for split in asked}
        found = {f"annotations/{place.name}": place for place in places.values() if not place.exists()}
    if found or not all(folder.complete(split).exists() for split in asked):
        places = {split: folder.complete(split) for split in year}
        found |= {f"annotations/{place.name}": place for place in places.values() if not place.exists()}
    return found


def by_archive(config: DownloadCocoConfig, folder: CocoFolder, split: str, lacking: int, total: int) -> bool:
    """Whether `lacking` pictures, of all `total` of a split, come out of its archive rather than singly."""
    if config.from_archive or (folder.archives / f"{split}.zip").exists():
        return True
    limited = config.limit is not None and config.limit < total
    return not limited and lacking > FEW * total


def pieces(config: DownloadCocoConfig, folder: CocoFolder) -> list[Piece]:
    """What is still to be fetched, or unpacked; sizes as COCO has published them.

    Raises:
        DataError: an archive that --from-archive should hold is not there.
        ArtifactError: a caption file that is here is damaged.
    """
    found = []
    for name in dict.fromkeys(annotations_archive(split) for split in config.split):
        targets = annotation_targets(config, folder, name)
        if targets:
            sizes = {f"captions_{split}.json": known.captions for split, known in COCO_SPLITS.items()}
            sizes |= {f"instances_{split}.json": known.instances for split, known in COCO_SPLITS.items()}
            kept = sum(sizes[place.name] for place in targets.values())
            found.append(_archive(config, folder, name, 0, COCO_ANNOTATION_BYTES[name[-8:-4]], kept))
    for split in dict.fromkeys(config.split):
        known = COCO_SPLITS[split]
        lacking = min(config.limit or known.pictures, known.pictures)
        total = known.pictures
        if folder.complete(split).exists():
            names = folder.wanted(split, config.limit, config.seed)
            lacking, total = len(folder.lacking(split, names)), len(folder.content(split)["images"])
        kept = round(known.archive * lacking / total)
        if lacking and by_archive(config, folder, split, lacking, total):
            found.append(_archive(config, folder, f"{split}.zip", lacking, known.archive, kept))
        elif lacking:
            found.append(Piece(f"pictures of {split}", lacking, kept, 0, kept, None))
    return found


def _archive(config: DownloadCocoConfig, folder: CocoFolder, name: str, pictures: int, size: int, kept: int) -> Piece:
    place = archive_place(config, folder, name)
    if place.is_file():
        own = place.stat().st_size
        return Piece(name, pictures, own, own, round(kept * own / size), None)
    if config.from_archive:
        raise DataError(f"no such file: {place}", hint="without --from-archive it is fetched")
    return Piece(name, pictures, size, fetched_so_far(place), kept, archive_url(config, name))


def refreshed(found: Sequence[Piece], patience: RetryPolicy) -> list[Piece]:
    """The same with the sizes that the server gives now."""
    now = []
    for piece in found:
        size = size_at(piece.url, patience) if piece.url else None
        if size:
            piece = piece._replace(size=size, kept=round(piece.kept * size / piece.size))
        now.append(piece)
    return now


def room(config: DownloadCocoConfig, found: Sequence[Piece]) -> tuple[int, int]:
    """Bytes that the disk must have free for these pieces, and those that are."""
    on_the_way = [max(0, piece.size - piece.here) if piece.url else 0 for piece in found]
    passing = sum(on_the_way) if config.keep_archives else max(on_the_way, default=0)
    needed = SLACK * sum(piece.kept for piece in found) + passing
    return round(needed), shutil.disk_usage(nearest_existing(config.root.absolute())).free


def check_room(config: DownloadCocoConfig, found: Sequence[Piece]) -> None:
    """Refuse what does not fit.

    Raises:
        ResourceError: says what is needed, and what is free.
    """
    needed, free = room(config, found)
    if needed > free:
        told = f"{format_bytes(needed)} are needed under {config.root}, archives included, and {format_bytes(free)} are free"
        raise ResourceError(told, hint="--limit 500 takes a part; another --root may have more room")


def told_lines(config: DownloadCocoConfig, found: Sequence[Piece]) -> list[str]:
    """What is to be done, for a person, a line a piece."""
    lines = []
    for piece in found:
        size = format_bytes(piece.size) if piece.url or piece.here else f"about {format_bytes(piece.size)}"
        pictures = f", {piece.pictures} pictures" if piece.pictures and not piece.name.startswith("pictures") else ""
        name = f"{piece.pictures} {piece.name}" if piece.name.startswith("pictures") else piece.name
        here = ""
        if piece.here:
            here = "; it is here" if piece.here >= piece.size else f"; {format_bytes(piece.here)} of it are here"
        lines.append(f"{name}: {size}{pictures}{here}")
    if config.limit is not None and any(piece.url and piece.name.startswith("annotations") for piece in found):
        lines.append("the annotations come in one archive, also for a few pictures")
    needed, free = room(config, found)
    lines.append(f"on the disk: {format_bytes(needed)} needed, archives included; {format_bytes(free)} free")
    return lines


def tell_dry_run(config: DownloadCocoConfig, found: Sequence[Piece]) -> dict[str, Any]:
    """Say what would be done; what --json prints of it."""
    if not found:
        console.print_result(f"{config.root / 'coco'}: everything is here; nothing would be fetched")
    else:
        for line in told_lines(config, found):
            console.print_result(line)
    needed, free = room(config, found)
    to_fetch = [piece for piece in found if piece.here < piece.size]
    return {
        "root": str(config.root / "coco"),
        "dry_run": True,
        "pieces": [
            {"name": piece.name, "pictures": piece.pictures, "bytes": piece.size, "here": piece.here, "url": piece.url}
            for piece in found
        ],
        "bytes_to_fetch": sum(piece.size - piece.here for piece in to_fetch),
        "disk": {"needed": needed, "free": free},
    }
