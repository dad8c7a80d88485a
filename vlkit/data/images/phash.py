"""Perceptual hashes: how alike two images look, regardless of scale, compression, light, rotation and mirroring.

The hash is imagehash's pHash of 256 bits (signs of the low frequencies of a 64 x 64 thumbnail). Measured on 136 photos
of dishes: the nearest different photos are 86 bits apart; a copy at half size, at JPEG quality 40 or brighter by a
fifth is at most 28, nine in ten at most 8. A pHash knows no colour, so the mean colours must agree too. An image of
next to no detail (a blank page) has no meaningful hash: only its bytes are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_SIDE = 64
COLOUR_BYTES, HASH_BYTES = 3, 32
HASH_BITS = 8 * HASH_BYTES
MAX_COLOUR_DISTANCE = 48
MIN_DETAIL = 3.0
BLOCK_ROWS = 1024


def perceptual_hash(image: Image.Image) -> bytes:
    """Return the mean colour (3 bytes) and the hashes of the 8 rotations and mirrorings (32 bytes each, upright first).

    Empty where the thumbnail's standard deviation is below `MIN_DETAIL` of 255.
    """
    import imagehash
    from PIL import Image

    thumbnail = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    grey = thumbnail.convert("L")
    if np.asarray(grey).std() < MIN_DETAIL:
        return b""
    orientations = [grey, *(grey.transpose(method) for method in Image.Transpose)]
    hashes = [np.packbits(imagehash.phash(grey, hash_size=16).hash.ravel()).tobytes() for grey in orientations]
    return bytes(np.asarray(thumbnail).mean((0, 1)).round().astype(np.uint8)) + b"".join(hashes)


def cluster_lookalikes(hashes: Sequence[bytes], bits: int) -> np.ndarray:
    """Cluster images that look alike: hashes at most `bits` apart in one of the 8 orientations, and similar colours.

    Args:
        hashes: the `perceptual_hash` of each image.

    Returns:
        int64 [images]: equal numbers for the images of a cluster. An image with an empty hash is alone.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first: dict[bytes, int] = {}
    representative = [first.setdefault(item, position) if item else position for position, item in enumerate(hashes)]
    distinct = sorted(first.values())
    labels = np.arange(len(distinct))
    distinct_hashes = [hashes[position] for position in distinct]
    for one, other in _lookalike_blocks(distinct_hashes, distinct_hashes, bits):
        edges = coo_array((np.ones(len(one), np.int8), (labels[one], labels[other])), shape=(len(labels),) * 2)
        labels = connected_components(edges, directed=False)[1][labels]
    # Clusters of distinct hashes, then every image that has exactly one of these; blank ones stay alone.
    clusters = np.arange(len(hashes), dtype=np.int64)
    first_of_label = {
        label: position for position, label in reversed(list(zip(distinct, labels.tolist(), strict=True)))
    }
    cluster_of = {position: first_of_label[label] for position, label in zip(distinct, labels.tolist(), strict=True)}
    for position, same in enumerate(representative):
        clusters[position] = cluster_of.get(same, position)
    return clusters


def first_lookalike(hashes: Sequence[bytes], others: Sequence[bytes], bits: int) -> tuple[int, int] | None:
    """Return the position of the first image that looks like one of the others, and the other's; None if none does."""
    for one, other in _lookalike_blocks(hashes, others, bits):
        if len(one):
            return int(one[0]), int(other[0])
    return None


def _lookalike_blocks(
    hashes: Sequence[bytes], others: Sequence[bytes], bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions of images that look alike, in both sequences, for a block of `hashes` at a time."""
    import faiss

    own, theirs = (np.flatnonzero([len(item) > 0 for item in items]) for items in (hashes, others))
    if not len(own) or not len(theirs):
        return
    queries = np.frombuffer(b"".join(hashes[i] for i in own.tolist()), np.uint8).reshape(len(own), -1)
    stored = np.frombuffer(b"".join(others[i] for i in theirs.tolist()), np.uint8).reshape(len(theirs), -1)
    index = faiss.IndexBinaryFlat(HASH_BITS)
    index.add(np.ascontiguousarray(stored[:, COLOUR_BYTES : COLOUR_BYTES + HASH_BYTES]))
    for start in range(0, len(own), BLOCK_ROWS):
        block = queries[start : start + BLOCK_ROWS]
        for offset in range(COLOUR_BYTES, queries.shape[1] - HASH_BYTES + 1, HASH_BYTES):
            orientation = np.ascontiguousarray(block[:, offset : offset + HASH_BYTES])
            limits, _, hits = index.range_search(orientation, bits + 1)
            counts = np.diff(limits.astype(np.int64)).astype(np.int64)
            rows = np.repeat(np.arange(len(block)), counts)
            distances = np.abs(block[rows, :COLOUR_BYTES].astype(np.int16) - stored[hits, :COLOUR_BYTES]).max(1)
            similar = distances <= MAX_COLOUR_DISTANCE
            yield own[start + rows[similar]], theirs[hits[similar]]


def to_hex(image_hash: bytes) -> str:
    """Return the part of a hash that the pairs table stores: colour and upright hash, as hexadecimal digits."""
    return image_hash[: COLOUR_BYTES + HASH_BYTES].hex()


def from_hex(text: object) -> bytes:
    """Restore a whole hash from the part that the table stores.

    In a mirrored image's hash every second bit is flipped, and a transposed one's is transposed; the first is off by
    6 bits as a rule, because the hash's threshold is a median.
    """
    if not isinstance(text, str) or not text:
        return b""
    image_hash = bytes.fromhex(text)
    upright = np.unpackbits(np.frombuffer(image_hash[COLOUR_BYTES:], np.uint8)).reshape(16, 16)
    odd = np.arange(16) % 2
    orientations = [
        bits ^ (odd * across)[None, :] ^ (odd * down)[:, None]
        for bits in (upright, upright.T)
        for across in (0, 1)
        for down in (0, 1)
    ]
    return image_hash[:COLOUR_BYTES] + b"".join(np.packbits(bits).tobytes() for bits in orientations)
