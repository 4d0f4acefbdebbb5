"""Creates connections with redis-py, and turns the errors of redis-py into an `ExchangeFailed`.

redis-py does TLS, the handshake and the parsing. Its pools and retries are not used; see `transport.exchange`.
"""

from __future__ import annotations

import asyncio
import socket
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
from redis.exceptions import InvalidResponse, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from agentperf_redis.command import Reply
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.transport.address import Address, ServerKind
from agentperf_redis.transport.delivery import ExchangeFailed, refusal_reason, transient_reason
from agentperf_redis.transport.resp import ServerError
from agentperf_redis.transport.topology import Node

_CONNECT_S = 5.0
_LOCAL = ("localhost", "127.0.0.1", "::1")
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPALIVE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
"""TCP keepalive: a probe after 30 s without data, then every 10 s; three unanswered probes end the connection.

Load balancers and firewalls drop idle connections silently, some after a minute, and the default of Linux is a first
probe after two hours. macOS names the first option TCP_KEEPALIVE. Options that the platform lacks are left out.
"""
_SURELY_BUFFERED_BYTES = 32_768
"""Maximum payload that can be sent without blocking. The socket buffer of an idle connection is larger."""


class _WholeText:
    """Keeps the full text of error replies.

    By default, redis-py removes the error code, and reports some error replies as broken connections.
    """

    @staticmethod
    def parse_error(response: str) -> ResponseError:
        return ResponseError(response)


class _Parser(_WholeText, DefaultParser):  # type: ignore[misc, valid-type]  # redis-py chooses the base class at import
    pass


class _AsyncParser(_WholeText, AsyncDefaultParser):  # type: ignore[misc, valid-type]  # as above
    pass


class Connector:
    """Creates connections to the nodes of an address.

    Args:
        address: the address of the server.
        defaulted: whether the address is the default address, because neither code nor environment gives a URL.
    """

    def __init__(self, address: Address, *, defaulted: bool = False) -> None:
        self.address = address
        self._defaulted = defaulted
        if defaulted or address.kind is ServerKind.EMBEDDED:
            # Import the module now, not at first use. The first use may be on the flushing thread. If the process
            # forked while that thread was importing the module, the module's import lock would stay held in the child.
            import agentperf_redis.embedded  # noqa: F401
        self._embedded_path: str | None = None
        self._lock = threading.Lock()

    @property
    def advice(self) -> str:
        """Advice for the user if the server is unreachable."""
        return _advice(self.address, defaulted=self._defaulted)

    def after_fork(self) -> None:
        """In a forked child: replace the lock, because another thread may have held it at the fork."""
        self._lock = threading.Lock()

    def connection(self, node: Node, timeout_s: float = _CONNECT_S) -> Connection:
        """Return a new blocking connection that is not connected yet. Connecting takes at most `timeout_s`."""
        kwargs = self._kwargs(node, Retry(NoBackoff(), 0), _Parser)
        # redis-py also applies `socket_timeout` to the replies of its handshake.
        kwargs["socket_connect_timeout"] = kwargs["socket_timeout"] = min(_CONNECT_S, timeout_s)
        if node.port == 0:
            unix: Any = UnixDomainSocketConnection  # type checkers consider this class abstract
            return cast("Connection", unix(path=self._path(node), **kwargs))
        kind = SSLConnection if self._tls(node) else Connection
        return kind(host=node.host, port=node.port, **kwargs)

    def request(self, node: Node, payload: bytes, timeout_s: float) -> Reply:
        """Send one request to a node on a temporary connection, and return the reply. See `requests` for the errors."""
        return self.requests(node, payload, 1, timeout_s)[0]

    def requests(self, node: Node, payload: bytes, count: int, timeout_s: float) -> list[Reply]:
        """Send `count` requests to a node on a temporary connection, and return the replies.

        Raises:
            ExchangeFailed: the node was unreachable or did not answer in time.
        """
        end = time.monotonic() + timeout_s
        connection = self.connection(node, timeout_s)
        try:
            connection.connect()
            send(connection, payload, end)
            return [read(connection, end) for _ in range(count)]
        except (RedisError, OSError) as error:
            raise self.unconnected(error) from None
        finally:
            connection.disconnect()

    def failure(
        self, error: BaseException, timeout_s: float, replies: Sequence[Reply], *, sent: bool, fresh: bool
    ) -> ExchangeFailed | None:
        """Convert an error that ended an exchange; return None if it is not a connection error.

        Args:
            error: the error raised in the driver.
            timeout_s: the timeout of the exchange, s.
            replies: the replies that arrived before the error.
            sent: whether the connection was established. If so, the payload may have reached the server.
            fresh: whether the connection was opened for this exchange.
        """
        if isinstance(error, ExchangeFailed):
            return error
        if isinstance(error, BackendUnavailable):  # the embedded server could not be started
            return ExchangeFailed(error.reason, sent=False, final=True)
        if not isinstance(error, (RedisError, OSError)):
            return None
        if isinstance(error, TimeoutError) and not str(error):  # raised by asyncio
            error = TimeoutError(f"no answer for {timeout_s:.3g} s")
        return broken(error, replies, fresh=fresh) if sent else self.unconnected(error)

    def unconnected(self, error: RedisError | OSError) -> ExchangeFailed:
        """Convert a connect error. A wrong or missing certificate is final; after other errors a retry may succeed."""
        if isinstance(error, ResponseError):
            return refused(error)
        text, timed_out, tls = _text_of(error), isinstance(error, (RedisTimeoutError, TimeoutError)), self.address.tls
        if tls and "No such file" in text:
            return ExchangeFailed(
                "a file that the URL names (ssl_ca_certs, ...) does not exist", sent=False, final=True
            )
        if "certificate" in text.lower():
            return ExchangeFailed(f"{text}; check ssl_ca_certs in the URL", sent=False, final=True)
        if tls and ("ssl" in text.lower() or timed_out):
            text += "; the TLS handshake failed: is it a plain redis:// server?"
            return ExchangeFailed(text, sent=False, timed_out=timed_out)
        return ExchangeFailed(f"{text}; {self.advice}", sent=False, timed_out=timed_out)

    async def async_connection(self, node: Node) -> AsyncConnection:
        """Return a new asyncio connection that is not connected yet."""
        kwargs = self._kwargs(node, AsyncRetry(NoBackoff(), 0), _AsyncParser)
        kwargs["socket_timeout"] = None  # `asyncio.timeout_at` limits the whole exchange
        if node.port == 0:
            path = await asyncio.to_thread(self._path, node)
            return cast("AsyncConnection", AsyncUnixConnection(path=path, **kwargs))
        kind = AsyncSSLConnection if self._tls(node) else AsyncConnection
        return kind(host=node.host, port=node.port, **kwargs)

    def _path(self, node: Node) -> str:
        if self.address.kind is not ServerKind.EMBEDDED:
            return node.host
        # A process starts the embedded server on first use only. After `agentperf down`, running processes must not
        # restart the server.
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
            # Use RESP2. Under RESP3 with maintenance notifications, redis-py does not check for unread bytes of an
            # earlier reply.
            "protocol": 2,
            "retry": retry,
            "parser_class": parser,
            "socket_timeout": _CONNECT_S,
            "socket_connect_timeout": _CONNECT_S,
            "driver_info": None,
        }
        if node.port != 0:
            kwargs["socket_keepalive"] = True
            kwargs["socket_keepalive_options"] = keepalive_options()
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
        from agentperf_redis.embedded import url_if_running

        url = url_if_running()
        return "this is the default address, since neither AGENTPERF_REDIS_URL nor REDIS_URL is set; " + (
            "`agentperf up` starts a server on this machine and prints the URL to set"
            if url is None
            else f"a server of `agentperf up` is running: export AGENTPERF_REDIS_URL={url}"
        )
    if address.kind is ServerKind.UNIX or any(host in _LOCAL for host, _ in address.nodes):
        return "is a server running there? `agentperf up` starts one on this machine"
    return "is the address right, and can this machine reach it?"


def keepalive_options() -> dict[int, int]:
    """Return the socket options that set the intervals of TCP keepalive on this platform."""
    return {getattr(socket, name): value for name, value in _KEEPALIVE if hasattr(socket, name)}


_UNREADABLE = "a reply that is not one of Redis or Valkey"


def send(connection: Connection, payload: bytes, end: float) -> None:
    """Send the payload before `end`, a time of `time.monotonic`."""
    if len(payload) > _SURELY_BUFFERED_BYTES and connection._sock is not None:  # noqa: SLF001  no public API
        connection._sock.settimeout(max(0.001, end - time.monotonic()))  # noqa: SLF001
    connection.send_packed_command((payload,), check_health=False)


def read(connection: Connection, end: float) -> Reply:
    """Read one reply before `end`, a time of `time.monotonic`. An error reply is returned as a `ServerError`."""
    try:
        return connection.read_response(disable_decoding=True, timeout=max(0.001, end - time.monotonic()))
    except ResponseError as error:
        return ServerError(str(error))
    except TypeError as error:  # hiredis cannot make a dict of the items in the reply
        raise InvalidResponse(f"{_UNREADABLE} ({error})") from None


async def aconnect(connection: AsyncConnection) -> None:
    """Connect. If the connection is lost during the handshake, raise ConnectionResetError."""
    try:
        await connection.connect()
    except AttributeError as error:
        # In CPython 3.12 and newer, `writelines` does not check for a lost connection and raises AttributeError (seen
        # on 3.12.1 and 3.13.0).
        raise ConnectionResetError("the connection was lost during the handshake") from error


async def asend(connection: AsyncConnection, payload: bytes) -> None:
    """Send bytes without redis-py: redis-py would use `writelines` (see `aconnect`) and reconnect silently."""
    writer = connection._writer  # noqa: SLF001  no public API
    if writer is None or writer.transport.is_closing():
        raise ConnectionResetError("the connection was lost")
    writer.write(payload)
    await writer.drain()


async def aread(connection: AsyncConnection) -> Reply:
    """Read one reply. An error reply is returned as a `ServerError`."""
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return ServerError(str(error))
    except TypeError as error:  # as in `read`
        raise InvalidResponse(f"{_UNREADABLE} ({error})") from None


def drop(connection: AsyncConnection) -> None:
    """Close a connection at once. Call this on the thread of its loop, or after the loop is closed."""
    writer = connection._writer  # noqa: SLF001  the close methods of redis-py wait or need a running loop
    connection._reader = connection._writer = None  # noqa: SLF001
    if writer is None:
        return
    try:
        writer.transport.abort()
    except RuntimeError:  # the loop is closed: close the underlying socket
        underlying = writer.get_extra_info("socket")
        if underlying is not None:
            underlying._sock.close()  # noqa: SLF001  the wrapper of asyncio has no `close`
            writer.transport._sock = None  # type: ignore[attr-defined]  # noqa: SLF001  else asyncio warns about a leak


def broken(error: RedisError | OSError | TypeError, replies: Sequence[Reply], *, fresh: bool) -> ExchangeFailed:
    """Convert an error during an exchange. `fresh` means that the connection was opened for this exchange."""
    timed_out = isinstance(error, (RedisTimeoutError, TimeoutError))
    stale = not (fresh or timed_out or replies)
    return ExchangeFailed(_text_of(error), sent=True, stale=stale, timed_out=timed_out, replies=replies)


def _text_of(error: BaseException) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__


def refused(error: ResponseError) -> ExchangeFailed:
    """Convert the error of a refused handshake. Most refusals are permanent; a few are transient."""
    text = str(error)
    if transient_reason(text) is not None:
        return ExchangeFailed(text, sent=False, final=False)
    meaning = refusal_reason(text)
    known = text if meaning is None else f"{meaning} ({text})"
    return ExchangeFailed(f"{known}; check user name, password and database in the URL", sent=False, final=True)
