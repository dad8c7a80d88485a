"""The rows of a raw folder that can be used: their pictures checked, conflicts settled, and what was left out."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from vlkit.config import PrepConfig
from vlkit.data import layouts, perceptual
from vlkit.data.checking import Findings, check_all
from vlkit.data.images import Checked
from vlkit.data.raw import RawFolder, RawRow, Reject
from vlkit.data.sources import path_id
from vlkit.errors import DataError

SUBJECT = re.compile(r"(?i)(^|_)(patient|lesion|subject|person|participant|plant|animal|case)(_?id)?$")


@dataclass
class Gathered:
    """What was read from a raw folder.

    Attributes:
        rows: usable rows.
        rejects: what was left out.
        checked: picture name -> what was found of it; empty where pictures were not looked at.
        read: pictures that were read now, not taken from the cache.
        classes: image id -> the classes of a picture that stands under several, in the order met.
        alike: image ids of near-identical pictures, as pairs.
        alike_across_classes: how many of those pairs have no class in common.
        source_splits: the splits that the source names.
        subjects: a further column that looks like who is on the pictures, with several pictures each.
    """

    raw: RawFolder
    rows: list[RawRow] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    checked: dict[str, Checked] = field(default_factory=dict)
    read: int = 0
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    alike: list[tuple[str, str]] = field(default_factory=list)
    source_splits: set[str] = field(default_factory=set)
    subjects: str | None = None
    alike_across_classes: int = 0

    def image_id(self, name: str) -> str:
        """Hash of the picture's bytes; where pictures are not looked at, of its name."""
        return self.checked[name].image_id if self.checked else path_id(name)

    @property
    def reasons(self) -> Counter[str]:
        """How many were left out, by reason."""
        return Counter(reject.reason for reject in self.rejects)

    def links(self) -> Iterator[tuple[str, Hashable]]:
        """What ties units together: identical pictures, and near-identical ones."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, pair in enumerate(self.alike):
            for image_id in pair:
                alike[image_id].append(number)
        for row in self.rows:
            image_id = self.image_id(row.image)
            yield row.unit, image_id
            for number in alike.get(image_id, ()):
                yield row.unit, number


def gather(config: PrepConfig) -> Gathered:
    """Read the layout, check each picture once, settle conflicts, find near-identical pictures.

    Raises:
        DataError: not one pair of a picture and a text is left.
    """
    found = Gathered(RawFolder(config))
    for item in layouts.read(found.raw):
        (found.rows if isinstance(item, RawRow) else found.rejects).append(item)
    if config.check_images:
        findings = _check(found, config)
        found.read = findings.read
    found.source_splits = {row.split for row in found.rows if row.split}
    found.subjects = _subjects(found.rows)
    _settle_conflicts(found, config)
    _refuse_nothing(found, config)
    if config.near_duplicates >= 0 and found.checked:
        found.alike = _alike(found, config.near_duplicates)
        classes: dict[str, set[str]] = defaultdict(set)
        for row in found.rows:
            classes[found.image_id(row.image)] |= set(row.classes)
        found.alike_across_classes = sum(
            classes[one].isdisjoint(classes[other]) for one, other in found.alike if classes[one]
        )
    return found


def _check(found: Gathered, config: PrepConfig) -> Findings:
    names = list(dict.fromkeys(row.image for row in found.rows))
    findings = check_all(found.raw.pictures, names, workers=config.workers, rehash=config.rehash)
    broken: dict[str, str] = {}
    for name in names:
        finding = findings.of[name]
        if isinstance(finding, str):
            broken[name] = finding
        elif min(finding.width, finding.height) < config.min_side:
            broken[name] = f"a picture of fewer than {config.min_side} pixels"
        else:
            found.checked[name] = finding
    _drop(found, lambda row: broken.get(row.image), once=True)
    return findings


def _drop(found: Gathered, reason_of: Callable[[RawRow], str | None], *, once: bool) -> None:
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


def _settle_conflicts(found: Gathered, config: PrepConfig) -> None:
    """One picture under two classes: has both, is left out, or keeps the first, as --on-conflict says."""
    met: dict[str, dict[tuple[str, ...], str]] = defaultdict(dict)
    for row in found.rows:
        if row.classes:
            met[found.image_id(row.image)].setdefault(row.classes, row.where)
    torn = {image_id: classes for image_id, classes in met.items() if len({frozenset(c) for c in classes}) > 1}
    found.classes = {
        image_id: tuple(dict.fromkeys(name for names in classes for name in names))
        for image_id, classes in torn.items()
    }
    if config.on_conflict == "keep" or not torn:
        return

    def reason(row: RawRow) -> str | None:
        classes = torn.get(found.image_id(row.image))
        if classes is None or (config.on_conflict == "first" and row.classes == next(iter(classes))):
            return None
        others = "; ".join(sorted("|".join(names) for names in classes if names != row.classes))
        return f"the same picture stands under other classes too: {others}"

    _drop(found, reason, once=False)


def _refuse_nothing(found: Gathered, config: PrepConfig) -> None:
    if found.rows:
        return
    reasons = "; ".join(f"{count} x {reason}" for reason, count in found.reasons.most_common(3))
    examples = ", ".join(dict.fromkeys(reject.item for reject in found.rejects[:50] if reject.item))
    told = f"{config.source}: no pair of a picture and a text; expected {layouts.expected(config.layout)}"
    raise DataError(
        told, hint=f"found: {reasons} (such as {examples[:120]})" if reasons else "found: nothing of the kind"
    )


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


def _alike(found: Gathered, bits: int) -> list[tuple[str, str]]:
    looks = {each.image_id: each.looks for each in found.checked.values()}
    ids = sorted(looks)
    return [(ids[one], ids[other]) for one, other in perceptual.near([looks[each] for each in ids], bits)]
