"""Unpack downloaded ZIP files, file by file: nothing is written outside the target folder, no file only in part.

Every entry is checked before the first one is written. A file that exists already, byte for byte, is skipped, so
unpacking resumes where it stopped.
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

CHUNK_BYTES = 2**20
# A member of more than BOMB_BYTES may be at most BOMB_RATIO times its packed size: COCO's images keep their size, its
# annotations grow four times.
BOMB_BYTES, BOMB_RATIO = 2**20, 60
# COCO's largest annotation file has 0.5 GB.
MAX_MEMBER_BYTES = 4 * 2**30
UNSAFE_HINT = "it is not COCO's archive: get it from another place, and do not unpack it by hand"


class DamagedArchive(ArtifactError):
    """A ZIP file whose bytes are not what its own records say; another copy may be whole."""


class UnpackCounts(NamedTuple):
    """Members that were written, and those that existed already."""

    written: int
    skipped: int


def unpack(
    archive: Path, targets: Mapping[str, Path], on_progress: Callable[[int], None] | None = None
) -> UnpackCounts:
    """Write the members of `archive` that `targets` names to their paths.

    Args:
        targets: name in the archive -> file. Names that the archive does not have are ignored.
        on_progress: called with the number of finished members.

    Raises:
        DamagedArchive: the archive, or a member, cannot be read, or its checksum differs.
        ArtifactError: an entry leads out of its folder, is a link, or would grow to an absurd size.
    """
    written = skipped = 0
    with _zip_errors_as_damaged(archive), zipfile.ZipFile(archive) as opened:
        _refuse_unsafe(archive, opened.infolist())
        entries = [entry for entry in opened.infolist() if entry.filename in targets and not entry.is_dir()]
        for folder in {targets[entry.filename].parent for entry in entries}:
            folder.mkdir(parents=True, exist_ok=True)
        for count, entry in enumerate(entries, 1):
            target = targets[entry.filename]
            if _is_unpacked(target, entry):
                skipped += 1
            else:
                _write(opened, entry, target)
                written += 1
            if on_progress:
                on_progress(count)
    return UnpackCounts(written, skipped)


@contextmanager
def _zip_errors_as_damaged(archive: Path) -> Iterator[None]:
    """Turn every error that reading a bad ZIP file may raise into DamagedArchive."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise DamagedArchive(f"{archive} is damaged: {error or type(error).__name__}") from None


def _refuse_unsafe(archive: Path, entries: Collection[zipfile.ZipInfo]) -> None:
    packed, names = 0, set()
    for entry in entries:
        reason = _unsafe_reason(entry) or ("a second file of one name" if entry.filename in names else None)
        if reason:
            raise ArtifactError(f"{archive} is refused: {entry.orig_filename!r} is {reason}", hint=UNSAFE_HINT)
        names.add(entry.filename)
        packed += entry.compress_size
    if packed > archive.stat().st_size:
        # Entries that share their bytes turn a small file into a huge folder.
        message = f"{archive} is refused: its entries have {format_bytes(packed)}, more than the file itself"
        raise ArtifactError(message, hint=UNSAFE_HINT)


def _unsafe_reason(entry: zipfile.ZipInfo) -> str | None:
    """Return why an entry must not be unpacked; None for a safe one."""
    name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
    if "\\" in name or "\0" in name or ":" in name:
        return "a name with a backslash, a colon or a zero byte"
    if name.startswith("/") or ".." in name.split("/"):
        return "a path that leads out of the folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or another special file"
    if entry.flag_bits & 1:
        return "encrypted"
    size, packed = entry.file_size, entry.compress_size
    if size > MAX_MEMBER_BYTES or (size > BOMB_BYTES and size > BOMB_RATIO * packed):
        return f"{format_bytes(size)} packed into {format_bytes(packed)}"
    return None


def _is_unpacked(target: Path, entry: zipfile.ZipInfo) -> bool:
    if not target.is_file() or target.stat().st_size != entry.file_size:
        return False
    checksum = 0
    with target.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum == entry.CRC


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """Write one member beside its path, then rename it.

    It is not flushed to the disk alone, which would take hours for 100,000 members: whoever removes the archive flushes
    all of them first.
    """
    aside, size = target.with_name(f".{target.name}.part"), 0
    aside.unlink(missing_ok=True)
    try:
        with archive.open(entry) as packed, aside.open("xb") as file:
            while chunk := packed.read(CHUNK_BYTES):
                size += len(chunk)
                if size > entry.file_size:
                    raise zipfile.BadZipFile(f"{entry.filename} is larger than the archive says")
                file.write(chunk)
        if size != entry.file_size:
            raise zipfile.BadZipFile(f"{entry.filename} is smaller than the archive says")
        fault_injection.fault_point("before rename", target)
        os.replace(aside, target)
        fault_injection.fault_point("after rename", target)
    finally:
        aside.unlink(missing_ok=True)
