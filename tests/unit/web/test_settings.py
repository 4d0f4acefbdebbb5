"""Tests of the settings of the web page."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis.errors import InvalidArgument
from agentperf_redis.web.settings import checked, is_loopback, without_port


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8420", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]", "[::1]"),
        ("[::1]:80", "[::1]"),
        ("ops.example.com.:443", "ops.example.com"),
        ("", None),
        (":80", None),
        ("a b", None),
        ("localhost:", None),
        ("localhost:x", None),
        ("localhost:80:80", None),
        ("user@localhost", None),
        ("localhost/x", None),
        ("::1", None),
        ("[::1", None),
        ("x" * 300, None),
    ],
)
def test_host_header_is_read_strictly(host: str, name: str | None) -> None:
    assert without_port(host) == name


def test_loopback_names_alone_are_allowed_by_default() -> None:
    settings = checked(None, allow_actions=False, hosts=None)
    assert all(settings.allows_host(host) for host in ("localhost:8420", "127.0.0.1", "[::1]:8420"))
    assert not any(
        settings.allows_host(host) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io")
    )


def test_token_allows_all_names_unless_some_are_given() -> None:
    token = "x" * 16
    assert checked(token, allow_actions=False, hosts=None).allows_host("ops.example.com")
    named = checked(token, allow_actions=False, hosts=["Ops.example.com"])
    assert named.allows_host("ops.example.com:443")
    assert named.allows_host("localhost")
    assert not named.allows_host("evil.example")
    assert checked(None, allow_actions=False, hosts=["*"]).allows_host("evil.example")


@pytest.mark.parametrize("hosts", ["ops.example.com", [], ["a:80"], ["http://a"], ["a b"], [1], 5])
def test_invalid_hosts_are_refused(hosts: Any) -> None:
    with pytest.raises(InvalidArgument, match="hosts"):
        checked(None, allow_actions=False, hosts=hosts)


@pytest.mark.parametrize(
    "token", ["", "short", "x" * 513, "has a space in it", "ümlautümlautümlaut", "line\nline\nline\nline", 5]
)
def test_weak_token_is_refused_and_not_shown(token: Any) -> None:
    with pytest.raises(InvalidArgument, match="16 to 512") as raised:
        checked(token, allow_actions=False, hosts=None)
    if isinstance(token, str) and token:
        assert token not in str(raised.value)


@pytest.mark.parametrize(("refresh", "actions"), [(0, False), (float("nan"), False), ("2", False), (2.0, "yes")])
def test_other_invalid_settings_are_refused(refresh: Any, actions: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"refresh|allow_actions"):
        checked(None, allow_actions=actions, hosts=None, refresh=refresh)


def test_loopback_addresses_are_known() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.com", "")))
