"""Parses server URLs into an `Address`.

    redis://[user:password@]host[:6379][/db]        rediss:// for TLS
    unix:///path/to/socket[?db=0]
    redis+cluster://host:port[,host:port...]        rediss+cluster:// for TLS
    redis+sentinel://host:26379[,...]/service[/db]  rediss+sentinel:// for TLS
    embedded://[/path/to/data]                      a local server, started when needed

Options follow as a query. The options for TLS are ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile``,
``ssl_cert_reqs`` (required, optional, none) and ``ssl_check_hostname`` (true, false). The options for Sentinel are
``sentinel_username`` and ``sentinel_password``. The option ``db`` names the database if the path does not. An option
that would have no effect is refused.

In a password, ``/``, ``?`` and ``%`` are written ``%2F``, ``%3F`` and ``%25``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from agentperf_redis.errors import InvalidArgument

DEFAULT_URL = "redis://localhost:6379/0"
URL_VARIABLES = ("AGENTPERF_REDIS_URL", "REDIS_URL")
"""Environment variables used when no URL is given, in this order."""

_REDIS_PORT, _SENTINEL_PORT, _MAX_PORT, _MAX_DB = 6379, 26379, 65535, 2**31 - 1
_FORMS = (
    "a URL beginning with redis://, rediss://, unix://, redis+cluster://, rediss+cluster://, redis+sentinel://, "
    "rediss+sentinel:// or embedded://"
)
_SCHEME = re.compile(r"[A-Za-z]+(\+[A-Za-z]+)?")
_TLS_OPTIONS = {
    "ssl_ca_certs": None,
    "ssl_cert_reqs": ("required", "optional", "none"),
    "ssl_certfile": None,
    "ssl_check_hostname": ("true", "false", "1", "0", "yes", "no"),
    "ssl_keyfile": None,
}
"""Name of a TLS option -> its allowed values; None if the value is a path."""
_SENTINEL_OPTIONS = ("sentinel_password", "sentinel_username")
_OPTIONS = ("db", *_SENTINEL_OPTIONS, *_TLS_OPTIONS)


class ServerKind(Enum):
    """The kind of server at an address."""

    STANDALONE = "standalone"
    UNIX = "unix"
    CLUSTER = "cluster"
    SENTINEL = "sentinel"
    EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class Address:
    """A server, or the seed nodes of a Cluster or a Sentinel group. Its repr hides the password."""

    kind: ServerKind
    nodes: tuple[tuple[str, int], ...] = ()
    path: str = ""
    """The socket (unix) or the data folder (embedded); otherwise empty."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    service: str = ""
    """Name of the primary monitored by Sentinel."""
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def option(self, name: str) -> str | None:
        """Return an option from the query of the URL."""
        return dict(self.options).get(name)

    @property
    def masked(self) -> str:
        """The address as a URL to show to people, with ``***`` instead of the password."""
        if self.kind is ServerKind.EMBEDDED:
            return f"embedded://{self.path}"
        user = f"{self.username or ''}:***@" if self.password else f"{self.username}@" if self.username else ""
        if self.kind is ServerKind.UNIX:
            return f"unix://{user}{self.path}" + (f"?db={self.db}" if self.db else "")
        scheme = ("rediss" if self.tls else "redis") + (
            "" if self.kind is ServerKind.STANDALONE else f"+{self.kind.value}"
        )
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.nodes)
        tail = f"/{self.service}" if self.service else ""
        return f"{scheme}://{user}{hosts}{tail}" + (f"/{self.db}" if self.kind is not ServerKind.CLUSTER else "")


def url_in_environment() -> str | None:
    """Return the URL in AGENTPERF_REDIS_URL, else in REDIS_URL, else None."""
    return next((os.environ[variable] for variable in URL_VARIABLES if os.environ.get(variable)), None)


def resolve_url(url: str | None) -> str:
    """Return the given URL, else the URL in the environment, else redis://localhost:6379/0."""
    return url if url is not None else url_in_environment() or DEFAULT_URL


def parse_url(url: object) -> Address:
    """Parse a URL.

    Args:
        url: one of the forms at the top of this module.

    Returns:
        The address.

    Raises:
        InvalidArgument: if the URL has none of the forms at the top of this module. The message never contains the
            password.
    """
    if not isinstance(url, str):
        raise InvalidArgument("url", type(url), "a string")  # not the value, which may contain a password
    parts = _split(url)
    if parts.scheme == "embedded":
        return _embedded(url, parts)
    options = _options(url, parts)
    login, _, hosts = parts.authority.rpartition("@")
    user, colon, secret = login.partition(":")
    username, password = unquote(user) or None, unquote(secret) if colon else None
    rest = tuple(sorted(options.items()))
    if parts.scheme == "unix":
        if hosts or not parts.path.strip("/"):
            raise _refused(url, "unix:///path/to/socket")
        db = _db(url, None, options)
        return Address(ServerKind.UNIX, (), unquote(parts.path), db, username, password, options=rest)
    tls = parts.scheme.startswith("rediss")
    kind = ServerKind(parts.scheme.partition("+")[2] or ServerKind.STANDALONE)
    nodes = _nodes(url, hosts, _SENTINEL_PORT if kind is ServerKind.SENTINEL else _REDIS_PORT)
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    service = segments.pop(0) if kind is ServerKind.SENTINEL and segments else ""
    if kind is ServerKind.SENTINEL and (not service or len(segments) > 1):
        raise _refused(url, "redis+sentinel://host:port,.../service[/db]")
    if kind is ServerKind.STANDALONE and (len(segments) > 1 or len(nodes) > 1):
        raise _refused(url, "redis://[user:password@]host[:port][/db]")
    if kind is ServerKind.CLUSTER and (segments or [options.get("db", "0")]) != ["0"]:
        raise _refused(url, "only database 0 on a Cluster")
    db = _db(url, segments[0] if segments else None, options)
    return Address(kind, nodes, "", db, username, password, tls, service, rest)


def hidden(url: str) -> str:
    """Replace all parts of a URL that may belong to a password with ``***``. The URL may be malformed."""
    scheme, separator, rest = url.rpartition("://") if url.count("://") == 1 else ("", "", url)
    head = (scheme if _SCHEME.fullmatch(scheme) else "***") + separator if separator else ""
    before, _, query = rest.partition("?")
    if "@" in query:  # the question mark may belong to a password
        return f"{head}***"
    _, at, after = before.rpartition("@")
    authority, slash, path = after.partition("/")
    hosts = ",".join(re.sub(r":(?!\d*$)[^\]]*$", ":***", host_text) for host_text in authority.split(","))
    return head + ("***@" if at else "") + hosts + slash + path


class _Parts(NamedTuple):
    scheme: str
    authority: str
    path: str
    query: str


def _split(url: str) -> _Parts:
    """Split a URL. `urllib` is not used, because it cuts off a URL at a ``#`` and does not support several hosts."""
    scheme, separator, rest = url.partition("://")
    known = ("embedded", "unix", *(tls + form for tls in ("redis", "rediss") for form in ("", "+cluster", "+sentinel")))
    if not separator or scheme.lower() not in known:
        raise _refused(url, _FORMS)
    before, _, query = rest.partition("?")
    authority, slash, path = before.partition("/")
    return _Parts(scheme.lower(), authority, slash + path, query)


def _refused(url: str, allowed: str) -> InvalidArgument:
    return InvalidArgument("url", hidden(url), allowed)


def _embedded(url: str, parts: _Parts) -> Address:
    if parts.query:
        raise _refused(url, "embedded:// without options")
    path = unquote(parts.authority + parts.path)
    if path and not path.startswith(("/", "~")):  # a path relative to the working directory is a mistake
        raise _refused(url, "embedded:// or embedded:///path/to/data")
    return Address(ServerKind.EMBEDDED, path=path)


def _options(url: str, parts: _Parts) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    for option in options:
        if option not in _OPTIONS:
            allowed = f"options {', '.join(_OPTIONS)}"
            if not re.fullmatch(r"\w{1,40}", option) or "@" in parts.query:
                raise _refused(url, allowed)
            raise InvalidArgument("url", f"{hidden(url)}?{option}=...", f"{allowed}, not {option!r}")
    if len(options) < len(pairs):
        raise _refused(url, "each option once")
    if not parts.scheme.startswith("rediss") and options.keys() & _TLS_OPTIONS.keys():
        raise _refused(url, "TLS options with rediss:// only")
    if not parts.scheme.endswith("+sentinel") and options.keys() & set(_SENTINEL_OPTIONS):
        raise _refused(url, "sentinel options with redis+sentinel:// only")
    for option, values in _TLS_OPTIONS.items():
        if option in options and values is not None:
            options[option] = options[option].lower()
            if options[option] not in values:
                raise _refused(url, f"{option} of {', '.join(values[:-1])} or {values[-1]}")
    return options


def _nodes(url: str, hosts: str, default_port: int) -> tuple[tuple[str, int], ...]:
    listed = hosts.split(",")
    if len(listed) > 1 and "" in listed:
        raise _refused(url, "no empty host between commas")
    return tuple(_node(url, host_text, default_port) for host_text in listed)


def _node(url: str, host_text: str, default_port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::(.*))?", host_text, re.DOTALL)
    if found is None or ":" in (found[3] or ""):
        raise _refused(url, "host:port, IPv6 addresses in brackets")
    host, port = found[1] or found[2] or "localhost", found[3] or str(default_port)
    if not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= _MAX_PORT):
        raise _refused(url, f"ports from 1 to {_MAX_PORT}")
    if not host.isprintable() or " " in host:
        raise _refused(url, "host names without spaces or control characters")
    return host, int(port)


def _db(url: str, in_path: str | None, options: dict[str, str]) -> int:
    if in_path is not None and "db" in options:
        raise _refused(url, "the database once, in the path or as an option")
    text = options.get("db", "0") if in_path is None else in_path
    if not (re.fullmatch(r"[0-9]{1,10}", text) and int(text) <= _MAX_DB):
        raise _refused(url, f"a database number from 0 to {_MAX_DB}")
    return int(text)
