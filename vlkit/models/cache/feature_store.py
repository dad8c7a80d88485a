"""Rows of numbers on disk, by key: appended to block by block, read through a memory map.

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


def folder_of(cache: str) -> Path:
    """Where features are kept: auto, or the folder that --cache names."""
    return cache_dir() / "features" if cache == "auto" else Path(cache)


class FeatureStore:
    """One folder of rows.

    Attributes:
        shape, dtype: of a row.
    """

    def __init__(self, folder: Path, shape: Sequence[int], dtype: np.dtype, about: dict[str, Any]) -> None:
        """Open the folder; make it where it is not there.

        Args:
            about: what the rows are, for whoever looks into the folder.
        """
        self.folder, self.shape, self.dtype = folder, tuple(shape), np.dtype(dtype)
        self.places, self._sums, self._seen = dict[str, int](), np.zeros(0, np.uint32), 0
        self._checked, self._rows = np.zeros(0, bool), None
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "about.json").is_file():
            told = {**about, "shape": list(self.shape), "dtype": self.dtype.name}
            write_text(folder / "about.json", json_text(told, indent=2) + "\n")
        self.reload()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def reload(self) -> None:
        """Learn what has been written since, by whomever."""
        for keys, sums in self._new_blocks():
            first = len(self._sums)
            self.places |= {key: first + position for position, key in enumerate(keys)}
            self._sums = np.concatenate([self._sums, np.array(sums, np.uint32)])
        fresh = np.zeros(len(self._sums) - len(self._checked), bool)
        self._checked, self._rows = np.concatenate([self._checked, fresh]), None

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions, in `keys`, of what is not here; a key that repeats counts once."""
        first = {key: position for position, key in reversed(list(enumerate(keys)))}
        return sorted(position for key, position in first.items() if key not in self.places)

    def append(self, keys: Sequence[str], rows: np.ndarray) -> None:
        """Write rows [keys, *shape]; they are there, whatever happens, once this returns.

        Raises:
            ResourceError: the disk is full.
        """
        rows = np.ascontiguousarray(rows, self.dtype)
        if rows.shape != (len(keys), *self.shape):
            raise ValueError(f"{len(keys)} rows of {self.shape} wanted, {rows.shape} given")
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

    def read(self, places: Sequence[int]) -> np.ndarray:
        """Rows [places, *shape], copied.

        Raises:
            ArtifactError: a row is not what was written.
        """
        if self._rows is None:
            self._rows = self._mapped()
        rows = np.empty((len(places), *self.shape), self.dtype)
        for position, place in enumerate(places):
            rows[position] = self._rows[place]
            if not self._checked[place]:
                if zlib.crc32(rows[position]) != self._sums[place]:
                    raise self._damaged()
                self._checked[place] = True
        return rows

    def __getstate__(self) -> dict[str, Any]:
        """Without the map: pickled, it would be copied whole."""
        return {**self.__dict__, "_rows": None}

    def _mapped(self) -> np.memmap:
        path = self.folder / "rows.bin"
        if not path.is_file() or path.stat().st_size < len(self._sums) * self.row_bytes:
            raise self._damaged()
        return np.memmap(path, self.dtype, "r", shape=(len(self._sums), *self.shape))

    def _damaged(self) -> ArtifactError:
        return ArtifactError(f"the cache {self.folder} is damaged", hint="remove the folder: it is filled again")

    def _new_blocks(self) -> list[tuple[list[str], list[int]]]:
        path = self.folder / "index.jsonl"
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(self._seen)
            told = file.read()
        # What follows the last line break was torn by a kill.
        whole = told[: told.rfind(b"\n") + 1]
        self._seen += len(whole)
        try:
            blocks = [json.loads(line) for line in whole.splitlines()]
            return [(block["keys"], block["sums"]) for block in blocks]
        except (ValueError, KeyError, TypeError):
            raise self._damaged() from None

    def _write(self, keys: list[str], rows: np.ndarray) -> None:
        """The rows first, then the line that counts them; what stands behind what is counted is cut off before."""
        _appended(self.folder / "rows.bin", len(self._sums) * self.row_bytes, rows.tobytes())
        block = {"keys": keys, "sums": [zlib.crc32(row) for row in rows]}
        _appended(self.folder / "index.jsonl", self._seen, (json.dumps(block) + "\n").encode())
        self.reload()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _appended(path: Path, length: int, content: bytes) -> None:
    """The file's first `length` bytes with `content` behind them, on the disk."""
    with path.open("ab") as file:
        file.truncate(length)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        fault_injection.fault_point("after fsync", path)
