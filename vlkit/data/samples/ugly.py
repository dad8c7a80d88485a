"""What real folders have: broken, odd and misleading files and rows, added to sample data on request.

Every picture here either must decode, or must be left out with a reason; no row may lead out of the folder.
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
    """Add the ugly cases to sample data of a layout. Returns how many pictures and rows were added."""
    pictures, rows = _ADDERS[layout](out)
    return {"ugly pictures": pictures, "ugly rows": rows}


def write_ugly_pictures(folder: Path, like: Path) -> list[str]:
    """Pictures of every odd kind, made from a good one. Returns their names; good ones hold the word."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.open(like).convert("RGB")
    before = set(os.listdir(folder))
    for number, (name, write) in enumerate(_PICTURES.items()):
        # Each differs from the others, so that they are not one another's copies.
        shift = np.roll(np.asarray(picture), 7 * number, axis=(0, 1))
        noise = np.random.default_rng(number).integers(-40, 40, shift.shape)
        write(Image.fromarray((shift + noise).clip(0, 255).astype(np.uint8)), folder / name)
    return sorted(set(os.listdir(folder)) - before)


def _with_exif(picture: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, "JPEG", exif=exif)


def _deep(picture: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path, "PNG")


def _lab(picture: Image.Image, path: Path) -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")
    assert converted is not None
    converted.save(path, "TIFF")


def _animated(picture: Image.Image, path: Path) -> None:
    picture.save(path, "GIF", save_all=True, append_images=[picture.rotate(90)])


def _truncated(picture: Image.Image, path: Path) -> None:
    picture.save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-400])


def _bomb(_: Image.Image, path: Path) -> None:
    """A PNG of a few kilobytes that says it is 30,000 x 30,000."""
    side = 30_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    line = zlib.compress(b"\0" * 4096)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", line) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def _bytes(content: bytes) -> Callable[[Image.Image, Path], None]:
    return lambda _, path: (path.write_bytes(content), None)[1]


def _as(mode: str, kind: str) -> Callable[[Image.Image, Path], None]:
    return lambda picture, path: picture.convert(mode).save(path, kind)


_PICTURES: dict[str, Callable[[Image.Image, Path], None]] = {
    "good webp.jpg": _as("RGB", "WEBP"),
    "good jpeg.webp": _as("RGB", "JPEG"),
    "good alpha.jpg": _as("RGBA", "PNG"),
    "good.JPG": _as("RGB", "JPEG"),
    "good.jfif": _as("RGB", "JPEG"),
    "good cmyk.jpeg": _as("CMYK", "JPEG"),
    "good palette.png": _as("P", "PNG"),
    "good grey alpha.png": _as("LA", "PNG"),
    "good lab.tif": _lab,
    "good 16 bit.png": _deep,
    "good turned.jpg": _with_exif,
    "good animated.gif": _animated,
    "good [brackets] (1).jpg": _as("RGB", "JPEG"),
    "good قرمه‌سبزی.jpg": _as("RGB", "JPEG"),
    "good 麻婆豆腐.jpg": _as("RGB", "JPEG"),
    "good phở bò.jpg": _as("RGB", "JPEG"),
    "good back\\slash.jpg": _as("RGB", "JPEG"),
    "truncated.jpg": _truncated,
    "page.jpg": _bytes(b"<!DOCTYPE html><html><body>404</body></html>"),
    "pointer.jpg": _bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    "empty.jpg": _bytes(b""),
    "text.png": _bytes(b"this is no picture"),
    "dot.png": lambda _, path: Image.new("RGB", (1, 1)).save(path, "PNG"),
    "bomb.png": _bomb,
}


def _some(out: Path) -> list[Path]:
    """Good pictures of the sample, in order."""
    return sorted(path for path in out.rglob("*") if path.suffix == ".jpg")


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _turned_copy(source: Path, target: Path) -> None:
    Image.open(source).rotate(90, expand=True).save(target, quality=88)


def _link_out(path: Path) -> None:
    """A link that leads out of the folder."""
    path.symlink_to(Path("/etc/hostname"))


def _recipes(out: Path) -> tuple[int, int]:
    some = _some(out)
    names = write_ugly_pictures(out / "images", some[0])
    _copy(some[1], out / "images/zz copy.jpg")
    _turned_copy(some[2], out / "images/zz turned.jpg")
    _link_out(out / "images/zz link.jpg")
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
        "backslashes": [some[3].relative_to(out).as_posix().replace("/", "\\")],
        "listed": str([some[4].relative_to(out).as_posix()]),
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


def _class_folders(out: Path) -> tuple[int, int]:
    some = _some(out)
    folder = some[0].parent
    names = write_ugly_pictures(folder, some[0])
    other = sorted(path for path in out.iterdir() if path.is_dir())[-1]
    _copy(some[0], other / "zz copy of another class.jpg")
    _turned_copy(some[1], folder / "zz turned.jpg")
    Image.new("L", (64, 64)).save(folder / f"{some[1].stem}_mask.png")
    _link_out(folder / "zz link.jpg")
    (folder / "Thumbs.db").write_bytes(b"\0")
    (folder / "notes.txt").write_text("taken in June")
    _copy(some[2], out / "loose.jpg")
    lonely = out / "Fern___Only_one"
    lonely.mkdir()
    Image.open(some[3]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(17).save(lonely / "1.jpg")
    nested = out / "rice" / "blast" / "orig"
    nested.mkdir(parents=True)
    for number, path in enumerate(some[4:8]):
        Image.open(path).rotate(31 + 9 * number).save(nested / f"{number}.jpg")
    return len(names) + 9, 0


def _table(out: Path) -> tuple[int, int]:
    some = _some(out)
    names = write_ugly_pictures(out / "images", some[0])
    _copy(some[0], out / "images/zz copy.jpg")
    rows = [f'"images/{name}",acne,,,' for name in names]
    rows += [
        'images/zz copy.jpg,vitiligo,"a copy under another condition",,',
        f"{some[1].stem},melanoma,named without suffix and folder,,",
        f"{some[2].relative_to(out).as_posix()},\"['acne', 'psoriasis']\",a list of two,,",
        f'{some[3].relative_to(out).as_posix()},acne,"two lines\nin one ""cell""",,',
        f"{some[4].relative_to(out).as_posix()},#NAME?,#NAME?,,",
        "../../etc/hostname.jpg,acne,leads out,,",
        "/etc/hostname.jpg,acne,leads out,,",
        "images/never was.jpg,acne,gone,,",
        ",acne,no picture,,",
        "images/good.JPG,acne",
    ]
    table = out / "labels.csv"
    text = table.read_text(encoding="utf-8")
    table.write_bytes("\ufeff".encode() + text.encode() + "\r\n".join(rows).encode() + b"\n")
    Image.new("L", (64, 64)).save(out / "images" / f"{some[1].stem}_segmentation.png")
    return len(names) + 2, len(rows)


def _json_folders(out: Path) -> tuple[int, int]:
    some = _some(out)
    folder = out / "zz odd"
    names = write_ugly_pictures(folder, some[0])
    said = {"title": "آش", "response": "آش رشته با کشک و نعناداغ در کاسه‌ی بزرگ.", "folder_path": "zz odd"}
    (folder / "info.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
    rows = {
        "zz out": '{"response": "بیرون", "image_path": "../../etc/hostname.jpg"}',
        "zz broken": '{"response": "ناتمام',
        "zz silent": '{"title": "بی‌متن", "folder_path": "."}',
        "zz alone": json.dumps({"response": "غذایی بی‌عکس"}, ensure_ascii=False),
        "zz again": json.dumps({**said, "response": said["response"].replace("ک", "ك"), "folder_path": "."}),
    }
    for name, text in rows.items():
        (out / name).mkdir()
        (out / name / "info.json").write_text(text, encoding="utf-8")
    for name in ("zz out", "zz silent", "zz again"):
        Image.open(some[5]).rotate(40 + len(name)).save(out / name / "1.jpg")
    return len(names) + 3, len(rows) + 1


def _coco(out: Path) -> tuple[int, int]:
    path = out / "annotations/captions_train2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    some = _some(out / "images/train2017")
    names = write_ugly_pictures(out / "images/train2017", some[0])
    _copy(some[0], out / "images/val2017/zz copy of train.jpg")
    _copy(some[1], out / "images/train2017/zz nobody names this.jpg")
    files = [*names, "never was.jpg", "../../../etc/hostname.jpg"]
    for number, name in enumerate(files, start=10**9):
        content["images"].append({"id": number, "file_name": name})
        content["annotations"].append({"id": number, "image_id": number, "caption": f"ugly thing number {number}"})
    content["images"].append({"id": 2 * 10**9, "file_name": some[2].name.replace("0", "0")})
    content["images"].append({"id": 3 * 10**9, "file_name": "good.JPG"})
    content["annotations"].append({"id": 3 * 10**9, "image_id": 4 * 10**9, "caption": "of a picture not listed"})
    path.write_text(json.dumps(content), encoding="utf-8")
    val = out / "annotations/captions_val2017.json"
    content = json.loads(val.read_text(encoding="utf-8"))
    content["images"].append({"id": 5 * 10**9, "file_name": "zz copy of train.jpg"})
    content["annotations"].append({"id": 5 * 10**9, "image_id": 5 * 10**9, "caption": "A copy of a training picture"})
    val.write_text(json.dumps(content), encoding="utf-8")
    return len(names) + 2, len(files) + 4


_ADDERS: dict[str, Callable[[Path], tuple[int, int]]] = {
    "recipes": _recipes,
    "agriculture": _class_folders,
    "dermatology": _table,
    "persian-food": _json_folders,
    "coco": _coco,
}
