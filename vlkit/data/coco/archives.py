"""ZIP files from elsewhere, unpacked file by file: nothing outside of the folder that is meant, nothing half.

Every entry is looked at before the first is written. A file that is there already, byte for byte, is passed over, so
that unpacking goes on where it ended.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vlkit import fault_injection
from vlkit.errors import ArtifactError
from vlkit.storage import format_bytes

CHUNK = 2**20
# A member of more than BOMB bytes must not be more than RATIO times as large as it is packed: COCO's pictures are as
# large, its annotations four times.
BOMB, RATIO = 2**20, 60
# COCO's largest annotation file has 0.5 GB.
MOST_BYTES = 4 * 2**30
REFUSED = "it is not COCO's: get it from another place, and do not unpack it by hand"


class Damaged(ArtifactError):
    """A ZIP file whose bytes are not what it says they are; another copy may be whole."""


class Unpacked(NamedTuple):
    """Members that were written, and those that were there."""

    written: int
    skipped: int


def unpack(archive: Path, targets: Mapping[str, Path], told: Callable[[int], None] | None = None) -> Unpacked:
    """Write the members of `archive` that `targets` names, each to its place.

    Args:
        targets: name in the archive -> file. A name that the archive does not have is passed over.
        told: called with the number of members that are dealt with.

    Raises:
        Damaged: the archive, or a member, cannot be read, or its checksum differs.
        ArtifactError: an entry leads out of its folder, is a link, or would swell to what no such file has.
    """
    written = skipped = 0
    with _reading(archive), zipfile.ZipFile(archive) as opened:
        _refuse_unsafe(archive, opened.infolist())
        wanted = [entry for entry in opened.infolist() if entry.filename in targets and not entry.is_dir()]
        for folder in {targets[entry.filename].parent for entry in wanted}:
            folder.mkdir(parents=True, exist_ok=True)
        for count, entry in enumerate(wanted, 1):
            target = targets[entry.filename]
            if _is_there(target, entry):
                skipped += 1
            else:
                _write(opened, entry, target)
                written += 1
            if told:
                told(count)
    return Unpacked(written, skipped)


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """What the readers of ZIP files raise, as one kind."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise Damaged(f"{archive} is damaged: {error or type(error).__name__}") from None


def _refuse_unsafe(archive: Path, entries: Collection[zipfile.ZipInfo]) -> None:
    packed, seen = 0, set()
    for entry in entries:
        reason = _unsafe(entry) or ("a second file of one name" if entry.filename in seen else None)
        if reason:
            raise ArtifactError(f"{archive} is refused: {entry.orig_filename!r} is {reason}", hint=REFUSED)
        seen.add(entry.filename)
        packed += entry.compress_size
    if packed > archive.stat().st_size:
        # Entries that share their bytes are how a small file becomes a huge folder.
        told = f"{archive} is refused: its entries have {format_bytes(packed)}, more than the file itself"
        raise ArtifactError(told, hint=REFUSED)


def _unsafe(entry: zipfile.ZipInfo) -> str | None:
    """Why an entry must not be unpacked."""
    name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
    if "\\" in name or "\0" in name or ":" in name:
        return "a name with a backslash, a colon or a zero in it"
    if name.startswith("/") or ".." in name.split("/"):
        return "a path that leads out of the folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link, or no plain file"
    if entry.flag_bits & 1:
        return "encrypted"
    if entry.file_size > MOST_BYTES or (entry.file_size > BOMB and entry.file_size > RATIO * entry.compress_size):
        return f"{format_bytes(entry.file_size)} packed into {format_bytes(entry.compress_size)}"
    return None


def _is_there(target: Path, entry: zipfile.ZipInfo) -> bool:
    if not target.is_file() or target.stat().st_size != entry.file_size:
        return False
    found = 0
    with target.open("rb") as file:
        while chunk := file.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found == entry.CRC


def _write(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """One member, aside and then renamed.

    It is not flushed to the disk by itself, which would take hours for 100,000 of them: whoever removes the archive
    flushes all of them first.
    """
    aside, size = target.with_name(f".{target.name}.part"), 0
    aside.unlink(missing_ok=True)
    try:
        with opened.open(entry) as packed, aside.open("xb") as file:
            while chunk := packed.read(CHUNK):
                size += len(chunk)
                if size > entry.file_size:
                    raise zipfile.BadZipFile(f"{entry.filename} is larger than it says")
                file.write(chunk)
        if size != entry.file_size:
            raise zipfile.BadZipFile(f"{entry.filename} is smaller than it says")
        fault_injection.fault_point("before rename", target)
        os.replace(aside, target)
        fault_injection.fault_point("after rename", target)
    finally:
        aside.unlink(missing_ok=True)
