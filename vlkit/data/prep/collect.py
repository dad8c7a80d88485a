"""Collect the usable rows of a raw folder: verify images, resolve conflicting classes, find lookalikes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from vlkit.config.data import PrepConfig
from vlkit.data import splits
from vlkit.data.images import phash
from vlkit.data.images.decode import ImageInfo
from vlkit.data.prep import layouts
from vlkit.data.prep.raw_folder import RawFolder, RawRow, Reject, count_reasons
from vlkit.data.prep.source_folder import LINK_LEADS_OUT, path_id
from vlkit.data.prep.verify_images import VerifiedImages, verify_images
from vlkit.errors import DataError

SUBJECT_COLUMN = re.compile(r"(?i)(^|_)(patient|lesion|subject|person|participant|plant|animal|case)(_?id)?$")

Classes = tuple[str, ...]


@dataclass
class CollectedRows:
    """The rows of a raw folder.

    Attributes:
        rows: usable rows.
        rejects: rows and files that were left out.
        images: image name -> what is known of it; empty where images are not opened.
        images_read: images that were opened now, not taken from the cache.
        classes: image id -> every class of an image that has any, in order of appearance.
        conflicting: ids of images that have different classes in different rows.
        cluster: image id -> the first image id of its cluster of lookalikes, for images that have any.
        source_splits: the splits that the source names.
        subject_column: a further column that seems to name who is on the images, some of them on several.
    """

    raw: RawFolder
    rows: list[RawRow] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    images: dict[str, ImageInfo] = field(default_factory=dict)
    images_read: int = 0
    classes: dict[str, Classes] = field(default_factory=dict)
    conflicting: set[str] = field(default_factory=set)
    cluster: dict[str, str] = field(default_factory=dict)
    source_splits: set[str] = field(default_factory=set)
    subject_column: str | None = None

    def image_id(self, name: str) -> str:
        """Return the hash of the image's bytes; where images are not opened, of its name."""
        return self.images[name].image_id if self.raw.config.check_images else path_id(name)

    def unit_links(self) -> Iterator[tuple[str, Hashable]]:
        """Yield (unit, what it shares with other units): identical images, and lookalikes."""
        for row in self.rows:
            image_id = self.image_id(row.image)
            yield row.unit, image_id
            if image_id in self.cluster:
                yield row.unit, self.cluster[image_id]

    def add(self, items: Iterable[RawRow | Reject]) -> None:
        """Append rows to `rows` and rejects to `rejects`."""
        for item in items:
            if isinstance(item, RawRow):
                self.rows.append(item)
            else:
                self.rejects.append(item)

    def drop_rows(self, reason_of: Callable[[RawRow], str | None], *, once_per_image: bool = False) -> None:
        """Remove the rows for which `reason_of` gives a reason, and add a reject for each row or each image."""
        remaining, rejected = [], set()
        for row in self.rows:
            reason = reason_of(row)
            if reason is None:
                remaining.append(row)
            elif not once_per_image or row.image not in rejected:
                rejected.add(row.image)
                self.rejects.append(Reject(row.where, row.image, reason))
        self.rows = remaining

    def drop_unusable_images(self, verified: VerifiedImages, min_side: int) -> None:
        """Remember the usable images in `images`; drop the rows of the others."""
        reasons: dict[str, str] = {}
        for name, result in verified.results.items():
            if not isinstance(result, ImageInfo):
                reasons[name] = result.reason
            elif min(result.width, result.height) < min_side:
                reasons[name] = f"an image of fewer than {min_side} pixels"
            else:
                self.images[name] = result
        self.drop_rows(lambda row: reasons.get(row.image), once_per_image=True)

    def release_rows(self) -> None:
        """Free the memory of the rows once the table holds them: two copies of a million rows are too many."""
        self.rows.clear()


def collect(config: PrepConfig) -> CollectedRows:
    """Read the layout, verify each image once, resolve conflicts, find lookalikes.

    Raises:
        DataError: no pair of an image and a text is left.
    """
    collected = CollectedRows(RawFolder(config))
    collected.add(layouts.read_rows(collected.raw))
    if config.check_images:
        names = list(dict.fromkeys(row.image for row in collected.rows))
        verified = verify_images(collected.raw.image_source, names, workers=config.workers, rehash=config.rehash)
        collected.images_read = verified.images_read
        collected.drop_unusable_images(verified, config.min_side)
    collected.source_splits = {row.split for row in collected.rows if row.split}
    collected.subject_column = _find_subject_column(collected.rows)
    conflicts = _find_conflicts(collected)
    collected.conflicting = set(conflicts)
    if conflicts and config.on_conflict != "keep":
        preferred = {image_id: classes[0] for image_id, classes in conflicts.items() if config.on_conflict == "first"}
        collected.drop_rows(lambda row: _conflict_reason(row, collected.image_id(row.image), conflicts, preferred))
    collected.classes = _classes_by_image(collected)
    if not collected.rows:
        raise _nothing_usable(collected, config)
    if config.near_duplicates >= 0 and collected.images:
        collected.cluster = find_lookalikes(collected.images, config.near_duplicates)
    return collected


def _find_conflicts(collected: CollectedRows) -> dict[str, list[Classes]]:
    """Return the images whose rows disagree: image id -> the different classes, in order of appearance."""
    classes: dict[str, dict[Classes, None]] = defaultdict(dict)
    for row in collected.rows:
        if row.classes:
            classes[collected.image_id(row.image)].setdefault(tuple(sorted(row.classes)))
    return {image_id: list(several) for image_id, several in classes.items() if len(several) > 1}


def _conflict_reason(
    row: RawRow, image_id: str, conflicts: Mapping[str, list[Classes]], preferred: Mapping[str, Classes]
) -> str | None:
    """Return why a row of a conflicting image is dropped; None for the classes that are kept."""
    if image_id not in conflicts or preferred.get(image_id) == tuple(sorted(row.classes)):
        return None
    return "the same image has other classes in another row"


def _classes_by_image(collected: CollectedRows) -> dict[str, Classes]:
    """Return image id -> the classes of all its rows."""
    classes: dict[str, Classes] = {}
    for row in collected.rows:
        if row.classes:
            image_id = collected.image_id(row.image)
            classes[image_id] = tuple(dict.fromkeys((*classes.get(image_id, ()), *row.classes)))
    return classes


def _nothing_usable(collected: CollectedRows, config: PrepConfig) -> DataError:
    """Return the error for a source without any usable pair: what was expected, what was rejected and why."""
    rejects = collected.rejects
    reasons = "; ".join(f"{count} x {reason}" for reason, count in count_reasons(rejects).most_common(3))
    examples = ", ".join(dict.fromkeys(reject.item for reject in rejects[:50] if reject.item))
    expected = layouts.describe_layout(collected.raw.layout)
    message = f"{config.source}: no pair of an image and a text; expected {expected}"
    hint = f"rejected: {reasons} (such as {examples[:120]})" if reasons else "found no images and no texts"
    if rejects and all(reject.reason == LINK_LEADS_OUT for reject in rejects):
        hint = "every file is a link that leads out: name the folder they point to, or copy them with cp -rL"
    return DataError(message, hint=hint)


def find_lookalikes(images: Mapping[str, ImageInfo], bits: int) -> dict[str, str]:
    """Return image id -> first image id of its cluster, for images that look like another one.

    Hashes are compared exactly and as the table stores them: reading the table must not find a pair that prep missed.
    """
    hashes = {image.image_id: image.perceptual_hash for image in images.values()}
    ids = sorted(hashes)
    exact = [hashes[image_id] for image_id in ids]
    stored = [phash.from_hex(phash.to_hex(digest)) for digest in exact]
    links = (
        (image_id, (version, cluster))
        for version, digests in enumerate((exact, stored))
        for image_id, cluster in zip(ids, phash.cluster_lookalikes(digests, bits).tolist(), strict=True)
    )
    members: dict[str, list[str]] = defaultdict(list)
    for image_id, cluster in splits.connected_components(links).items():
        members[cluster].append(image_id)
    return {image_id: cluster for cluster, image_ids in members.items() if len(image_ids) > 1 for image_id in image_ids}


def count_clusters_across_classes(cluster: Mapping[str, str], classes: Mapping[str, Classes]) -> int:
    """Count the clusters of lookalikes that have several classes and none in common."""
    of_cluster: dict[str, list[set[str]]] = defaultdict(list)
    for image_id, first in cluster.items():
        if image_id in classes:
            of_cluster[first].append(set(classes[image_id]))
    return sum(len(sets) > 1 and not set.intersection(*sets) for sets in of_cluster.values())


def _find_subject_column(rows: list[RawRow]) -> str | None:
    """Return a column that names patients, lesions or the like, some of them on several images."""
    for column in [name for name in (rows[0].extra or {}) if SUBJECT_COLUMN.search(name)] if rows else []:
        first_image: dict[str, str] = {}
        repeated = False
        for row in rows:
            value = (row.extra or {}).get(column)
            repeated |= bool(value) and first_image.setdefault(str(value), row.image) != row.image
        if repeated and len(first_image) > 1:
            return column
    return None
