"""Copies and lookalikes are found and clustered; images are read once, on all cores, with the same result."""

import os
import time
from pathlib import Path

import imagehash
import numpy as np
import pytest
from helpers import write_class_folders, write_patterned_image
from PIL import Image, ImageEnhance

from vlkit.config.data import PrepConfig
from vlkit.data.images import phash
from vlkit.data.images.decode import ImageInfo, verify_image
from vlkit.data.prep import verify_images
from vlkit.data.prep.source_folder import SourceFolder
from vlkit.storage import Location

COPIES = {
    "jpeg": lambda p: p,
    "half": lambda p: p.resize((p.width // 2, p.height // 2)),
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.15),
    "turned": lambda p: p.transpose(Image.Transpose.ROTATE_90),
    "upside down": lambda p: p.transpose(Image.Transpose.ROTATE_180),
    "mirrored": lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_look_alike_and_others_do_not(name, tmp_path):
    paths = [write_patterned_image(tmp_path / f"{seed}.png", seed, size=(160, 120)) for seed in range(12)]
    COPIES[name](Image.open(paths[5])).save(tmp_path / "copy.jpg", quality=70)
    looks = [verify_image(path).perceptual_hash for path in [*paths, tmp_path / "copy.jpg"]]
    actual = phash.cluster_lookalikes(looks, PrepConfig.near_duplicates).tolist()
    assert actual == [*range(12), 5]


@pytest.mark.parametrize("bits", [8, 20, 28, 64])
def test_clusters_are_what_hangs_together_within_the_distance(bits, tmp_path):
    """Against a loop over imagehash's own distance and all 8 ways to turn, in a crowd with many near misses."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(14):
        base = write_patterned_image(tmp_path / f"{number}.png", number % 5, size=(64, 64))
        noisy = np.asarray(Image.open(base)).astype(int) + rng.integers(-90, 90, (64, 64, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).rotate(90 * (number % 4)).save(base)
        paths.append(base)

    def hashes(path):
        grey = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BOX).convert("L")
        return [imagehash.phash(item, hash_size=16) for item in (grey, *(grey.transpose(t) for t in Image.Transpose))]

    hashed = [hashes(path) for path in paths]
    near = {(i, j) for i in range(14) for j in range(14) if min(one - hashed[j][0] for one in hashed[i]) <= bits}
    expected = []
    for start in range(14):
        reached, frontier = {start}, {start}
        while frontier := {j for i in frontier for j in range(14) if (i, j) in near or (j, i) in near} - reached:
            reached |= frontier
        expected.append(min(reached))
    looks = [verify_image(path).perceptual_hash for path in paths]
    assert phash.cluster_lookalikes(looks, bits).tolist() == expected
    assert 5 <= len(set(expected)) <= 14
    assert phash.first_lookalike(looks[:1], looks[1:], 256) == (0, 0)


def test_thousands_of_lookalikes_cost_little(tmp_path):
    looks = verify_image(write_patterned_image(tmp_path / "a.png", 1)).perceptual_hash
    nearly = [looks[:3] + bytes([n % 256 & 3, n >> 8 & 3]) + looks[5:] for n in range(6000)]
    assert set(phash.cluster_lookalikes([*nearly, b"", b""], 28).tolist()) == {0, 6000, 6001}


def test_colour_and_detail_decide_too(tmp_path):
    grey = np.asarray(Image.open(write_patterned_image(tmp_path / "a.png", 1)).convert("L")).astype(float)
    for name, tint in (("warm", (1.0, 0.7, 0.4)), ("cold", (0.4, 0.7, 1.0))):
        Image.fromarray((grey[:, :, None] * tint).astype(np.uint8)).save(tmp_path / f"{name}.png")
    looks = [verify_image(tmp_path / f"{name}.png").perceptual_hash for name in ("warm", "cold")]
    assert phash.cluster_lookalikes(looks, 31).tolist() == [0, 1]
    for shade in (250, 252):
        Image.new("RGB", (50, 50), (shade,) * 3).save(tmp_path / f"{shade}.png")
    blank = [verify_image(tmp_path / f"{shade}.png").perceptual_hash for shade in (250, 252)]
    assert blank == [b"", b""] and phash.cluster_lookalikes(blank, 31).tolist() == [0, 1]


def test_processes_find_what_one_finds(tmp_path):
    raw = write_class_folders(tmp_path / "raw", per_class=30)
    (raw / "broken.png").write_bytes(b"no")
    source = SourceFolder(Location(raw))
    one = verify_images.verify_images(source, list(source.files), workers=1, rehash=True).results
    assert len(one) == 151
    assert verify_images.verify_images(source, list(source.files), workers=2, rehash=True).results == one


def test_the_cache_knows_a_picture_by_size_and_by_time(tmp_path):
    """Equal size at another time, and equal time with another size, are read again; nothing else is."""
    path = tmp_path / "raw/a.bin.png"
    write_patterned_image(path, 1)
    content = path.read_bytes()

    def read(size, mtime):
        path.write_bytes(content + b" " * size)
        os.utime(path, ns=(mtime, mtime))
        source = SourceFolder(Location(tmp_path / "raw"))
        return verify_images.verify_images(source, list(source.files)).images_read

    assert [read(0, 10**18), read(0, 10**18), read(0, 11 * 10**17), read(5, 11 * 10**17), read(5, 11 * 10**17)] == [
        1,
        0,
        1,
        1,
        0,
    ]


def test_a_picture_written_this_moment_is_not_remembered(tmp_path):
    """It may be written again before its time moves on."""
    write_patterned_image(tmp_path / "raw/a.png", 1)
    now = time.time_ns() + 10**10
    os.utime(tmp_path / "raw/a.png", ns=(now, now))
    source = SourceFolder(Location(tmp_path / "raw"))
    assert [verify_images.verify_images(source, ["a.png"]).images_read for _ in range(2)] == [1, 1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_closed_picture_is_tried_again(tmp_path):
    path = write_patterned_image(tmp_path / "raw/a.png", 1)
    source = SourceFolder(Location(tmp_path / "raw"))
    path.chmod(0)
    assert verify_images.verify_images(source, ["a.png"]).results["a.png"].temporary
    path.chmod(0o644)
    assert isinstance(verify_images.verify_images(source, ["a.png"]).results["a.png"], ImageInfo)


def test_what_could_not_be_read_is_not_remembered(tmp_path, monkeypatch):
    """The same without permissions: the first reading fails, the second does not."""
    write_patterned_image(tmp_path / "raw/a.png", 1)
    os.utime(tmp_path / "raw/a.png", ns=(10**18, 10**18))
    source = SourceFolder(Location(tmp_path / "raw"))
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert "Input/output error" in verify_images.verify_images(source, ["a.png"]).results["a.png"].reason
    assert isinstance(verify_images.verify_images(source, ["a.png"]).results["a.png"], ImageInfo)


def test_what_the_table_would_call_alike_is_one_cluster(tmp_path):
    """The table keeps one hash, from which a mirrored one follows nearly: prep must not write what reading refuses."""
    from vlkit.data.prep.collect import find_lookalikes

    rng = np.random.default_rng(0)
    colour, own = bytes([90, 90, 90]), rng.integers(0, 2, (16, 16), dtype=np.uint8)
    mirrored = own ^ (np.arange(16) % 2).astype(np.uint8)[None, :]
    far = [rng.integers(0, 256, 7 * phash.HASH_BYTES, dtype=np.uint8).tobytes() for _ in range(2)]
    looks = [colour + np.packbits(one).tobytes() + rest for one, rest in zip((own, mirrored), far, strict=True)]
    assert len(set(phash.cluster_lookalikes(looks, 28).tolist())) == 2
    assert phash.first_lookalike([phash.from_hex(phash.to_hex(looks[0]))], looks[1:], 28) == (0, 0)
    images = {name: ImageInfo(name, 9, 9, item) for name, item in zip("ab", looks, strict=True)}
    assert find_lookalikes(images, 28) == {"a": "a", "b": "a"}
