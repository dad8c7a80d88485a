"""Index folder: written atomically, and verified before any of its files is parsed.

    texts.faiss images.faiss   one FAISS index per modality, of those that were asked for
    docstore.parquet           the documents: texts before images, each in the order of its index
    index.yaml                 model, hash of its weights, preprocessing, data, counts, measured recall
    MANIFEST.json              SHA-256 of each of these files

It is written beside an older index and then swapped with it in one step, so a reader gets the old index or the new one.
A reader that meets the swap starts again. On s3:// the manifest is replaced last.
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
from vlkit.inference.index.documents import MODALITIES, SCHEMA
from vlkit.inference.index.faiss_index import EFFORT_PARAMETERS, VectorIndex
from vlkit.models.stages import Modality
from vlkit.remote import MANIFEST, VERSIONS, Remote, file_sha256
from vlkit.storage import Location, atomic_folder, json_text

VERSION = 1
HIT_COLUMNS = ("id", "text", "path", "class", "group", "metadata")
ABOUT, DOCSTORE = "index.yaml", "docstore.parquet"
FILES = {ABOUT, DOCSTORE, *(f"{modality}.faiss" for modality in MODALITIES)}
REBUILD = "build it again: vlkit index"
MAX_OPEN_ATTEMPTS = 5


@dataclass(frozen=True)
class Index:
    """An open index.

    Attributes:
        about: the content of index.yaml.
        table: the docstore.
        vectors: modality -> index of its embeddings.
    """

    location: Location
    about: dict[str, Any]
    table: pa.Table
    vectors: dict[Modality, VectorIndex]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.location.name

    def first_row(self, modality: Modality) -> int:
        """Return the row of the docstore where a modality begins."""
        return len(self.vectors["texts"]) if modality == "images" and "texts" in self.vectors else 0

    def documents(self, modality: Modality, positions: np.ndarray) -> list[dict[str, Any]]:
        """Return documents by their positions in the index of a modality."""
        first = self.first_row(modality)
        return [
            {name: column[first + position].as_py() for name, column in self._hit_columns}
            for position in positions.tolist()
        ]

    @cached_property
    def _hit_columns(self) -> list[tuple[str, pa.Array]]:
        """The columns of a hit, each in one chunk, so that a value is found in constant time."""
        return [(name, self.table.column(name).combine_chunks()) for name in HIT_COLUMNS]

    def column(self, modality: Modality, name: str) -> pa.ChunkedArray:
        """Return a column of the docstore, cut to one modality."""
        return self.table.column(name).slice(self.first_row(modality), len(self.vectors[modality]))

    @cached_property
    def positions(self) -> dict[Modality, dict[str, int]]:
        """Modality -> id -> position in its index."""
        return {
            modality: {key: position for position, key in enumerate(self.column(modality, "id").to_pylist())}
            for modality in self.vectors
        }

    @cached_property
    def classes(self) -> list[str]:
        """Class names of the documents, sorted."""
        return sorted(name for name in self.table.column("class").unique().to_pylist() if name is not None)

    def embeddings(self, modality: Modality) -> dict[str, np.ndarray]:
        """Return key -> unit row for all documents of a modality."""
        if modality not in self.vectors:
            return {}
        return dict(zip(self.column(modality, "key").to_pylist(), self.vectors[modality].rows(), strict=True))


def write_index(
    location: Location, about: Mapping[str, Any], table: pa.Table, vectors: Mapping[Modality, VectorIndex]
) -> None:
    """Write an index folder atomically; an older index stays in place until then."""
    refuse_foreign_folder(location)
    if location.is_remote:
        with tempfile.TemporaryDirectory() as folder:
            files = _write_files(Path(folder), about, table, vectors)
            Remote(location).replace(files, MANIFEST)
        return
    with atomic_folder(location.path) as folder:
        files = _write_files(folder, about, table, vectors)
        hashes = {name: {"sha256": file_sha256(path)} for name, path in files.items()}
        (folder / MANIFEST).write_text(json_text({"schema": 1, "files": hashes}, indent=1) + "\n", encoding="utf-8")


def _write_files(
    folder: Path, about: Mapping[str, Any], table: pa.Table, vectors: Mapping[Modality, VectorIndex]
) -> dict[str, Path]:
    for modality, index in vectors.items():
        index.write(folder / f"{modality}.faiss")
    pq.write_table(table, folder / DOCSTORE)
    (folder / ABOUT).write_text(yaml_text({"schema": VERSION, **about}), encoding="utf-8")
    return {path.name: path for path in sorted(folder.iterdir())}


def open_index(location: Location) -> Index:
    """Open an index folder.

    Raises:
        ArtifactError: it is not an index, is damaged, or its files do not belong together; says which.
    """
    for _ in range(MAX_OPEN_ATTEMPTS):
        with _watch(location) as unchanged:
            try:
                if location.is_remote:
                    # The manifest lies in the folder itself, also where the location is a whole bucket.
                    index = _load(location, Remote(location).download_verified(MANIFEST))
                else:
                    _verify(location.path)
                    index = _load(location, location.path)
            except (ArtifactError, NetworkError):
                if unchanged():
                    raise
                continue
            if unchanged():
                return index
    raise ArtifactError(f"{location} was replaced again and again while it was read", hint="run the same command again")


def index_exists(location: Location) -> bool:
    """Return whether the folder says that it is an index; it may still be damaged."""
    if location.is_remote:
        return MANIFEST in Remote(location).listing()
    return (location.path / ABOUT).is_file()


def refuse_foreign_folder(location: Location) -> None:
    """Refuse to replace anything that is not an index.

    Raises:
        UsageError: names the folder.
    """
    if location.is_remote:
        names = {name for name in Remote(location).listing() if not name.startswith(f"{VERSIONS}/")}
    elif location.path.is_dir():
        # A folder inside is never one of an index's files, whatever its name.
        names = {path.name if path.is_file() else f"{path.name}/" for path in location.path.iterdir()}
    else:
        names = {"a file"} if location.path.exists() else set()
    if names and not (MANIFEST in names and ABOUT in names and names <= {MANIFEST, *FILES}):
        raise UsageError(
            f"--out {location} exists and is not an index", hint="choose another folder: this one would be replaced"
        )


@contextmanager
def _watch(location: Location) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether the folder is still the one that it was at the beginning.

    Raises:
        ArtifactError: the index does not exist.
    """
    missing = ArtifactError(f"no such index: {location}", hint=f"build one: vlkit index --run RUN --out {location}")
    if location.is_remote:
        manifest = Remote(location).listing().get(MANIFEST)
        if manifest is None:
            raise missing
        yield lambda: Remote(location).listing().get(MANIFEST) == manifest
        return
    try:
        # While it is open, no other folder gets its inode number.
        descriptor = os.open(location.path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        raise missing from None
    try:
        yield lambda: location.path.is_dir() and os.path.samestat(os.fstat(descriptor), location.path.stat())
    finally:
        os.close(descriptor)


def _verify(folder: Path) -> None:
    """Compare the hash of every file with the manifest.

    Raises:
        ArtifactError: names the file.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        hashes = {str(name): str(files[name]["sha256"]) for name in files}
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is not an index: it has no {MANIFEST}", hint=REBUILD) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise ArtifactError(f"{folder / MANIFEST} is damaged", hint=REBUILD) from None
    if not {ABOUT, DOCSTORE} <= set(hashes) <= FILES:
        raise ArtifactError(f"{folder / MANIFEST} is not the manifest of an index", hint=REBUILD)
    for name, expected in hashes.items():
        try:
            actual = file_sha256(folder / name)
        except OSError:
            raise ArtifactError(f"{folder / name} is missing", hint=REBUILD) from None
        if actual != expected:
            message = f"{folder / name} is damaged: its content is not what was written"
            raise ArtifactError(message, hint=REBUILD)


def _load(location: Location, folder: Path) -> Index:
    """Open verified files, and compare them with each other.

    Raises:
        ArtifactError: they do not belong together.
    """
    try:
        about = read_yaml(folder / ABOUT)
        table = pq.read_table(folder / DOCSTORE, memory_map=True)
        searched = {modality: about["searched"][modality] for modality in MODALITIES if modality in about["searched"]}
        if about["schema"] != VERSION or table.schema.names != SCHEMA.names or not searched:
            raise ArtifactError(f"{location} was written by another version of vlkit", hint=REBUILD)
        vectors: dict[Modality, VectorIndex] = {}
        for modality, facts in searched.items():
            effort = facts.get(EFFORT_PARAMETERS[facts["type"]] or "", 0)
            index = vectors[modality] = VectorIndex.read(folder / f"{modality}.faiss", facts["type"], effort)
            for name, actual, expected in (
                ("rows", len(index), facts["count"]),
                ("columns", index.width, about["width"]),
            ):
                if actual != expected:
                    message = f"{location}: {modality}.faiss has {actual} {name}, index.yaml says {expected}"
                    raise ArtifactError(message, hint=REBUILD)
    except (UsageError, OSError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise ArtifactError(f"{location} is damaged: {error}", hint=REBUILD) from None
    count = sum(map(len, vectors.values()))
    if count != len(table):
        raise ArtifactError(f"{location}: {DOCSTORE} has {len(table)} rows, the index {count}", hint=REBUILD)
    return Index(location, about, table, vectors)
