"""How alike two pictures look: perceptual hashes, compared up to scale, compression, light, and rotation or mirroring.

The hash is imagehash's pHash of 256 bits (signs of the low frequencies of a 64 x 64 thumbnail). Measured on 136 photos
of dishes: the nearest different photos are 86 bits apart; a copy at half size, at JPEG quality 40 or brighter by a
fifth is at most 28, nine in ten at most 8. A pHash knows no colour, so the mean colours must agree too, and a picture
of next to no detail (a blank page) has no hash that means anything: only its bytes are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SIDE, HASH_BYTES = 64, 32
BITS = 8 * HASH_BYTES
COLOUR_APART = 48
LEAST_DETAIL = 3.0
BLOCK = 1024


def perceptual_hash(picture: Image.Image) -> bytes:
    """Mean colour (3 bytes) and the hashes of the 8 ways to turn and mirror it (32 bytes each, as it is first).

    Empty where the thumbnail's standard deviation is below `LEAST_DETAIL` of 255.
    """
    import imagehash
    from PIL import Image

    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    grey = small.convert("L")
    if np.asarray(grey).std() < LEAST_DETAIL:
        return b""
    turned = [grey, *(grey.transpose(way) for way in Image.Transpose)]
    hashes = [np.packbits(imagehash.phash(each, hash_size=16).hash.ravel()).tobytes() for each in turned]
    return bytes(np.asarray(small).mean((0, 1)).round().astype(np.uint8)) + b"".join(hashes)


def cluster_lookalikes(looks_of: Sequence[bytes], bits: int) -> np.ndarray:
    """Which pictures hang together by looking alike: hashes at most `bits` apart in one of the 8 ways, colours close.

    Args:
        looks_of: of each picture what `perceptual_hash` gave.

    Returns:
        int64 [pictures]: equal numbers for pictures of one cluster. A picture without looks is alone.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[bytes, int] = {}
    own = [first.setdefault(each, place) if each else place for place, each in enumerate(looks_of)]
    distinct = sorted(first.values())
    found = np.arange(len(distinct))
    for one, other in _blocks([looks_of[place] for place in distinct], [looks_of[place] for place in distinct], bits):
        edges = coo_array((np.ones(len(one), np.int8), (found[one], found[other])), shape=(len(found),) * 2)
        found = connected_components(edges, directed=False)[1][found]
    # Clusters of distinct looks, then every picture that has exactly these looks; blank ones stay by themselves.
    cluster = np.arange(len(looks_of), dtype=np.int64)
    least = {label: place for place, label in reversed(list(zip(distinct, found.tolist(), strict=True)))}
    of_distinct = {place: least[label] for place, label in zip(distinct, found.tolist(), strict=True)}
    for place, each in enumerate(own):
        cluster[place] = of_distinct.get(each, place)
    return cluster


def first_lookalike(looks_of: Sequence[bytes], among: Sequence[bytes], bits: int) -> tuple[int, int] | None:
    """The first picture that looks like one of the others, and that other; None where none does."""
    for one, other in _blocks(looks_of, among, bits):
        if len(one):
            return int(one[0]), int(other[0])
    return None


def _blocks(looks_of: Sequence[bytes], among: Sequence[bytes], bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of pictures that look alike, in both sequences, a block of the first at a time."""
    import faiss

    here, there = (np.flatnonzero([len(each) > 0 for each in group]) for group in (looks_of, among))
    if not len(here) or not len(there):
        return
    queries = np.frombuffer(b"".join(looks_of[i] for i in here), np.uint8).reshape(len(here), -1)
    stored = np.frombuffer(b"".join(among[i] for i in there), np.uint8).reshape(len(there), -1)
    index = faiss.IndexBinaryFlat(BITS)
    index.add(np.ascontiguousarray(stored[:, 3 : 3 + HASH_BYTES]))
    for start in range(0, len(here), BLOCK):
        block = queries[start : start + BLOCK]
        for turn in range((queries.shape[1] - 3) // HASH_BYTES):
            hashes = np.ascontiguousarray(block[:, 3 + turn * HASH_BYTES : 3 + (turn + 1) * HASH_BYTES])
            limits, _, hits = index.range_search(hashes, bits + 1)
            rows = np.repeat(np.arange(len(block)), np.diff(limits.astype(np.int64)))
            close = np.abs(block[rows, :3].astype(np.int16) - stored[hits, :3]).max(1) <= COLOUR_APART
            yield here[start + rows[close]], there[hits[close]]


def to_hex(looks_of: bytes) -> str:
    """What the pairs table keeps of a picture's looks: colour and unturned hash, as hexadecimal digits."""
    return looks_of[: 3 + HASH_BYTES].hex()


def from_hex(text: object) -> bytes:
    """Looks again from what the table kept.

    A mirrored picture's hash is this one with every second bit the other way, a transposed one's is this one
    transposed; the first only nearly (6 bits off, as a rule), because the hash's threshold is a median.
    """
    if not isinstance(text, str) or not text:
        return b""
    looks_of = bytes.fromhex(text)
    unturned = np.unpackbits(np.frombuffer(looks_of[3:], np.uint8)).reshape(16, 16)
    odd = np.arange(16) % 2
    turned = [
        one ^ (odd * across)[None, :] ^ (odd * down)[:, None]
        for one in (unturned, unturned.T)
        for across in (0, 1)
        for down in (0, 1)
    ]
    return looks_of[:3] + b"".join(np.packbits(each).tobytes() for each in turned)
