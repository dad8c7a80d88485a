"""COCO: `images/<split>/` and `annotations/captions_<split>.json`, read by pycocotools."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

from vlkit.data.prep.raw_folder import RawImage, RawFolder, RawRow, Reject, reject_from_error
from vlkit.data.splits import split_from_name
from vlkit.errors import DataError

ANNOTATIONS = re.compile(r"(?:annotations/)?captions_([^/]+)\.json")


def coco(raw: RawFolder) -> Iterator[RawRow | Reject]:
    """Every caption of every picture; group and unit are the picture's id."""
    files = {found[1]: name for name in raw.source.files if (found := ANNOTATIONS.fullmatch(name))}
    if not files:
        told = f"{raw.source.location}: no annotations/captions_<split>.json"
        found = ", ".join(sorted({name.split("/")[0] for name in raw.source.files})[:8])
        raise DataError(told, hint=f"found: {found}; vlkit sample coco raw/ shows the layout")
    named: set[str] = set()
    picture_of: dict[str, str] = {}
    for split, name in files.items():
        data = _read(raw, name)
        for image_id, image in data.imgs.items():
            where, file_name = f"{name} image {image_id}", str(image.get("file_name") or "")
            texts = [str(each.get("caption") or "") for each in data.imgToAnns.get(image_id, [])]
            try:
                found = raw.locate(file_name, f"images/{split}") if file_name else ""
            except DataError as error:
                yield reject_from_error(error, where, file_name)
                continue
            named.add(found)
            # Ids are unique in COCO; files of one's own may both count from 1.
            group = str(image_id)
            if picture_of.setdefault(group, found) != found:
                group = f"{split}/{image_id}"
            if not found or not any(text.strip() for text in texts):
                yield Reject(where, file_name, "no caption" if found else "no file_name")
                continue
            yield from raw.rows_of(RawImage(found, texts, where, group, (group,), split=split_from_name(split)))
        for image_id in sorted(set(data.imgToAnns) - set(data.imgs), key=str):
            yield Reject(name, str(image_id), "captions of a picture that the file does not list")
    yield from raw.unnamed(named, "no annotation names this picture")


def _read(raw: RawFolder, name: str) -> Any:
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data = COCO(str(raw.source.path(name)))
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        told = f"{raw.source.location}/{name}: not a COCO caption file: {type(error).__name__}: {error}"
        raise DataError(
            told, hint='expected {"images": [...], "annotations": [{"image_id", "caption"}, ...]}'
        ) from None
    if not data.imgs:
        raise DataError(
            f"{raw.source.location}/{name} lists no images", hint='expected {"images": [{"id", "file_name"}]}'
        )
    return data
