"""Runs the web page on its own uvicorn server until a signal ends the server."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from agentperf_redis.web.security import MAX_HEADER_BYTES

_END_S: Final = 2
"""How long a server that ends waits for requests in progress, s. Live connections end at once."""
_MAX_CONNECTIONS: Final = 1000


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        OSError: if the address cannot be bound.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family)


def under(root_path: str, app: ASGIApp) -> ASGIApp:
    """Adapt the application to a proxy that shows it under a path, whether or not the proxy removes this path."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if "path" in scope:
            path = scope["path"]
            path = path if path == root_path or path.startswith(f"{root_path}/") else root_path + path
            scope = {**scope, "path": path, "root_path": root_path}
        await app(scope, receive, send)

    return answer


def run(
    app: ASGIApp,
    listener: socket.socket,
    root_path: str,
    at_start: Callable[[], object],
    at_end: Callable[[], Awaitable[object]],
) -> None:
    """Answer requests until SIGTERM or SIGINT.

    Args:
        app: the application.
        listener: the socket. It is closed at the end.
        root_path: the path under which a proxy shows the application, without a slash at its end.
        at_start: is called before the first request is answered. From then on, SIGTERM ends the server.
        at_end: is awaited on the same event loop at the end.
    """
    config = uvicorn.Config(
        under(root_path, app) if root_path else app,
        http="h11",  # h11 limits the size of all headers together; httptools would collect headers of any size
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_END_S,
    )

    server = uvicorn.Server(config)

    async def serving() -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            await at_end()

    # Until uvicorn installs its own handlers, this handler ends the server at a SIGTERM. When uvicorn ends after a
    # SIGTERM, uvicorn restores this handler and raises the signal again.
    former = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        at_start()
        asyncio.run(serving())
    finally:
        signal.signal(signal.SIGTERM, former)
