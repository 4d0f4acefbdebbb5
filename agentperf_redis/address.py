"""Where the server is: URLs read into an `Address`.

    redis://[user:password@]host[:6379][/db]        rediss:// for TLS
    unix:///path/to/socket[?db=0]
    redis+cluster://host:port[,host:port...]        rediss+cluster:// for TLS
    redis+sentinel://host:26379[,...]/service[/db]  rediss+sentinel:// for TLS
    embedded://[/path/to/data]                      a server of this machine's own, started when needed

Options follow as a query: ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``, ``ssl_check_hostname``,
``ssl_cert_reqs`` (required, optional, none), ``sentinel_username``, ``sentinel_password``, ``db``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import parse_qsl, unquote, urlsplit

from agentperf_redis.errors import InvalidArgument

DEFAULT_URL = "redis://localhost:6379/0"
URL_VARIABLES = ("AGENTPERF_REDIS_URL", "REDIS_URL")
"""Environment variables asked in this order when no URL is given."""

_REDIS_PORT, _SENTINEL_PORT, _MAX_PORT, _MAX_DB = 6379, 26379, 65535, 2**31 - 1
_FORMS = (
    "redis://, rediss://, unix://, redis+cluster://, rediss+cluster://, redis+sentinel://, rediss+sentinel:// "
    "or embedded://"
)
_OPTIONS = frozenset(
    {
        "db",
        "sentinel_password",
        "sentinel_username",
        "ssl_ca_certs",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_keyfile",
    }
)


class Kind(Enum):
    """What stands behind an address."""

    STANDALONE = "standalone"
    UNIX = "unix"
    CLUSTER = "cluster"
    SENTINEL = "sentinel"
    EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class Address:
    """A server, or the nodes by which a Cluster or a Sentinel group is found. Its repr shows no password."""

    kind: Kind
    nodes: tuple[tuple[str, int], ...] = ()
    path: str = ""
    """Socket (unix) or data folder (embedded)."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    service: str = ""
    """Name of the primary that Sentinel watches."""
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def option(self, name: str) -> str | None:
        """Return an option of the URL's query."""
        return dict(self.options).get(name)

    @property
    def masked(self) -> str:
        """The address for people to read: as a URL, the password as ``***``."""
        if self.kind is Kind.EMBEDDED:
            return f"embedded://{self.path}"
        user = f"{self.username or ''}:***@" if self.password else f"{self.username}@" if self.username else ""
        if self.kind is Kind.UNIX:
            return f"unix://{user}{self.path}" + (f"?db={self.db}" if self.db else "")
        scheme = ("rediss" if self.tls else "redis") + ("" if self.kind is Kind.STANDALONE else f"+{self.kind.value}")
        places = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.nodes)
        tail = f"/{self.service}" if self.service else ""
        return f"{scheme}://{user}{places}{tail}" + (f"/{self.db}" if self.kind is not Kind.CLUSTER else "")


def resolve_url(url: str | None) -> str:
    """Return the URL given, else the one in AGENTPERF_REDIS_URL or REDIS_URL, else redis://localhost:6379/0."""
    if url is not None:
        return url
    for variable in URL_VARIABLES:
        if os.environ.get(variable):
            return os.environ[variable]
    return DEFAULT_URL


def parse_url(url: object) -> Address:
    """Read a URL.

    Args:
        url: one of the forms at the top of this module.

    Returns:
        The address.

    Raises:
        InvalidArgument: if it is none of these forms; a password in it is not repeated.
    """
    if not isinstance(url, str):
        raise InvalidArgument("url", url, f"a string beginning with {_FORMS}")
    parts = _split(url)
    scheme, _, form = parts.scheme.partition("+")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    for option in options:
        if option not in _OPTIONS:
            raise InvalidArgument("url", hidden(url), f"options {', '.join(sorted(_OPTIONS))}, not {option!r}")
    login, _, places = parts.netloc.rpartition("@")
    user, colon, secret = login.partition(":")
    username, password = unquote(user) or None, unquote(secret) if colon else None
    rest = tuple(sorted(options.items()))
    if parts.scheme == "embedded":
        return Address(Kind.EMBEDDED, path=unquote(parts.netloc + parts.path), options=rest)
    if parts.scheme == "unix":
        if not parts.path.strip("/"):
            raise InvalidArgument("url", hidden(url), "unix:///path/to/socket")
        db = _db(url, options.get("db", "0"))
        return Address(Kind.UNIX, (), unquote(parts.path), db, username, password, options=rest)
    if scheme not in ("redis", "rediss") or form not in ("", "cluster", "sentinel"):
        raise InvalidArgument("url", hidden(url), f"a URL beginning with {_FORMS}")
    tls = scheme == "rediss"
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    nodes = tuple(
        _node(url, place, _SENTINEL_PORT if form == "sentinel" else _REDIS_PORT) for place in places.split(",")
    )
    if form == "sentinel":
        if len(segments) not in (1, 2):
            raise InvalidArgument("url", hidden(url), "redis+sentinel://host:port,.../service[/db]")
        db = _db(url, segments[1] if len(segments) > 1 else options.get("db", "0"))
        return Address(Kind.SENTINEL, nodes, "", db, username, password, tls, segments[0], rest)
    if form == "cluster":
        if segments and segments != ["0"]:
            raise InvalidArgument("url", hidden(url), "no database but 0 on a Cluster")
        return Address(Kind.CLUSTER, nodes, "", 0, username, password, tls, options=rest)
    if len(segments) > 1 or len(nodes) > 1:
        raise InvalidArgument("url", hidden(url), "redis://[user:password@]host[:port][/db]")
    db = _db(url, segments[0] if segments else options.get("db", "0"))
    return Address(Kind.STANDALONE, nodes, "", db, username, password, tls, options=rest)


def hidden(url: str) -> str:
    """Return a URL with whatever may be a password in it replaced by ``***``."""
    head, separator, rest = url.partition("://")
    login, at, places = rest.rpartition("@")
    places = places.partition("?")[0]
    if not at:
        return head + separator + places
    user = login.partition(":")[0]
    return f"{head}{separator}{user}:***@{places}" if ":" in login else f"{head}{separator}{user}@{places}"


def _split(url: str) -> SplitUrl:
    head, separator, rest = url.partition("://")
    if not separator or not head:
        raise InvalidArgument("url", hidden(url), f"a URL beginning with {_FORMS}")
    # urlsplit knows neither our schemes nor several hosts, but reads everything after them as we need it
    try:
        parts = urlsplit("redis://" + rest)
    except ValueError:
        raise InvalidArgument("url", hidden(url), f"a URL beginning with {_FORMS}") from None
    return SplitUrl(head.lower(), parts.netloc, parts.path, parts.query)


@dataclass(frozen=True, slots=True)
class SplitUrl:
    """The pieces of a URL."""

    scheme: str
    netloc: str
    path: str
    query: str


def _node(url: str, place: str, default_port: int) -> tuple[str, int]:
    host, colon, port = place.rpartition(":")
    if not colon or (place.startswith("[") and place.endswith("]")):
        host, port = place, str(default_port)
    if port and not (port.isascii() and port.isdigit() and 1 <= int(port) <= _MAX_PORT):
        raise InvalidArgument("url", hidden(url), f"ports from 1 to {_MAX_PORT}")
    return host.strip("[]") or "localhost", int(port or default_port)


def _db(url: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _MAX_DB):
        raise InvalidArgument("url", hidden(url), "a database number from 0")
    return int(text)
