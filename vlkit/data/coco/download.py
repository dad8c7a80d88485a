"""`vlkit download-coco`: fetch COCO's images and captions, or unpack them from archives, in the layout that prep reads.

The annotations come first, because they list the images. The command succeeds only when every image exists. Whatever
stops it, the same command resumes.
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
    archive_path,
    archive_url,
    ask_sizes,
    check_disk,
    describe_pieces,
    plan_pieces,
    print_dry_run,
    uses_archive,
)
from vlkit.data.coco.responses import OTHER_SOURCES
from vlkit.errors import ArtifactError, DataError, NetworkError
from vlkit.storage import format_bytes, refuse_unwritable

MEGABYTE = 2**20
SHOWN_NAMES = 3


def download_coco(config: DownloadCocoConfig, *, dry_run: bool = False) -> dict[str, Any]:
    """Run `vlkit download-coco`.

    Returns:
        Images, captions and bytes of each split, as --json prints them.

    Raises:
        UsageError: the folder cannot be written, or another process downloads into it.
        DataError: images are still missing at the end.
        ResourceError: the disk has no room.
        ArtifactError: an archive is damaged, or not safe to unpack.
        NetworkError: the server, or the connection to it, fails.
    """
    refuse_unwritable(config.root, "--root")
    if config.from_archive is not None and not config.from_archive.is_dir():
        message = f"no such folder: {config.from_archive}"
        raise DataError(message, hint="--from-archive DIR names the folder of the ZIP files")
    folder = CocoFolder(config.root)
    if dry_run:
        return print_dry_run(config, plan_pieces(config, folder))
    with folder.lock():
        try:
            return _Download(config, folder).run()
        except KeyboardInterrupt:
            console.say(f"the download so far stays in {folder.path}: run the same command again to resume")
            raise


class _Download:
    """One run of the command.

    Attributes:
        received: bytes that came over the network.
        sizes: archive -> bytes, for the progress bar.
    """

    def __init__(self, config: DownloadCocoConfig, folder: CocoFolder) -> None:
        self.config, self.folder = config, folder
        self.policy = http.RetryPolicy(config.retries, config.timeout)
        self.received = 0
        self.sizes: dict[str, int] = {}

    def run(self) -> dict[str, Any]:
        """Fetch annotations, then images; print a table; refuse to end with missing images."""
        splits = list(dict.fromkeys(self.config.split))
        for split in splits:
            self.folder.adopt_captions(split)
        self._print_plan()
        for name in dict.fromkeys(annotations_archive(split) for split in splits):
            self._get_annotations(name)
        summaries, missing = {}, {}
        for split in splits:
            summaries[split], missing[split] = self._get_split(split)
        root = str(self.folder.path)
        rows = [
            [
                split,
                *(str(summary[key]) for key in ("pictures", "captions")),
                format_bytes(summary["bytes"]),
                *(str(summary[key]) for key in ("fetched", "skipped")),
            ]
            for split, summary in summaries.items()
        ]
        console.print_table(root, ["split", "images", "captions", "size", "new", "here already"], rows)
        _refuse_missing(self.folder, missing, offline=self.config.from_archive is not None)
        console.hint(
            f"vlkit prep --domain coco --source {self.folder.path} --out {self.folder.path / 'prepared'}, "
            f"or vlkit train-fusion --data {self.folder.path}"
        )
        return {"root": root, "splits": summaries, "received": self.received}

    def _print_plan(self) -> None:
        """Print what is to be done, and check the disk space, before anything is fetched."""
        pieces = plan_pieces(self.config, self.folder)
        if not pieces:
            console.say(f"{self.folder.path}: everything is here; nothing is fetched")
            return
        pieces = ask_sizes(pieces, self.policy)
        for line in describe_pieces(self.config, pieces):
            console.say(line)
        check_disk(self.config, pieces)
        self.sizes = {piece.name: piece.size for piece in pieces}

    def _get_annotations(self, archive: str) -> None:
        targets = annotation_targets(self.config, self.folder, archive)
        if not targets:
            return
        self._unpack(archive, targets)
        # The year's other split is unpacked if the archive has it; the user did not ask for it.
        optional = {self.folder.full_captions_path(split) for split in COCO_SPLITS if split not in self.config.split}
        for member, path in targets.items():
            if not path.exists() and path not in optional:
                message = f"{archive_path(self.config, self.folder, archive)} holds no {member}"
                hint = "it is not COCO's archive: remove it, and run the same command again"
                raise ArtifactError(message, hint=hint)
        self._remove_archive(archive)

    def _get_split(self, split: str) -> tuple[dict[str, Any], list[str]]:
        """Get the images of a split and write their captions. Return its --json object, and the missing names."""
        config, folder = self.config, self.folder
        names = folder.choose_images(split, config.limit, config.seed)
        missing = folder.missing_images(split, names)
        skipped = len(names) - len(missing)
        total = len(folder.full_captions(split)["images"])
        if missing and uses_archive(config, folder, split, len(missing), total):
            targets = {f"{split}/{name}": folder.images_folder(split) / name for name in missing}
            self._unpack(f"{split}.zip", targets)
            missing = folder.missing_images(split, missing)
        if missing and config.from_archive is None:
            self._fetch_singly(split, missing, are_all=len(missing) == len(names))
            missing = folder.missing_images(split, missing)
        absent = set(missing)
        present = [name for name in names if name not in absent]
        if not present:
            message = f"no image of {split} could be fetched"
            raise DataError(message, hint="is it COCO's archive? see --url, --from-archive")
        counts = folder.write_captions(split, present)
        if others := folder.count_other_images(split, names):
            console.say(f"{split}: the folder holds {others} other images; they stay, and prep rejects them")
        if not missing:
            self._remove_archive(f"{split}.zip")
        summary = {
            "pictures": counts.images,
            "captions": counts.captions,
            "bytes": counts.bytes,
            "fetched": len(present) - skipped,
            "skipped": skipped,
            "missing": len(missing),
        }
        return summary, missing

    def _unpack(self, archive: str, targets: Mapping[str, Path]) -> None:
        """Fetch an archive if it is not here, and unpack members of it; fetch a damaged one once more."""
        path = archive_path(self.config, self.folder, archive)
        is_second = False
        while True:
            self._fetch_archive(archive, path)
            try:
                with console.progress(f"unpacking {archive}", len(targets)) as bar:
                    archives.unpack(path, targets, bar.update)
                return
            except archives.DamagedArchive as error:
                if self.config.from_archive is not None:
                    hint = "get another copy of it, or let the command fetch it"
                    raise ArtifactError(error.message, hint=hint) from None
                path.unlink()
                if is_second:
                    hint = "the server's file or the connection is bad: try another --url, or try later"
                    raise ArtifactError(f"{error.message}; fetched twice, and removed", hint=hint) from None
                console.warn(f"{error.message}: fetching it again")
                is_second = True
            except ArtifactError:
                if self.config.from_archive is None:
                    path.unlink()
                raise

    def _fetch_archive(self, archive: str, path: Path) -> None:
        if path.exists():
            return
        url = archive_url(self.config, archive)
        with console.progress(f"{archive}, MB", self.sizes.get(archive, 0) // MEGABYTE) as bar:
            self.received += http.fetch(url, path, self.policy, lambda size: bar.update(size // MEGABYTE))

    def _fetch_singly(self, split: str, names: Sequence[str], *, are_all: bool) -> None:
        """Fetch single images; those that the server refuses stay missing.

        Args:
            are_all: these are all requested images of the split.
        """
        url, folder = f"{self.config.url.rstrip('/')}/{split}", self.folder.images_folder(split)
        with console.progress(f"images of {split}", len(names)) as bar:
            targets = {f"{url}/{name}": folder / name for name in names}
            fetched = http.fetch_many(targets, self.policy, workers=self.config.workers, on_progress=bar.update)
        self.received += fetched.received
        if are_all and len(fetched.refused) == len(names):
            raise NetworkError(next(iter(fetched.refused.values())).message, hint=OTHER_SOURCES)

    def _remove_archive(self, archive: str) -> None:
        """Remove an archive that this command fetched, after its content was flushed to the disk."""
        path = self.folder.archives / archive
        if self.config.keep_archives or self.config.from_archive is not None or not path.exists():
            return
        os.sync()
        path.unlink()
        if not any(self.folder.archives.iterdir()):
            self.folder.archives.rmdir()


def _refuse_missing(folder: CocoFolder, missing: Mapping[str, Sequence[str]], *, offline: bool) -> None:
    parts = [
        f"{len(names)} {'image' if len(names) == 1 else 'images'} of {split} "
        f"({', '.join(names[:SHOWN_NAMES])}{', ...' if len(names) > SHOWN_NAMES else ''})"
        for split, names in missing.items()
        if names
    ]
    if parts:
        message = f"missing in {folder.path}: {'; '.join(parts)}"
        retry = "without --from-archive they are fetched singly" if offline else "run the same command to try again"
        raise DataError(message, hint=f"{retry}; the caption files list only the images that are here")
