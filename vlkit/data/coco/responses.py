"""Read a server's response to a request for a file: its bytes, or why there are none and whether to try again."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.client import HTTPException, InvalidURL
from ssl import SSLCertVerificationError
from typing import Any
from urllib.error import HTTPError, URLError

from vlkit import __version__
from vlkit.errors import NetworkError

CHUNK_BYTES = 2**18
# Enough first bytes to recognise a file.
HEAD_BYTES = 8
# Status codes after which another attempt may succeed.
RETRY_CODES = (408, 425, 429, 500, 502, 503, 504)
OTHER_SOURCES = "--url names a mirror; --from-archive DIR takes archives that are already here"


class FileRefused(NetworkError):
    """The server answers, but does not give this file: it does not exist, or access is denied."""


class TransientError(Exception):
    """An attempt failed for a reason that may pass; `wait`: the seconds that the server asks for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class NothingLeft(Exception):
    """The server has no bytes after the local ones; `size`: of the whole file, where the server says so."""

    def __init__(self, size: int | None) -> None:
        self.size = size


def open_url(request: urllib.request.Request, timeout: float) -> Any:
    """Open a request and return the response.

    Raises:
        TransientError: another attempt may succeed.
        NothingLeft: the requested range starts at the end of the file.
        FileRefused, NetworkError: another attempt is useless.
    """
    request.add_header("User-Agent", f"vlkit/{__version__}")
    name = request.full_url.rpartition("/")[2]
    try:
        # A new opener reads the proxies of the environment as they are now.
        return urllib.request.build_opener().open(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416:
            match = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            raise NothingLeft(int(match[1]) if match else None) from None
        if error.code in RETRY_CODES:
            message = f"{name}: the server answers {error.code} {error.reason}"
            raise TransientError(message, _parse_retry_after(error.headers.get("Retry-After"))) from None
        message = f"{request.full_url}: the server answers {error.code} {error.reason}"
        raise FileRefused(message, hint=OTHER_SOURCES) from error
    except (InvalidURL, UnicodeError) as error:
        raise NetworkError(f"{request.full_url} is not a valid address: {error}", hint=OTHER_SOURCES) from None
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, SSLCertVerificationError):
            message = f"{request.full_url}: the server's certificate is not valid: {reason.verify_message}"
            raise NetworkError(message, hint=OTHER_SOURCES) from None
        raise TransientError(f"{name}: {_describe(reason)}") from None


def iter_chunks(response: Any) -> Iterator[bytes]:
    """Yield the bytes of a response as they arrive. It may end early: the caller compares with the length."""
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)
        except (OSError, HTTPException) as error:
            raise TransientError(f"the connection broke: {_describe(error)}") from None
        if not chunk:
            return
        yield chunk


def _describe(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    return str(reason) or type(reason).__name__


def read_head(chunks: Iterator[bytes]) -> bytes:
    """Return at least the first `HEAD_BYTES` bytes; a slow server sends them one by one."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    return head


def range_start(response: Any) -> int:
    """Return the position of a response's first byte in the file; -1 for a part that does not say which."""
    if response.status != 206:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else -1


def parse_number(text: str | None) -> int | None:
    """Return a header's whole number; None if absent."""
    return int(text) if text is not None and text.strip().isdigit() else None


def _parse_retry_after(text: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which holds seconds or a date."""
    if text is None or parse_number(text) is not None:
        return parse_number(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def visible_text(page: bytes) -> str:
    """Return the first words of a page, without its tags."""
    text = page.decode("utf-8", "replace")
    text = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:120]
