"""Broken, odd and misleading files and rows, as real folders have them, added to sample data on request.

Every image here must either decode, or be left out with a reason; no row may lead out of the folder.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms


def add_ugly(layout: str, out: Path) -> dict[str, int]:
    """Add the ugly cases to sample data of a layout; return how many images and rows were added."""
    images, rows = _ADD_UGLY[layout](out)
    return {"ugly pictures": images, "ugly rows": rows}


def write_ugly_images(folder: Path, like: Path) -> list[str]:
    """Write images of every odd kind, made from a good one; return their names, with "good" in those that decode."""
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.open(like).convert("RGB")
    before = set(os.listdir(folder))
    for number, (name, write) in enumerate(_UGLY_IMAGES.items()):
        # Each differs from the others, so that none is a copy of another.
        shift = np.roll(np.asarray(image), 7 * number, axis=(0, 1))
        noise = np.random.default_rng(number).integers(-40, 40, shift.shape)
        write(Image.fromarray((shift + noise).clip(0, 255).astype(np.uint8)), folder / name)
    return sorted(set(os.listdir(folder)) - before)


def _save_rotated_exif(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, "JPEG", exif=exif)


def _save_16_bit(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path, "PNG")


def _save_lab(image: Image.Image, path: Path) -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert converted is not None
    converted.save(path, "TIFF")


def _save_animated(image: Image.Image, path: Path) -> None:
    image.save(path, "GIF", save_all=True, append_images=[image.rotate(90)])


def _save_truncated(image: Image.Image, path: Path) -> None:
    image.save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-400])


def _save_bomb(_: Image.Image, path: Path) -> None:
    """Write a PNG of a few kilobytes whose header claims 30,000 x 30,000 pixels."""
    side = 30_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    line = zlib.compress(b"\0" * 4096)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", line) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def _write_bytes(content: bytes) -> Callable[[Image.Image, Path], None]:
    return lambda _, path: (path.write_bytes(content), None)[1]


def _save_as(mode: str, kind: str) -> Callable[[Image.Image, Path], None]:
    return lambda image, path: image.convert(mode).save(path, kind)


_UGLY_IMAGES: dict[str, Callable[[Image.Image, Path], None]] = {
    "good webp.jpg": _save_as("RGB", "WEBP"),
    "good jpeg.webp": _save_as("RGB", "JPEG"),
    "good alpha.jpg": _save_as("RGBA", "PNG"),
    "good.JPG": _save_as("RGB", "JPEG"),
    "good.jfif": _save_as("RGB", "JPEG"),
    "good cmyk.jpeg": _save_as("CMYK", "JPEG"),
    "good palette.png": _save_as("P", "PNG"),
    "good grey alpha.png": _save_as("LA", "PNG"),
    "good lab.tif": _save_lab,
    "good 16 bit.png": _save_16_bit,
    "good turned.jpg": _save_rotated_exif,
    "good animated.gif": _save_animated,
    "good [brackets] (1).jpg": _save_as("RGB", "JPEG"),
    "good قرمه‌سبزی.jpg": _save_as("RGB", "JPEG"),
    "good 麻婆豆腐.jpg": _save_as("RGB", "JPEG"),
    "good phở bò.jpg": _save_as("RGB", "JPEG"),
    "good back\\slash.jpg": _save_as("RGB", "JPEG"),
    "truncated.jpg": _save_truncated,
    "page.jpg": _write_bytes(b"<!DOCTYPE html><html><body>404</body></html>"),
    "pointer.jpg": _write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    "empty.jpg": _write_bytes(b""),
    "text.png": _write_bytes(b"this is no picture"),
    "dot.png": lambda _, path: Image.new("RGB", (1, 1)).save(path, "PNG"),
    "bomb.png": _save_bomb,
}


def _good_images(out: Path) -> list[Path]:
    """Return the good images of the sample, in order."""
    return sorted(path for path in out.rglob("*") if path.suffix == ".jpg")


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _rotated_copy(source: Path, target: Path) -> None:
    Image.open(source).rotate(90, expand=True).save(target, quality=88)


def _link_outside(path: Path) -> None:
    """Create a link that leads out of the folder."""
    path.symlink_to(Path("/etc/hostname"))


def _add_to_recipes(out: Path) -> tuple[int, int]:
    good = _good_images(out)
    names = write_ugly_images(out / "images", good[0])
    _copy(good[1], out / "images/zz copy.jpg")
    _rotated_copy(good[2], out / "images/zz turned.jpg")
    _link_outside(out / "images/zz link.jpg")
    rows = [
        json.dumps({"recipe_id": f"u{number}", "title": f"Ugly dish {number} on a plate", "images": [f"images/{name}"]})
        for number, name in enumerate(names)
    ]
    odd = {
        "copy": ["images/zz copy.jpg"],
        "turned": ["images/zz turned.jpg"],
        "link": ["images/zz link.jpg"],
        "out": ["../../etc/hostname.jpg"],
        "absolute": ["/etc/hostname.jpg"],
        "gone": ["images/never was.jpg"],
        "backslashes": [good[3].relative_to(out).as_posix().replace("/", "\\")],
        "listed": str([good[4].relative_to(out).as_posix()]),
    }
    rows += [json.dumps({"recipe_id": key, "title": f"A dish, {key}", "images": value}) for key, value in odd.items()]
    rows += [
        '{"recipe_id": "html", "title": "<b>Bold</b> &amp; <i>brave</i> soup\\u0000", "images": ["images/good.JPG"]}',
        '{"recipe_id": "empty", "title": "  ", "images": ["images/good.JPG"]}',
        '{"recipe_id": "excel", "title": "#NAME?", "images": ["images/good.JPG"]}',
        '{"recipe_id": "no pictures", "title": "Nothing to see", "images": []}',
        '{"title": "No id", "images": ["images/good.JPG"]}',
        "{this is not json",
        "[1, 2, 3]",
    ]
    with (out / "recipes.jsonl").open("a", encoding="utf-8") as file:
        file.write("\r\n".join(rows) + "\n")
    return len(names) + 3, len(rows)


def _add_to_class_folders(out: Path) -> tuple[int, int]:
    good = _good_images(out)
    folder = good[0].parent
    names = write_ugly_images(folder, good[0])
    other = sorted(path for path in out.iterdir() if path.is_dir())[-1]
    _copy(good[0], other / "zz copy of another class.jpg")
    _rotated_copy(good[1], folder / "zz turned.jpg")
    Image.new("L", (64, 64)).save(folder / f"{good[1].stem}_mask.png")
    _link_outside(folder / "zz link.jpg")
    (folder / "Thumbs.db").write_bytes(b"\0")
    (folder / "notes.txt").write_text("taken in June")
    _copy(good[2], out / "loose.jpg")
    lonely = out / "Fern___Only_one"
    lonely.mkdir()
    Image.open(good[3]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(17).save(lonely / "1.jpg")
    nested = out / "rice" / "blast" / "orig"
    nested.mkdir(parents=True)
    for number, path in enumerate(good[4:8]):
        Image.open(path).rotate(31 + 9 * number).save(nested / f"{number}.jpg")
    return len(names) + 9, 0


def _add_to_table(out: Path) -> tuple[int, int]:
    good = _good_images(out)
    names = write_ugly_images(out / "images", good[0])
    _copy(good[0], out / "images/zz copy.jpg")
    rows = [f'"images/{name}",acne,,,' for name in names]
    rows += [
        'images/zz copy.jpg,vitiligo,"a copy under another condition",,',
        f"{good[1].stem},melanoma,named without suffix and folder,,",
        f"{good[2].relative_to(out).as_posix()},\"['acne', 'psoriasis']\",a list of two,,",
        f'{good[3].relative_to(out).as_posix()},acne,"two lines\nin one ""cell""",,',
        f"{good[4].relative_to(out).as_posix()},#NAME?,#NAME?,,",
        "../../etc/hostname.jpg,acne,leads out,,",
        "/etc/hostname.jpg,acne,leads out,,",
        "images/never was.jpg,acne,gone,,",
        ",acne,no picture,,",
        "images/good.JPG,acne",
    ]
    table = out / "labels.csv"
    text = table.read_text(encoding="utf-8")
    table.write_bytes("\ufeff".encode() + text.encode() + "\r\n".join(rows).encode() + b"\n")
    Image.new("L", (64, 64)).save(out / "images" / f"{good[1].stem}_segmentation.png")
    return len(names) + 2, len(rows)


def _add_to_json_folders(out: Path) -> tuple[int, int]:
    good = _good_images(out)
    folder = out / "zz odd"
    names = write_ugly_images(folder, good[0])
    record = {"title": "آش", "response": "آش رشته با کشک و نعناداغ در کاسه‌ی بزرگ.", "folder_path": "zz odd"}
    (folder / "info.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    rows = {
        "zz out": '{"response": "بیرون", "image_path": "../../etc/hostname.jpg"}',
        "zz broken": '{"response": "ناتمام',
        "zz silent": '{"title": "بی‌متن", "folder_path": "."}',
        "zz alone": json.dumps({"response": "غذایی بی‌عکس"}, ensure_ascii=False),
        "zz again": json.dumps({**record, "response": record["response"].replace("ک", "ك"), "folder_path": "."}),
    }
    for name, text in rows.items():
        (out / name).mkdir()
        (out / name / "info.json").write_text(text, encoding="utf-8")
    for name in ("zz out", "zz silent", "zz again"):
        Image.open(good[5]).rotate(40 + len(name)).save(out / name / "1.jpg")
    return len(names) + 3, len(rows) + 1


def _add_to_coco(out: Path) -> tuple[int, int]:
    path = out / "annotations/captions_train2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    good = _good_images(out / "images/train2017")
    names = write_ugly_images(out / "images/train2017", good[0])
    _copy(good[0], out / "images/val2017/zz copy of train.jpg")
    _copy(good[1], out / "images/train2017/zz nobody names this.jpg")
    files = [*names, "never was.jpg", "../../../etc/hostname.jpg"]
    for number, name in enumerate(files, start=10**9):
        content["images"].append({"id": number, "file_name": name})
        content["annotations"].append({"id": number, "image_id": number, "caption": f"ugly thing number {number}"})
    content["images"].append({"id": 2 * 10**9, "file_name": good[2].name.replace("0", "0")})
    content["images"].append({"id": 3 * 10**9, "file_name": "good.JPG"})
    content["annotations"].append({"id": 3 * 10**9, "image_id": 4 * 10**9, "caption": "of a picture not listed"})
    path.write_text(json.dumps(content), encoding="utf-8")
    val = out / "annotations/captions_val2017.json"
    content = json.loads(val.read_text(encoding="utf-8"))
    content["images"].append({"id": 5 * 10**9, "file_name": "zz copy of train.jpg"})
    content["annotations"].append({"id": 5 * 10**9, "image_id": 5 * 10**9, "caption": "A copy of a training picture"})
    val.write_text(json.dumps(content), encoding="utf-8")
    return len(names) + 2, len(files) + 4


_ADD_UGLY: dict[str, Callable[[Path], tuple[int, int]]] = {
    "recipes": _add_to_recipes,
    "agriculture": _add_to_class_folders,
    "dermatology": _add_to_table,
    "persian-food": _add_to_json_folders,
    "coco": _add_to_coco,
}
