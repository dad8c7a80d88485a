"""State of the server: indexes, a queue for each of them, uploads and thumbnails, all within fixed limits."""

from __future__ import annotations

import asyncio
import io
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request

from vlkit.data.images import decode
from vlkit.errors import UsageError, VlkitError
from vlkit.inference.search.search import Query, Searcher, SearchResult
from vlkit.inference.serve.batch_queue import BatchQueue, QueueFull
from vlkit.remote import fetch_by_hash
from vlkit.storage import Location

THUMBNAIL_SIDE, JPEG_QUALITY, CACHED_THUMBNAILS = 320, 82, 2000
# Bytes of uploads held in memory at once; seconds and pixels that one upload may take.
MAX_UPLOADS_HELD, UPLOAD_SECONDS, MAX_PIXELS = 2**28, 30, 24_000_000
# Bytes of a refused upload that are still read and dropped, and the seconds this may take.
MAX_DISCARDED, DISCARD_SECONDS = 2**26, 5


class TooLarge(VlkitError):
    """An upload is larger than the limit."""


class TooSlow(VlkitError):
    """An upload does not arrive in time."""


class ServerState:
    """The indexes behind the app, a queue for each, and the threads that compute and decode for all of them."""

    def __init__(self, searchers: Sequence[Searcher], max_upload: int) -> None:
        """Serve these indexes.

        Args:
            max_upload: largest accepted image, in bytes.
        """
        self.searchers, self.max_upload = list(searchers), max_upload
        names = [searcher.index.name for searcher in searchers]
        paths = [str(searcher.index.location) for searcher in searchers]
        self.names = names if len({*names}) == len(names) else paths
        # One thread computes, because threads that share cores would only slow each other down. Another one decodes.
        self.computing, self.decoding = ThreadPoolExecutor(1, "compute"), ThreadPoolExecutor(1, "decode")
        self.queues: list[BatchQueue[Query, SearchResult]] = [
            BatchQueue(searcher.answer, self.computing) for searcher in searchers
        ]
        self.bytes_held = 0
        self.thumbnails: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    async def search(self, queries: Sequence[Query | None]) -> dict[str, Any]:
        """Search every index with its own form of a query; None skips that index.

        Raises:
            UsageError: no index holds what the query asks for. QueueFull: too many queries wait.
        """
        live = [
            (number, query)
            for number, query in enumerate(queries)
            if query and (query.contents == "both" or query.contents in self.searchers[number].index.vectors)
        ]
        if not live:
            raise UsageError("no index holds any of these")
        answers = await asyncio.gather(*(self.queues[number].submit(query) for number, query in live))
        by_number = dict(zip((number for number, _ in live), answers, strict=True))
        absent = {"notes": ["this index holds none of these"]}
        return {
            "results": [
                {"index": name, **(_with_urls(by_number[number], number) if number in by_number else absent)}
                for number, name in enumerate(self.names)
            ]
        }

    async def check_filters(self, filters: Sequence[str]) -> None:
        """Check that a document in at least one index passes the filters.

        Raises:
            UsageError: no document does.
        """
        refusals: list[UsageError] = []
        for searcher in self.searchers if filters else ():
            try:
                await asyncio.get_running_loop().run_in_executor(self.computing, searcher.check_filters, tuple(filters))
                return
            except UsageError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]

    async def receive_image(self, request: Request) -> list[np.ndarray]:
        """Read an uploaded image, within the limits, and preprocess it for each index: uint8 [3, size, size].

        Raises:
            TooLarge, TooSlow: the upload exceeds its limits. QueueFull: too many uploads at once.
            DataError: it is not an image, or has too many pixels.
        """
        too_large = TooLarge(f"an image may have at most {self.max_upload / 2**20:g} MB", hint="send a smaller one")
        if int(request.headers.get("content-length") or 0) > self.max_upload:
            await _discard(request)
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                async for part in request.stream():
                    content += part
                    self.bytes_held += len(part)
                    if len(content) > self.max_upload:
                        await _discard(request)
                        raise too_large
                    if self.bytes_held > max(MAX_UPLOADS_HELD, self.max_upload):
                        raise QueueFull
            return await asyncio.get_running_loop().run_in_executor(self.decoding, self._decode, bytes(content))
        except ClientDisconnect:
            raise TooSlow("the upload was cut off") from None
        except TimeoutError:
            raise TooSlow(f"the image did not arrive within {UPLOAD_SECONDS} seconds") from None
        finally:
            self.bytes_held -= len(content)

    def _decode(self, content: bytes) -> list[np.ndarray]:
        return [searcher.query_encoder.load_pixels(io.BytesIO(content), MAX_PIXELS) for searcher in self.searchers]

    async def thumbnail(self, number: int, row: int) -> bytes:
        """Return a small JPEG of the image in this row of an index."""
        key = number, row
        if key not in self.thumbnails:
            content = await asyncio.get_running_loop().run_in_executor(self.decoding, self._make_thumbnail, number, row)
            self.thumbnails[key] = content
            while len(self.thumbnails) > CACHED_THUMBNAILS:
                self.thumbnails.popitem(last=False)
        return self.thumbnails[key]

    def _make_thumbnail(self, number: int, row: int) -> bytes:
        location = Location(self.searchers[number].index.column("images", "path")[row].as_py())
        path = fetch_by_hash({location: ""})[location] if location.is_remote else location.path
        image, content = decode.load_rgb(path, max_side=THUMBNAIL_SIDE), io.BytesIO()
        image.save(content, "JPEG", quality=JPEG_QUALITY)
        return content.getvalue()

    def close(self) -> None:
        """Let the threads end."""
        self.computing.shutdown(wait=False, cancel_futures=True)
        self.decoding.shutdown(wait=False, cancel_futures=True)


async def _discard(request: Request) -> None:
    """Read on for a while: a client that is cut off while it sends sees a broken connection instead of the reason."""
    left = MAX_DISCARDED
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DISCARD_SECONDS):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return


def _with_urls(result: SearchResult, number: int) -> dict[str, Any]:
    """Return a result as JSON, each image addressed by its URL on this server."""
    content = result.to_dict()
    for modality in result.hits:
        for hit in content[modality]:
            hit["picture"] = f"/api/pictures/{number}/{hit['row']}" if modality == "images" else None
    return content
