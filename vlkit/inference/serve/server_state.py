"""Behind the page: the indexes, the queues in front of them, uploads and thumbnails, each within its limits."""

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
from vlkit.inference.search.search import Answer, Ask, Searcher
from vlkit.inference.serve.batch_queue import Full, Waiting
from vlkit.remote import fetch_by_hash
from vlkit.storage import Location

THUMBNAIL, QUALITY, KEPT_THUMBNAILS = 320, 82, 2000
# Bytes of uploads that are held in memory at once, the time that one may take, and its pixels.
MOST_HELD, UPLOAD_SECONDS, MOST_PIXELS = 2**28, 30, 24_000_000


# Bytes that are still read, and forgotten, of an upload that is refused; and seconds that this may take.
MOST_THROWN_AWAY, PATIENCE = 2**26, 5


class TooLarge(VlkitError):
    """An upload beyond the limit."""


class TooSlow(VlkitError):
    """An upload that does not end."""


class Served:
    """The indexes behind the app, their queues, and the thread that works for all of them."""

    def __init__(self, searchers: Sequence[Searcher], max_upload: int) -> None:
        """Serve these.

        Args:
            max_upload: bytes that a picture may have.
        """
        self.searchers, self.max_upload = list(searchers), max_upload
        names, places = [each.index.name for each in searchers], [str(each.index.location) for each in searchers]
        self.names = names if len({*names}) == len(names) else places
        # One thread computes: threads that take turns on the same cores would only be slower. Another one decodes.
        self.computing, self.decoding = ThreadPoolExecutor(1, "compute"), ThreadPoolExecutor(1, "decode")
        self.queues: list[Waiting[Ask, Answer]] = [Waiting(each.answer, self.computing) for each in searchers]
        self.held = 0
        self.thumbnails: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    async def ask(self, asks: Sequence[Ask | None]) -> dict[str, Any]:
        """The answer of every index to its own form of a query; None: it has none to give."""
        held = [each.index.nearest for each in self.searchers]
        live = [
            (number, ask) for number, ask in enumerate(asks) if ask and (ask.of == "both" or ask.of in held[number])
        ]
        if not live:
            raise UsageError("no index holds any of these")
        answers = await asyncio.gather(*(self.queues[number](ask) for number, ask in live))
        by_number = dict(zip((number for number, _ in live), answers, strict=True))
        absent = {"notes": ["this index holds none of these"]}
        return {
            "results": [
                {"index": self.names[number], **(_given(by_number[number], number) if number in by_number else absent)}
                for number, each in enumerate(self.searchers)
            ]
        }

    async def check(self, filters: Sequence[str]) -> None:
        """Refuse a filter that nothing passes in any index."""
        refusals: list[UsageError] = []
        for each in self.searchers if filters else ():
            try:
                await asyncio.get_running_loop().run_in_executor(self.computing, each.check, tuple(filters))
                return
            except UsageError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]

    async def received(self, request: Request) -> list[np.ndarray]:
        """An upload, as each model sees it; never more of it is held than is allowed.

        Raises:
            TooLarge, TooSlow: there is more, or it does not come. Full: too many come at once.
            DataError: it is no picture, or one of too many pixels.
        """
        told = TooLarge(f"a picture may have {self.max_upload / 2**20:g} MB", hint="send a smaller one")
        if int(request.headers.get("content-length") or 0) > self.max_upload:
            await _thrown_away(request)
            raise told
        content = bytearray()
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                async for part in request.stream():
                    content += part
                    self.held += len(part)
                    if len(content) > self.max_upload:
                        await _thrown_away(request)
                        raise told
                    if self.held > max(MOST_HELD, self.max_upload):
                        raise Full
            return await asyncio.get_running_loop().run_in_executor(self.decoding, self._decoded, bytes(content))
        except ClientDisconnect:
            raise TooSlow("the upload broke off") from None
        except TimeoutError:
            raise TooSlow(f"the picture did not come within {UPLOAD_SECONDS} seconds") from None
        finally:
            self.held -= len(content)

    def _decoded(self, content: bytes) -> list[np.ndarray]:
        return [each.embedder.pixels(io.BytesIO(content), MOST_PIXELS) for each in self.searchers]

    async def thumbnail(self, number: int, row: int) -> bytes:
        """A small JPEG of a picture that an index lists."""
        key = number, row
        if key not in self.thumbnails:
            made = await asyncio.get_running_loop().run_in_executor(self.decoding, self._thumbnail, number, row)
            self.thumbnails[key] = made
            while len(self.thumbnails) > KEPT_THUMBNAILS:
                self.thumbnails.popitem(last=False)
        return self.thumbnails[key]

    def _thumbnail(self, number: int, row: int) -> bytes:
        place = Location(self.searchers[number].index.column("images", "path")[row].as_py())
        file = fetch_by_hash({place: ""})[place] if place.is_remote else place.path
        picture, packed = decode.upright(file, at_most=THUMBNAIL), io.BytesIO()
        picture.save(packed, "JPEG", quality=QUALITY)
        return packed.getvalue()

    def close(self) -> None:
        """Let the threads end."""
        self.computing.shutdown(wait=False, cancel_futures=True)
        self.decoding.shutdown(wait=False, cancel_futures=True)


async def _thrown_away(request: Request) -> None:
    """Read on for a while: who is cut off while sending sees a broken connection, and not why."""
    left = MOST_THROWN_AWAY
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return


def _given(answer: Answer, number: int) -> dict[str, Any]:
    """An answer, with URLs of this server in the place of its files."""
    facts = answer.facts()
    for kind in answer.hits:
        for hit in facts[kind]:
            hit["picture"] = f"/api/pictures/{number}/{hit['row']}" if kind == "images" else None
    return facts
