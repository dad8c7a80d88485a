"""s3:// and whatever else fsspec opens: list, fetch, upload.

What is read is kept in a local cache under the object's etag, so that it is fetched once, also when a run dies half
way. A folder is uploaded with its manifest last: a reader that finds no manifest, or one that does not fit the files,
is told so and never reads half.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from vlkit import console, fault_injection
from vlkit.errors import ArtifactError, DataError, NetworkError, UsageError
from vlkit.storage import Location, cache_dir, json_text, atomic_file

MANIFEST, VERSIONS = "MANIFEST.json", ".versions"
# Where a lake's zone, a whole bucket, keeps tables; pictures lie under images/ beside it.
ZONE_TABLES = "datasets"
FILES_AT_ONCE = 32
MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class RemoteFile:
    """A remote file: its size in bytes, and a stamp that changes with its content."""

    size: int
    stamp: str


class Remote:
    """A folder behind a URL."""

    def __init__(self, location: str) -> None:
        self.location = Location(str(location).rstrip("/"))
        self.fs, self.root = _open_filesystem(self.location)

    def listing(self) -> dict[str, RemoteFile]:
        """name -> Entry of every file below, sorted by name.

        Raises:
            NetworkError: it cannot be reached.
        """
        with _translate_errors(self.location):
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
        prefix = self.root.rstrip("/") + "/"
        return {
            path.removeprefix(prefix): RemoteFile(int(info["size"] or 0), _stamp(info))
            for path, info in sorted(found.items())
            if path.startswith(prefix) and not path.endswith("/") and _stays_inside(path.removeprefix(prefix))
        }

    def fetch(self, entries: Mapping[str, RemoteFile]) -> dict[str, Path]:
        """Local copies of these files, by name; what is in the cache already is not read again.

        Raises:
            NetworkError: one cannot be read. What was read before it stays.
        """
        places = {name: self._place(name, entry) for name, entry in entries.items()}
        missing = [name for name, place in places.items() if not place.is_file()]
        with console.progress(f"fetching from {self.location}", len(missing)) as bar:
            for start in range(0, len(missing), FILES_AT_ONCE):
                self._download({name: places[name] for name in missing[start : start + FILES_AT_ONCE]}, entries)
                bar.update(min(start + FILES_AT_ONCE, len(missing)))
        return places

    def _place(self, name: str, entry: RemoteFile) -> Path:
        key = hashlib.sha256(f"{self.location}/{name}\0{entry.stamp}\0{entry.size}".encode()).hexdigest()
        return cache_dir() / "objects" / key[:2] / f"{key[2:34]}{PurePosixPath(name).suffix[:12]}"

    def _download(self, places: Mapping[str, Path], entries: Mapping[str, RemoteFile]) -> None:
        with _atomic_downloads(places) as parts:
            with _translate_errors(self.location):
                self.fs.get([f"{self.root}/{name}" for name in parts], [str(part) for part in parts.values()])
            for name, part in parts.items():
                if part.stat().st_size != entries[name].size:
                    raise NetworkError(
                        f"{self.location}/{name}: {part.stat().st_size} of {entries[name].size} bytes came",
                        hint="run the same command again: what was fetched stays",
                    )

    def upload(self, files: Mapping[str, Path]) -> None:
        """Write local files under their names, many at a time.

        Raises:
            NetworkError: one cannot be written.
        """
        names = list(files)
        with _translate_errors(self.location), console.progress(f"uploading to {self.location}", len(names)) as bar:
            for start in range(0, len(names), FILES_AT_ONCE):
                some = names[start : start + FILES_AT_ONCE]
                self.fs.put([str(files[name]) for name in some], [f"{self.root}/{name}" for name in some])
                bar.update(min(start + FILES_AT_ONCE, len(names)))

    def replace(self, files: Mapping[str, Path], manifest: str) -> None:
        """Put a set of files in the place of an older one; readers of the manifest have the old set until the end.

        Each set lies under a name of its own, which the manifest gives; the plain names beside it are for people and
        other tools. The manifest changes last, then the old set goes.
        """
        before = self.listing()
        old = self.read_manifest(manifest, before) if manifest in before else {}
        hashes = {name: file_sha256(path) for name, path in files.items()}
        version = f"{VERSIONS}/{hashlib.sha256(json_text(hashes).encode()).hexdigest()[:20]}"
        self.upload({f"{version}/{name}": path for name, path in files.items()})
        self.upload(files)
        self.write_manifest(manifest, {f"{version}/{name}": digits for name, digits in hashes.items()})
        there = self.listing()
        gone = {name.rpartition("/")[2] for name in old} - files.keys()
        stale = [each for each in there if each.startswith(f"{VERSIONS}/") and not each.startswith(version)]
        self.remove([*stale, *(name for name in gone if name in there)])

    def write_manifest(self, name: str, hashes: Mapping[str, str]) -> None:
        """Say which files belong together: name -> SHA-256."""
        content = (
            json_text({"schema": 1, "files": {each: {"sha256": hashes[each]} for each in hashes}}, indent=1) + "\n"
        )
        with _translate_errors(self.location):
            self.fs.pipe_file(f"{self.root}/{name}", content.encode())

    def read_manifest(self, name: str, listing: Mapping[str, RemoteFile]) -> dict[str, str]:
        """name -> SHA-256 of the files that belong together.

        Raises:
            ArtifactError: it is damaged, or names a file outside its folder.
        """
        path = self.fetch({name: listing[name]})[name]
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["files"]
            hashes = {str(each): str(files[each]["sha256"]) for each in files}
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(f"{self.location}/{name} is damaged", hint="write the folder again") from None
        if odd := [each for each in hashes if not _stays_inside(each)]:
            raise ArtifactError(f"{self.location}/{name} names {odd[0]!r}, which leads out of the folder")
        return hashes

    def remove(self, names: Sequence[str]) -> None:
        """Delete files below this folder."""
        with _translate_errors(self.location):
            if names:
                self.fs.rm([f"{self.root}/{name}" for name in names])

    def download_verified(self, manifest: str) -> Path:
        """A local folder with the files that `manifest` lists, each verified by its hash, under its plain name.

        Raises:
            DataError: there is no manifest.
            ArtifactError: a file is not the one that the manifest names.
        """
        listing = self.listing()
        if manifest not in listing:
            hint = "a prepared folder is uploaded with its manifest last: was it interrupted? Run prep again"
            raise DataError(f"{self.location} holds no {manifest}", hint=hint)
        wanted = self.read_manifest(manifest, listing)
        prefix = manifest.rpartition("/")[0]
        names = {name: f"{prefix}/{name}" if prefix else name for name in wanted}
        if gone := [name for name in names.values() if name not in listing]:
            raise ArtifactError(f"{self.location}: {gone[0]} is missing", hint="write the folder again")
        fetched = self.fetch({name: listing[name] for name in names.values()})
        key = json_text([self.location, wanted])
        folder = cache_dir() / "folders" / hashlib.sha256(key.encode()).hexdigest()[:32]
        for name, full in names.items():
            if file_sha256(fetched[full]) != wanted[name]:
                told = f"{self.location}/{full} is not the file that {manifest} names"
                raise ArtifactError(told, hint="it is being written, or was half written: write the folder again")
            plain = folder / prefix / name.rpartition("/")[2]
            if not plain.is_file():
                with atomic_file(plain) as aside:
                    aside.write_bytes(fetched[full].read_bytes())
        return folder


def tables_location(location: Location) -> Location:
    """Where a remote prepared folder has its tables: a lake's zone keeps them apart from its pictures."""
    return location / ZONE_TABLES if location.is_bucket else location


def local_folder(location: Location | Path | str) -> Path:
    """A folder to read from: a local one as it is, of a remote one the verified copy of what its manifest lists.

    Raises:
        DataError: there is no manifest. ArtifactError: a file is not the one it names. NetworkError.
    """
    location = Location(location)
    if not location.is_remote:
        return location.path
    remote = Remote(location)
    return remote.download_verified(f"{ZONE_TABLES}/{MANIFEST}" if location.is_bucket else MANIFEST)


def fetch_by_hash(urls: Mapping[str, str]) -> dict[str, Path]:
    """Local copies of pictures, kept under the hash of their bytes.

    Args:
        urls: URL -> the first digits of its content's SHA-256; none: it is not verified.

    Raises:
        DataError: a file has changed.
    """
    keys = {url: digits or f"url-{hashlib.sha256(url.encode()).hexdigest()[:32]}" for url, digits in urls.items()}
    places = {url: cache_dir() / "pictures" / key[:2] / key for url, key in keys.items()}
    # Copies under several URLs are fetched once.
    missing = list({place: url for url, place in places.items() if not place.is_file()}.values())
    with console.progress("fetching pictures", len(missing)) as bar:
        for start in range(0, len(missing), FILES_AT_ONCE):
            some = missing[start : start + FILES_AT_ONCE]
            location = Location(some[0])
            opened = [_open_filesystem(Location(url)) for url in some]
            with _atomic_downloads({url: places[url] for url in some}) as parts:
                with _translate_errors(location):
                    opened[0][0].get([path for _, path in opened], [str(part) for part in parts.values()])
                for url, part in parts.items():
                    if not file_sha256(part).startswith(urls[url]):
                        told = f"{url} is not the picture that prep read"
                        raise DataError(told, hint="it has changed since: run prep again")
            bar.update(min(start + FILES_AT_ONCE, len(missing)))
    return places


@contextmanager
def _atomic_downloads(places: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Paths to download to; renamed to their places when the block ends well, removed when not."""
    parts = {name: place.with_name(f".{place.name}.{os.getpid()}.part") for name, place in places.items()}
    for part in parts.values():
        part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield parts
        for name, part in parts.items():
            fault_injection.fault_point("before rename", places[name])
            os.replace(part, places[name])
            fault_injection.fault_point("after rename", places[name])
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _stamp(info: Mapping[str, Any]) -> str:
    known = next(
        (info[key] for key in ("ETag", "etag", "md5", "LastModified", "mtime", "created") if info.get(key)), ""
    )
    return str(known).strip('"')


def _stays_inside(name: str) -> bool:
    """A name below its folder, as a local path too."""
    return bool(name) and not any(part in ("", ".", "..") for part in name.split("/"))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_filesystem(location: Location) -> tuple[Any, str]:
    """fsspec's filesystem and the path in it."""
    import fsspec

    protocol = location.split("://", 1)[0]
    try:
        fs, root = fsspec.core.url_to_fs(location, **(_s3_options() if protocol == "s3" else {}))
        if protocol == "s3":
            fs.retries = 1  # Its client tries again already; both together would take minutes to give up.
        return fs, root
    except ImportError:
        hint = "pip install 'vlkit[s3]'" if protocol == "s3" else f"install what fsspec needs for {protocol}://"
        raise UsageError(f"{location}: {protocol}:// needs another package", hint=hint) from None
    except ValueError as error:
        raise UsageError(f"{location}: {error}") from None


def _s3_options() -> dict[str, Any]:
    """AWS' own variables are read by its client; those of MinIO are translated here."""
    options: dict[str, Any] = {
        "use_listings_cache": False,
        "config_kwargs": {
            "retries": {"max_attempts": MAX_ATTEMPTS, "mode": "standard"},
            "connect_timeout": 5,
            "read_timeout": 20,
        },
    }
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MINIO_ENDPOINT")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if endpoint:
        options["endpoint_url"] = endpoint if "://" in endpoint else f"http://{endpoint}"
    if os.environ.get("MINIO_USER") and not os.environ.get("AWS_ACCESS_KEY_ID"):
        options |= {"key": os.environ["MINIO_USER"], "secret": os.environ.get("MINIO_PASSWORD", "")}
    return options


@contextmanager
def _translate_errors(location: Location) -> Iterator[None]:
    """What the storage's client raises, as one of ours."""
    try:
        yield
    except OSError as error:
        # A local file's error has its name; the client's have none.
        if error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        _raise_translated(location, error)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp", "s3fs"):
            raise
        _raise_translated(location, error)


def _raise_translated(location: Location, error: Exception) -> NoReturn:
    if isinstance(error, FileNotFoundError):
        raise DataError(f"{location}: no such bucket or file: {error}") from None
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        hint = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MINIO_USER and MINIO_PASSWORD, say who you are"
        raise NetworkError(f"{location}: access denied: {error}", hint=hint) from None
    hint = "AWS_ENDPOINT_URL or MINIO_ENDPOINT names another server than Amazon's; run the same command again"
    raise NetworkError(f"{location}: {type(error).__name__}: {error}", hint=hint) from None
