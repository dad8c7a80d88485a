"""Read COCO: `images/<split>/` and `annotations/captions_<split>.json`, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

from vlkit.data.prep.raw_folder import RawFolder, RawImage, RawRow, Reject, reject_from_error
from vlkit.data.splits import split_from_name
from vlkit.errors import DataError

CAPTIONS_FILE = re.compile(r"(?:annotations/)?captions_([^/]+)\.json")


def read_coco(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """Yield every caption of every image; group and unit are the image's id."""
    files = {match[1]: name for name in raw.source.files if (match := CAPTIONS_FILE.fullmatch(name))}
    if not files:
        message = f"{raw.source.location}: no annotations/captions_<split>.json"
        top_names = ", ".join(sorted({name.split("/")[0] for name in raw.source.files})[:8])
        raise DataError(message, hint=f"it holds {top_names}; vlkit sample coco raw/ shows the layout")
    named: set[str] = set()
    image_of_group: dict[str, str] = {}
    for split, name in files.items():
        data = _read_captions(raw, name)
        for image_id, image in data.imgs.items():
            where, file_name = f"{name} image {image_id}", str(image.get("file_name") or "")
            texts = [str(annotation.get("caption") or "") for annotation in data.imgToAnns.get(image_id, [])]
            try:
                image_name = raw.locate(file_name, f"images/{split}") if file_name else ""
            except DataError as error:
                yield reject_from_error(error, where, file_name)
                continue
            named.add(image_name)
            # Ids are unique in COCO, but two files of a user may both count from 1.
            group = str(image_id)
            if image_of_group.setdefault(group, image_name) != image_name:
                group = f"{split}/{image_id}"
            if not image_name or not any(text.strip() for text in texts):
                yield Reject(where, file_name, "no caption" if image_name else "no file_name")
                continue
            yield from raw.make_rows(RawImage(image_name, texts, where, group, (group,), split=split_from_name(split)))
        for image_id in sorted(set(data.imgToAnns) - set(data.imgs), key=str):
            yield Reject(name, str(image_id), "captions of an image that the file does not list")
    yield from raw.reject_unnamed_images(named, "no annotation names this image")


def _read_captions(raw: RawFolder, name: str) -> Any:
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data = COCO(str(raw.source.local_path(name)))
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        message = f"{raw.source.location}/{name}: not a COCO caption file: {type(error).__name__}: {error}"
        hint = 'expected {"images": [...], "annotations": [{"image_id", "caption"}, ...]}'
        raise DataError(message, hint=hint) from None
    if not data.imgs:
        message = f"{raw.source.location}/{name} lists no images"
        raise DataError(message, hint='expected {"images": [{"id", "file_name"}]}')
    return data
