"""Documents of an index: the texts of a docstore and the images of a prepared folder, one row each.

id        text_id, or image_id
kind      texts or images
text      the text; for an image, the first of its texts
path      of an image: absolute path, or URL
group     match groups: a list
class     class name, or null
metadata  the split, and further columns of the source, as JSON
key       identifies the embedding for --update: hash of the text, or hash, size and time of the file
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlkit import console
from vlkit.config.base import read_yaml
from vlkit.data import labels
from vlkit.data.captions import clean, text_id
from vlkit.data.pairs import PAIR_COLUMNS, Pairs, read_pairs
from vlkit.data.prep import tables
from vlkit.data.splits import hash_order
from vlkit.errors import DataError
from vlkit.models.cache.feature_cache import image_keys
from vlkit.models.stages import Modality
from vlkit.storage import Location, json_text

MODALITIES: tuple[Modality, ...] = ("texts", "images")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "kind")),
        # All rows together can exceed the 2 GB of a plain string column.
        *((name, pa.large_string()) for name in ("text", "path")),
        ("group", pa.list_(pa.string())),
        *((name, pa.large_string()) for name in ("class", "metadata", "key")),
    ]
)
# Columns of the pairs that do not describe a text or an image by itself.
NOT_METADATA = {*PAIR_COLUMNS, "image_looks", "weight", "source_pair_id", "group", "key", "path"} - {"split"}


@dataclass(frozen=True)
class DocumentSource:
    """A prepared folder or a table of texts, from which documents are read.

    Attributes:
        pairs: matching rows of a prepared folder, without those that augment wrote.
        texts: rows of a table of texts.
        fingerprint: hash of the content.
        script: script of the texts, from the settings of prep.
    """

    location: Location
    fingerprint: str
    script: str | None = None
    pairs: Pairs | None = None
    texts: Sequence[dict[str, Any]] = ()

    @classmethod
    def read(cls, location: Location, *, limit: int | None, seed: int) -> DocumentSource:
        """Read and validate a source.

        Args:
            limit: approximate number of rows, drawn by the seed.

        Raises:
            DataError: it is empty or damaged.
        """
        if not location.is_remote and location.path.is_file() and not _has_images(location.path):
            return cls._read_texts(location, limit, seed)
        pairs = read_pairs(location)
        originals = pairs.positives()
        originals = replace(
            originals, frame=originals.frame[originals.frame["origin"] != "augmented"].reset_index(drop=True)
        )
        if not len(originals):
            raise DataError(f"{location} has no rows to index", hint="see its rejects.csv, and run prep again")
        script = pairs.metadata.get("settings", {}).get("script")
        return cls(location, pairs.fingerprint, script, pairs=originals.subsample(limit, seed))

    @classmethod
    def _read_texts(cls, location: Location, limit: int | None, seed: int) -> DocumentSource:
        """Read a table of texts; a data.yaml beside it says which script they are in."""
        metadata = location.path.parent / "data.yaml"
        settings = read_yaml(metadata).get("settings") if metadata.is_file() else None
        script = settings.get("script") if isinstance(settings, dict) else None
        rows = _read_text_rows(location.path, persian=script == "persian")
        if not rows:
            raise DataError(f"{location} has no texts", hint="it needs one row per text, in a column named text")
        chosen = {row["text_id"] for row in sorted(rows, key=lambda row: hash_order(seed, row["text_id"]))[:limit]}
        rows = [row for row in rows if row["text_id"] in chosen]
        content = json_text([[row["text_id"], row["text"]] for row in rows])
        return cls(location, hashlib.sha256(content.encode()).hexdigest()[:20], script, texts=rows)

    def documents(self, modality: Modality) -> pa.Table:
        """Return all documents of one modality, each once.

        Raises:
            DataError: images of a table of texts.
        """
        if self.pairs is not None:
            return _text_documents(self.pairs) if modality == "texts" else _image_documents(self.pairs)
        if modality == "images":
            raise DataError(f"{self.location} is a table of texts: it has no images", hint="--of texts")
        return _to_table("texts", ({**row, "key": text_key(row["text"])} for row in self.texts))

    def sample_texts(self, count: int = 200) -> list[str]:
        """Return the first `count` texts."""
        texts = self.pairs.frame["text"] if self.pairs is not None else [row["text"] for row in self.texts]
        return list(texts[:count])

    def held_out_ids(self) -> tuple[set[str], set[str]]:
        """Return ids of texts and of images outside the training split: those of test, else of val, else all."""
        if self.pairs is None:
            return {str(row["text_id"]) for row in self.texts}, set()
        frame = self.pairs.frame
        rows = next((part for name in ("test", "val") if len(part := frame[frame["split"] == name])), frame)
        return set(rows["text_id"]), set(rows["image_id"])


def text_key(text: str) -> str:
    """Return the key of a text's embedding: 24 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _has_images(path: Path) -> bool:
    """Return whether a table has an image column."""
    if path.suffix == ".parquet":
        try:
            return "image" in pq.read_schema(path).names
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    first = next((record for _, record in tables.read_records(path) if isinstance(record, dict)), {})
    return "image" in first


def _read_text_rows(path: Path, *, persian: bool) -> list[dict[str, Any]]:
    """Read the rows of a docstore.parquet, or of a table written by hand: each text once.

    Raises:
        DataError: a row that cannot be read or has no text column; names it.
    """
    rows: dict[str, dict[str, Any]] = {}
    empty = conflicting = 0
    for where, record in tables.read_records(path):
        if isinstance(record, tables.BadLine):
            raise DataError(f"{where}: {record.reason}")
        if "text" not in record:
            raise DataError(f"{where}: there is no column 'text'", hint=f"it has {', '.join(map(str, record))}")
        if not isinstance(record["text"], str | None):
            raise DataError(f"{where}: {record['text']!r} is not a text")
        text = clean(record["text"], persian=persian)
        key = str(record.get("text_id") or record.get("id") or text_id(text))
        empty += not text
        conflicting += key in rows and rows[key]["text"] != text
        if not text or key in rows:
            continue
        group = record.get("text_group")
        group = [key] if group is None else group if isinstance(group, list) else tables.cell_values(group)
        rows[key] = {**record, "text": text, "text_id": key, "group": group}
    if empty:
        console.warn(f"{path}: {empty} rows have no text and are left out")
    if conflicting:
        message = f"{path}: {conflicting} rows have the text_id of an earlier row but another text"
        console.warn(f"{message}: they are left out")
    return list(rows.values())


def _text_documents(pairs: Pairs) -> pa.Table:
    groups = _collect_groups(pairs.frame, "text_id", "text_group")
    rows = pairs.unique_texts().to_dict("records")
    return _to_table("texts", ({**row, "group": groups[row["text_id"]], "key": text_key(row["text"])} for row in rows))


def _image_documents(pairs: Pairs) -> pa.Table:
    images = pairs.unique_images()
    groups = _collect_groups(pairs.frame, "image_id", "image_group")
    keys = image_keys(pairs.image_paths(images), list(images["image_id"]))
    paths = [str(location.absolute) for location in pairs.image_locations(images)]
    rows = zip(images.to_dict("records"), paths, keys, strict=True)
    return _to_table(
        "images", ({**row, "path": path, "key": key, "group": groups[row["image_id"]]} for row, path, key in rows)
    )


def _collect_groups(frame: pd.DataFrame, key: str, column: str) -> dict[str, list[str]]:
    """Return the sorted groups of every text or image: a pair may add further ones."""
    groups: dict[str, set[str]] = defaultdict(set)
    for item, group in zip(frame[key], frame[column], strict=True):
        groups[item] |= labels.as_set(group)
    return {item: sorted(names) for item, names in groups.items()}


def _to_table(modality: Modality, rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Return rows as a table of `SCHEMA`; columns that it has no place for go into metadata."""
    id_column = "text_id" if modality == "texts" else "image_id"
    dropped = NOT_METADATA | ({"image_key", "width", "height"} if modality == "texts" else set())
    documents = []
    for row in rows:
        metadata = {name: value for name, value in row.items() if name not in dropped and _has_value(value)}
        documents.append(
            {
                "id": row[id_column],
                "kind": modality,
                "text": row["text"],
                "path": row.get("path"),
                "group": list(map(str, row["group"])),
                "class": str(row["class_name"]) if _has_value(row.get("class_name")) else None,
                "metadata": json_text(metadata),
                "key": row["key"],
            }
        )
    return pa.Table.from_pylist(documents, schema=SCHEMA)


def _has_value(value: Any) -> bool:
    """Return False for None, NaN and the empty string, which tables have in empty cells."""
    is_list = isinstance(value, list | tuple) or hasattr(value, "tolist")
    return is_list or not (value is None or value != value or value == "")
