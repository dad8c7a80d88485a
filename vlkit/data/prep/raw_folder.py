"""Turn what a layout finds in a raw folder into rows and rejects, under the settings of prep.

A row is one image with one text. A layout says which file, which texts, which classes and groups; cleaning texts,
limiting their length and filling templates is the same for all layouts and happens here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vlkit.config.data import PrepConfig
from vlkit.data import captions
from vlkit.data.prep import tables
from vlkit.data.prep.source_folder import SourceFolder
from vlkit.errors import DataError, UsageError, suggest_name
from vlkit.storage import Location


class RawRow(NamedTuple):
    """One image with one text.

    Attributes:
        image: the image's name in its source folder.
        groups: what makes a match; several where the image has several conditions.
        unit: what the split must keep together.
        classes: none, one or several.
        where: file and line, for messages.
        split: the split that the source assigns, if any.
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
    """Something that was left out: a reason shared with others, and a detail of its own. The columns of rejects.csv."""

    where: str
    item: str
    reason: str
    detail: str = ""


class RawImage(NamedTuple):
    """An image with what its source says about it, before it becomes rows. Attributes as in `RawRow`.

    Attributes:
        texts: its own texts, not yet cleaned.
        fields: values that templates can name.
    """

    image: str
    texts: Sequence[str]
    where: str
    unit: str
    groups: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    split: str | None = None
    fields: Mapping[str, str] = {}
    extra: Mapping[str, str | None] | None = None


def count_reasons(rejects: Iterable[Reject]) -> Counter[str]:
    """Count rejects by reason."""
    return Counter(reject.reason for reject in rejects)


class RawFolder:
    """A raw folder and its settings.

    Attributes:
        layout: the name of the layout; "auto" until it was guessed.
        table: the name of the table that the settings ask for.
        source: the folder of tables and texts.
        image_source: the folder of images: the same one, unless --image-root names another.

    Raises:
        DataError: the folder is missing, empty, or a prepared folder.
    """

    def __init__(self, config: PrepConfig) -> None:
        self.config = config
        self.layout: str = config.layout
        location, self.table = config.source, config.table
        if is_table(location):
            self.table, location = location.name, location.parent
        exclude = [config.out] if config.out is not None else []
        self.source = SourceFolder(location, exclude)
        if self.source.remote is None and {"pairs.parquet", "data.yaml"} <= set(os.listdir(self.source.root)):
            raise DataError(
                f"{location} is a prepared folder already", hint=f"use it: vlkit train-retrieval --data {location}"
            )
        images = config.image_root
        self.image_source = SourceFolder(images, exclude, "--image-root") if images else self.source

    def check_templates(self, columns: Collection[str]) -> None:
        """Refuse a template with a field that no row has.

        Raises:
            UsageError: names the field and the known ones.
        """
        known = {*columns, *self.class_fields}
        for template in self.config.templates:
            for name in captions.template_fields(template):
                if name not in known:
                    message = f"the template {template!r} names {{{name}}}, which no row has"
                    raise UsageError(message, hint=suggest_name(name, sorted(known)))

    def make_rows(self, image: RawImage) -> Iterator[RawRow | Reject]:
        """Yield an image's rows: one per own text; per template where it has no text, or with --templates-for all."""
        own = list(dict.fromkeys(text for text in map(self._clean, image.texts) if text))
        image_groups = image.groups or image.classes or (image.image,)
        groups_by_text = dict.fromkeys(own, image_groups)
        if not own or self.config.templates_for == "all":
            groups_by_text |= self._fill_templates(image, image_groups)
        if not groups_by_text:
            yield Reject(image.where, image.image, "no text" if image.classes else "no text and no class")
        for text, groups in groups_by_text.items():
            if (reason := self._length_problem(text)) is not None:
                yield Reject(image.where, image.image, reason)
                continue
            # A template speaks of one class: that class comes first in its row.
            others = tuple(name for name in image.classes if name not in groups)
            classes = (*groups, *others) if set(groups) <= set(image.classes) else image.classes
            yield RawRow(image.image, text, groups, image.unit, classes, image.where, image.split, image.extra)

    def _fill_templates(self, image: RawImage, groups: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Return text -> groups for every class and template; an image without groups of its own has its classes."""
        texts = {}
        for class_name in image.classes:
            words = captions.readable_class(class_name)
            class_values = dict.fromkeys(self.class_fields, words)
            for template in self.config.templates:
                text = captions.fill_template(template, {**image.fields, **class_values})
                if text:
                    texts[text] = groups if image.groups else (class_name,)
        return texts

    @cached_property
    def class_fields(self) -> tuple[str, ...]:
        """The field names under which a template gets the class."""
        return ("class_name", "condition", *self.config.label_column)

    def _clean(self, text: Any) -> str:
        return captions.clean(text, persian=self.config.script == "persian")

    def _length_problem(self, text: str) -> str | None:
        words = len(text.split())
        if self.config.min_words is not None and words < self.config.min_words:
            return f"a text of fewer than {self.config.min_words} words"
        if self.config.max_words is not None and words > self.config.max_words:
            return f"a text of more than {self.config.max_words} words"
        return None

    def locate(self, name: str, folder: str = "") -> str:
        """Return the image that `name` means; `folder` holds the file that names it.

        Raises:
            DataError: why there is no such image.
        """
        beside = folder if self.image_source is self.source else ""
        return self.image_source.locate(name, beside, must_exist=self.lists_images)

    @property
    def lists_images(self) -> bool:
        """Whether the image files are listed and looked up; not so with --no-check-images."""
        return self.config.check_images

    def reject_unnamed_images(self, named: set[str], reason: str) -> Iterator[Reject]:
        """Yield a reject for every image that no row names; masks have a reason of their own."""
        if not self.lists_images or self._images_are_shared:
            return
        for name in self.image_source.image_names:
            if name not in named and PurePosixPath(name).suffix:
                yield Reject(name, name, mask_reason(name, self.image_source) or reason)

    @property
    def _images_are_shared(self) -> bool:
        """Whether --image-root contains the source: its other images then belong to others and are not listed."""
        root = self.image_source.location
        if self.image_source is self.source or root.is_remote or self.source.location.is_remote:
            return False
        return Path(self.source.root.resolve()).is_relative_to(root.path.resolve())

    def reject_skipped_files(self) -> Iterator[Reject]:
        """Yield a reject for every file and folder that was skipped: unreadable, a link that leads out, no file."""
        for source in dict.fromkeys((self.source, self.image_source)):
            for name, reason in sorted(source.skipped.items()):
                printable = os.fsencode(name).decode("utf-8", "replace")
                yield Reject(printable, printable, reason)


def is_table(location: Location) -> bool:
    """Return whether the source is a table, not a folder."""
    if location.is_remote:
        return PurePosixPath(location).suffix.lower() in tables.SUFFIXES
    return location.path.is_file()


MASK_FOLDERS = frozenset(
    ["mask", "masks", "segmentation", "segmentations", "ground_truth", "groundtruth", "annotations"]
)
MASK_SUFFIXES = ("mask", "masks", "seg", "segmentation", "superpixels", "groundtruth", "gt")
IMAGE_FOLDERS = ("image", "images", "img", "imgs", "original", "originals", "orig")


def mask_reason(name: str, source: SourceFolder) -> str | None:
    """Return why an image is taken for a mask; None if no image exists that it would mask.

    The masked image is beside it, under the name without the suffix (`7_mask.png` and `7.png`), or above or beside a
    folder of masks (`masks/7.png` and `7.png` or `images/7.png`). So a class may be called mask.
    """
    path = PurePosixPath(name)
    word = path.stem.lower().rstrip("0123456789").rstrip("_- ") or path.stem.lower()
    suffix = next((suffix for suffix in MASK_SUFFIXES for mark in "_-. " if word.endswith(mark + suffix)), None)
    masked = path.stem[: len(word) - len(suffix) - 1] if suffix else None
    if masked and source.has_stem(str(path.with_name(masked))):
        return "a mask: its name is that of an image beside it"
    folders = path.parts[:-1]
    stems = [stem for stem in (path.stem, masked) if stem]
    for depth, folder in enumerate(folders):
        if folder.lower() in MASK_FOLDERS:
            for instead in ((), *((image_folder,) for image_folder in IMAGE_FOLDERS)):
                parts = (*folders[:depth], *instead, *folders[depth + 1 :])
                if any(source.has_stem("/".join((*parts, stem))) for stem in stems):
                    return "a mask: it is in a folder of masks"
    return None


def reject_from_error(error: DataError, where: str, item: str) -> Reject:
    """Return a DataError about one file as a reject."""
    return Reject(where, item, error.message, error.hint or "")
