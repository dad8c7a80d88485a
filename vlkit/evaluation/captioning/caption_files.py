"""Files of captions and of what people say: COCO's results and annotation files, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlkit.errors import DataError


def read_captions(path: Path) -> list[tuple[str, str]]:
    """Read (image, caption) from a list of {image_id, caption}, JSON or JSON lines, or from COCO annotations.

    Raises:
        DataError: it is neither.
    """
    content = read_json_file(path)
    rows = content.get("annotations", [content]) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds no captions", hint="a list of {image_id, caption}, or a COCO annotation file")
    captions = []
    for number, row in enumerate(rows, start=1):
        if number == 1 and isinstance(row, dict) and "asked" in row:
            continue  # The header of `vlkit caption --out`.
        image, text = (_image_id(row), row.get("caption")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(image, str | int | float):
            raise DataError(f"{path}: entry {number} has no image_id or no caption")
        # Replace lone surrogates, such as half of an emoji.
        captions.append((normalize_image_id(image), text.encode("utf-8", "replace").decode("utf-8")))
    return captions


def _image_id(row: Mapping[str, Any]) -> Any:
    """Return a row's image_id; of a line of `vlkit caption --out`, which names files, the file's name."""
    by_file = "image_id" not in row and isinstance(row.get("image"), str)
    return Path(row["image"]).stem if by_file else row.get("image_id")


def normalize_image_id(image: str | int | float) -> str:
    """Return an image's id as text: 7, "7", 7.0 and "000000000007" are one image."""
    whole = isinstance(image, float) and image.is_integer()
    return str(int(image)) if whole or str(image).isdecimal() else str(image)


def read_json_file(path: Path) -> Any:
    """Read a JSON file, or a .jsonl of one value a line.

    Raises:
        DataError: there is none, or it is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: a JSON file was expected") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}", hint="JSON lines are read from a .jsonl") from None


def read_other_captions(against: Path, images: Sequence[str], suffix: str = "") -> list[str]:
    """Read the captions of the same images by another run, or from a COCO results file.

    Args:
        suffix: of the run's captions file: another split, or a part of it.

    Raises:
        DataError: an image has none, or there is no such file.
    """
    path = against / f"captions{suffix}.json" if against.is_dir() else against
    hint = f"measure it on the same data, split and limit first: vlkit eval --run {against}"
    if against.is_dir() and not path.is_file():
        raise DataError(f"no such file: {path}", hint=hint)
    texts = dict(read_captions(path))
    missing = [image for image in images if normalize_image_id(image) not in texts]
    if missing:
        message = f"{path} has no caption of {len(missing)} of the images, the first is {missing[0]}"
        raise DataError(message, hint=hint if against.is_dir() else "are they of the same images?")
    return [texts[normalize_image_id(image)] for image in images]


def coco_image_paths(annotations: Path, folder: Path, images: Sequence[str]) -> list[Path]:
    """Return the files of images, by the names in a COCO annotation file.

    Raises:
        DataError: it does not name one of them, or the file does not exist.
    """
    content = read_json_file(annotations)
    rows = content.get("images") if isinstance(content, dict) else None
    known = [row for row in rows or [] if isinstance(row, dict) and isinstance(row.get("id"), str | int | float)]
    names = {normalize_image_id(row["id"]): str(row.get("file_name") or "") for row in known}
    paths = []
    for image in images:
        name = names.get(image, "")
        path = folder / name
        if not name or not path.is_file():
            message = f"no such image: {path}" if name else f"{annotations} names no file of image {image}"
            raise DataError(message, hint="--images is the folder of the images that --references names")
        paths.append(path)
    return paths
