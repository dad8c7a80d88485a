"""The index folder: written whole, verified before anything in it is parsed.

    texts.faiss images.faiss   one FAISS index a kind, of those that were asked for
    docstore.parquet           what the rows are, texts before pictures, each in the order of its index
    index.yaml                 model, hash of its weights, preprocessing, data, counts, measured recall
    MANIFEST.json              SHA-256 of each of them

It is written aside and changes places with an older one at once, so a reader meets the old index or the new one; one
that is about to read when they change places begins again. On s3:// the manifest changes last.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlkit.config.base import read_yaml, yaml_text
from vlkit.errors import ArtifactError, NetworkError, UsageError
from vlkit.inference.index.documents import MODALITIES, SCHEMA, Modality
from vlkit.inference.index.faiss_index import PARAMETERS, Nearest
from vlkit.remote import MANIFEST, VERSIONS, Remote, file_sha256
from vlkit.storage import Location, atomic_folder, json_text

VERSION = 1
SHOWN = ("id", "text", "path", "class", "group", "metadata")
ABOUT, DOCSTORE = "index.yaml", "docstore.parquet"
KNOWN = {ABOUT, DOCSTORE, *(f"{kind}.faiss" for kind in MODALITIES)}
AGAIN = "build it again: vlkit index"
ATTEMPTS = 5


@dataclass(frozen=True)
class Index:
    """An index, opened.

    Attributes:
        about: the content of index.yaml.
        table: the docstore.
        nearest: kind -> its rows' index.
    """

    location: Location
    about: dict[str, Any]
    table: pa.Table
    nearest: dict[Modality, Nearest]

    @property
    def name(self) -> str:
        """The folder's."""
        return self.location.name

    def first_row(self, kind: Modality) -> int:
        """Where, in the docstore, a kind begins."""
        return len(self.nearest["texts"]) if kind == "images" and "texts" in self.nearest else 0

    def rows(self, kind: Modality, places: np.ndarray) -> list[dict[str, Any]]:
        """Entries by their places in a kind's index."""
        first = self.first_row(kind)
        return [{name: column[first + place].as_py() for name, column in self._shown} for place in places.tolist()]

    @cached_property
    def _shown(self) -> list[tuple[str, pa.Array]]:
        """The columns of an entry, each in one piece: a value is found at once."""
        return [(name, self.table.column(name).combine_chunks()) for name in SHOWN]

    def column(self, kind: Modality, name: str) -> pa.ChunkedArray:
        """One of the docstore's columns, of a kind."""
        return self.table.column(name).slice(self.first_row(kind), len(self.nearest[kind]))

    @cached_property
    def places(self) -> dict[Modality, dict[str, int]]:
        """kind -> id -> place in its index."""
        return {
            kind: {key: place for place, key in enumerate(self.column(kind, "id").to_pylist())} for kind in self.nearest
        }

    @cached_property
    def classes(self) -> list[str]:
        """Those that entries have, sorted."""
        return sorted(each for each in self.table.column("class").unique().to_pylist() if each is not None)

    def embeddings(self, kind: Modality) -> dict[str, np.ndarray]:
        """key -> unit row, of what is in it already."""
        if kind not in self.nearest:
            return {}
        return dict(zip(self.column(kind, "key").to_pylist(), self.nearest[kind].rows(), strict=True))


def write(location: Location, about: Mapping[str, Any], table: pa.Table, nearest: Mapping[Modality, Nearest]) -> None:
    """Write an index folder, whole or not at all; an older one is there until then."""
    refuse_other(location)
    if location.is_remote:
        with tempfile.TemporaryDirectory() as folder:
            files = _written(Path(folder), about, table, nearest)
            Remote(location).replace(files, MANIFEST)
        return
    with atomic_folder(location.path) as aside:
        files = _written(aside, about, table, nearest)
        hashes = {name: {"sha256": file_sha256(path)} for name, path in files.items()}
        (aside / MANIFEST).write_text(json_text({"schema": 1, "files": hashes}, indent=1) + "\n", encoding="utf-8")


def _written(
    folder: Path, about: Mapping[str, Any], table: pa.Table, nearest: Mapping[Modality, Nearest]
) -> dict[str, Path]:
    for kind, each in nearest.items():
        each.write(folder / f"{kind}.faiss")
    pq.write_table(table, folder / DOCSTORE)
    (folder / ABOUT).write_text(yaml_text({"schema": VERSION, **about}), encoding="utf-8")
    return {path.name: path for path in sorted(folder.iterdir())}


def open_index(location: Location) -> Index:
    """Open an index folder.

    Raises:
        ArtifactError: it is none, or damaged, or its parts do not belong together; says which.
    """
    for _ in range(ATTEMPTS):
        with _same(location) as still:
            try:
                if location.is_remote:
                    # A whole bucket is no zone here: its manifest lies in it.
                    found = _opened(location, Remote(location).download_verified(MANIFEST))
                else:
                    _verify(location.path)
                    found = _opened(location, location.path)
            except (ArtifactError, NetworkError):
                if still():
                    raise
                continue
            if still():
                return found
    raise ArtifactError(f"{location} is written again and again while it is read", hint="run the same command again")


def is_there(location: Location) -> bool:
    """Something that says it is an index."""
    if location.is_remote:
        return MANIFEST in Remote(location).listing()
    return (location.path / ABOUT).is_file()


def refuse_other(location: Location) -> None:
    """Refuse to put an index in the place of something that is none.

    Raises:
        UsageError: names the folder.
    """
    if location.is_remote:
        there = {name for name in Remote(location).listing() if not name.startswith(f"{VERSIONS}/")}
    elif location.path.is_dir():
        # A folder is none of its files, whatever its name.
        there = {path.name if path.is_file() else f"{path.name}/" for path in location.path.iterdir()}
    else:
        there = {"a file"} if location.path.exists() else set()
    if there and not (MANIFEST in there and ABOUT in there and there <= {MANIFEST, *KNOWN}):
        raise UsageError(f"--out {location} exists and is no index", hint="choose another folder: it would be replaced")


@contextmanager
def _same(location: Location) -> Iterator[Callable[[], bool]]:
    """Within the block, whether what bears the name is still what bore it at the beginning.

    Raises:
        ArtifactError: there is nothing.
    """
    none = ArtifactError(f"there is no index {location}", hint=f"make one: vlkit index --run RUN --out {location}")
    if location.is_remote:
        before = Remote(location).listing().get(MANIFEST)
        if before is None:
            raise none
        yield lambda: Remote(location).listing().get(MANIFEST) == before
        return
    try:
        # Held open, its number is given to no other folder.
        held = os.open(location.path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        raise none from None
    try:
        yield lambda: location.path.is_dir() and os.path.samestat(os.fstat(held), location.path.stat())
    finally:
        os.close(held)


def _verify(folder: Path) -> None:
    """Compare every file with the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        hashes = {str(name): str(files[name]["sha256"]) for name in files}
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is no index: it has no {MANIFEST}", hint=AGAIN) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(f"{folder / MANIFEST} is damaged", hint=AGAIN) from None
    if not {ABOUT, DOCSTORE} <= set(hashes) <= KNOWN:
        raise ArtifactError(f"{folder / MANIFEST} is not that of an index", hint=AGAIN)
    for name, wanted in hashes.items():
        try:
            found = file_sha256(folder / name)
        except OSError:
            raise ArtifactError(f"{folder / name} is missing", hint=AGAIN) from None
        if found != wanted:
            told = f"{folder / name} is not what was written: it is cut off, or was changed"
            raise ArtifactError(told, hint=AGAIN)


def _opened(location: Location, folder: Path) -> Index:
    """Open verified files, and compare them with each other."""
    try:
        about = read_yaml(folder / ABOUT)
        table = pq.read_table(folder / DOCSTORE, memory_map=True)
        kinds = {kind: about["searched"][kind] for kind in MODALITIES if kind in about["searched"]}
        if about["schema"] != VERSION or table.schema.names != SCHEMA.names or not kinds:
            raise ArtifactError(f"{location} is of another version of vlkit", hint=AGAIN)
        nearest: dict[Modality, Nearest] = {}
        for kind, how in kinds.items():
            effort = how.get(PARAMETERS[how["type"]] or "", 0)
            nearest[kind] = Nearest.read(folder / f"{kind}.faiss", how["type"], effort)
            if len(nearest[kind]) != how["count"]:
                told = f"{location}: {kind}.faiss has {len(nearest[kind])} rows, index.yaml says {how['count']}"
                raise ArtifactError(told, hint=AGAIN)
            if nearest[kind].width != about["width"]:
                told = f"{location}: {kind}.faiss is {nearest[kind].width} wide, index.yaml says {about['width']}"
                raise ArtifactError(told, hint=AGAIN)
    except (UsageError, OSError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise ArtifactError(f"{location} is damaged: {error}", hint=AGAIN) from None
    if sum(map(len, nearest.values())) != len(table):
        told = f"{location}: {DOCSTORE} has {len(table)} rows, the index {sum(map(len, nearest.values()))}"
        raise ArtifactError(told, hint=AGAIN)
    return Index(location, about, table, nearest)
