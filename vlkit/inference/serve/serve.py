"""serve: the local page over one index, or two side by side."""

from __future__ import annotations

import socket
from typing import Any

from vlkit import console
from vlkit.config.search import ServeConfig
from vlkit.errors import UsageError
from vlkit.inference.search.search import Searcher, only_index
from vlkit.signals import Terminated
from vlkit.storage import Location

# Seconds that a connection may stay open without a word, and that answers may take when the server is to end.
IDLE, LAST_WORDS = 30, 5
CONNECTIONS, BACKLOG = 400, 256


def serve(config: ServeConfig) -> dict[str, Any]:
    """Run `vlkit serve` until it is told to end.

    Raises:
        UsageError: the packages are missing, or the port is taken. ArtifactError: see `Searcher`.
    """
    try:
        import uvicorn

        from vlkit.inference.serve.web_app import app_of
    except ImportError as error:
        raise UsageError(f"serve needs another package: {error.name}", hint="pip install 'vlkit[serve]'") from None
    listening = _listening(config.host, config.port)
    places = [Location(place) for place in config.index] or [only_index()]
    searchers = []
    for place, model in zip(places, config.model or [None] * len(places), strict=True):
        searcher = Searcher.open(place, model)
        # Now, rather than at the first query.
        for kind in ("texts", "images"):
            searcher.embedder.agree(searcher.index.about, kind)
        _ = searcher.index.places, searcher.index.classes
        searchers.append(searcher)
    local = config.host in ("127.0.0.1", "localhost", "::1")
    app = app_of(
        searchers,
        max_upload=int(config.max_upload * 2**20),
        hosts=("127.0.0.1", "localhost", "[::1]") if local else ("*",),
    )
    port = listening.getsockname()[1]
    address = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}"
    console.print_result(f"{address} searches {' and '.join(str(place) for place in places)}; the API: {address}/docs")
    if not local:
        console.warn(f"whoever reaches {config.host} can search, and see every picture of the index")
    console.hint("Ctrl-C ends it")
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=IDLE,
            timeout_graceful_shutdown=LAST_WORDS,
            limit_concurrency=CONNECTIONS,
            server_header=False,
        )
    )
    try:
        server.run(sockets=[listening])
    except Terminated:
        raise
    except KeyboardInterrupt:
        console.say("stopped")
    return {"address": address}


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound already: a port that is taken shows before a model is loaded.

    Raises:
        UsageError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        told = f"--host {host} --port {port} cannot be had: {error.strerror or error}"
        raise UsageError(told, hint="--port 0 takes any that is free") from None
    return listening
