"""Store rows of numbers on disk, by key: appended in blocks, read through a memory map.

    about.json   what the rows are
    rows.bin     the rows, all of one shape
    index.jsonl  a line a block: the keys of its rows and a checksum of each

A block is there once its line is: a process that is killed while it writes leaves at most bytes that the next one cuts
off. Several processes may fill one folder at once, and a row that another one wrote meanwhile is not written again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vlkit import fault_injection
from vlkit.errors import ArtifactError, ResourceError
from vlkit.storage import cache_dir, json_text, write_text


def cache_folder(cache: str) -> Path:
    """Return the folder of all stores: vlkit's own for auto, or the one that --cache names."""
    return cache_dir() / "features" if cache == "auto" else Path(cache)


class FeatureStore:
    """One folder of rows.

    Attributes:
        shape, dtype: of a row.
        row_of: key -> row.
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: np.dtype, about: dict[str, Any]) -> None:
        """Open the folder; create it if absent.

        Args:
            about: what the rows are, for people who look into the folder.
        """
        self.folder, self.shape, self.dtype = folder, tuple(shape), np.dtype(dtype)
        self.row_of, self._sums, self._index_bytes = dict[str, int](), np.zeros(0, np.uint32), 0
        self._checked = np.zeros(0, bool)
        self._rows: np.memmap | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "about.json").is_file():
            content = {**about, "shape": list(self.shape), "dtype": self.dtype.name}
            write_text(folder / "about.json", json_text(content, indent=2) + "\n")
        self.reload()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def reload(self) -> None:
        """Read what any process has written since."""
        for keys, sums in self._new_blocks():
            first = len(self._sums)
            self.row_of |= {key: first + position for position, key in enumerate(keys)}
            self._sums = np.concatenate([self._sums, np.array(sums, np.uint32)])
        fresh = np.zeros(len(self._sums) - len(self._checked), bool)
        self._checked, self._rows = np.concatenate([self._checked, fresh]), None

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Return positions, in `keys`, of what is not here; a key that repeats counts once."""
        first = {key: position for position, key in reversed(list(enumerate(keys)))}
        return sorted(position for key, position in first.items() if key not in self.row_of)

    def append(self, keys: Sequence[str], rows: np.ndarray) -> None:
        """Write rows [keys, *shape]; once this returns they are there, whatever happens.

        Raises:
            ResourceError: the disk is full.
        """
        rows = np.ascontiguousarray(rows, self.dtype)
        if rows.shape != (len(keys), *self.shape):
            raise ValueError(f"expected {len(keys)} rows of {self.shape}, got {rows.shape}")
        try:
            with self._locked():
                self.reload()
                new = self.missing(keys)
                if new:
                    self._write([keys[position] for position in new], rows[new])
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            hint = "--cache off does without it; --cache DIR keeps it on another disk"
            raise ResourceError(f"{self.folder}: the disk is full", hint=hint) from None

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return copies of rows: [indices, *shape].

        Raises:
            ArtifactError: a row is not what was written.
        """
        if self._rows is None:
            self._rows = self._map_rows()
        rows = np.empty((len(indices), *self.shape), self.dtype)
        for position, index in enumerate(indices):
            rows[position] = self._rows[index]
            if not self._checked[index]:
                if zlib.crc32(rows[position]) != self._sums[index]:
                    raise self._damaged()
                self._checked[index] = True
        return rows

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the map: pickled, it would be copied whole."""
        return {**self.__dict__, "_rows": None}

    def _map_rows(self) -> np.memmap:
        path = self.folder / "rows.bin"
        if not path.is_file() or path.stat().st_size < len(self._sums) * self.row_bytes:
            raise self._damaged()
        return np.memmap(path, self.dtype, "r", shape=(len(self._sums), *self.shape))

    def _damaged(self) -> ArtifactError:
        return ArtifactError(f"the cache {self.folder} is damaged", hint="remove the folder: vlkit fills it again")

    def _new_blocks(self) -> list[tuple[list[str], list[int]]]:
        path = self.folder / "index.jsonl"
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(self._index_bytes)
            tail = file.read()
        # What follows the last line break was torn by a kill.
        whole = tail[: tail.rfind(b"\n") + 1]
        self._index_bytes += len(whole)
        try:
            blocks = [json.loads(line) for line in whole.splitlines()]
            return [(block["keys"], block["sums"]) for block in blocks]
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None

    def _write(self, keys: list[str], rows: np.ndarray) -> None:
        """Write the rows first, then the line that counts them; cut off before what no line counts."""
        _append(self.folder / "rows.bin", len(self._sums) * self.row_bytes, rows.tobytes())
        block = {"keys": keys, "sums": [zlib.crc32(row) for row in rows]}
        _append(self.folder / "index.jsonl", self._index_bytes, (json.dumps(block) + "\n").encode())
        self.reload()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _append(path: Path, length: int, content: bytes) -> None:
    """Cut the file to its first `length` bytes and flush `content` behind them to the disk."""
    with path.open("ab") as file:
        file.truncate(length)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        fault_injection.fault_point("after fsync", path)
