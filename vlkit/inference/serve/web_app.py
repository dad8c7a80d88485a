"""The page and its JSON API, as an ASGI app.

It sends images that an index lists: scaled down, encoded again as JPEG, addressed by their row and never by a path.
It accepts a text of limited length or an image of limited size, which is decoded before anything else is done with it.
Nothing that it sends loads anything from another server, and its headers forbid it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import fastapi_offline
from fastapi import FastAPI, Request, Response
from fastapi import Query as QueryParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlkit import __version__
from vlkit.config.search import MAX_HITS, Contents
from vlkit.errors import DataError, UsageError, VlkitError
from vlkit.inference.search.search import Query, Searcher
from vlkit.inference.serve.batch_queue import QueueFull
from vlkit.inference.serve.server_state import ServerState, TooLarge, TooSlow

STATIC = Path(__file__).parent / "static"
MAX_QUERY_CHARACTERS = 4000
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger's own page has inline styles.
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


class OriginGuard:
    """Middleware: refuses requests from pages of other sites, and adds `HEADERS` to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and the response back."""
        request_headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = request_headers.get("origin")
        foreign = origin is not None and origin != f"{scope['scheme']}://{request_headers.get('host')}"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = JSONResponse({"error": "the request comes from a page of another site", "hint": None}, 403)
        await (refusal if foreign else self.app)(scope, receive, send_with_headers)


class HitResponse(BaseModel):
    """A document that was found."""

    score: float = Field(description="cosine, -1 to 1")
    id: str
    text: str = Field(description="the text; for an image, one of its texts")
    picture: str | None = Field(description="for an image: URL of its thumbnail on this server")
    class_: str | None = Field(alias="class")
    group: list[str] = Field(description="match groups of the document")
    metadata: dict[str, Any] = Field(description="further columns of the data")


class IndexHits(BaseModel):
    """The hits of one index, best first."""

    index: str
    texts: list[HitResponse] | None = None
    images: list[HitResponse] | None = None
    notes: list[str] = Field(description="warnings about this query")


class SearchResponse(BaseModel):
    """The hits of every index."""

    results: list[IndexHits]


class IndexInfo(BaseModel):
    """An index that this server searches."""

    name: str
    model: str
    untouched: bool
    texts: int
    images: int
    recall: dict[str, float] = Field(description="recall@10 against exact search, of texts and of images")
    classes: list[str]


class ErrorResponse(BaseModel):
    """Why a request is refused."""

    error: str
    hint: str | None = None


HitsParameter = Annotated[int, QueryParameter(ge=1, le=MAX_HITS, description="hits of each kind")]
OfParameter = Annotated[Contents, QueryParameter(description="what to find")]
FilterParameter = Annotated[
    list[str],
    QueryParameter(alias="filter", max_length=50, description="class=rust; repeat it to allow further values"),
]
BINARY = {"type": "string", "format": "binary"}
REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"model": ErrorResponse, "description": "the query, the filter or the image cannot be used"},
    413: {"model": ErrorResponse, "description": "the image is too large"},
    503: {"model": ErrorResponse, "description": "too many queries are waiting"},
}


STATUS: dict[type[VlkitError], int] = {TooLarge: 413, TooSlow: 408, UsageError: 422, DataError: 422}


def create_app(searchers: Sequence[Searcher], *, max_upload: int, hosts: Sequence[str] = ("*",)) -> OriginGuard:
    """Build the app.

    Args:
        max_upload: largest accepted image, in bytes.
        hosts: accepted host names; this refuses a foreign page whose name resolves to this machine (DNS rebinding).
    """
    state = ServerState(searchers, max_upload)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        state.close()

    app = FastAPI(
        title="vlkit",
        version=__version__,
        description="Search with text or with an image.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.server = state
    _add_pages(app)
    _add_search_routes(app, state)
    _add_image_route(app, state)
    _add_error_handlers(app)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return OriginGuard(app)


def _add_search_routes(app: FastAPI, state: ServerState) -> None:
    """Add the JSON API."""

    @app.get("/api/indexes", response_model=list[IndexInfo], summary="List the indexes")
    async def indexes() -> list[dict[str, Any]]:
        return [_describe_index(name, searcher) for name, searcher in zip(state.names, state.searchers, strict=True)]

    @app.get("/api/search", response_model=SearchResponse, responses=REFUSALS, summary="Search with text")
    async def search(
        q: Annotated[
            str, QueryParameter(min_length=1, max_length=MAX_QUERY_CHARACTERS, description="what to search for")
        ],
        k: HitsParameter = 12,
        of: OfParameter = "both",
        filters: FilterParameter = [],  # noqa: B006
    ) -> dict[str, Any]:
        await state.check_filters(filters)
        if not state.searchers[0].query_encoder.clean(q):
            raise UsageError("the query is empty")
        return await state.search([Query(text=q, k=k, contents=of, filters=tuple(filters)) for _ in state.searchers])

    @app.post(
        "/api/search",
        response_model=SearchResponse,
        responses=REFUSALS,
        summary="Search with an image",
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": {"schema": BINARY}}}},
    )
    async def search_by_image(
        request: Request,
        k: HitsParameter = 12,
        of: OfParameter = "both",
        filters: FilterParameter = [],  # noqa: B006
    ) -> dict[str, Any]:
        await state.check_filters(filters)
        uploads = await state.receive_image(request)
        return await state.search(
            [Query(pixels=pixels, k=k, contents=of, filters=tuple(filters)) for pixels in uploads]
        )

    @app.get("/api/like", response_model=SearchResponse, responses=REFUSALS, summary="Search with a document")
    async def like(
        id: Annotated[str, QueryParameter(max_length=200, description="id of a text or an image")],
        k: HitsParameter = 12,
        of: OfParameter = "both",
        filters: FilterParameter = [],  # noqa: B006
    ) -> dict[str, Any]:
        await state.check_filters(filters)
        queries: list[Query | None] = []
        for searcher in state.searchers:
            known = any(id in positions for positions in searcher.index.positions.values())
            queries.append(Query(like=searcher.locate(id), k=k, contents=of, filters=tuple(filters)) if known else None)
        return await state.search(queries)


def _add_image_route(app: FastAPI, state: ServerState) -> None:
    """Add the thumbnails of indexed images."""

    @app.get(
        "/api/pictures/{index}/{row}",
        summary="Thumbnail of an image",
        responses={200: {"content": {"image/jpeg": {}}}, 404: {"model": ErrorResponse}},
        response_class=Response,
    )
    async def image(index: int, row: int) -> Response:
        known = 0 <= index < len(state.searchers) and "images" in state.searchers[index].index.vectors
        if not known or not 0 <= row < len(state.searchers[index].index.vectors["images"]):
            return JSONResponse({"error": "no such image", "hint": None}, 404)
        try:
            content = await state.thumbnail(index, row)
        except (VlkitError, OSError):
            return JSONResponse({"error": "the image cannot be read: its file is gone", "hint": None}, 404)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _describe_index(name: str, searcher: Searcher) -> dict[str, Any]:
    about = searcher.index.about
    counts = {modality: len(vectors) for modality, vectors in searcher.index.vectors.items()}
    return {
        "name": name,
        "model": about["model"]["name"],
        "untouched": about["model"]["untouched"],
        "texts": counts.get("texts", 0),
        "images": counts.get("images", 0),
        "recall": {modality: facts["recall@10"] for modality, facts in about["searched"].items()},
        "classes": searcher.index.classes,
    }


def _add_pages(app: FastAPI) -> None:
    """Add the search page and the page of the API."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "serve.html", headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/files/{name}", include_in_schema=False)
    async def file(name: Literal["serve.js", "serve.css", "docs.js"]) -> FileResponse:
        return FileResponse(STATIC / name)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(DOCS, headers={"Content-Security-Policy": DOCS_POLICY})

    app.mount("/docs/files", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"))


def _add_error_handlers(app: FastAPI) -> None:
    """Answer errors as JSON {error, hint}."""

    @app.exception_handler(VlkitError)
    async def refuse(_: Request, error: VlkitError) -> JSONResponse:
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
        # Tells the client to stop sending the rest of an upload.
        headers = {"Connection": "close"} if status in (408, 413) else {}
        return JSONResponse({"error": error.message, "hint": error.hint}, status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        message = "; ".join(f"{detail['loc'][-1]}: {detail['msg']}" for detail in error.errors())
        return JSONResponse({"error": message, "hint": None}, 422)

    @app.exception_handler(HTTPException)
    async def refuse_http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail, "hint": None}, error.status_code, headers=error.headers)

    @app.exception_handler(QueueFull)
    async def refuse_full(_: Request, error: QueueFull) -> JSONResponse:
        message = {"error": "too many queries are waiting", "hint": "try again"}
        return JSONResponse(message, 503, headers={"Retry-After": "1"})
