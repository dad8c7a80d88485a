"""Entries -> unit rows: what an older index has is taken from it, the rest is embedded, and kept on the way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from vlkit import console
from vlkit.config.search import IndexConfig
from vlkit.data.loading.retrieval_batches import InputStore, PixelStore, TokenStore
from vlkit.data.splits import hash_order
from vlkit.distributed import SINGLE
from vlkit.inference.index.documents import MODALITIES, Modality, DocumentSource
from vlkit.inference.index.index_folder import Index
from vlkit.inference.index.query_encoder import QueryEncoder
from vlkit.models.cache.feature_cache import Kept, text_keys
from vlkit.models.encode import encode_captions, encode_images

# Of fewer rows none can be spared for a query.
FEW = 100


@dataclass(frozen=True)
class Part:
    """One kind of what is indexed.

    Attributes:
        rows: float32 unit rows, in the order of `print_table`.
        embedded: how many of them were not in the index that is updated.
    """

    kind: Modality
    table: pa.Table
    rows: np.ndarray
    embedded: int

    def with_last(self, places: np.ndarray) -> Part:
        """The same, these rows coming last."""
        kept = np.setdiff1d(np.arange(len(self.rows)), places)
        order = np.concatenate([kept, places])
        return replace(self, table=self.table.take(order), rows=self.rows[order])


def embedded(
    embedder: QueryEncoder, config: IndexConfig, source: DocumentSource, kind: Modality, table: pa.Table, before: Index | None
) -> Part:
    """The rows of one kind; of those that an older index has, its own."""
    known = before.embeddings(kind) if before else {}
    keys = table.column("key").to_pylist()
    missing = [place for place, key in enumerate(keys) if key not in known]
    rows = np.zeros((len(keys), embedder.encoder.width), np.float32)
    if missing:
        rows[missing] = _encoded(embedder, config, source, kind, table, missing)
    for place, key in enumerate(keys):
        if key in known:
            rows[place] = known[key]
    if before is not None:
        gone = len(known.keys() - set(keys))
        console.say(f"{kind}: {len(missing)} new or changed, {len(keys) - len(missing)} as they were, {gone} gone")
    return Part(kind, table, rows, len(missing))


def _encoded(
    embedder: QueryEncoder, config: IndexConfig, source: DocumentSource, kind: Modality, table: pa.Table, places: list[int]
) -> np.ndarray:
    """Embed the entries at `places`; what is done is kept, so that an interrupted index goes on."""
    encoder = embedder.encoder
    how: dict[str, Any] = {"batch_size": config.batch_size, "precision": embedder.precision}
    if kind == "texts":
        tokens, cut = encoder.tokenize([table.column("text")[place].as_py() for place in places])
        if cut:
            told = f"{cut} of {len(places)} texts are longer than the {encoder.text_limit} tokens that the model reads"
            console.warn(f"{told}: what comes after is not found")
        captions = TokenStore(tokens, encoder.pad)
        kept: InputStore = captions
        if config.cache != "off":
            longest = max(map(len, tokens))
            kept = Kept(encoder, embedder.precision, longest, config.cache, SINGLE)("texts", captions, text_keys(tokens))
        return encode_captions(encoder, kept, **how).float().cpu().numpy()
    assert source.pairs is not None
    chosen = source.pairs.unique_images().iloc[places]
    pixels = PixelStore(source.pairs.image_paths(chosen), encoder.pixel_spec)
    pictures: InputStore = pixels
    if config.cache != "off":
        keys = [str(table.column("key")[place]) for place in places]
        pictures = Kept(encoder, embedder.precision, 0, config.cache, SINGLE)("pictures", pixels, keys)
    return encode_images(encoder, pictures, **how).float().cpu().numpy()


@dataclass(frozen=True)
class Queries:
    """What an index is measured by: texts and pictures that nothing was trained on, mixed.

    Attributes:
        rows: float32 unit rows [queries, width].
        own: int64 [queries], the place in the index of a query that is in it itself; -1 of the others.
        last: so many of the index' rows, the last ones, are queries, and must not be in it while it is tuned: a graph
            finds its own rows far more easily than what it never saw.
    """

    rows: np.ndarray
    own: np.ndarray
    last: int


def held_out_queries(
    part: Part, approximate: bool, config: IndexConfig, source: DocumentSource, parts: list[Part]
) -> tuple[Part, Queries]:
    """Draw queries of either kind by the seed; for an approximate index, those of its own come last in it."""
    held = dict(zip(MODALITIES, source.held_out(), strict=True))
    others = [each for each in parts if each.kind != part.kind]
    share = config.queries // (1 + len(others))
    approximate = approximate and len(part.rows) >= FEW
    most = len(part.rows) // 10 if approximate else share
    chosen = _drawn(part, held[part.kind], min(share, most), config.seed)
    if approximate:
        part, chosen = part.with_last(chosen), np.full(len(chosen), -1)
        own = part.rows[len(part.rows) - len(chosen) :]
    else:
        own = part.rows[chosen]
    foreign = [each.rows[_drawn(each, held[each.kind], share, config.seed)] for each in others]
    rows = np.concatenate([own, *foreign])
    places = np.concatenate([chosen, *(np.full(len(each), -1) for each in foreign)])
    order = np.random.default_rng(config.seed).permutation(len(rows))
    return part, Queries(rows[order], places[order], len(chosen) if approximate else 0)


def _drawn(part: Part, held: set[str], count: int, seed: int) -> np.ndarray:
    """Places of some entries, of those that were held out where there are any."""
    ids = part.table.column("id").to_pylist()
    known = [place for place, key in enumerate(ids) if key in held] or range(len(ids))
    return np.array(sorted(known, key=lambda place: hash_order(seed, ids[place]))[:count], np.int64)
