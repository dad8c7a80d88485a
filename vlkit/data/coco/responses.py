"""What a server answers to a request for a file: its bytes, or why there are none, and whether that may pass."""

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

CHUNK = 2**18
BUSY = (408, 425, 429, 500, 502, 503, 504)
WAY_OUT = "--url names a mirror; --from-archive DIR takes archives that are already here"


class Refused(NetworkError):
    """The server answers, but does not give this file: there is none, or it is closed."""


class Broken(Exception):
    """An attempt that failed for a reason that may pass; `wait`: the seconds that the server asked for."""

    def __init__(self, told: str, wait: float | None = None) -> None:
        super().__init__(told)
        self.wait = wait


class Complete(Exception):
    """There is nothing after the bytes that are here; `size`: of the whole file, where the server says so."""

    def __init__(self, size: int | None) -> None:
        self.size = size


def opened(request: urllib.request.Request, timeout: float) -> Any:
    """The answer to a request; what may pass as `Broken`, what will not as an error of the network."""
    request.add_header("User-Agent", f"vlkit/{__version__}")
    name = request.full_url.rpartition("/")[2]
    try:
        # Built anew: it reads the proxies of the environment.
        return urllib.request.build_opener().open(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416:
            whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            raise Complete(int(whole[1]) if whole else None) from None
        if error.code in BUSY:
            told = f"{name}: the server answers {error.code} {error.reason}"
            raise Broken(told, _asked_wait(error.headers.get("Retry-After"))) from None
        told = f"{request.full_url}: the server answers {error.code} {error.reason}"
        raise Refused(told, hint=WAY_OUT) from error
    except (InvalidURL, UnicodeError) as error:
        raise NetworkError(f"{request.full_url} cannot be asked for: {error}", hint=WAY_OUT) from None
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, SSLCertVerificationError):
            told = f"{request.full_url}: the server's certificate is not good: {reason.verify_message}"
            raise NetworkError(told, hint=WAY_OUT) from None
        raise Broken(f"{name}: {_named(reason)}") from None


def chunks_of(response: Any) -> Iterator[bytes]:
    """The bytes of an answer as they come. It may end early: whoever knows the length compares."""
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, HTTPException) as error:
            raise Broken(f"the connection broke: {_named(error)}") from None
        if not chunk:
            return
        yield chunk


def _named(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    return str(reason) or type(reason).__name__


def first_of(chunks: Iterator[bytes]) -> bytes:
    """Enough bytes to know a file by; a slow server sends them one by one."""
    first = b""
    for chunk in chunks:
        first += chunk
        if len(first) >= 8:
            break
    return first


def start_of(response: Any) -> int:
    """The byte that an answer begins at; -1: it is a part, and does not say of what."""
    if response.status != 206:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1


def number(text: str | None) -> int | None:
    """A header's whole number; None where there is none."""
    return int(text) if text is not None and text.strip().isdigit() else None


def _asked_wait(text: str | None) -> float | None:
    """Seconds of a Retry-After, which has seconds or a date."""
    if text is None or number(text) is not None:
        return number(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def words_of(page: bytes) -> str:
    """The first words of a page, without its tags."""
    text = page.decode("utf-8", "replace")
    text = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())[:120]
