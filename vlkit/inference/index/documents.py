"""What an index finds: the texts of a docstore and the pictures of a prepared folder, one row each.

id        text_id, or image_id
kind      texts or images
text      the text; of a picture the first of its texts
path      of a picture: absolute, or a URL
group     what it is a match of: a list
class     its class, or null
metadata  the split, and the source's further columns, as JSON
key       what its embedding is known by, for --update: a hash of the text, or the hash, size and time of the file
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from vlkit.storage import Location, json_text

Modality = Literal["texts", "images"]
MODALITIES: tuple[Modality, ...] = ("texts", "images")
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "kind")),
        # Of all rows together they may be more than 2 GB.
        *((name, pa.large_string()) for name in ("text", "path")),
        ("group", pa.list_(pa.string())),
        *((name, pa.large_string()) for name in ("class", "metadata", "key")),
    ]
)
# Columns of the pairs that say nothing about a text or a picture by itself.
LEFT_OUT = {*PAIR_COLUMNS, "image_looks", "weight", "source_pair_id", "group", "key", "path"} - {"split"}


@dataclass(frozen=True)
class DocumentSource:
    """Where entries come from: a prepared folder, or a table of texts.

    Attributes:
        pairs: matching rows, without those that augment wrote.
        texts: of a table: its rows.
        fingerprint: of the content.
        script: of the texts, as prep was told.
    """

    location: Location
    fingerprint: str
    script: str | None = None
    pairs: Pairs | None = None
    texts: Sequence[dict[str, Any]] = ()

    @classmethod
    def read(cls, location: Location, *, limit: int | None, seed: int) -> DocumentSource:
        """Read and validate it.

        Args:
            limit: about this many rows, drawn by the seed.

        Raises:
            DataError: there is nothing, or it is damaged.
        """
        if not location.is_remote and location.path.is_file() and not _has_pictures(location.path):
            described = location.path.parent / "data.yaml"
            settings = read_yaml(described).get("settings") if described.is_file() else None
            script = settings.get("script") if isinstance(settings, dict) else None
            rows = _texts_of_table(location.path, persian=script == "persian")
            if not rows:
                raise DataError(f"{location} has no texts", hint="a row a text, in a column called text")
            kept = {row["text_id"] for row in sorted(rows, key=lambda row: hash_order(seed, row["text_id"]))[:limit]}
            rows = [row for row in rows if row["text_id"] in kept]
            content = json_text([[row["text_id"], row["text"]] for row in rows])
            return cls(location, hashlib.sha256(content.encode()).hexdigest()[:20], script, texts=rows)
        pairs = read_pairs(location)
        own = pairs.positives()
        own = replace(own, frame=own.frame[own.frame["origin"] != "augmented"].reset_index(drop=True))
        if not len(own):
            raise DataError(f"{location} has no rows to index", hint="see its rejects.csv, and run prep again")
        script = pairs.metadata.get("settings", {}).get("script")
        return cls(location, pairs.fingerprint, script, pairs=own.subsample(limit, seed))

    def entries(self, kind: Modality) -> pa.Table:
        """All of one kind, each once.

        Raises:
            DataError: there is none.
        """
        if self.pairs is not None:
            return _texts_of(self.pairs) if kind == "texts" else _pictures_of(self.pairs)
        if kind == "images":
            raise DataError(f"{self.location} is a table of texts: it has no pictures", hint="--of texts")
        return _table("texts", ({**row, "key": text_key(row["text"])} for row in self.texts))

    def some_texts(self, count: int = 200) -> list[str]:
        """A few of the texts."""
        texts = self.pairs.frame["text"] if self.pairs is not None else [row["text"] for row in self.texts]
        return list(texts[:count])

    def held_out(self) -> tuple[set[str], set[str]]:
        """Ids of texts and pictures that a model was not trained on, as far as the data says: of test, else of val."""
        if self.pairs is None:
            return {str(row["text_id"]) for row in self.texts}, set()
        frame = self.pairs.frame
        rows = next((part for name in ("test", "val") if len(part := frame[frame["split"] == name])), frame)
        return set(rows["text_id"]), set(rows["image_id"])


def text_key(text: str) -> str:
    """What the embedding of a text is known by: 24 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _has_pictures(path: Path) -> bool:
    """Whether a table is one of pairs."""
    if path.suffix == ".parquet":
        try:
            return "image" in pq.read_schema(path).names
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    first = next((record for _, record in tables.read_records(path) if isinstance(record, dict)), {})
    return "image" in first


def _texts_of_table(path: Path, *, persian: bool) -> list[dict[str, Any]]:
    """The rows of a docstore.parquet, or of a table that somebody made: each text once.

    Raises:
        DataError: a row that is none, or has no text; names it.
    """
    found: dict[str, dict[str, Any]] = {}
    empty = other = 0
    for where, record in tables.read_records(path):
        if isinstance(record, tables.BadLine):
            raise DataError(f"{where}: {record.reason}")
        if "text" not in record:
            raise DataError(f"{where}: no column 'text'", hint=f"it has {', '.join(map(str, record))}")
        if not isinstance(record["text"], str | None):
            raise DataError(f"{where}: {record['text']!r} is no text")
        text = clean(record["text"], persian=persian)
        known = str(record.get("text_id") or record.get("id") or text_id(text))
        empty += not text
        other += known in found and found[known]["text"] != text
        if not text or known in found:
            continue
        group = record.get("text_group")
        group = [known] if group is None else group if isinstance(group, list) else tables.cell_values(group)
        found[known] = {**record, "text": text, "text_id": known, "group": group}
    if empty:
        console.warn(f"{path}: {empty} rows have no text: they are left out")
    if other:
        console.warn(f"{path}: {other} rows have the text_id of an earlier row and another text: they are left out")
    return list(found.values())


def _texts_of(pairs: Pairs) -> pa.Table:
    groups = _groups(pairs.frame, "text_id", "text_group")
    rows = pairs.unique_texts().to_dict("records")
    return _table("texts", ({**row, "group": groups[row["text_id"]], "key": text_key(row["text"])} for row in rows))


def _pictures_of(pairs: Pairs) -> pa.Table:
    first = pairs.unique_images()
    groups = _groups(pairs.frame, "image_id", "image_group")
    keys = image_keys(pairs.image_paths(first), list(first["image_id"]))
    places = [str(place.absolute) for place in pairs.image_locations(first)]
    more = zip(first.to_dict("records"), places, keys, strict=True)
    return _table(
        "images", ({**row, "path": place, "key": key, "group": groups[row["image_id"]]} for row, place, key in more)
    )


def _groups(frame: pd.DataFrame, key: str, column: str) -> dict[str, list[str]]:
    """Every group that an item stands in."""
    found: dict[str, set[str]] = defaultdict(set)
    for item, group in zip(frame[key], frame[column], strict=True):
        found[item] |= labels.as_set(group)
    return {item: sorted(groups) for item, groups in found.items()}


def _table(kind: Modality, rows: Iterable[dict[str, Any]]) -> pa.Table:
    identity, made = "text_id" if kind == "texts" else "image_id", []
    told = LEFT_OUT | ({"image_key", "width", "height"} if kind == "texts" else set())
    for row in rows:
        further = {name: value for name, value in row.items() if name not in told and _is(value)}
        made.append(
            {
                "id": row[identity],
                "kind": kind,
                "text": row["text"],
                "path": row.get("path"),
                "group": list(map(str, row["group"])),
                "class": str(row["class_name"]) if _is(row.get("class_name")) else None,
                "metadata": json_text(further),
                "key": row["key"],
            }
        )
    return pa.Table.from_pylist(made, schema=SCHEMA)


def _is(value: Any) -> bool:
    """A value, and not what tables have in its place."""
    several = isinstance(value, list | tuple) or hasattr(value, "tolist")
    return several or not (value is None or value != value or value == "")
