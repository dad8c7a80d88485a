"""The rows of a raw folder that can be used: their pictures checked, conflicts settled, and what was left out."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from vlkit.config.data import PrepConfig
from vlkit.data import splits
from vlkit.data.images import phash
from vlkit.data.images.decode import ImageInfo
from vlkit.data.prep import layouts
from vlkit.data.prep.raw_folder import RawFolder, RawRow, Reject
from vlkit.data.prep.source_folder import LINK_LEADS_OUT, path_id
from vlkit.data.prep.verify_images import VerifiedImages, verify_images
from vlkit.errors import DataError

SUBJECT = re.compile(r"(?i)(^|_)(patient|lesion|subject|person|participant|plant|animal|case)(_?id)?$")


@dataclass
class CollectedRows:
    """What was read from a raw folder.

    Attributes:
        rows: usable rows.
        rejects: what was left out.
        checked: picture name -> what was found of it; empty where pictures were not looked at.
        read: pictures that were read now, not taken from the cache.
        classes: image id -> every class of a picture that has any, in the order met.
        torn: image ids of pictures that stand under different classes in different places.
        cluster: image id -> the first image id of its cluster of lookalikes, for those that have any.
        alike_across_classes: clusters of lookalikes that have no class in common.
        notes: what the split did otherwise than the user may expect.
        source_splits: the splits that the source names.
        subjects: a further column that looks like who is on the pictures, with several pictures each.
    """

    raw: RawFolder
    rows: list[RawRow] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    checked: dict[str, ImageInfo] = field(default_factory=dict)
    read: int = 0
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    torn: set[str] = field(default_factory=set)
    cluster: dict[str, str] = field(default_factory=dict)
    alike_across_classes: int = 0
    notes: list[str] = field(default_factory=list)
    source_splits: set[str] = field(default_factory=set)
    subjects: str | None = None

    def image_id(self, name: str) -> str:
        """Hash of the picture's bytes; where pictures are not looked at, of its name."""
        return self.checked[name].image_id if self.raw.config.check_images else path_id(name)

    @property
    def reasons(self) -> Counter[str]:
        """How many were left out, by reason."""
        return Counter(reject.reason for reject in self.rejects)

    def links(self) -> Iterator[tuple[str, Hashable]]:
        """What ties units together: identical pictures, and lookalikes."""
        for row in self.rows:
            image_id = self.image_id(row.image)
            yield row.unit, image_id
            if image_id in self.cluster:
                yield row.unit, self.cluster[image_id]


def collect(config: PrepConfig) -> CollectedRows:
    """Read the layout, check each picture once, settle conflicts, find lookalikes.

    Raises:
        DataError: not one pair of a picture and a text is left.
    """
    found = CollectedRows(RawFolder(config))
    for item in layouts.read_rows(found.raw):
        (found.rows if isinstance(item, RawRow) else found.rejects).append(item)
    if config.check_images:
        found.read = _check(found, config).read
    found.source_splits = {row.split for row in found.rows if row.split}
    found.subjects = _subjects(found.rows)
    _settle_conflicts(found, config)
    _refuse_nothing(found, config)
    if config.near_duplicates >= 0 and found.checked:
        find_lookalikes(found, config.near_duplicates)
    return found


def _check(found: CollectedRows, config: PrepConfig) -> VerifiedImages:
    names = list(dict.fromkeys(row.image for row in found.rows))
    findings = verify_images(found.raw.pictures, names, workers=config.workers, rehash=config.rehash)
    broken: dict[str, str] = {}
    for name in names:
        finding = findings.of[name]
        if not isinstance(finding, ImageInfo):
            broken[name] = str(finding)
        elif min(finding.width, finding.height) < config.min_side:
            broken[name] = f"a picture of fewer than {config.min_side} pixels"
        else:
            found.checked[name] = finding
    _drop(found, lambda row: broken.get(row.image), once=True)
    return findings


def _drop(found: CollectedRows, reason_of: Callable[[RawRow], str | None], *, once: bool) -> None:
    """Turn rows into rejects; `once` a picture, or each row."""
    kept, told = [], set()
    for row in found.rows:
        reason = reason_of(row)
        if reason is None:
            kept.append(row)
        elif not once or row.image not in told:
            told.add(row.image)
            found.rejects.append(Reject(row.where, row.image, reason))
    found.rows = kept


def _settle_conflicts(found: CollectedRows, config: PrepConfig) -> None:
    """One picture under different classes: has all, is left out, or keeps the first, as --on-conflict says."""
    met: dict[str, dict[tuple[str, ...], str]] = defaultdict(dict)
    for row in found.rows:
        if row.classes:
            met[found.image_id(row.image)].setdefault(tuple(sorted(row.classes)), row.where)
    torn = {image_id: classes for image_id, classes in met.items() if len(classes) > 1}
    found.torn = set(torn)

    def reason(row: RawRow) -> str | None:
        classes = torn.get(found.image_id(row.image), {})
        if not classes or (config.on_conflict == "first" and tuple(sorted(row.classes)) == next(iter(classes))):
            return None
        return "the same picture stands under other classes too"

    if config.on_conflict != "keep" and torn:
        _drop(found, reason, once=False)
    for row in found.rows:
        if row.classes:
            image_id = found.image_id(row.image)
            found.classes[image_id] = tuple(dict.fromkeys((*found.classes.get(image_id, ()), *row.classes)))


def _refuse_nothing(found: CollectedRows, config: PrepConfig) -> None:
    if found.rows:
        return
    reasons = "; ".join(f"{count} x {reason}" for reason, count in found.reasons.most_common(3))
    examples = ", ".join(dict.fromkeys(reject.item for reject in found.rejects[:50] if reject.item))
    told = f"{config.source}: no pair of a picture and a text; expected {layouts.describe_layout(found.raw.layout)}"
    hint = f"found: {reasons} (such as {examples[:120]})" if reasons else "found: nothing of the kind"
    if found.rejects and all(reject.reason == LINK_LEADS_OUT for reject in found.rejects):
        hint = "every file is a link that leads out: name the folder that they lead to, or copy them with cp -rL"
    raise DataError(told, hint=hint)


def find_lookalikes(found: CollectedRows, bits: int) -> None:
    """By the looks as they are, and as the table keeps them: reading it must find nothing that prep did not."""
    looks = {each.image_id: each.perceptual_hash for each in found.checked.values()}
    ids = sorted(looks)
    exact = [looks[each] for each in ids]
    as_kept = [phash.from_hex(phash.to_hex(each)) for each in exact]
    links = (
        (image_id, (way, cluster))
        for way, seen in enumerate((exact, as_kept))
        for image_id, cluster in zip(ids, phash.cluster_lookalikes(seen, bits).tolist(), strict=True)
    )
    members: dict[str, list[str]] = defaultdict(list)
    for image_id, cluster in splits.connected_components(links).items():
        members[cluster].append(image_id)
    for cluster, alike in members.items():
        if len(alike) > 1:
            found.cluster |= dict.fromkeys(alike, cluster)
            classes = [set(found.classes[image_id]) for image_id in alike if image_id in found.classes]
            found.alike_across_classes += len(classes) > 1 and not set.intersection(*classes)


def _subjects(rows: list[RawRow]) -> str | None:
    """A column that names patients, lesions or the like, some of them on several pictures."""
    for column in [name for name in (rows[0].extra or {}) if SUBJECT.search(name)] if rows else []:
        first: dict[str, str] = {}
        several = False
        for row in rows:
            value = (row.extra or {}).get(column)
            several |= bool(value) and first.setdefault(str(value), row.image) != row.image
        if several and len(first) > 1:
            return column
    return None
