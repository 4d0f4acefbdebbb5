"""Changes to the text of all scripts, by which one server shows what another server would do with them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import pytest

from agentperf_redis.script import Script
from agentperf_redis.script_header import parse_header

_SHEBANG = "#!lua\n"
_NUMBERS = (
    "local redis = (function(plain) "
    "local function written(call) return function(...) local words = {...} "
    "for i = 1, #words do local word = words[i] "
    "if type(word) == 'number' and word ~= 0 and word % 1e8 == 0 then words[i] = string.format('%.15e', word) end end "
    "return call(unpack(words)) end end "
    "return setmetatable({call = written(plain.call), pcall = written(plain.pcall)}, {__index = plain}) end)(redis) "
)


def change_scripts(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    """Send every script of this process with a changed text."""
    plain = Script.__dict__["source"].fget
    sources: dict[str, str] = {}

    def source(script: Script) -> str:
        return sources.setdefault(script.name, change(plain(script)))

    def sha(script: Script) -> str:
        return hashlib.sha1(script.source.encode()).hexdigest()

    monkeypatch.setattr(Script, "source", property(source))
    monkeypatch.setattr(Script, "sha", property(sha))
    # The header is parsed from `source`, because a subclass of Script may override `source`.
    monkeypatch.setattr(Script, "header", property(lambda script: parse_header(script.source.removeprefix(_SHEBANG))))


def with_shebang(text: str) -> str:
    """Let the server of a Cluster reject a script that leaves its slot."""
    return _SHEBANG + text


def with_exponents(text: str) -> str:
    """Let a script write numbers as in Redis 7.2: multiples of 10^8 have an exponent. Texts keep their form.

    The code is inserted in front of the first line that is no comment.
    """
    return re.sub(r"^(?!--)", lambda _: _NUMBERS, text, count=1, flags=re.MULTILINE)
