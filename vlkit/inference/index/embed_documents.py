"""Embed documents: reuse the embeddings of an older index, and keep finished ones for an interrupted command."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from vlkit import console
from vlkit.config.search import IndexConfig
from vlkit.data.loading.stores import InputStore, PixelStore, TokenStore
from vlkit.data.splits import hash_order
from vlkit.inference.index.documents import MODALITIES, DocumentSource
from vlkit.inference.index.index_folder import Index
from vlkit.inference.index.query_encoder import QueryEncoder
from vlkit.models.cache.feature_cache import FrozenImages, FrozenTexts, fill, text_keys
from vlkit.models.encode import encode_images, encode_text_inputs
from vlkit.models.stages import Modality

# An index of fewer rows can spare none of them as queries.
MIN_ROWS_TO_HOLD_OUT = 100


@dataclass(frozen=True)
class EmbeddedDocuments:
    """The documents of one modality with their embeddings.

    Attributes:
        rows: float32 unit rows [documents, width], in the order of the table.
        embedded: how many of them were not in the older index.
    """

    modality: Modality
    table: pa.Table
    rows: np.ndarray
    embedded: int

    def move_last(self, positions: np.ndarray) -> EmbeddedDocuments:
        """Return the same documents with those at `positions` last."""
        others = np.setdiff1d(np.arange(len(self.rows)), positions)
        order = np.concatenate([others, positions])
        return replace(self, table=self.table.take(order), rows=self.rows[order])


def embed_documents(
    query_encoder: QueryEncoder,
    config: IndexConfig,
    source: DocumentSource,
    modality: Modality,
    table: pa.Table,
    before: Index | None,
) -> EmbeddedDocuments:
    """Embed the documents of one modality, except those that an older index has."""
    known = before.embeddings(modality) if before else {}
    keys = table.column("key").to_pylist()
    missing = [position for position, key in enumerate(keys) if key not in known]
    rows = np.zeros((len(keys), query_encoder.encoder.width), np.float32)
    if missing:
        rows[missing] = _embed(query_encoder, config, source, modality, table, missing)
    for position, key in enumerate(keys):
        if key in known:
            rows[position] = known[key]
    if before is not None:
        gone = len(known.keys() - set(keys))
        console.say(f"{modality}: {len(missing)} new or changed, {len(keys) - len(missing)} unchanged, {gone} removed")
    return EmbeddedDocuments(modality, table, rows, len(missing))


def _embed(
    query_encoder: QueryEncoder,
    config: IndexConfig,
    source: DocumentSource,
    modality: Modality,
    table: pa.Table,
    positions: list[int],
) -> np.ndarray:
    """Embed the documents at `positions` through the feature cache, so that an interrupted command continues."""
    encoder, precision = query_encoder.encoder, query_encoder.precision
    if modality == "texts":
        tokens, cut = encoder.tokenize([table.column("text")[position].as_py() for position in positions])
        if cut:
            message = f"{cut} of {len(positions)} texts are longer than the {encoder.text_limit} tokens the model reads"
            console.warn(f"{message}: the rest of them is not searched")
        texts: InputStore = TokenStore(tokens, encoder.pad)
        if config.cache != "off":
            frozen_texts = FrozenTexts.from_encoder(encoder, precision, max(map(len, tokens)))
            texts = fill(frozen_texts, config.cache, texts, text_keys(tokens)) or texts
        rows = encode_text_inputs(encoder, texts, batch_size=config.batch_size, precision=precision)
    else:
        assert source.pairs is not None
        chosen = source.pairs.unique_images().iloc[positions]
        images: InputStore = PixelStore(source.pairs.image_paths(chosen), encoder.pixel_spec)
        if config.cache != "off":
            keys = [str(table.column("key")[position]) for position in positions]
            images = fill(FrozenImages.from_encoder(encoder, precision), config.cache, images, keys) or images
        rows = encode_images(encoder, images, batch_size=config.batch_size, precision=precision)
    return rows.float().cpu().numpy()


@dataclass(frozen=True)
class HeldOutQueries:
    """Queries that measure an index: texts and images outside the training split, mixed.

    Attributes:
        rows: float32 unit rows [queries, width].
        own: int64 [queries], position in the index of a query that is itself a document; -1 for others.
        last: how many of the last documents are queries and must stay out of the index while it is tuned: a graph
            finds its own rows far more easily than unseen ones.
    """

    rows: np.ndarray
    own: np.ndarray
    last: int


def draw_queries(
    documents: EmbeddedDocuments,
    approximate: bool,
    config: IndexConfig,
    source: DocumentSource,
    every: list[EmbeddedDocuments],
) -> tuple[EmbeddedDocuments, HeldOutQueries]:
    """Draw queries of both modalities by the seed; for an approximate index, its own ones become its last documents.

    Args:
        every: the documents of all modalities.
    """
    held_out = dict(zip(MODALITIES, source.held_out_ids(), strict=True))
    others = [other for other in every if other.modality != documents.modality]
    share = config.queries // (1 + len(others))
    approximate = approximate and len(documents.rows) >= MIN_ROWS_TO_HOLD_OUT
    most = len(documents.rows) // 10 if approximate else share
    chosen = _draw(documents, held_out[documents.modality], min(share, most), config.seed)
    if approximate:
        documents, chosen = documents.move_last(chosen), np.full(len(chosen), -1)
        own = documents.rows[len(documents.rows) - len(chosen) :]
    else:
        own = documents.rows[chosen]
    foreign = [other.rows[_draw(other, held_out[other.modality], share, config.seed)] for other in others]
    rows = np.concatenate([own, *foreign])
    positions = np.concatenate([chosen, *(np.full(len(part), -1) for part in foreign)])
    order = np.random.default_rng(config.seed).permutation(len(rows))
    return documents, HeldOutQueries(rows[order], positions[order], len(chosen) if approximate else 0)


def _draw(documents: EmbeddedDocuments, held_out: set[str], count: int, seed: int) -> np.ndarray:
    """Draw positions of documents: of held-out ones if any, else of all."""
    ids = documents.table.column("id").to_pylist()
    candidates = [position for position, key in enumerate(ids) if key in held_out] or range(len(ids))
    return np.array(sorted(candidates, key=lambda position: hash_order(seed, ids[position]))[:count], np.int64)
