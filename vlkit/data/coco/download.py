"""`vlkit download-coco`: COCO's pictures and captions, from its server or from archives, in the layout that prep reads.

The annotations come first: they say which pictures there must be, and every picture is looked for before the command
is content. Whatever ends it on the way, the same command goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlkit import console
from vlkit.config.data import COCO_SPLITS, DownloadCocoConfig
from vlkit.data.coco import archives, http
from vlkit.data.coco.folder import CocoFolder
from vlkit.data.coco.plan import (
    annotation_targets,
    annotations_archive,
    archive_place,
    archive_url,
    by_archive,
    check_room,
    pieces,
    refreshed,
    tell_dry_run,
    told_lines,
)
from vlkit.errors import ArtifactError, DataError, NetworkError
from vlkit.storage import refuse_unwritable, format_bytes

MEGABYTE = 2**20


def download_coco(config: DownloadCocoConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Run `vlkit download-coco`.

    Returns:
        Pictures, captions and bytes of each split, as --json prints them.

    Raises:
        UsageError: the folder cannot be written, or another process downloads into it.
        DataError: pictures are still missing at the end.
        ResourceError: the disk has no room.
        ArtifactError: an archive is damaged, or not safe to unpack.
        NetworkError: the server, or the way to it, does not give what is asked for.
    """
    refuse_unwritable(config.root, "--root")
    if config.from_archive is not None and not config.from_archive.is_dir():
        raise DataError(f"no such folder: {config.from_archive}", hint="--from-archive DIR has the ZIP files")
    folder = CocoFolder(config.root)
    if dry_run:
        return tell_dry_run(config, pieces(config, folder))
    with folder.locked():
        try:
            return _Work(config, folder).run()
        except KeyboardInterrupt:
            console.say(f"what has come stays under {folder.path}; the same command goes on from there")
            raise


class _Work:
    """One run of the command."""

    def __init__(self, config: DownloadCocoConfig, folder: CocoFolder) -> None:
        self.config, self.folder = config, folder
        self.patience = http.RetryPolicy(config.retries, config.timeout)
        self.received = 0
        # Bytes of the archives, for the bar.
        self.sizes: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        config = self.config
        splits = list(dict.fromkeys(config.split))
        for split in splits:
            self.folder.adopt(split)
        self._prepare()
        for name in dict.fromkeys(annotations_archive(split) for split in splits):
            self._annotate(name)
        told, missing = {}, {}
        for split in splits:
            told[split], missing[split] = self._split(split)
        rows = [
            [split, *(f"{found[each]}" for each in ("pictures", "captions")), format_bytes(found["bytes"])]
            + [f"{found[each]}" for each in ("fetched", "skipped")]
            for split, found in told.items()
        ]
        title = str(self.folder.path)
        console.print_table(title, ["split", "pictures", "captions", "size", "new", "here already"], rows)
        _refuse_missing(self.folder, missing, offline=config.from_archive is not None)
        console.hint(
            f"vlkit prep --domain coco --source {self.folder.path} --out {self.folder.path / 'prepared'}, "
            f"or vlkit train-fusion --data {self.folder.path}"
        )
        return {"root": title, "splits": told, "received": self.received}

    def _prepare(self) -> None:
        """Say how much there is to do, and see that the disk has room, before anything is fetched."""
        found = pieces(self.config, self.folder)
        if not found:
            console.say(f"{self.folder.path}: everything is here; nothing is fetched")
            return
        found = refreshed(found, self.patience)
        for line in told_lines(self.config, found):
            console.say(line)
        check_room(self.config, found)
        self.sizes = {piece.name: piece.size for piece in found}

    def _annotate(self, archive: str) -> None:
        targets = annotation_targets(self.config, self.folder, archive)
        if not targets:
            return
        self._unpack(archive, targets)
        # The other split of the year came along if it was there; nobody asked for it.
        other = {self.folder.complete(split) for split in COCO_SPLITS if split not in self.config.split}
        for member, place in targets.items():
            if not place.exists() and place not in other:
                told = f"{archive_place(self.config, self.folder, archive)} holds no {member}"
                raise ArtifactError(told, hint="it is not COCO's archive: remove it, and run the same command again")
        self._done_with(archive)

    def _split(self, split: str) -> tuple[dict[str, Any], list[str]]:
        """The pictures of a split, and their captions. Returns what --json tells, and the names still missing."""
        config, folder = self.config, self.folder
        names = folder.wanted(split, config.limit, config.seed)
        lacking = folder.lacking(split, names)
        skipped = len(names) - len(lacking)
        if lacking and by_archive(config, folder, split, len(lacking), len(folder.content(split)["images"])):
            targets = {f"{split}/{name}": folder.pictures(split) / name for name in lacking}
            self._unpack(f"{split}.zip", targets)
            lacking = folder.lacking(split, lacking)
        if lacking and config.from_archive is None:
            self._fetch_singly(split, lacking, alone=len(lacking) == len(names))
            lacking = folder.lacking(split, lacking)
        gone = set(lacking)
        here = [name for name in names if name not in gone]
        if not here:
            raise DataError(f"there is no picture of {split}", hint="is it COCO's archive? see --url, --from-archive")
        published = folder.publish(split, here)
        if others := folder.others(split, names):
            console.say(f"{split}: {others} other pictures lie there; they are left as they are, and prep rejects them")
        if not lacking:
            self._done_with(f"{split}.zip")
        told = {**published._asdict(), "fetched": len(here) - skipped, "skipped": skipped, "missing": len(lacking)}
        return told, lacking

    def _unpack(self, archive: str, targets: Mapping[str, Path]) -> None:
        """Members of an archive to their places. It is fetched where it is not here; a damaged one, again once."""
        place = archive_place(self.config, self.folder, archive)
        again = False
        while True:
            self._fetch(archive, place)
            try:
                with console.progress(f"unpacking {archive}", len(targets)) as bar:
                    archives.unpack(place, targets, bar.update)
                return
            except archives.DamagedArchive as error:
                if self.config.from_archive is not None:
                    raise ArtifactError(error.message, hint="another copy of it; or let it be fetched") from None
                place.unlink()
                if again:
                    hint = "the server's file, or the way to it, is bad: try another --url, or later"
                    raise ArtifactError(f"{error.message}; fetched twice, and removed", hint=hint) from None
                console.warn(f"{error.message}: it is fetched again")
                again = True
            except ArtifactError:
                if self.config.from_archive is None:
                    place.unlink()
                raise

    def _fetch(self, archive: str, place: Path) -> None:
        if place.exists():
            return
        url = archive_url(self.config, archive)
        with console.progress(f"{archive}, MB", self.sizes.get(archive, 0) // MEGABYTE) as bar:
            self.received += http.fetch(url, place, self.patience, lambda here: bar.update(here // MEGABYTE))

    def _fetch_singly(self, split: str, names: Sequence[str], *, alone: bool) -> None:
        """Fetch single pictures; those that the server does not give stay missing.

        Args:
            alone: these are all pictures that are wanted.
        """
        base, place = f"{self.config.url.rstrip('/')}/{split}", self.folder.pictures(split)
        with console.progress(f"pictures of {split}", len(names)) as bar:
            targets = {f"{base}/{name}": place / name for name in names}
            many = http.fetch_many(targets, self.patience, workers=self.config.workers, told=bar.update)
        self.received += many.received
        if alone and len(many.refused) == len(names):
            raise NetworkError(next(iter(many.refused.values())).message, hint=http.WAY_OUT)

    def _done_with(self, archive: str) -> None:
        """Remove an archive of our own: what came out of it is on the disk."""
        place = self.folder.archives / archive
        if self.config.keep_archives or self.config.from_archive is not None or not place.exists():
            return
        os.sync()
        place.unlink()
        if not any(self.folder.archives.iterdir()):
            self.folder.archives.rmdir()


def _refuse_missing(folder: CocoFolder, missing: Mapping[str, Sequence[str]], *, offline: bool) -> None:
    parts = [
        f"{len(names)} pictures of {split} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for split, names in missing.items()
        if names
    ]
    if parts:
        told = f"missing under {folder.path}: {'; '.join(parts)}"
        way = "without --from-archive they are fetched singly" if offline else "the same command asks for them again"
        raise DataError(told, hint=f"{way}; the caption files name only the pictures that are here")
