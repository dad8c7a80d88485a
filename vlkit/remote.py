"""s3:// and whatever else fsspec opens: list, fetch, upload.

What is read is kept in a local cache under the object's etag, so that it is fetched once, also when a run dies half
way. A folder is uploaded with its manifest last: a reader that finds no manifest, or one that does not fit the files,
is told so and never reads half.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlkit import console
from vlkit.errors import ArtifactError, DataError, NetworkError, UsageError
from vlkit.storage import Location, cache_dir, json_text, written_whole

MANIFEST = "MANIFEST.json"
# Where a lake's zone, a whole bucket, keeps tables; pictures lie under images/ beside it.
ZONE_TABLES = "datasets"
AT_ONCE = 32
ATTEMPTS = 6


@dataclass(frozen=True)
class Entry:
    """A remote file: its size in bytes, and a stamp that changes with its content."""

    size: int
    stamp: str


class Remote:
    """A folder behind a URL."""

    def __init__(self, location: str) -> None:
        self.location = Location(str(location).rstrip("/"))
        self.fs, self.root = _opened(self.location)

    def listing(self) -> dict[str, Entry]:
        """name -> Entry of every file below, sorted by name.

        Raises:
            NetworkError: it cannot be reached.
        """
        with _told(self.location):
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
        prefix = self.root.rstrip("/") + "/"
        return {
            path.removeprefix(prefix): Entry(int(info["size"] or 0), _stamp(info))
            for path, info in sorted(found.items())
            if path.startswith(prefix)
        }

    def fetch(self, entries: Mapping[str, Entry]) -> dict[str, Path]:
        """Local copies of these files, by name; what is in the cache already is not read again.

        Raises:
            NetworkError: one cannot be read. What was read before it stays.
        """
        places = {name: self._place(name, entry) for name, entry in entries.items()}
        missing = [name for name, place in places.items() if not place.is_file()]
        with console.progress(f"fetching from {self.location}", len(missing)) as bar:
            for start in range(0, len(missing), AT_ONCE):
                self._download({name: places[name] for name in missing[start : start + AT_ONCE]}, entries)
                bar.update(min(start + AT_ONCE, len(missing)))
        return places

    def _place(self, name: str, entry: Entry) -> Path:
        key = hashlib.sha256(f"{self.location}/{name}\0{entry.stamp}\0{entry.size}".encode()).hexdigest()
        return cache_dir() / "objects" / key[:2] / f"{key[2:34]}{PurePosixPath(name).suffix[:12]}"

    def _download(self, places: Mapping[str, Path], entries: Mapping[str, Entry]) -> None:
        with _aside(places) as parts:
            with _told(self.location):
                self.fs.get([f"{self.root}/{name}" for name in parts], [str(part) for part in parts.values()])
            for name, part in parts.items():
                if part.stat().st_size != entries[name].size:
                    raise NetworkError(
                        f"{self.location}/{name}: {part.stat().st_size} of {entries[name].size} bytes came",
                        hint="run the same command again: what was fetched stays",
                    )

    def upload(self, files: Mapping[str, Path], *, manifest: str | None = None) -> None:
        """Write local files under their names, then the manifest of their hashes under `manifest`.

        Raises:
            NetworkError: one cannot be written; the manifest is then missing, and readers refuse the folder.
        """
        entries = {name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for name, path in files.items()}
        names = list(files)
        with _told(self.location):
            if manifest and self.fs.exists(f"{self.root}/{manifest}"):
                self.fs.rm(f"{self.root}/{manifest}")
            with console.progress(f"uploading to {self.location}", len(names)) as bar:
                for start in range(0, len(names), AT_ONCE):
                    some = names[start : start + AT_ONCE]
                    self.fs.put([str(files[name]) for name in some], [f"{self.root}/{name}" for name in some])
                    bar.update(min(start + AT_ONCE, len(names)))
            if manifest:
                content = json_text({"schema": 1, "files": entries}, indent=1) + "\n"
                self.fs.pipe_file(f"{self.root}/{manifest}", content.encode())

    def remove(self, names: Sequence[str]) -> None:
        """Delete files below this folder."""
        with _told(self.location):
            if names:
                self.fs.rm([f"{self.root}/{name}" for name in names])

    def mirrored(self, manifest: str) -> Path:
        """A local folder with the files that `manifest` lists, each verified by its hash, at its place beside it.

        Raises:
            DataError: there is no manifest.
            ArtifactError: a file is not the one that the manifest names.
        """
        listing = self.listing()
        if manifest not in listing:
            hint = "a prepared folder is uploaded with its manifest last: was it interrupted? Run prep again"
            raise DataError(f"{self.location} holds no {manifest}", hint=hint)
        head = self.fetch({manifest: listing[manifest]})[manifest]
        wanted = json.loads(head.read_text(encoding="utf-8"))["files"]
        prefix = manifest.rpartition("/")[0]
        names = {name: f"{prefix}/{name}" if prefix else name for name in wanted}
        if gone := [name for name in names.values() if name not in listing]:
            raise ArtifactError(f"{self.location}: {gone[0]} is missing", hint="write the folder again")
        fetched = self.fetch({name: listing[name] for name in names.values()})
        folder = cache_dir() / "folders" / hashlib.sha256(f"{self.location}{_hash(head)}".encode()).hexdigest()[:32]
        for name, full in names.items():
            if _hash(fetched[full]) != wanted[name]["sha256"]:
                told = f"{self.location}/{full} is not the file that {manifest} names"
                raise ArtifactError(told, hint="it is being written, or was half written: write the folder again")
            if not (folder / full).is_file():
                with written_whole(folder / full) as aside:
                    aside.write_bytes(fetched[full].read_bytes())
        return folder


def local_folder(location: Location | Path | str) -> Path:
    """A folder to read from: a local one as it is, of a remote one the verified copy of what its manifest lists.

    Raises:
        DataError: there is no manifest. ArtifactError: a file is not the one it names. NetworkError.
    """
    location = Location(location)
    if not location.is_remote:
        return location.path
    remote = Remote(location)
    return remote.mirrored(f"{ZONE_TABLES}/{MANIFEST}" if location.is_bucket else MANIFEST)


def fetch_by_hash(urls: Mapping[str, str]) -> dict[str, Path]:
    """Local copies of pictures, kept under the hash of their bytes.

    Args:
        urls: URL -> the first digits of its content's SHA-256; none: it is not verified.

    Raises:
        DataError: a file has changed.
    """
    keys = {url: digits or f"url-{hashlib.sha256(url.encode()).hexdigest()[:32]}" for url, digits in urls.items()}
    places = {url: cache_dir() / "pictures" / key[:2] / key for url, key in keys.items()}
    missing = [url for url, place in places.items() if not place.is_file()]
    with console.progress("fetching pictures", len(missing)) as bar:
        for start in range(0, len(missing), AT_ONCE):
            some = missing[start : start + AT_ONCE]
            location = Location(some[0])
            fs, _ = _opened(location)
            with _aside({url: places[url] for url in some}) as parts:
                with _told(location):
                    fs.get([fs._strip_protocol(url) for url in parts], [str(part) for part in parts.values()])
                for url, part in parts.items():
                    if not _hash(part).startswith(urls[url]):
                        told = f"{url} is not the picture that prep read"
                        raise DataError(told, hint="it has changed since: run prep again")
            bar.update(min(start + AT_ONCE, len(missing)))
    return places


@contextmanager
def _aside(places: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Paths to download to; renamed to their places when the block ends well, removed when not."""
    parts = {name: place.with_name(f".{place.name}.{os.getpid()}.part") for name, place in places.items()}
    for part in parts.values():
        part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield parts
        for name, part in parts.items():
            os.replace(part, places[name])
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _stamp(info: Mapping[str, Any]) -> str:
    known = next(
        (info[key] for key in ("ETag", "etag", "md5", "LastModified", "mtime", "created") if info.get(key)), ""
    )
    return str(known).strip('"')


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(location: Location) -> tuple[Any, str]:
    """fsspec's filesystem and the path in it."""
    import fsspec

    protocol = location.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(location, **(_s3_options() if protocol == "s3" else {}))
    except ImportError:
        hint = "pip install 'vlkit[s3]'" if protocol == "s3" else f"install what fsspec needs for {protocol}://"
        raise UsageError(f"{location}: {protocol}:// needs another package", hint=hint) from None
    except ValueError as error:
        raise UsageError(f"{location}: {error}") from None


def _s3_options() -> dict[str, Any]:
    """AWS' own variables are read by its client; those of MinIO are translated here."""
    options: dict[str, Any] = {
        "use_listings_cache": False,
        "config_kwargs": {"retries": {"max_attempts": ATTEMPTS, "mode": "standard"}},
    }
    endpoint = os.environ.get("MINIO_ENDPOINT")
    if endpoint and not (os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3")):
        options["endpoint_url"] = endpoint if "://" in endpoint else f"http://{endpoint}"
    if os.environ.get("MINIO_USER") and not os.environ.get("AWS_ACCESS_KEY_ID"):
        options |= {"key": os.environ["MINIO_USER"], "secret": os.environ.get("MINIO_PASSWORD", "")}
    return options


@contextmanager
def _told(location: Location) -> Iterator[None]:
    """What the storage's client raises, as one of ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{location}: no such bucket or file: {error}") from None
    except PermissionError as error:
        hint = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MINIO_USER and MINIO_PASSWORD, say who you are"
        raise NetworkError(f"{location}: access denied: {error}", hint=hint) from None
    except Exception as error:
        if not _of_the_network(error):
            raise
        hint = "AWS_ENDPOINT_URL or MINIO_ENDPOINT names another server than Amazon's; run the same command again"
        raise NetworkError(f"{location}: {type(error).__name__}: {error}", hint=hint) from None


def _of_the_network(error: Exception) -> bool:
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.split(".")[0] in (
        "botocore",
        "aiobotocore",
        "aiohttp",
        "s3fs",
    )
