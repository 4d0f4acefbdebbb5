"""Tests of logins and CSRF tokens."""

from __future__ import annotations

import pytest

from agentperf_redis.web.sessions import SESSION_S, Sessions

TOKEN = "correct-horse-battery"


def test_cookie_outlives_a_restart_but_not_its_token() -> None:
    cookie = Sessions(TOKEN).new()
    assert Sessions(TOKEN).is_valid(cookie)
    assert not Sessions("another-token-than-that").is_valid(cookie)
    assert TOKEN not in cookie


def test_cookie_ends() -> None:
    now = [1e9]
    sessions = Sessions(TOKEN, clock=lambda: now[0])
    cookie = sessions.new()
    now[0] += SESSION_S - 1
    assert sessions.is_valid(cookie)
    now[0] += 2
    assert not sessions.is_valid(cookie)


def test_changed_cookies_are_refused() -> None:
    sessions = Sessions(TOKEN)
    cookie = sessions.new()
    end, nonce, code = cookie.split(".")
    later = f"{int(end) + 1}.{nonce}.{code}"
    for other in (later, f"{end}.{nonce[1:]}0.{code}", cookie[:-1], cookie + "0", "", "..", "a.b.c", "é.é.é", TOKEN):
        assert not sessions.is_valid(other), other


def test_without_token_processes_of_an_application_share_their_cookies() -> None:
    sessions = Sessions(None, "redis://h:1/0 secret ns")
    cookie = sessions.new()
    assert Sessions(None, "redis://h:1/0 secret ns").is_csrf(sessions.csrf(cookie), cookie)
    assert not Sessions(None, "redis://h:1/0 another ns").is_valid(cookie)
    assert not Sessions("redis://h:1/0 secret ns").is_valid(cookie), "the seed is no token"
    assert not sessions.is_token("")


@pytest.mark.parametrize("given", ["", "correct-horse-batter", TOKEN + " ", TOKEN.upper(), "é" * 20, "\ud800" * 20])
def test_wrong_tokens_are_refused(given: str) -> None:
    assert Sessions(TOKEN).is_token(TOKEN)
    assert not Sessions(TOKEN).is_token(given)


def test_csrf_token_belongs_to_its_cookie() -> None:
    sessions = Sessions(TOKEN)
    cookie, other = sessions.new(), sessions.new()
    first, second = sessions.csrf(cookie), sessions.csrf(cookie)
    assert first != second, "the mask differs"
    assert sessions.is_csrf(first, cookie)
    assert sessions.is_csrf(second, cookie)
    assert not sessions.is_csrf(first, other)
    for wrong in ("", "00" * 64, first[:-2], first + "00", first[:64], "zz" * 64, "é"):
        assert not sessions.is_csrf(wrong, cookie), wrong
