"""The pairs table and the docstore: their columns, and how they are built, read and validated.

A row is one image with one text. `PAIR_COLUMNS` lists the columns of every table; those that a source adds follow.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlkit.config.base import read_yaml
from vlkit.config.data import PrepConfig
from vlkit.data import captions, labels, splits
from vlkit.data.labels import Groups
from vlkit.errors import DataError, suggest_name
from vlkit.remote import ZONE_TABLES, fetch_by_hash, local_folder
from vlkit.storage import Location

if TYPE_CHECKING:
    import pandas as pd

PAIR_COLUMNS = (
    "pair_id",
    "image",
    "image_id",
    "text",
    "text_id",
    "image_group",
    "text_group",
    "unit",
    "class_name",
    "split",
    "origin",
    "match",
)
# Columns that prep fills; a source's own columns of the same name become source_<name>.
RESERVED_COLUMNS = (*PAIR_COLUMNS, "image_key", "width", "height", "image_looks", "weight", "source_pair_id")
REQUIRED_COLUMNS = ("image", "image_id", "text", "text_id", "image_group", "text_group", "unit", "split")
# What augment adds to a prepared folder: images, a view of the training rows, a sheet to look at.
AUGMENTED_FOLDER = "augmented_images"
NEGATIVES_VIEW = "train_pairs_augmented_with_negatives.csv"
PREVIEW_FILE = "augment_preview.png"
# Paths of images that vlkit wrote into a prepared folder: named by their content.
COPIED_IMAGE = re.compile(r"(?:augmented_)?images/[0-9a-f]{20}\.?\w*")
TABLE_FILES = ("pairs.parquet", "pairs.csv", "pairs.jsonl")


@dataclass(frozen=True)
class Pairs:
    """A pairs table in memory.

    Attributes:
        folder: the prepared folder; paths of images that prep wrote are relative to it.
        metadata: the content of data.yaml.
    """

    frame: pd.DataFrame
    folder: Location
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """data.yaml's fingerprint, or one computed from the rows."""
        return self.metadata.get("fingerprint") or fingerprint(self.frame)

    def with_rows(self, rows: pd.DataFrame) -> Pairs:
        """Return other rows of the same folder."""
        return Pairs(rows.reset_index(drop=True), self.folder, self.metadata)

    def split(self, name: str, *, limit: int | None = None, seed: int = 42) -> Pairs:
        """Return the rows of one split; at most `limit` of them, see `subsample`."""
        return self.with_rows(self.frame[self.frame["split"] == name]).subsample(limit, seed)

    def subsample(self, limit: int | None, seed: int) -> Pairs:
        """Return at most `limit` rows: whole units in a seeded order, the last one cut."""
        rows = self.frame
        if limit is None or len(rows) <= limit:
            return self
        units = splits.subsample_units(rows.groupby("unit").size().to_dict(), limit, seed)
        rank = rows["unit"].map(index_of_ids(units))
        return self.with_rows(rows.loc[rank.dropna().sort_values(kind="stable").index[:limit].sort_values()])

    @property
    def weights(self) -> list[float] | None:
        """How often each row is drawn an epoch, where prep wrote it (--oversample-below)."""
        return [float(weight) for weight in self.frame["weight"]] if "weight" in self.frame else None

    def positives(self) -> Pairs:
        """Return the rows that match: all but the negative pairs."""
        return self.with_rows(self.frame[self.frame["match"] == 1])

    def with_text(self) -> tuple[Pairs, int]:
        """Return the rows whose text is not blank; and the number of blank ones."""
        has_text = self.frame["text"].str.strip() != ""
        return self.with_rows(self.frame[has_text]), int((~has_text).sum())

    def unique_images(self) -> pd.DataFrame:
        """Return the first row of every image."""
        return self.frame.drop_duplicates("image_id").reset_index(drop=True)

    def unique_texts(self) -> pd.DataFrame:
        """Return the first row of every text."""
        return self.frame.drop_duplicates("text_id").reset_index(drop=True)

    def match_sets(self) -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
        """Return image id -> set and text id -> set; the sets of a matching pair intersect (see `labels.py`)."""
        return labels.match_sets(self.frame)

    def image_locations(self, rows: pd.DataFrame) -> list[Location]:
        """Return where the images of these rows lie: paths, or URLs."""
        locations = [Location(image) for image in rows["image"]]
        return [
            location if location.is_remote or image.startswith("/") else self.folder / image
            for location, image in zip(locations, rows["image"], strict=True)
        ]

    def image_paths(self, rows: pd.DataFrame) -> list[Path]:
        """Return the images of these rows as local files; remote ones are fetched first, each once."""
        locations = self.image_locations(rows)
        hashed = self.metadata.get("image_ids", "bytes") == "bytes"
        remote: dict[str, str] = {
            location: image_id if hashed else ""
            for location, image_id in zip(locations, rows["image_id"], strict=True)
            if location.is_remote
        }
        fetched = fetch_by_hash(remote) if remote else {}
        return [fetched[location] if location.is_remote else location.path for location in locations]

    def __len__(self) -> int:
        return len(self.frame)


def index_of_ids(ids: Iterable[str]) -> dict[str, int]:
    """Return id -> its position."""
    return {key: position for position, key in enumerate(ids)}


def positions_in(unique: Iterable[str], ids: Iterable[str]) -> np.ndarray:
    """Return int64 [ids]: the position of each in `unique`."""
    position_of = index_of_ids(unique)
    return np.array([position_of[key] for key in ids], np.int64)


def read_pairs(path: Location | Path | str) -> Pairs:
    """Read and validate a prepared folder, or a table of the same columns (parquet, CSV or JSONL).

    Raises:
        DataError: there is no table, a column is missing, a cell is empty, a split is unknown, or two splits share a
            unit or an image.
    """
    location = Location(path)
    path = local_folder(location)
    if not path.exists():
        raise DataError(
            f"no such prepared folder: {path}",
            hint=f"make one: vlkit prep --domain recipes --source raw/ --out {location}",
        )
    table = _find_table(path) if path.is_dir() else path
    if table is None:
        raise DataError(
            f"{location} holds no {' or '.join(TABLE_FILES)}",
            hint="vlkit prep turns a raw folder into a prepared one",
        )
    frame = _read_table(table)
    metadata = _read_metadata(table.parent / "data.yaml")
    folder = location if path.is_dir() else Location(table.parent)
    pairs = Pairs(validate_rows(frame, str(table)), folder, metadata)
    near_duplicates = metadata.get("settings", {}).get("near_duplicates", PrepConfig.near_duplicates)
    splits.refuse_leaks(pairs.frame, str(table), near=near_duplicates)
    return pairs


def _find_table(folder: Path) -> Path | None:
    """Return the pairs table of a prepared folder; in a folder behind a bucket's URL it lies in a subfolder."""
    candidates = (base / name for base in (folder, folder / ZONE_TABLES) for name in TABLE_FILES)
    return next((path for path in candidates if path.is_file()), None)


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": pd.read_parquet,
        ".csv": _read_csv,
        ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: a pairs table ends in {', '.join(readers)}")
    try:
        return readers[path.suffix](path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="run prep again") from None


def _read_metadata(path: Path) -> dict[str, Any]:
    """Return the content of data.yaml, empty if absent.

    Raises:
        DataError: a section is no mapping.
    """
    metadata = read_yaml(path) if path.is_file() else {}
    for section in ("settings", "augmentation"):
        if not isinstance(metadata.get(section) or {}, dict):
            raise DataError(f"{path}: {section} holds no `key: value` lines", hint="run prep again")
        if section in metadata:
            metadata[section] = metadata[section] or {}
    return metadata


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if "match" in frame:
        frame["match"] = [int(value) if value in ("0", "1") else value for value in frame["match"]]
    for column in {"image_group", "text_group"} & set(frame):
        frame[column] = [_parse_group_cell(value) for value in frame[column]]
    return frame


def _parse_group_cell(cell: str) -> str | list[str]:
    """Return the list that a CSV cell holds as JSON; else the cell itself, even if it begins with a bracket."""
    try:
        value: str | list[str] = json.loads(cell) if cell.startswith("[") else cell
    except json.JSONDecodeError:
        return cell
    return value


def validate_rows(frame: pd.DataFrame, table_name: str) -> pd.DataFrame:
    """Return the table with every column, in order.

    Args:
        table_name: for messages.

    Raises:
        DataError: names the row or the column that is wrong.
    """
    for column in REQUIRED_COLUMNS:
        if column not in frame:
            raise DataError(
                f"{table_name}: no column {column!r}", hint=suggest_name(column, [str(name) for name in frame.columns])
            )
    if not len(frame):
        raise DataError(f"{table_name} has no rows")
    frame = frame.copy()
    for column in ("image", "image_id", "text", "text_id", "unit", "split"):
        empty = frame[column].isna() | (frame[column].astype(str) == "")
        if empty.any():
            raise DataError(f"{table_name}: row {_first_row(empty) + 1} has no {column}")
        frame[column] = frame[column].astype(str)
    unknown = ~frame["split"].isin(splits.SPLITS)
    if unknown.any():
        row = _first_row(unknown)
        message = f"{table_name}: row {row + 1} has the unknown split {frame['split'].iloc[row]!r}"
        raise DataError(message, hint=f"known: {', '.join(splits.SPLITS)}")
    for column, default in (("class_name", None), ("origin", "original"), ("match", 1)):
        if column not in frame:
            frame[column] = default
    invalid = ~frame["match"].isin([0, 1])
    if invalid.any():
        row = _first_row(invalid)
        message = f"{table_name}: row {row + 1} has match {frame['match'].iloc[row]!r}; it is 1, or 0 for a negative"
        raise DataError(message)
    frame["match"] = frame["match"].astype(int)
    for column in ("image_group", "text_group"):
        frame[column] = [
            _parse_groups(value, table_name, row, column)
            for row, (value,) in enumerate(_iter_rows(frame, (column,)), start=1)
        ]
    if "pair_id" not in frame:
        identifying = ("image_id", "text_id", "image_group", "text_group", "unit")
        frame["pair_id"] = [pair_id(*row) for row in _iter_rows(frame, identifying)]
    repeated = frame["pair_id"].duplicated()
    if repeated.any():
        message = f"{table_name}: row {_first_row(repeated) + 1} has the pair_id of an earlier row"
        raise DataError(message, hint="drop the repeated rows")
    return frame[[*PAIR_COLUMNS, *(column for column in frame if column not in PAIR_COLUMNS)]]


def _first_row(mask: pd.Series) -> int:
    return int(mask.to_numpy().argmax())


def pair_id(image_id: str, text_id: str, image_group: Groups, text_group: Groups, unit: str) -> str:
    """Return the identity of a row: 20 hex digits."""
    parts = [image_id, text_id, sorted(labels.as_set(image_group)), sorted(labels.as_set(text_group)), unit]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _iter_rows(frame: pd.DataFrame, columns: Sequence[str], chunk_size: int = 50_000) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of some columns as plain values; in chunks, because a million of them at once is gigabytes."""
    for start in range(0, len(frame), chunk_size):
        chunk = frame.iloc[start : start + chunk_size]
        yield from zip(*(chunk[column].tolist() for column in columns), strict=True)


def _parse_groups(value: Any, table_name: str, row: int, column: str) -> str | list[str]:
    """Return a group cell as one id or a list of them, whatever kind of table it comes from."""
    several = isinstance(value, list | tuple | set | frozenset) or hasattr(value, "tolist")
    ids = [str(item) for item in value] if several else [] if value is None or value != value else [str(value)]
    if not ids or not all(ids):
        raise DataError(f"{table_name}: row {row} has no {column}")
    return ids if several else ids[0]


def fingerprint(frame: pd.DataFrame) -> str:
    """Hash the rows and, through image_id, the bytes of the images. The paths of the images do not matter."""
    digest = hashlib.sha256()
    columns = ["pair_id", "image_id", "text_id", "image_group", "text_group", "unit", "split", "match"]
    for row in _iter_rows(frame, columns):
        fields = zip(columns, row, strict=True)
        parts = [sorted(labels.as_set(v)) if name.endswith("_group") else str(v) for name, v in fields]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:20]


def docstore(frame: pd.DataFrame) -> pd.DataFrame:
    """Return every unique text once, in order of first appearance: text_id, text, text_group, class_name.

    A text of several groups has them all, as a list.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for text_id, group in zip(frame["text_id"], frame["text_group"], strict=True):
        groups[text_id] |= labels.as_set(group)
    texts = frame.drop_duplicates("text_id")[["text_id", "text", "text_group", "class_name"]].reset_index(drop=True)
    if any(len(ids) > 1 for ids in groups.values()):
        texts["text_group"] = [sorted(groups[text_id]) for text_id in texts["text_id"]]
    return texts


def group_name(frame: pd.DataFrame, group_column: str | None) -> str:
    """Return the views' name for the group: the source's, else class_name if any, else group."""
    name = group_column or ("class_name" if frame["class_name"].notna().any() else "group")
    return "group" if name in ("image_key", "caption") else name


def view(rows: pd.DataFrame, group: str, *, label: bool = False) -> pd.DataFrame:
    """Return rows for people: group, image_key, caption. Several groups are joined by |.

    Args:
        group: name of the first column.
        label: add a column label, 1 for a match and 0 for a negative.
    """
    import pandas as pd

    groups = ["|".join(sorted(labels.as_set(ids))) for ids in rows["image_group"]]
    keys = rows["image_key"] if "image_key" in rows else rows["image"]
    group = "group" if label and group == "label" else group
    columns = {group: groups, "image_key": list(keys), "caption": list(rows["text"])}
    return pd.DataFrame(columns | ({"label": list(rows["match"])} if label else {}))


def make_frame(columns: Mapping[str, list[Any]]) -> pd.DataFrame:
    """Build a validated table from columns (image, image_id, text, image_group, unit, class_name, split, ...)."""
    import pandas as pd

    frame = pd.DataFrame(dict(columns))
    frame["text_id"] = [captions.text_id(text) for text in columns["text"]]
    if "text_group" not in frame:
        frame["text_group"] = frame["image_group"]
    return validate_rows(frame, "the prepared rows")
