"""List, fetch and upload files at s3:// and every other URL that fsspec opens.

Fetched files are cached locally under the object's etag, so that each is fetched once, even if a run dies half way. A
folder is uploaded with its manifest last: a reader refuses a folder without a manifest, or with one that does not fit
the files, and never reads half of it.
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
from vlkit.storage import Location, atomic_file, cache_dir, json_text

MANIFEST, VERSIONS = "MANIFEST.json", ".versions"
# The folder of tables in a lake's zone, which is a whole bucket; images are in images/ beside it.
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
        """Return name -> `RemoteFile` of every file below, sorted by name.

        Raises:
            NetworkError: it cannot be reached.
        """
        with _translate_errors(self.location):
            self.fs.invalidate_cache()
            infos = self.fs.find(self.root, detail=True)
        prefix = self.root.rstrip("/") + "/"
        return {
            path.removeprefix(prefix): RemoteFile(int(info["size"] or 0), _stamp(info))
            for path, info in sorted(infos.items())
            if path.startswith(prefix) and not path.endswith("/") and _stays_inside(path.removeprefix(prefix))
        }

    def fetch(self, entries: Mapping[str, RemoteFile]) -> dict[str, Path]:
        """Return local copies of these files, by name; cached ones are not read again.

        Raises:
            NetworkError: one cannot be read. Those read before it stay in the cache.
        """
        paths = {name: self._cache_path(name, entry) for name, entry in entries.items()}
        missing = [name for name, path in paths.items() if not path.is_file()]
        with console.progress(f"fetching from {self.location}", len(missing)) as bar:
            for start in range(0, len(missing), FILES_AT_ONCE):
                self._download({name: paths[name] for name in missing[start : start + FILES_AT_ONCE]}, entries)
                bar.update(min(start + FILES_AT_ONCE, len(missing)))
        return paths

    def _cache_path(self, name: str, entry: RemoteFile) -> Path:
        key = hashlib.sha256(f"{self.location}/{name}\0{entry.stamp}\0{entry.size}".encode()).hexdigest()
        return cache_dir() / "objects" / key[:2] / f"{key[2:34]}{PurePosixPath(name).suffix[:12]}"

    def _download(self, paths: Mapping[str, Path], entries: Mapping[str, RemoteFile]) -> None:
        with _atomic_downloads(paths) as parts:
            with _translate_errors(self.location):
                self.fs.get([f"{self.root}/{name}" for name in parts], [str(part) for part in parts.values()])
            for name, part in parts.items():
                if part.stat().st_size != entries[name].size:
                    raise NetworkError(
                        f"{self.location}/{name}: received {part.stat().st_size} of {entries[name].size} bytes",
                        hint="run the same command again; fetched files are kept",
                    )

    def upload(self, files: Mapping[str, Path]) -> None:
        """Write local files under their names, many at a time.

        Raises:
            NetworkError: one cannot be written.
        """
        names = list(files)
        with _translate_errors(self.location), console.progress(f"uploading to {self.location}", len(names)) as bar:
            for start in range(0, len(names), FILES_AT_ONCE):
                batch = names[start : start + FILES_AT_ONCE]
                self.fs.put([str(files[name]) for name in batch], [f"{self.root}/{name}" for name in batch])
                bar.update(min(start + FILES_AT_ONCE, len(names)))

    def replace(self, files: Mapping[str, Path], manifest: str) -> None:
        """Replace an older set of files; readers of the manifest see the old set until the end.

        Each set is stored in a folder of its own, which the manifest names; copies under plain names are for people and
        other tools. The manifest changes last; then the old set is removed.
        """
        before = self.listing()
        old = self.read_manifest(manifest, before) if manifest in before else {}
        hashes = {name: file_sha256(path) for name, path in files.items()}
        version = f"{VERSIONS}/{hashlib.sha256(json_text(hashes).encode()).hexdigest()[:20]}"
        self.upload({f"{version}/{name}": path for name, path in files.items()})
        self.upload(files)
        self.write_manifest(manifest, {f"{version}/{name}": digits for name, digits in hashes.items()})
        listing = self.listing()
        removed = {name.rpartition("/")[2] for name in old} - files.keys()
        stale = [name for name in listing if name.startswith(f"{VERSIONS}/") and not name.startswith(version)]
        self.remove([*stale, *(name for name in removed if name in listing)])

    def write_manifest(self, name: str, hashes: Mapping[str, str]) -> None:
        """Write which files belong together: name -> SHA-256."""
        files = {file: {"sha256": digits} for file, digits in hashes.items()}
        content = json_text({"schema": 1, "files": files}, indent=1) + "\n"
        with _translate_errors(self.location):
            self.fs.pipe_file(f"{self.root}/{name}", content.encode())

    def read_manifest(self, name: str, listing: Mapping[str, RemoteFile]) -> dict[str, str]:
        """Read which files belong together: name -> SHA-256.

        Raises:
            ArtifactError: it is damaged, or names a file outside of its folder.
        """
        path = self.fetch({name: listing[name]})[name]
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["files"]
            hashes = {str(file): str(files[file]["sha256"]) for file in files}
        except (ValueError, KeyError, TypeError):
            raise ArtifactError(f"{self.location}/{name} is damaged", hint="write the folder again") from None
        if outside := [file for file in hashes if not _stays_inside(file)]:
            raise ArtifactError(f"{self.location}/{name} names {outside[0]!r}, which is outside of the folder")
        return hashes

    def remove(self, names: Sequence[str]) -> None:
        """Delete files below this folder."""
        with _translate_errors(self.location):
            if names:
                self.fs.rm([f"{self.root}/{name}" for name in names])

    def download_verified(self, manifest: str) -> Path:
        """Return a local folder with the files that `manifest` lists, each verified by its hash, under its plain name.

        Raises:
            DataError: there is no manifest.
            ArtifactError: a file is missing, or not the one that the manifest lists.
        """
        listing = self.listing()
        if manifest not in listing:
            hint = "the manifest is uploaded last: if the upload was interrupted, run prep again"
            raise DataError(f"{self.location} has no {manifest}", hint=hint)
        hashes = self.read_manifest(manifest, listing)
        prefix = manifest.rpartition("/")[0]
        names = {name: f"{prefix}/{name}" if prefix else name for name in hashes}
        if missing := [name for name in names.values() if name not in listing]:
            raise ArtifactError(f"{self.location}: {missing[0]} is missing", hint="write the folder again")
        paths = self.fetch({name: listing[name] for name in names.values()})
        key = json_text([self.location, hashes])
        folder = cache_dir() / "folders" / hashlib.sha256(key.encode()).hexdigest()[:32]
        for name, full in names.items():
            if file_sha256(paths[full]) != hashes[name]:
                message = f"{self.location}/{full} is not the file that {manifest} lists"
                raise ArtifactError(message, hint="the folder is being written, or is half written: write it again")
            plain = folder / prefix / name.rpartition("/")[2]
            if not plain.is_file():
                with atomic_file(plain) as aside:
                    aside.write_bytes(paths[full].read_bytes())
        return folder


def tables_location(location: Location) -> Location:
    """Return where a remote prepared folder has its tables; in a lake's zone they are in a folder of their own."""
    return location / ZONE_TABLES if location.is_bucket else location


def local_folder(location: Location | Path | str) -> Path:
    """Return a folder to read from: a local one itself, or a verified copy of a remote one.

    Raises:
        DataError: there is no manifest.
        ArtifactError: a file is not the one that the manifest lists.
        NetworkError: it cannot be reached.
    """
    location = Location(location)
    if not location.is_remote:
        return location.path
    remote = Remote(location)
    return remote.download_verified(f"{ZONE_TABLES}/{MANIFEST}" if location.is_bucket else MANIFEST)


def fetch_by_hash(urls: Mapping[str, str]) -> dict[str, Path]:
    """Return local copies of images, cached under the hash of their bytes.

    Args:
        urls: URL -> the first digits of its content's SHA-256; "": do not verify it.

    Raises:
        DataError: a file has changed.
    """
    keys = {url: digits or f"url-{hashlib.sha256(url.encode()).hexdigest()[:32]}" for url, digits in urls.items()}
    paths = {url: cache_dir() / "pictures" / key[:2] / key for url, key in keys.items()}
    # Copies under several URLs are fetched once.
    missing = list({path: url for url, path in paths.items() if not path.is_file()}.values())
    with console.progress("fetching images", len(missing)) as bar:
        for start in range(0, len(missing), FILES_AT_ONCE):
            batch = missing[start : start + FILES_AT_ONCE]
            filesystems = [_open_filesystem(Location(url)) for url in batch]
            with _atomic_downloads({url: paths[url] for url in batch}) as parts:
                with _translate_errors(Location(batch[0])):
                    fs = filesystems[0][0]
                    fs.get([path for _, path in filesystems], [str(part) for part in parts.values()])
                for url, part in parts.items():
                    if not file_sha256(part).startswith(urls[url]):
                        raise DataError(f"{url} has changed since prep read it", hint="run prep again")
            bar.update(min(start + FILES_AT_ONCE, len(missing)))
    return paths


@contextmanager
def _atomic_downloads(paths: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Yield temporary paths to download to; rename them to `paths` if the block succeeds, else remove them."""
    parts = {name: path.with_name(f".{path.name}.{os.getpid()}.part") for name, path in paths.items()}
    for part in parts.values():
        part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield parts
        for name, part in parts.items():
            fault_injection.fault_point("before rename", paths[name])
            os.replace(part, paths[name])
            fault_injection.fault_point("after rename", paths[name])
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _stamp(info: Mapping[str, Any]) -> str:
    known = next(
        (info[key] for key in ("ETag", "etag", "md5", "LastModified", "mtime", "created") if info.get(key)), ""
    )
    return str(known).strip('"')


def _stays_inside(name: str) -> bool:
    """Return whether a name stays below its folder, as a local path too."""
    return bool(name) and not any(part in ("", ".", "..") for part in name.split("/"))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_filesystem(location: Location) -> tuple[Any, str]:
    """Return fsspec's filesystem and the path in it."""
    import fsspec

    protocol = location.split("://", 1)[0]
    try:
        fs, root = fsspec.core.url_to_fs(location, **(_s3_options() if protocol == "s3" else {}))
        if protocol == "s3":
            fs.retries = 1  # Its client retries already; both together would take minutes to give up.
        return fs, root
    except ImportError:
        hint = (
            "pip install 'vlkit[s3]'"
            if protocol == "s3"
            else f"install the package that fsspec needs for {protocol}://"
        )
        raise UsageError(f"{location}: {protocol}:// needs another package", hint=hint) from None
    except ValueError as error:
        raise UsageError(f"{location}: {error}") from None


def _s3_options() -> dict[str, Any]:
    """Return options of s3fs; its client reads AWS' own variables, those of MinIO are translated here."""
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
    """Translate what the storage's client raises into vlkit's errors."""
    try:
        yield
    except OSError as error:
        # The error of a local file has its name; the client's have none.
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
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MINIO_USER and MINIO_PASSWORD"
        raise NetworkError(f"{location}: access denied: {error}", hint=hint) from None
    hint = "run the same command again; for a server other than Amazon's set AWS_ENDPOINT_URL or MINIO_ENDPOINT"
    raise NetworkError(f"{location}: {type(error).__name__}: {error}", hint=hint) from None
