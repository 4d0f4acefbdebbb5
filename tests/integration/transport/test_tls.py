"""TLS: every connection checks the certificate of the server.

The servers from the wheels are built without TLS, so a small proxy adds TLS. Its certificate is for `localhost` and is
signed by a test CA that no machine trusts.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.command import Command
from agentperf_redis.errors import BackendUnavailable
from tests.support.driving import Run
from tests.support.places import DATA
from tests.support.servers import Server, wait_until

CERTIFICATES = DATA / "tls"
pytestmark = pytest.mark.standalone

ECHO = Command("ECHO", ("hello",), (), bytes)


@pytest.fixture
def tls_port(server: Server) -> Iterator[int]:
    """A TLS port that forwards to the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATES / "server.pem", CERTIFICATES / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []
    ended = threading.Event()

    def serve(plain: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            plain,
            context.wrap_socket(plain, server_side=True) as outer,
            socket.create_connection(("127.0.0.1", server.port)) as inner,
        ):
            pairs = {outer: inner, inner: outer}
            while not ended.is_set():
                ready = [outer] if outer.pending() else select.select(list(pairs), [], [], 0.05)[0]
                for side in ready:
                    data = side.recv(65536)
                    if not data:
                        return
                    pairs[side].sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    yield listener.getsockname()[1]
    ended.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    acceptor.join()
    for thread in threads:
        thread.join()


def test_trusted_certificate_is_accepted(
    tls_port: int, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    backend = connect(f"rediss://localhost:{tls_port}/0?ssl_ca_certs={CERTIFICATES / 'ca.pem'}")
    assert run(backend, ECHO) == b"hello"
    messages: list[bytes] = []
    channel = f"{namespace}:{{cache:x}}:bus"
    backend.bus.subscribe(channel, messages.append, lambda: None)
    publish = Command("SPUBLISH", (channel,), ("over TLS",), int)
    wait_until(lambda: run(backend, publish) and messages, "a message over TLS")
    backend.close()


def test_certificate_of_unknown_ca_is_refused(tls_port: int, connect: Callable[..., Backend], run: Run) -> None:
    backend = connect(f"rediss://localhost:{tls_port}/0", deadline=3.0)
    with pytest.raises(BackendUnavailable, match="certificate verify failed") as caught:
        run(backend, ECHO)
    assert caught.value.outcome == "not_applied"


def test_certificate_of_another_host_is_refused(tls_port: int, connect: Callable[..., Backend], run: Run) -> None:
    backend = connect(f"rediss://127.0.0.1:{tls_port}/0?ssl_ca_certs={CERTIFICATES / 'ca.pem'}", deadline=3.0)
    with pytest.raises(BackendUnavailable, match="certificate"):
        run(backend, ECHO)


def test_url_option_disables_certificate_checks(tls_port: int, connect: Callable[..., Backend], run: Run) -> None:
    assert run(connect(f"rediss://127.0.0.1:{tls_port}/0?ssl_cert_reqs=none"), ECHO) == b"hello"


def test_missing_file_and_plain_server_fail(server: Server, connect: Callable[..., Backend], run: Run) -> None:
    plain = server.url.replace("redis://", "rediss://")
    with pytest.raises(BackendUnavailable, match="ssl_ca_certs"):
        run(connect(f"{plain}?ssl_ca_certs=/nowhere/ca.pem", deadline=0.5), ECHO)
    with pytest.raises(BackendUnavailable):
        run(connect(plain, deadline=0.5), ECHO)
