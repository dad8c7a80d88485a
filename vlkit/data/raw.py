"""What a layout reads and gives: a raw folder under its settings -> rows and rejects.

A row is one picture with one text. A layout says which file, which texts of its own, which classes and groups; how
texts are cleaned, limited and, where there are none, made from templates is the same for all and stands here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vlkit.config import PrepConfig
from vlkit.data import captions
from vlkit.data.sources import Source
from vlkit.errors import DataError


class RawRow(NamedTuple):
    """One picture with one text.

    Attributes:
        image: the picture's name in the source of the pictures.
        groups: what makes a match; several where the picture has several conditions.
        unit: what must not be torn apart by the split.
        classes: none, one or several.
        where: its place for messages, a file and a line.
        split: where the source puts it, if it does.
        extra: further columns of the source.
    """

    image: str
    text: str
    groups: tuple[str, ...]
    unit: str
    classes: tuple[str, ...]
    where: str
    split: str | None = None
    extra: Mapping[str, str | None] | None = None


class Reject(NamedTuple):
    """Something left out, and why."""

    where: str
    item: str
    reason: str


class Item(NamedTuple):
    """A picture with what its source says of it, before it has become rows."""

    image: str
    texts: Sequence[str]
    where: str
    unit: str
    groups: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    split: str | None = None
    fields: Mapping[str, str] = {}
    extra: Mapping[str, str | None] | None = None


class RawFolder:
    """A raw folder under its settings: the source of the tables, and that of the pictures."""

    def __init__(self, config: PrepConfig) -> None:
        self.config = config
        location, self.table = config.source, config.table
        if not location.is_remote and location.path.is_file():
            # --source names the table itself.
            self.table, location = location.path.name, type(location)(location.path.parent)
        without = [] if config.out is None or config.out.is_remote else [config.out.path]
        self.source = Source(location, without)
        self.pictures = Source(config.image_root, without) if config.image_root else self.source

    def rows_of(self, item: Item) -> Iterator[RawRow | Reject]:
        """An item's rows: its own texts, and the templates' where it has none of its own (or for all, if asked)."""
        own = list(dict.fromkeys(text for text in map(self._cleaned, item.texts) if text))
        groups = item.groups or item.classes or (item.image,)
        captioned = [(text, groups) for text in own]
        if not own or self.config.templates_for == "all":
            captioned += self._from_templates(item, groups)
        if not captioned:
            yield Reject(item.where, item.image, "no text")
        for text, of in dict(captioned).items():
            if (told := self._length(text)) is not None:
                yield Reject(item.where, item.image, told)
                continue
            yield RawRow(item.image, text, of, item.unit, item.classes, item.where, item.split, item.extra)

    def _from_templates(self, item: Item, groups: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
        made = []
        for class_name in item.classes:
            words = captions.readable_class(class_name)
            named = {column: words for column in self.class_fields}
            for template in self.config.templates:
                text = captions.from_template(template, {**item.fields, **named})
                if text:
                    made.append((text, groups if item.groups else (class_name,)))
        return made

    @cached_property
    def class_fields(self) -> tuple[str, ...]:
        """Names under which a template finds the class."""
        return ("class_name", "condition", *self.config.label_column)

    def _cleaned(self, text: Any) -> str:
        return captions.clean(text, persian=self.config.script == "persian")

    def _length(self, text: str) -> str | None:
        words = len(text.split())
        if self.config.min_words is not None and words < self.config.min_words:
            return f"a text of fewer than {self.config.min_words} words"
        if self.config.max_words is not None and words > self.config.max_words:
            return f"a text of more than {self.config.max_words} words"
        return None

    def locate(self, name: str, beside: str = "") -> str:
        """The picture that is meant by `name`; DataError says why there is none."""
        return self.pictures.locate(name, beside if self.pictures is self.source else "", listed=self.listed)

    @property
    def listed(self) -> bool:
        """The source's files were listed; not so where pictures are not looked at."""
        return self.config.check_images

    def unnamed(self, named: set[str], reason: str) -> Iterator[Reject]:
        """The pictures that no row names; masks under their own reason."""
        if not self.listed or self._wide:
            return
        for name in self.pictures.pictures:
            if name not in named and PurePosixPath(name).suffix:
                yield Reject(name, name, mask_of(name, self.pictures) or reason)

    @property
    def _wide(self) -> bool:
        """The pictures' root holds more than this source: what lies there besides is not ours to list."""
        root = self.pictures.location
        if self.pictures is self.source or root.is_remote or self.source.location.is_remote:
            return False
        return Path(self.source.root.resolve()).is_relative_to(root.path.resolve())

    def closed(self) -> Iterator[Reject]:
        """Folders that could not be read, and links that lead out."""
        for source in dict.fromkeys((self.source, self.pictures)):
            for error in source.closed:
                yield Reject(str(error.filename), str(error.filename), f"the folder cannot be read: {error.strerror}")


MASK_FOLDERS = frozenset(
    ["mask", "masks", "segmentation", "segmentations", "ground_truth", "groundtruth", "annotations"]
)
MASK_ENDS = ("mask", "masks", "seg", "segmentation", "superpixels", "groundtruth", "gt")


def mask_of(name: str, source: Source) -> str | None:
    """Why a picture is taken for a mask: its folder, or its name beside the picture that it masks; else None."""
    path = PurePosixPath(name)
    if any(part.lower() in MASK_FOLDERS for part in path.parts[:-1]):
        return "a mask, by its folder"
    stem = path.stem.lower().rstrip("0123456789").rstrip("_- ") or path.stem.lower()
    end = next((end for end in MASK_ENDS for mark in "_-. " if stem.endswith(mark + end)), None)
    if end is None:
        return None
    masked = path.stem[: len(stem) - len(end) - 1]
    beside = (source.locate_stem(str(path.with_name(masked))) if masked else None) is not None
    return "a mask, by its name beside the picture" if beside else None


def reject_of(error: DataError, where: str, item: str) -> Reject:
    """A DataError about one file as a reject."""
    return Reject(where, item, error.message)
