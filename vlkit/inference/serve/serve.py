"""serve: a local search page for one index, or two side by side."""

from __future__ import annotations

import socket
from typing import Any

from vlkit import console
from vlkit.config.search import ServeConfig
from vlkit.errors import UsageError
from vlkit.inference.index.documents import MODALITIES
from vlkit.inference.search.search import Searcher, find_only_index
from vlkit.signals import Terminated
from vlkit.storage import Location

# Seconds that an idle connection stays open, and that open requests get when the server shuts down.
KEEP_ALIVE_SECONDS, SHUTDOWN_SECONDS = 30, 5
MAX_CONNECTIONS, BACKLOG = 400, 256


def serve(config: ServeConfig) -> dict[str, Any]:
    """Run `vlkit serve` until a signal stops it.

    Raises:
        UsageError: the packages are missing, or the port is in use. ArtifactError: see `Searcher`.
    """
    try:
        import uvicorn

        from vlkit.inference.serve.web_app import create_app
    except ImportError as error:
        raise UsageError(f"serve needs another package: {error.name}", hint="pip install 'vlkit[serve]'") from None
    listening = _listen(config.host, config.port)
    locations = [Location(path) for path in config.index] or [find_only_index()]
    searchers = []
    for location, model in zip(locations, config.model or [None] * len(locations), strict=True):
        searcher = Searcher.open(location, model)
        # Done now, so that the first query does not wait for it.
        for modality in MODALITIES:
            searcher.query_encoder.check_index(searcher.index.about, modality)
        _ = searcher.index.positions, searcher.index.classes
        searchers.append(searcher)
    local = config.host in ("127.0.0.1", "localhost", "::1")
    app = create_app(
        searchers,
        max_upload=int(config.max_upload * 2**20),
        hosts=("127.0.0.1", "localhost", "[::1]") if local else ("*",),
    )
    port = listening.getsockname()[1]
    address = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}"
    console.print_result(f"{address} searches {' and '.join(map(str, locations))}; API: {address}/docs")
    if not local:
        console.warn(f"everyone who can reach {config.host} can search, and see every image of the index")
    console.hint("stop it with Ctrl-C")
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            limit_concurrency=MAX_CONNECTIONS,
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


def _listen(host: str, port: int) -> socket.socket:
    """Bind and listen before a model is loaded, so that a port in use is reported at once.

    Raises:
        UsageError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        message = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise UsageError(message, hint="--port 0 takes any free port") from None
    return listening
