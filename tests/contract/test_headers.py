from __future__ import annotations

import re
from typing import Any

import pytest

from agentperf_redis.command import Command
from agentperf_redis.script import Script
from tests.support import headers
from tests.support.places import LUA, ROOT
from tests.support.servers import Server

_PACKAGE = ROOT / "agentperf_redis"


@pytest.mark.parametrize("name", headers.scripts())
def test_a_script_keeps_to_its_header(name: str) -> None:
    text = (LUA / f"{name}.lua").read_text()
    assert headers.problems(text, headers.fragments_of(name)) == []
    assert text.startswith(f"-- {name.split('/')[1]}: "), "the header names another script"


@pytest.mark.every_server
def test_every_script_compiles(server: Server) -> None:
    with server.nodes[0].client() as client:
        shas = {name: client.script_load(Script(name).source) for name in headers.scripts()}
    assert shas == {name: Script(name).sha for name in headers.scripts()}


def test_every_script_is_used_and_every_one_used_is_there() -> None:
    texts = (file.read_text() for file in _PACKAGE.rglob("*.py") if file.name != "script.py")  # that has examples
    used = {name for text in texts for name in re.findall(r"""\bScript\(\s*"([\w/]+)"\s*\)""", text)}
    assert used == set(headers.scripts())


_GOOD = """\
-- take: take one.
-- KEYS
--   state   HASH  agentperf:{x:<name>}:state
--   entries...  STRING  <tag>:e:<key>, one for each
--           and no more
--   The tag is that of state.
-- ARGV
--   ttl_ms  int   life, ms
--   names...  text  who
-- RETURNS
--   1   taken
-- REPEAT  harmless
-- ERRORS  none
-- COST    O(1)
local STATE, ENTRIES = KEYS[1], 2
local TTL_MS = tonumber(ARGV[1])
--@include pool
-- tostring, os.time and KEYS[7] in a comment are nobody's business
for i = ENTRIES, #KEYS do redis.call('DEL', KEYS[i]) end
local text = 'os.time tostring KEYS'
for i = 2, #ARGV do redis.call('HSET', STATE, ARGV[i], TTL_MS) end
return 1
"""
_POOL = "-- The pool.\nlocal now = redis.call('TIME')\n"


def test_a_right_script_passes() -> None:
    assert headers.problems(_GOOD, {"pool": _POOL}) == []


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("-- take: take one.", "-- takes one", "name: purpose"),
        *((f"-- {section}", f"-- {section.lower()}", f"has no {section}") for section in ("KEYS", "ARGV", "RETURNS")),
        *((f"-- {section}", f"-- {section.lower()}", f"has no {section}") for section in ("REPEAT", "ERRORS", "COST")),
        ("-- COST    O(1)", "-- COST", "nothing under COST"),
        ("--   1   taken\n", "", "nothing under RETURNS"),
        ("--   ttl_ms  int   life, ms\n", "", "not in the header"),
        ("--   ttl_ms  int", "--   ttl_us  int", "ttl_us in the header and TTL_MS in the code"),
        ("--   ttl_ms  int   life, ms\n", "--   ttl_ms  int   life, ms\n--   more  int   x\n", "has no name"),
        ("--   names...  text  who\n", "", "no name... for any number"),
        (
            "--   ttl_ms  int   life, ms\n--   names...  text  who\n",
            "--   names...  text  who\n--   ttl_ms  int  life\n",
            "last",
        ),
        ("for i = 2, #ARGV do redis.call('HSET', STATE, ARGV[i], TTL_MS) end\n", "", "the code does not use"),
        ("local STATE, ENTRIES = KEYS[1], 2", "local STATE, ENTRIES = KEYS[1]", "2 names for 1 values"),
        (
            "local TTL_MS = tonumber(ARGV[1])",
            "local TTL_MS = tonumber(ARGV[2])",
            r"ARGV[1], ttl_ms in the header, has no",
        ),
        ("local TTL_MS = tonumber(ARGV[1])", "local TTL_MS = ARGV[1] + KEYS[1]", "several values"),
        ("return 1\n", "return KEYS[1]\n", "bare KEYS[1]"),
        ("return 1\n", "local late = ARGV[3]\nreturn 1\n", "bare ARGV[3]"),
        ("return 1\n", "return tostring(1)\n", "tostring"),
        ("return 1\n", "return math.random()\n", "randomness"),
        ("return 1\n", "STAET = 1\nreturn 1\n", "STAET is declared nowhere"),
        ("return 1\n", "return {1, state = 'x'..STAET}\n", "STAET is declared nowhere"),
        ("return 1\n", "return os.time()\n", "time is the server's"),
        ("return 1\n", "return cmsgpack.pack(1)\n", "fakeredis"),
        ("return 1\n", "return redis.call('KEYS', '*')\n", "calls KEYS"),
        ("return 1\n", 'return redis.pcall("scan", 0)\n', "calls scan"),
        ("return 1\n", "return {redis.call('TIME'), redis.call('TIME')}\n", "TIME in more than one place"),
    ],
)
def test_a_wrong_script_is_caught(right: str, wrong: str, complaint: str) -> None:
    """The check of the check."""
    assert _GOOD.count(right) == 1
    found = headers.problems(_GOOD.replace(right, wrong), {"pool": _POOL})
    assert any(complaint in problem for problem in found), found


def test_a_wrong_fragment_is_caught() -> None:
    for fragment, complaint in (
        ("local x = f(KEYS[1])\n", "fragment pool: KEYS[1] is named twice"),
        (_POOL + "--@include more\n", "fragment pool: includes another"),
        (_POOL + "redis.call('DEL', ARGV[2])\n", "fragment pool: bare ARGV[2]"),
    ):
        assert any(problem.startswith(complaint) for problem in headers.problems(_GOOD, {"pool": fragment}))


def _command(keys: int, args: int, resend: int | None = None) -> Command[Any]:
    again = None if resend is None else ("x",) * resend
    return Command(Script("namespace/open"), ("k",) * keys, ("x",) * args, id, again)


def test_a_call_that_does_not_fit_its_header_is_caught() -> None:
    """Every command that a test makes in this process is checked so (see the conftest)."""
    assert _command(1, 2).args == ("x", "x")
    for keys, args, resend in ((2, 2, None), (1, 1, None), (1, 3, None), (1, 2, 1)):
        with pytest.raises(AssertionError, match="namespace/open takes"):
            _command(keys, args, resend)
