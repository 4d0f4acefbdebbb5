"""redis-py as the maker of connections: TLS, handshake, parsing. What its errors mean to a delivery is said here, too.

Its pools and retries are not used; see `transport.exchange`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio.connection import Connection as AsyncConnection
from redis.asyncio.connection import DefaultParser as AsyncDefaultParser
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection
from redis.asyncio.connection import UnixDomainSocketConnection as AsyncUnixConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import Connection, DefaultParser, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from agentperf_redis.command import Reply
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.transport.address import Address, ServerKind
from agentperf_redis.transport.delivery import ExchangeFailed, passing
from agentperf_redis.transport.resp import ServerError
from agentperf_redis.transport.topology import Node

_CONNECT_S = 5.0
_LOCAL = ("localhost", "127.0.0.1", "::1")
_SURELY_BUFFERED_BYTES = 32_768
"""Up to this, sending cannot block: an idle connection's socket buffer is larger."""


class _WholeText:
    """Keeps error replies whole: redis-py cuts the code off the text and turns some into broken connections."""

    @staticmethod
    def parse_error(response: str) -> ResponseError:
        return ResponseError(response)


class _Parser(_WholeText, DefaultParser):  # type: ignore[misc, valid-type]  # redis-py picks the class at import
    pass


class _AsyncParser(_WholeText, AsyncDefaultParser):  # type: ignore[misc, valid-type]  # as above
    pass


class Connector:
    """Makes connections to the nodes of an address.

    Args:
        address: of the server.
        defaulted: whether nobody gave it, neither in code nor in the environment.
    """

    def __init__(self, address: Address, *, defaulted: bool = False) -> None:
        self.address = address
        self.advice = _advice(address, defaulted=defaulted)
        """What a user may do when it cannot be reached."""
        self._embedded_path: str | None = None
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In a forked child: another thread may have held the lock."""
        self._lock = threading.Lock()

    def connection(self, node: Node, timeout_s: float = _CONNECT_S) -> Connection:
        """Return a new blocking connection, not yet connected; connecting may take `timeout_s`."""
        kwargs = self._kwargs(node, Retry(NoBackoff(), 0), _Parser)
        kwargs["socket_connect_timeout"] = kwargs["socket_timeout"] = min(_CONNECT_S, timeout_s)  # handshake included
        if node.port == 0:
            unix: Any = UnixDomainSocketConnection  # abstract to type checkers, though redis-py makes it all day
            return cast("Connection", unix(path=self._path(node), **kwargs))
        kind = SSLConnection if self._tls(node) else Connection
        return kind(host=node.host, port=node.port, **kwargs)

    def ask(self, node: Node, question: bytes, timeout_s: float) -> Reply:
        """Ask a node one thing, on a connection for that alone.

        Raises:
            ExchangeFailed: it could not be reached, or did not answer in time.
        """
        end = time.monotonic() + timeout_s
        connection = self.connection(node, timeout_s)
        try:
            connection.connect()
            send(connection, question, end)
            return read(connection, end)
        except (RedisError, OSError) as error:
            raise self.unconnected(error) from None
        finally:
            connection.disconnect()

    def failure(
        self, error: BaseException, timeout_s: float, replies: Sequence[Reply], *, sent: bool, fresh: bool
    ) -> ExchangeFailed | None:
        """Return what an error means that ended an exchange; None if it is no trouble of the connection.

        Args:
            error: what the driver met.
            timeout_s: seconds that the exchange was given.
            replies: those that had arrived before.
            sent: whether the connection was made, and the payload may have reached the server.
            fresh: whether the connection was made for this exchange.
        """
        if isinstance(error, ExchangeFailed):
            return error
        if isinstance(error, BackendUnavailable):  # the embedded server could not be started
            return ExchangeFailed(error.reason, sent=False, final=True)
        if not isinstance(error, (RedisError, OSError)):
            return None
        if isinstance(error, TimeoutError) and not str(error):  # asyncio's
            error = TimeoutError(f"no answer for {timeout_s:.3g} s")
        return broken(error, replies, fresh=fresh) if sent else self.unconnected(error)

    def unconnected(self, error: RedisError | OSError) -> ExchangeFailed:
        """What a connection that could not be made means: a server may yet come up, a wrong certificate stays wrong."""
        if isinstance(error, ResponseError):
            return refused(error)
        text, late, tls = _words(error), isinstance(error, (RedisTimeoutError, TimeoutError)), self.address.tls
        if tls and "No such file" in text:
            return ExchangeFailed("a file that the URL names (ssl_ca_certs, ...) is not there", sent=False, final=True)
        if "certificate" in text.lower():
            return ExchangeFailed(f"{text}; look at ssl_ca_certs in the URL", sent=False, final=True)
        if tls and ("ssl" in text.lower() or late):
            text += "; there was no TLS handshake: is it a plain redis:// server?"
            return ExchangeFailed(text, sent=False, silent=late)
        return ExchangeFailed(f"{text}; {self.advice}", sent=False, silent=late)

    async def async_connection(self, node: Node) -> AsyncConnection:
        """Return a new asyncio connection, not yet connected."""
        kwargs = self._kwargs(node, AsyncRetry(NoBackoff(), 0), _AsyncParser)
        kwargs["socket_timeout"] = None  # one asyncio.timeout bounds the whole exchange
        if node.port == 0:
            path = await asyncio.to_thread(self._path, node)
            return cast("AsyncConnection", AsyncUnixConnection(path=path, **kwargs))
        kind = AsyncSSLConnection if self._tls(node) else AsyncConnection
        return kind(host=node.host, port=node.port, **kwargs)

    def _path(self, node: Node) -> str:
        if self.address.kind is not ServerKind.EMBEDDED:
            return node.host
        # Started at the first use only: after `agentperf down`, processes that still run must not bring it back.
        with self._lock:
            if self._embedded_path is None:
                from agentperf_redis.embedded import data_folder, ensure

                self._embedded_path = str(ensure(data_folder(node.host or None)))
            return self._embedded_path

    def _tls(self, node: Node) -> bool:
        return self.address.tls and node.port != 0

    def _kwargs(self, node: Node, retry: object, parser: type) -> dict[str, Any]:
        address = self.address
        kwargs: dict[str, Any] = {
            "username": address.option("sentinel_username") if node.sentinel else address.username,
            "password": address.option("sentinel_password") if node.sentinel else address.password,
            "db": 0 if node.sentinel else address.db,
            # RESP3 with maintenance notifications skips redis-py's check for bytes that belong to another reply
            "protocol": 2,
            "retry": retry,
            "parser_class": parser,
            "socket_timeout": _CONNECT_S,
            "socket_connect_timeout": _CONNECT_S,
            "driver_info": None,
        }
        if node.port != 0:
            kwargs["socket_keepalive"] = True
        if self._tls(node):
            wanted = address.option("ssl_cert_reqs") or "required"
            kwargs["ssl_cert_reqs"] = wanted
            kwargs["ssl_check_hostname"] = wanted == "required" and address.option("ssl_check_hostname") not in (
                "0",
                "false",
                "no",
            )
            for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
                if address.option(name):
                    kwargs[name] = address.option(name)
        return kwargs


def _advice(address: Address, *, defaulted: bool) -> str:
    if defaulted:
        return (
            "this is the default address, since neither AGENTPERF_REDIS_URL nor REDIS_URL is set; `agentperf up` "
            "starts a server on this machine and prints the URL to set"
        )
    if address.kind is ServerKind.UNIX or any(host in _LOCAL for host, _ in address.nodes):
        return "is a server running there? `agentperf up` starts one on this machine"
    return "is the address right, and can this machine reach it?"


def send(connection: Connection, payload: bytes, end: float) -> None:
    """Send, until `end` by `time.monotonic` at the latest."""
    if len(payload) > _SURELY_BUFFERED_BYTES and connection._sock is not None:  # noqa: SLF001  it has no such argument
        connection._sock.settimeout(max(0.001, end - time.monotonic()))  # noqa: SLF001
    connection.send_packed_command((payload,), check_health=False)


def read(connection: Connection, end: float) -> Reply:
    """Read one reply, until `end` at the latest; an error reply is a `ServerError`."""
    try:
        return connection.read_response(disable_decoding=True, timeout=max(0.001, end - time.monotonic()))
    except ResponseError as error:
        return ServerError(str(error))


async def aconnect(connection: AsyncConnection) -> None:
    """Connect; a connection that is lost while the server is greeted is a broken one."""
    try:
        await connection.connect()
    except AttributeError as error:
        # CPython 3.12 and newer do not look in `writelines` whether the connection was lost (seen on 3.12.1, 3.13.0).
        raise ConnectionResetError("the connection was lost while it was made") from error


async def asend(connection: AsyncConnection, payload: bytes) -> None:
    """Send bytes. Not by redis-py's `writelines`: see `aconnect`; and it would connect again behind our back."""
    writer = connection._writer  # noqa: SLF001  as in `drop`
    if writer is None or writer.transport.is_closing():
        raise ConnectionResetError("the connection was lost")
    writer.write(payload)
    await writer.drain()


async def aread(connection: AsyncConnection) -> Reply:
    """Read one reply; an error reply is a `ServerError`."""
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return ServerError(str(error))


def drop(connection: AsyncConnection) -> None:
    """Close a connection at once, on its loop's thread or when its loop is closed."""
    writer = connection._writer  # noqa: SLF001  redis-py offers no close that neither waits nor needs a running loop
    connection._reader = connection._writer = None  # noqa: SLF001
    if writer is None:
        return
    try:
        writer.transport.abort()
    except RuntimeError:  # the loop is closed already: close the socket below it
        below = writer.get_extra_info("socket")
        if below is not None:
            below._sock.close()  # noqa: SLF001  asyncio's wrapper has no close
            writer.transport._sock = None  # type: ignore[attr-defined]  # noqa: SLF001  else it warns that it is open


def broken(error: RedisError | OSError, replies: Sequence[Reply], *, fresh: bool) -> ExchangeFailed:
    """What an error in the middle of an exchange means; `fresh` says that the connection was made for it."""
    late = isinstance(error, (RedisTimeoutError, TimeoutError))
    stale = not (fresh or late or replies)
    return ExchangeFailed(_words(error), sent=True, stale=stale, silent=late, replies=replies)


def _words(error: BaseException) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def refused(error: ResponseError) -> ExchangeFailed:
    """What a refused handshake means: most refusals are for good, a few pass."""
    text = str(error)
    final = passing(text) is None
    advice = "; look at user name, password and database in the URL" if final else ""
    return ExchangeFailed(text + advice, sent=False, final=final)
