"""The pairs table and the docstore: their columns, how they are written, how they are read and validated.

One row is one picture with one text. `PAIR_COLUMNS` lists what every table has; whatever a source adds stands behind.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkit.config.base import read_yaml
from vlkit.config.data import PrepConfig
from vlkit.data import captions, labels, splits
from vlkit.data.labels import Groups
from vlkit.errors import DataError, suggest_name
from vlkit.remote import ZONE_TABLES, fetch_by_hash, local_folder
from vlkit.runs import Run
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
# Columns that prep fills; a source's own of the same name are kept as source_<name>.
RESERVED_COLUMNS = (*PAIR_COLUMNS, "image_key", "width", "height", "image_looks", "weight", "source_pair_id")
REQUIRED_COLUMNS = ("image", "image_id", "text", "text_id", "image_group", "text_group", "unit", "split")
# What augment adds to a prepared folder: pictures, a view of the training rows, a sheet to look at.
AUGMENTED_FOLDER = "augmented_images"
NEGATIVES_VIEW = "train_pairs_augmented_with_negatives.csv"
PREVIEW_FILE = "augment_preview.png"
# Pictures that vlkit put into a prepared folder: named by their content.
COPIED_IMAGE = re.compile(r"(?:augmented_)?images/[0-9a-f]{20}\.?\w*")
TABLE_FILES = ("pairs.parquet", "pairs.csv", "pairs.jsonl")


@dataclass(frozen=True)
class Pairs:
    """A pairs table in memory.

    Attributes:
        folder: the prepared folder; pictures that prep wrote are relative to it.
        described: the content of data.yaml.
    """

    frame: pd.DataFrame
    folder: Location
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """data.yaml's fingerprint, or one computed from the rows where there is none."""
        return self.metadata.get("fingerprint") or fingerprint(self.frame)

    def split(self, name: str, *, limit: int | None = None, seed: int = 42) -> Pairs:
        """The rows of one split; with `limit`, that many: see `subsample_units`."""
        rows = self.frame[self.frame["split"] == name].reset_index(drop=True)
        return Pairs(rows, self.folder, self.metadata).subsample(limit, seed)

    def subsample(self, limit: int | None, seed: int) -> Pairs:
        """At most `limit` rows: units drawn by the seed, the last one cut."""
        rows = self.frame
        if limit is None or len(rows) <= limit:
            return self
        kept = splits.subsample_units(rows.groupby("unit").size().to_dict(), limit, seed)
        place = rows["unit"].map({unit: position for position, unit in enumerate(kept)})
        rows = rows.loc[place.dropna().sort_values(kind="stable").index[:limit].sort_values()]
        return Pairs(rows.reset_index(drop=True), self.folder, self.metadata)

    @property
    def weights(self) -> list[float] | None:
        """How often each row is drawn, where prep said so (--oversample-below)."""
        return [float(weight) for weight in self.frame["weight"]] if "weight" in self.frame else None

    def positives(self) -> Pairs:
        """Without the rows of mismatched pairs."""
        return Pairs(self.frame[self.frame["match"] == 1].reset_index(drop=True), self.folder, self.metadata)

    def with_text(self) -> tuple[Pairs, int]:
        """Without the rows whose text has no word in it; and how many these were."""
        there = self.frame["text"].str.strip() != ""
        rows = self.frame[there].reset_index(drop=True)
        return Pairs(rows, self.folder, self.metadata), int((~there).sum())

    def unique_images(self) -> pd.DataFrame:
        """The first row of every picture."""
        return self.frame.drop_duplicates("image_id").reset_index(drop=True)

    def unique_texts(self) -> pd.DataFrame:
        """The first row of every text."""
        return self.frame.drop_duplicates("text_id").reset_index(drop=True)

    def match_sets(self) -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]]]:
        """image id -> set and text id -> set; they intersect where the two match (see `labels.py`)."""
        return labels.match_sets(self.frame)

    def image_locations(self, rows: pd.DataFrame) -> list[Location]:
        """Where the pictures of these rows lie: paths, or URLs."""
        places = [Location(image) for image in rows["image"]]
        return [place if place.is_remote or place.startswith("/") else self.folder / place for place in places]

    def image_paths(self, rows: pd.DataFrame) -> list[Path]:
        """The same as local files; remote ones are fetched first, each once."""
        places = self.image_locations(rows)
        hashed = self.metadata.get("image_ids", "bytes") == "bytes"
        remote = {p: i if hashed else "" for p, i in zip(places, rows["image_id"], strict=True) if p.is_remote}
        fetched = fetch_by_hash(remote) if remote else {}
        return [fetched[place] if place.is_remote else place.path for place in places]

    def __len__(self) -> int:
        return len(self.frame)


def read_pairs(path: Location | Path | str) -> Pairs:
    """Read and validate a prepared folder, or a table of the same columns (parquet, CSV or JSONL).

    Raises:
        DataError: nothing there, a column missing, empty cells, an unknown split, a leak between splits.
    """
    import pandas as pd

    location = Location(path)
    path = local_folder(location)
    places = (path, path / ZONE_TABLES)
    table = next((p / name for p in places for name in TABLE_FILES if (p / name).is_file()), None) if path.is_dir() else path
    if not path.exists():
        raise DataError(
            f"no such prepared folder: {path}",
            hint=f"make one: vlkit prep --domain recipes --source raw/ --out {location}",
        )
    if table is None:
        raise DataError(
            f"{location} holds no {' or '.join(TABLE_FILES)}",
            hint="a raw folder is turned into a prepared one by vlkit prep",
        )
    readers = {
        ".parquet": pd.read_parquet,
        ".csv": _read_csv,
        ".jsonl": lambda p: pd.read_json(p, lines=True, dtype=False),
    }
    if table.suffix not in readers:
        raise DataError(f"{table}: a pairs table ends in {', '.join(readers)}")
    try:
        frame = readers[table.suffix](table)
    except (ValueError, OSError) as error:
        raise DataError(f"{table} cannot be read: {error}", hint="run prep again") from None
    described = _read_metadata(table.parent / "data.yaml")
    folder = location if path.is_dir() else Location(table.parent)
    pairs = Pairs(validate_rows(frame, str(table)), folder, described)
    splits.refuse_leaks(
        pairs.frame, str(table), near=described.get("settings", {}).get("near_duplicates", PrepConfig.near_duplicates)
    )
    return pairs


def data_of(run: Run) -> Location:
    """A run's prepared folder: as its command named it, or, called from elsewhere, where it was."""
    named = Location(run.config()["data"])
    there = named.is_remote or named.path.exists()
    return named if there else Location(run.environment().get("data", {}).get("path", named))


def _read_metadata(path: Path) -> dict[str, Any]:
    """The content of data.yaml, empty where there is none; refused where its sections are none."""
    described = read_yaml(path) if path.is_file() else {}
    for section in ("settings", "augmentation"):
        if not isinstance(described.get(section) or {}, dict):
            raise DataError(f"{path}: {section} holds no `key: value` lines", hint="run prep again")
        if section in described:
            described[section] = described[section] or {}
    return described


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if "match" in frame:
        frame["match"] = [int(value) if value in ("0", "1") else value for value in frame["match"]]
    for column in {"image_group", "text_group"} & set(frame):
        frame[column] = [_parse_group_cell(value) for value in frame[column]]
    return frame


def _parse_group_cell(cell: str) -> str | list[str]:
    """A CSV cell that holds a JSON list is one; any other text, also one that begins with a bracket, is itself."""
    try:
        value = json.loads(cell) if cell.startswith("[") else cell
    except json.JSONDecodeError:
        return cell
    return value


def validate_rows(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The table with every column in place and in order, or a DataError that says what is wrong with it."""
    for column in REQUIRED_COLUMNS:
        if column not in frame:
            raise DataError(
                f"{where}: no column {column!r}", hint=suggest_name(column, [str(name) for name in frame.columns])
            )
    if not len(frame):
        raise DataError(f"{where} has no rows")
    frame = frame.copy()
    for column in ("image", "image_id", "text", "text_id", "unit", "split"):
        empty = frame[column].isna() | (frame[column].astype(str) == "")
        if empty.any():
            raise DataError(f"{where}: row {int(empty.to_numpy().argmax()) + 1} has no {column}")
        frame[column] = frame[column].astype(str)
    unknown = ~frame["split"].isin(splits.SPLITS)
    if unknown.any():
        row = int(unknown.to_numpy().argmax())
        told = f"{where}: row {row + 1} has the unknown split {frame['split'].iloc[row]!r}"
        raise DataError(told, hint=f"known: {', '.join(splits.SPLITS)}")
    for column, default in (("class_name", None), ("origin", "original"), ("match", 1)):
        if column not in frame:
            frame[column] = default
    odd = ~frame["match"].isin([0, 1])
    if odd.any():
        row = int(odd.to_numpy().argmax())
        raise DataError(f"{where}: row {row + 1} has match {frame['match'].iloc[row]!r}; it is 1, or 0 for a negative")
    frame["match"] = frame["match"].astype(int)
    for column in ("image_group", "text_group"):
        frame[column] = [
            _groups(value, where, row, column)
            for row, value in enumerate((value for (value,) in _rows(frame, (column,))), start=1)
        ]
    if "pair_id" not in frame:
        named = ("image_id", "text_id", "image_group", "text_group", "unit")
        frame["pair_id"] = [pair_id(*row) for row in _rows(frame, named)]
    if frame["pair_id"].duplicated().any():
        row = int(frame["pair_id"].duplicated().to_numpy().argmax()) + 1
        raise DataError(f"{where}: row {row} has the pair_id of an earlier row", hint="drop the repeated rows")
    return frame[[*PAIR_COLUMNS, *(column for column in frame if column not in PAIR_COLUMNS)]]


def pair_id(image_id: str, text_id: str, image_group: Groups, text_group: Groups, unit: str) -> str:
    """Identity of a row: 20 hex digits."""
    parts = [image_id, text_id, sorted(labels.as_set(image_group)), sorted(labels.as_set(text_group)), unit]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _rows(frame: pd.DataFrame, columns: Sequence[str], chunk: int = 50_000) -> Iterator[tuple[Any, ...]]:
    """The rows of some columns as plain values: by chunks, because a million of them at once is gigabytes."""
    for start in range(0, len(frame), chunk):
        some = frame.iloc[start : start + chunk]
        yield from zip(*(some[column].tolist() for column in columns), strict=True)


def _groups(value: Any, where: str, row: int, column: str) -> str | list[str]:
    """A group cell as one id or a list of them, whatever table it came from."""
    several = isinstance(value, list | tuple | set | frozenset) or hasattr(value, "tolist")
    ids = [str(item) for item in value] if several else [] if value is None or value != value else [str(value)]
    if not ids or not all(ids):
        raise DataError(f"{where}: row {row} has no {column}")
    return ids if several else ids[0]


def fingerprint(frame: pd.DataFrame) -> str:
    """Hash of the rows and, through image_id, of the pictures' bytes. Where the pictures lie does not enter."""
    digest = hashlib.sha256()
    columns = ["pair_id", "image_id", "text_id", "image_group", "text_group", "unit", "split", "match"]
    for row in _rows(frame, columns):
        named = zip(columns, row, strict=True)
        parts = [sorted(labels.as_set(v)) if name.endswith("_group") else str(v) for name, v in named]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:20]


def docstore(frame: pd.DataFrame) -> pd.DataFrame:
    """Every unique text once, in order of first appearance: text_id, text, text_group, class_name.

    A text that stands in several groups has them all, as a list.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for text_id, group in zip(frame["text_id"], frame["text_group"], strict=True):
        groups[text_id] |= labels.as_set(group)
    texts = frame.drop_duplicates("text_id")[["text_id", "text", "text_group", "class_name"]].reset_index(drop=True)
    if any(len(found) > 1 for found in groups.values()):
        texts["text_group"] = [sorted(groups[text_id]) for text_id in texts["text_id"]]
    return texts


def group_name(frame: pd.DataFrame, group_column: str | None) -> str:
    """What the views call the group: as the source did, else class_name where there are classes, else group."""
    name = group_column or ("class_name" if frame["class_name"].notna().any() else "group")
    return "group" if name in ("image_key", "caption") else name


def view(rows: pd.DataFrame, group: str, *, label: bool = False) -> pd.DataFrame:
    """Rows for people: group, image_key, caption. Several groups have a | between them.

    Args:
        group: name of the first column.
        label: one more column, 1 for a match and 0 for a negative.
    """
    import pandas as pd

    groups = ["|".join(sorted(labels.as_set(each))) for each in rows["image_group"]]
    keys = rows["image_key"] if "image_key" in rows else rows["image"]
    group = "group" if label and group == "label" else group
    columns = {group: groups, "image_key": list(keys), "caption": list(rows["text"])}
    return pd.DataFrame(columns | ({"label": list(rows["match"])} if label else {}))


def make_frame(columns: Mapping[str, list[Any]]) -> pd.DataFrame:
    """Columns (image, image_id, text, image_group, unit, class_name, split, ...) to a validated table."""
    import pandas as pd

    frame = pd.DataFrame(dict(columns))
    frame["text_id"] = [captions.text_id(text) for text in columns["text"]]
    if "text_group" not in frame:
        frame["text_group"] = frame["image_group"]
    return validate_rows(frame, "the prepared rows")
