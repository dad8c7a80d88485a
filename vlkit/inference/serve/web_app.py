"""The page and its JSON API, as an ASGI app.

What it gives away: pictures that an index lists, made small and written anew as JPEG, by their row, never by a path.
What it takes: a text of a stated length, a picture of a stated size, decoded before anything else is done with it.
Nothing it sends loads anything from elsewhere, and its headers forbid it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import fastapi_offline
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlkit import __version__
from vlkit.config.search import MOST_HITS, Of
from vlkit.errors import DataError, UsageError, VlkitError
from vlkit.inference.search.search import Ask, Searcher
from vlkit.inference.serve.batch_queue import Full
from vlkit.inference.serve.server_state import Served, TooLarge, TooSlow

FILES = Path(__file__).parent / "static"
MOST_CHARACTERS = 4000
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger's own page has styles of its own.
DOCS_POLICY = PAGE_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
DOCS = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vlkit: API</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="/docs/files/swagger-ui.css"></head>
<body><div id="swagger-ui"></div>
<script src="/docs/files/swagger-ui-bundle.js"></script><script src="/files/docs.js"></script></body></html>"""


class Guard:
    """Refuses what another site's page asks for, and gives every answer the headers that keep it here."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and the answer back."""
        asked = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = asked.get("origin")
        foreign = origin is not None and origin != f"{scope['scheme']}://{asked.get('host')}"

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = JSONResponse({"error": "asked by a page of another site", "hint": None}, 403)
        await (refused if foreign else self.app)(scope, receive, sent)


class FoundHit(BaseModel):
    """An entry that was found."""

    score: float = Field(description="cosine, -1 to 1")
    id: str
    text: str = Field(description="the text; of a picture one of its texts")
    picture: str | None = Field(description="of a picture: where this server has it, made small")
    class_: str | None = Field(alias="class")
    group: list[str] = Field(description="what it is a match of")
    metadata: dict[str, Any] = Field(description="the data's further columns")


class FoundIn(BaseModel):
    """What one index answers, best first."""

    index: str
    texts: list[FoundHit] | None = None
    images: list[FoundHit] | None = None
    notes: list[str] = Field(description="what the asker should know")


class Found(BaseModel):
    """An answer, by index."""

    results: list[FoundIn]


class Described(BaseModel):
    """An index that is served."""

    name: str
    model: str
    untouched: bool
    texts: int
    images: int
    recall: dict[str, float] = Field(description="recall@10 against exact search, by kind")
    classes: list[str]


class Wrong(BaseModel):
    """Why a request is refused."""

    error: str
    hint: str | None = None


K = Annotated[int, Query(ge=1, le=MOST_HITS, description="hits of each kind")]
OfQuery = Annotated[Of, Query(description="what to find")]
FilterQuery = Annotated[
    list[str], Query(alias="filter", max_length=50, description="class=rust; again: that value too")
]
BINARY = {"type": "string", "format": "binary"}
REFUSED: dict[int | str, dict[str, Any]] = {
    422: {"model": Wrong, "description": "a query, a filter or a picture that cannot be used"},
    413: {"model": Wrong, "description": "the picture is too large"},
    503: {"model": Wrong, "description": "too many queries wait"},
}


STATUS: dict[type[VlkitError], int] = {TooLarge: 413, TooSlow: 408, UsageError: 422, DataError: 422}


def app_of(searchers: Sequence[Searcher], *, max_upload: int, hosts: Sequence[str] = ("*",)) -> Guard:
    """The app.

    Args:
        max_upload: bytes that a picture may have.
        hosts: names that a request may ask for; a page elsewhere whose name leads here is refused by it.
    """
    served = Served(searchers, max_upload)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        served.close()

    app = FastAPI(
        title="vlkit",
        version=__version__,
        description="Search by words, or by a picture.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.served = served
    _pages(app)
    _searches(app, served)
    _refusals(app)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return Guard(app)


def _searches(app: FastAPI, served: Served) -> None:
    """The JSON API."""

    @app.get("/api/indexes", response_model=list[Described], summary="What is served")
    async def indexes() -> list[dict[str, Any]]:
        return [_described(name, each) for name, each in zip(served.names, served.searchers, strict=True)]

    @app.get("/api/search", response_model=Found, responses=REFUSED, summary="Search by words")
    async def search(
        q: Annotated[str, Query(min_length=1, max_length=MOST_CHARACTERS, description="what to search for")],
        k: K = 12,
        of: OfQuery = "both",
        filters: FilterQuery = [],  # noqa: B006
    ) -> dict[str, Any]:
        await served.check(filters)
        if not served.searchers[0].embedder.clean(q):
            raise UsageError("the query is empty")
        return await served.ask([Ask(text=q, k=k, of=of, filters=tuple(filters)) for _ in served.searchers])

    @app.post(
        "/api/search",
        response_model=Found,
        responses=REFUSED,
        summary="Search by a picture",
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": {"schema": BINARY}}}},
    )
    async def search_by_picture(
        request: Request,
        k: K = 12,
        of: OfQuery = "both",
        filters: FilterQuery = [],  # noqa: B006
    ) -> dict[str, Any]:
        await served.check(filters)
        pixels = await served.received(request)
        return await served.ask([Ask(pixels=each, k=k, of=of, filters=tuple(filters)) for each in pixels])

    @app.get("/api/like", response_model=Found, responses=REFUSED, summary="Search by an entry")
    async def like(
        id: Annotated[str, Query(max_length=200, description="of a text or a picture")],
        k: K = 12,
        of: OfQuery = "both",
        filters: FilterQuery = [],  # noqa: B006
    ) -> dict[str, Any]:
        await served.check(filters)
        asks: list[Ask | None] = []
        for each in served.searchers:
            held = any(id in places for places in each.index.places.values())
            asks.append(Ask(like=each.locate(id), k=k, of=of, filters=tuple(filters)) if held else None)
        return await served.ask(asks)

    @app.get(
        "/api/pictures/{index}/{row}",
        summary="A picture, made small",
        responses={200: {"content": {"image/jpeg": {}}}, 404: {"model": Wrong}},
        response_class=Response,
    )
    async def picture(index: int, row: int) -> Response:
        known = 0 <= index < len(served.searchers) and "images" in served.searchers[index].index.nearest
        if not known or not 0 <= row < len(served.searchers[index].index.nearest["images"]):
            return JSONResponse({"error": "there is no such picture", "hint": None}, 404)
        try:
            content = await served.thumbnail(index, row)
        except (VlkitError, OSError):
            return JSONResponse({"error": "the picture is not to be had: its file is gone", "hint": None}, 404)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _described(name: str, searcher: Searcher) -> dict[str, Any]:
    about, counts = searcher.index.about, {kind: len(each) for kind, each in searcher.index.nearest.items()}
    return {
        "name": name,
        "model": about["model"]["name"],
        "untouched": about["model"]["untouched"],
        "texts": counts.get("texts", 0),
        "images": counts.get("images", 0),
        "recall": {kind: how["recall@10"] for kind, how in about["searched"].items()},
        "classes": searcher.index.classes,
    }


def _pages(app: FastAPI) -> None:
    """The page itself, and the API's."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(FILES / "serve.html", headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/files/{name}", include_in_schema=False)
    async def file(name: Literal["serve.js", "serve.css", "docs.js"]) -> FileResponse:
        return FileResponse(FILES / name)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(DOCS, headers={"Content-Security-Policy": DOCS_POLICY})

    app.mount("/docs/files", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"))


def _refusals(app: FastAPI) -> None:
    """What goes wrong, as JSON; and the headers of every answer."""

    @app.exception_handler(VlkitError)
    async def refused(_: Request, error: VlkitError) -> JSONResponse:
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
        # What of an upload is still to come need not come.
        close = {"Connection": "close"} if status in (408, 413) else {}
        return JSONResponse({"error": error.message, "hint": error.hint}, status, headers=close)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        told = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
        return JSONResponse({"error": told, "hint": None}, 422)

    @app.exception_handler(HTTPException)
    async def nothing(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail, "hint": None}, error.status_code, headers=error.headers)

    @app.exception_handler(Full)
    async def full(_: Request, error: Full) -> JSONResponse:
        return JSONResponse({"error": "too many queries wait", "hint": "try again"}, 503, headers={"Retry-After": "1"})
