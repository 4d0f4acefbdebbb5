"""The settings of the web page, checked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from agentperf_redis import arguments
from agentperf_redis.errors import InvalidArgument

MIN_TOKEN: Final = 16
"""Minimum length of a token, in characters. Attempts are not counted, so a token must be too long to be guessed."""
MAX_TOKEN: Final = 512
REFRESH_S: Final = 2.0
"""Default time between two reads, s."""
_MIN_REFRESH_S, _MAX_REFRESH_S = 0.05, 3600.0
_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
_NAME = re.compile(r"\[[0-9a-f:.]{2,45}\]|[a-z0-9_](?:[a-z0-9_.-]{0,252})")
_TOKEN_ALLOWED = f"None, a text of {MIN_TOKEN} to {MAX_TOKEN} printable ASCII characters without spaces"
_HOSTS_ALLOWED = 'host names without a port, such as "ops.example.com" or "[::1]"; "*" allows all'


@dataclass(frozen=True, slots=True)
class Settings:
    """How the application answers.

    Attributes:
        token: what a user must know; None if there is no login.
        allow_actions: whether forms may change the state of the namespace.
        hosts: names by which the page may be called, in lower case and without a port; None for all names.
        refresh_s: time between two reads, s. Pages that ask for the same data within this time share one read.
    """

    token: str | None
    allow_actions: bool
    hosts: frozenset[str] | None
    refresh_s: float

    def allows_host(self, host: str) -> bool:
        """Whether a Host header names this application."""
        name = without_port(host)
        return name is not None and (self.hosts is None or name in self.hosts)


def without_port(host: str) -> str | None:
    """Return the name in a Host header in lower case; None if the header is no name with an optional port."""
    name, port = host.lower(), ""
    if not name.endswith("]"):
        head, colon, tail = name.rpartition(":")
        if colon:
            name, port = head, tail
            if not (port.isascii() and port.isdigit()):
                return None
    name = name.removesuffix(".")
    return name if _NAME.fullmatch(name) else None


def checked(token: object, *, allow_actions: object, hosts: object, refresh: object = REFRESH_S) -> Settings:
    """Check the settings.

    Without `hosts` and without a token, only the names of this machine's loopback interface are allowed in an address
    of the page. With any other name, a page on another site could read this page (DNS rebinding). With a token but
    without `hosts`, all names are allowed, because a browser sends the cookie only to the name used for the login.

    Raises:
        InvalidArgument: for an invalid value.
    """
    if token is not None and not (
        isinstance(token, str)
        and MIN_TOKEN <= len(token) <= MAX_TOKEN
        and token.isascii()
        and token.isprintable()
        and " " not in token
    ):
        shown = f"a text of {len(token)} characters" if isinstance(token, str) else type(token).__name__
        raise InvalidArgument("token", shown, _TOKEN_ALLOWED)  # the token itself stays secret
    return Settings(
        token,
        arguments.flag("allow_actions", allow_actions),
        _checked_hosts(hosts, has_token=token is not None),
        arguments.seconds("refresh", refresh, minimum=_MIN_REFRESH_S, maximum=_MAX_REFRESH_S),
    )


def _checked_hosts(hosts: object, *, has_token: bool) -> frozenset[str] | None:
    if hosts is None:
        return None if has_token else frozenset(_LOOPBACK)
    if isinstance(hosts, str) or not isinstance(hosts, Sequence) or not hosts:
        raise InvalidArgument("hosts", hosts, _HOSTS_ALLOWED)
    if "*" in hosts:
        return None
    for host in hosts:
        if not isinstance(host, str) or not _NAME.fullmatch(host.lower()):
            raise InvalidArgument("hosts", host, _HOSTS_ALLOWED)
    return frozenset({*_LOOPBACK, *(host.lower() for host in hosts)})


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
