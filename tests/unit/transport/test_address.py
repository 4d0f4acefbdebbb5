from __future__ import annotations

import pytest

from agentperf_redis.errors import InvalidArgument
from agentperf_redis.transport.address import Address, ServerKind, hidden, parse_url, resolve_url


@pytest.mark.parametrize(
    ("url", "address", "masked"),
    [
        ("redis://", Address(ServerKind.STANDALONE, (("localhost", 6379),)), "redis://localhost:6379/0"),
        ("redis://h/3", Address(ServerKind.STANDALONE, (("h", 6379),), db=3), "redis://h:6379/3"),
        (
            "redis://h?db=3",
            Address(ServerKind.STANDALONE, (("h", 6379),), db=3, options=(("db", "3"),)),
            "redis://h:6379/3",
        ),
        (
            "rediss://me:p%40ss@h:7",
            Address(ServerKind.STANDALONE, (("h", 7),), username="me", password="p@ss", tls=True),
            "rediss://me:***@h:7/0",
        ),
        (
            "redis://:pw@[::1]:7/1",
            Address(ServerKind.STANDALONE, (("::1", 7),), db=1, password="pw"),
            "redis://:***@[::1]:7/1",
        ),
        ("redis://[::1]", Address(ServerKind.STANDALONE, (("::1", 6379),)), "redis://[::1]:6379/0"),
        (
            "redis://me:a:b@c%2Fd%3F%25@h",
            Address(ServerKind.STANDALONE, (("h", 6379),), username="me", password="a:b@c/d?%"),
            "redis://me:***@h:6379/0",
        ),
        ("unix:///run/r.sock", Address(ServerKind.UNIX, path="/run/r.sock"), "unix:///run/r.sock"),
        (
            "redis+cluster://a:1,b:2",
            Address(ServerKind.CLUSTER, (("a", 1), ("b", 2))),
            "redis+cluster://a:1,b:2",
        ),
        (
            "rediss+sentinel://:pw@a,b:2/main/4",
            Address(ServerKind.SENTINEL, (("a", 26379), ("b", 2)), db=4, password="pw", tls=True, service="main"),
            "rediss+sentinel://:***@a:26379,b:2/main/4",
        ),
        (
            "redis://me:a#b@h/1",
            Address(ServerKind.STANDALONE, (("h", 6379),), db=1, username="me", password="a#b"),
            "redis://me:***@h:6379/1",
        ),
        (
            "redis+cluster://h?db=0",
            Address(ServerKind.CLUSTER, (("h", 6379),), options=(("db", "0"),)),
            "redis+cluster://h:6379",
        ),
        ("redis+cluster://h/0", Address(ServerKind.CLUSTER, (("h", 6379),)), "redis+cluster://h:6379"),
        (
            "rediss://h?ssl_cert_reqs=NONE&ssl_check_hostname=False",
            Address(
                ServerKind.STANDALONE,
                (("h", 6379),),
                tls=True,
                options=(("ssl_cert_reqs", "none"), ("ssl_check_hostname", "false")),
            ),
            "rediss://h:6379/0",
        ),
        (
            "unix://me:pw@/run/a%20b?db=2",
            Address(ServerKind.UNIX, path="/run/a b", db=2, username="me", password="pw", options=(("db", "2"),)),
            "unix://me:***@/run/a b?db=2",
        ),
        ("embedded://", Address(ServerKind.EMBEDDED), "embedded://"),
        ("embedded://~/data", Address(ServerKind.EMBEDDED, path="~/data"), "embedded://~/data"),
        ("embedded:///var/data", Address(ServerKind.EMBEDDED, path="/var/data"), "embedded:///var/data"),
    ],
)
def test_urls_are_parsed_and_masked(url: str, address: Address, masked: str) -> None:
    read = parse_url(url)
    assert read == address
    assert read.masked == masked
    assert "pw" not in repr(read)


FORMS = "a URL beginning with redis://, rediss://"
TLS_ONLY = "TLS options with rediss:// only"


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("", FORMS),
        ("localhost:6379", FORMS),
        ("http://h", FORMS),
        ("redis+magic://h", FORMS),
        ("embedded+cluster://", FORMS),
        ("redis://h:99999", "ports from 1 to 65535"),
        ("redis://h:0", "ports from 1 to 65535"),
        ("redis://h:x", "ports from 1 to 65535"),
        ("redis://h:" + "1" * 5000, "ports from 1 to 65535"),
        ("redis://::1", "IPv6 addresses in brackets"),
        ("redis://[::1", "IPv6 addresses in brackets"),
        ("redis://[::1]7", "IPv6 addresses in brackets"),
        ("redis://h h", "host names without spaces"),
        ("redis://h\n", "host names without spaces"),
        ("redis://h/notanumber", "a database number from 0"),
        ("redis://h/-1", "a database number from 0"),
        ("redis://h/" + "1" * 5000, "a database number from 0"),
        ("redis://h/0#1", "a database number from 0"),
        ("redis://h/1?db=2", "the database once"),
        ("redis://h?db=1&db=2", "each option once"),
        ("redis://h/1/2", "redis://[user:password@]host[:port][/db]"),
        ("redis://a,b", "redis://[user:password@]host[:port][/db]"),
        ("redis://h?nonsense=1", "'nonsense'"),
        ("redis://h?ssl_ca_certs=/x", TLS_ONLY),
        ("unix:///s?ssl_ca_certs=/x", TLS_ONLY),
        ("rediss://h?ssl_cert_reqs=banana", "ssl_cert_reqs of required, optional or none"),
        ("rediss://h?ssl_check_hostname=banana", "ssl_check_hostname of true, false, "),
        ("redis://h?sentinel_password=x", "sentinel options with redis+sentinel:// only"),
        ("redis+cluster://h/1", "only database 0 on a Cluster"),
        ("redis+cluster://h?db=3", "only database 0 on a Cluster"),
        ("redis+cluster://a:7000,", "no empty host between commas"),
        ("redis+sentinel://,a/main", "no empty host between commas"),
        ("redis+sentinel://h", "redis+sentinel://host:port,.../service[/db]"),
        ("unix://", "unix:///path/to/socket"),
        ("unix://tmp/redis.sock", "unix:///path/to/socket"),
        ("embedded:///p?db=2", "embedded:// without options"),
        ("embedded://tmp/data", "embedded:///path/to/data"),
        (None, "a string"),
        (7, "a string"),
        (b"redis://h", "a string"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_invalid_urls_and_useless_options_are_refused(url: object, allowed: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_url(url)
    assert caught.value.argument == "url"
    assert allowed in caught.value.allowed


@pytest.mark.parametrize(
    ("url", "left"),
    [
        ("redis://me:hunter2@h/x", "redis://***@h/x"),
        ("redis://hunter2@h:x", "redis://***@h:***"),
        ("redis://me:hunter2", "redis://me:***"),
        ("me:hunter2@host:6379", "***@host:6379"),
        ("redis:/me:hunter2@host", "***@host"),
        ("me:hunter2://h", "***://h"),
        ("redis://me:hunt/hunter2@h", "redis://***@h"),
        ("redis://me:hunter?hunter2@h", "redis://***"),
        ("redis://me:x@hunter?hunter2@h", "redis://***"),
        ("redis+sentinel://h?sentinel_password=hunter@2", "redis+sentinel://***"),
        ("redis+sentinel://h?sentinel_password=hunter2", "redis+sentinel://h"),
        ("redis://[::1]:7,h:1/x?ssl_keyfile=hunter2", "redis://[::1]:7,h:1/x"),
        (b"redis://me:hunter2@h", None),
        (["hunter2"], None),
    ],
)
def test_refused_url_error_hides_the_password(url: object, left: str | None) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_url(url)
    assert "hunter" not in str(caught.value)
    assert "hunter" not in repr(caught.value)
    if isinstance(url, str):
        assert hidden(url) == left


def test_unknown_option_error_hides_the_value() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_url("rediss://h?ssl_ca_cert=/x/hunter2")
    assert str(caught.value).startswith("url is 'rediss://h?ssl_ca_cert=...'; allowed: options db, ")
    assert str(caught.value).endswith("ssl_keyfile, not 'ssl_ca_cert'")
    assert "hunter2" not in str(caught.value)


def test_environment_variables_are_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTPERF_REDIS_URL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert resolve_url(None) == "redis://localhost:6379/0"
    monkeypatch.setenv("REDIS_URL", "redis://two")
    assert resolve_url(None) == "redis://two"
    monkeypatch.setenv("AGENTPERF_REDIS_URL", "redis://one")
    assert resolve_url(None) == "redis://one"
    assert resolve_url("redis://given") == "redis://given"
