from __future__ import annotations

import pytest

from agentperf_redis.address import Address, Kind, hidden, parse_url, resolve_url
from agentperf_redis.errors import InvalidArgument


@pytest.mark.parametrize(
    ("url", "address", "masked"),
    [
        ("redis://", Address(Kind.STANDALONE, (("localhost", 6379),)), "redis://localhost:6379/0"),
        ("redis://h/3", Address(Kind.STANDALONE, (("h", 6379),), db=3), "redis://h:6379/3"),
        ("redis://h?db=3", Address(Kind.STANDALONE, (("h", 6379),), db=3, options=(("db", "3"),)), "redis://h:6379/3"),
        (
            "rediss://me:p%40ss@h:7",
            Address(Kind.STANDALONE, (("h", 7),), username="me", password="p@ss", tls=True),
            "rediss://me:***@h:7/0",
        ),
        (
            "redis://:pw@[::1]:7/1",
            Address(Kind.STANDALONE, (("::1", 7),), db=1, password="pw"),
            "redis://:***@[::1]:7/1",
        ),
        ("redis://[::1]", Address(Kind.STANDALONE, (("::1", 6379),)), "redis://[::1]:6379/0"),
        ("unix:///run/r.sock", Address(Kind.UNIX, path="/run/r.sock"), "unix:///run/r.sock"),
        (
            "redis+cluster://a:1,b:2",
            Address(Kind.CLUSTER, (("a", 1), ("b", 2))),
            "redis+cluster://a:1,b:2",
        ),
        (
            "rediss+sentinel://:pw@a,b:2/main/4",
            Address(Kind.SENTINEL, (("a", 26379), ("b", 2)), db=4, password="pw", tls=True, service="main"),
            "rediss+sentinel://:***@a:26379,b:2/main/4",
        ),
        ("embedded://", Address(Kind.EMBEDDED), "embedded://"),
        ("embedded:///var/data", Address(Kind.EMBEDDED, path="/var/data"), "embedded:///var/data"),
    ],
)
def test_urls_are_read_and_shown_without_passwords(url: str, address: Address, masked: str) -> None:
    read = parse_url(url)
    assert read == address
    assert read.masked == masked
    assert "pw" not in repr(read)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://h",
        "redis://h:99999",
        "redis://h:0",
        "redis://h:x",
        "redis://h/notanumber",
        "redis://h/-1",
        "redis://h/1/2",
        "redis://a,b",
        "redis://h?nonsense=1",
        "redis+cluster://h/1",
        "redis+sentinel://h",
        "redis+magic://h",
        "unix://",
        "redis://[::1",
        None,
        7,
        b"redis://h",
    ],
)
def test_what_is_no_url_is_refused(url: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_url(url)
    assert caught.value.argument == "url"


def test_a_refused_url_does_not_repeat_its_password() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_url("redis://me:hunter2@h/x")
    assert "hunter2" not in str(caught.value)
    assert hidden("redis://me:hunter2@h/x?ssl_keyfile=k") == "redis://me:***@h/x"


def test_the_environment_is_asked_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTPERF_REDIS_URL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert resolve_url(None) == "redis://localhost:6379/0"
    monkeypatch.setenv("REDIS_URL", "redis://two")
    assert resolve_url(None) == "redis://two"
    monkeypatch.setenv("AGENTPERF_REDIS_URL", "redis://one")
    assert resolve_url(None) == "redis://one"
    assert resolve_url("redis://given") == "redis://given"
