"""Every Lua script matches its header, and every call matches the header of its script."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis.command import Command, NamedArgs
from agentperf_redis.script import Script
from tests.support import headers
from tests.support.places import LUA, ROOT
from tests.support.servers import Server

_PACKAGE = ROOT / "agentperf_redis"


@pytest.mark.parametrize("name", headers.scripts())
def test_every_script_matches_its_header(name: str) -> None:
    text = (LUA / f"{name}.lua").read_text()
    assert headers.problems(text, headers.fragments_of(name)) == []
    assert text.startswith(f"-- {name.split('/')[1]}: "), "the header has another script's name"


LAID_OUT = [str(file.relative_to(LUA)) for file in sorted(LUA.rglob("*.lua"))]


@pytest.mark.parametrize("name", LAID_OUT)
def test_lua_files_have_the_standard_layout(name: str) -> None:
    assert headers.layout_problems((LUA / name).read_text()) == []


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("return 1\n", f"return 1 -- {'x' * 120}\n", "line 18 has 132 columns"),
        ("--   entries...  STRING  <tag>", "--   entries... STRING  <tag>", "line 4: the name"),
        ("--   ttl_ms      int     TTL", "--    ttl_ms     int     TTL", "line 6: the name"),
        ("--   ttl_ms      int     TTL", "--   ttl_ms      int    TTL", "line 6: the text"),
        ("-- COST    O(1)", "-- COST   O(1)", "line 12: the text of COST begins"),
        ("--         harmless", "--   harmless", "line 11: the text of REPEAT continues"),
    ],
)
def test_other_lua_layouts_are_detected(right: str, wrong: str, complaint: str) -> None:
    assert headers.layout_problems(_LAID_OUT) == []
    assert _LAID_OUT.count(right) == 1
    assert any(complaint in problem for problem in headers.layout_problems(_LAID_OUT.replace(right, wrong)))


_LAID_OUT = """\
-- take: take one.
-- KEYS
--   state       HASH    agentperf:{x:<name>}:state
--   entries...  STRING  <tag>:e:<key>, one for each
-- ARGV
--   ttl_ms      int     TTL, ms
-- RETURNS
--   1   taken
-- ERRORS  none
-- REPEAT  a second delivery is
--         harmless
-- COST    O(1)
local STATE, ENTRIES = KEYS[1], 2
local TTL_MS = tonumber(ARGV[1])
--@include pool

for i = ENTRIES, #KEYS do redis.call('DEL', KEYS[i]) end
return 1
"""


def test_every_fragment_is_included_by_a_script() -> None:
    assert headers.fragments() == {file for file in LUA.rglob("*.lua") if file.parent.name == "includes"}


@pytest.mark.parametrize("name", [name for name in LAID_OUT if "includes/" in name])
def test_fragments_do_not_end_their_script(name: str) -> None:
    assert not headers.returns_from_script((LUA / name).read_text())


@pytest.mark.parametrize(
    ("fragment", "ends"),
    [
        ("local function f(n) if n then return 1 end return 2 end\n", False),
        ("local x\ndo\n  if not x then return {0} end\nend\n", True),
        ("local function f() for i = 1, 2 do end end\nrepeat\n  return 1\nuntil true\n", True),
        ("-- return\nlocal text = 'return'\n", False),
    ],
)
def test_return_outside_functions_is_detected(fragment: str, ends: bool) -> None:
    assert headers.returns_from_script(fragment) == ends


def test_every_script_compiles(server: Server) -> None:
    with server.nodes[0].client() as client:
        shas = {name: client.script_load(Script(name).source) for name in headers.scripts()}
    assert shas == {name: Script(name).sha for name in headers.scripts()}


def test_scripts_in_use_are_the_scripts_present() -> None:
    # The names of scripts in script.py are only examples.
    texts = (file.read_text() for file in _PACKAGE.rglob("*.py") if file.name != "script.py")
    used = {name for text in texts for name in re.findall(r"""\bScript\(\s*"([\w/]+)"\s*\)""", text)}
    assert used == set(headers.scripts())


_GOOD = """\
-- take: take one.
-- KEYS
--   state   HASH  agentperf:{x:<name>}:state
--   entries...  STRING  <tag>:e:<key>, one for each
--           in index order
--   The tag is that of state.
-- ARGV
--   ttl_ms  int   TTL, ms
--   names...  text  names
-- RETURNS
--   1   taken
-- REPEAT  harmless
-- ERRORS  none
-- COST    O(1)
local STATE, ENTRIES = KEYS[1], 2
local TTL_MS = tonumber(ARGV[1])
--@include pool
-- tostring, os.time and KEYS[7] in a comment are allowed
for i = ENTRIES, #KEYS do redis.call('DEL', KEYS[i]) end
local text = 'os.time tostring KEYS'
local field,
  value = 'a', 'b'
redis.call('HSET', STATE, field, value)
for i = 2, #ARGV do redis.call('HSET', STATE, ARGV[i], TTL_MS) end
return 1
"""
_POOL = "-- The pool.\nlocal now = redis.call('TIME')\n"


def test_correct_script_has_no_problems() -> None:
    assert headers.problems(_GOOD, {"pool": _POOL}) == []


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("-- take: take one.", "-- takes one", "name: purpose"),
        *((f"-- {section}", f"-- {section.lower()}", f"has no {section}") for section in ("KEYS", "ARGV", "RETURNS")),
        *((f"-- {section}", f"-- {section.lower()}", f"has no {section}") for section in ("REPEAT", "ERRORS", "COST")),
        ("-- COST    O(1)", "-- COST", "nothing under COST"),
        ("--   1   taken\n", "", "nothing under RETURNS"),
        ("--   ttl_ms  int   TTL, ms\n", "", "not in the header"),
        ("--   ttl_ms  int", "--   ttl_us  int", "ttl_us in the header and TTL_MS in the code"),
        ("--   ttl_ms  int   TTL, ms\n", "--   ttl_ms  int   TTL, ms\n--   more  int   x\n", "has no name"),
        ("--   names...  text  names\n", "", "no name... for any number"),
        (
            "--   ttl_ms  int   TTL, ms\n--   names...  text  names\n",
            "--   names...  text  names\n--   ttl_ms  int  TTL\n",
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
        ("return 1\n", "return os.time()\n", "use the server's time"),
        ("return 1\n", "return cmsgpack.pack(1)\n", "fakeredis"),
        ("return 1\n", "return redis.call('KEYS', '*')\n", "calls KEYS"),
        ("return 1\n", 'return redis.pcall("scan", 0)\n', "calls scan"),
        ("return 1\n", "return {redis.call('TIME'), redis.call('TIME')}\n", "TIME in more than one place"),
    ],
)
def test_script_with_a_fault_is_reported(right: str, wrong: str, complaint: str) -> None:
    """The check of `test_every_script_matches_its_header` detects each kind of fault."""
    assert _GOOD.count(right) == 1
    found = headers.problems(_GOOD.replace(right, wrong), {"pool": _POOL})
    assert any(complaint in problem for problem in found), found


_SINGLE = """\
-- take: take one.
-- KEYS
--   due     ZSET  agentperf:{x:<name>}:due
-- ARGV
--   token   text  whose
-- RETURNS
--   1   taken
-- REPEAT  harmless
-- ERRORS  none
-- COST    O(1)
local DUE = KEYS[1]
local TOKEN = ARGV[1]
local now = redis.call('TIME')
redis.call('ZREM', DUE, '')
return redis.call('ZADD', DUE, now[1], TOKEN)
"""


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("", ""),
        ("redis.call('HGET', DUE .. TOKEN, 'x')", "HGET uses DUE .. TOKEN"),
        ("redis.pcall('SET', TOKEN, 1)", "SET uses TOKEN"),
        ("redis.call('ZREM', DUE, TOKEN)", "ZREM may delete the only key"),
        ("redis.call('UNLINK', DUE)", "UNLINK may delete the only key"),
    ],
)
def test_script_with_a_single_key_keeps_to_it(more: str, complaint: str) -> None:
    """A script with a single key runs even while its slot is moved. So it must not use other keys or delete its key."""
    found = headers.problems(_SINGLE.replace("return", f"{more}\nreturn", 1), {})
    assert any(complaint in problem for problem in found) if complaint else found == []


def test_fragment_with_a_fault_is_reported() -> None:
    for fragment, complaint in (
        ("local x = f(KEYS[1])\n", "fragment pool: KEYS[1] is named twice"),
        (_POOL + "--@include more\n", "fragment pool: includes another"),
        (_POOL + "redis.call('DEL', ARGV[2])\n", "fragment pool: bare ARGV[2]"),
    ):
        assert any(problem.startswith(complaint) for problem in headers.problems(_GOOD, {"pool": fragment}))


_OPEN, _DELETE = Script("namespace/open"), Script("cache/delete")
_OPEN_ARGS: NamedArgs = {"schema": 1, "epoch": "x"}
_INDEX_PARTS = ("meta", "size", "new", "hot", "warm", "cold", "ghost", "deferred")
_INDEX = tuple(f"ns:{{cache:c}}:{part}" for part in _INDEX_PARTS)
_BESIDE = ("ns:{cache:c}:e:a", "ns:{cache:c}:e:b", "ns:{cache:c}:l:a", "ns:{cache:c}:l:b")
_NAMES: NamedArgs = {"bus": "x", "origin": "y", "names...": ("a", "b")}


def test_commands_that_match_their_headers_pass() -> None:
    opened: Command[Any] = Command(_OPEN, ("ns:meta",), _OPEN_ARGS, id, {"schema": 2})
    assert opened.wire_args() == [1, "x"]
    assert opened.wire_args(again=True) == [2, "x"]
    deleted: Command[Any] = Command(_DELETE, _INDEX + _BESIDE, _NAMES, id)
    assert deleted.wire_args() == ["x", "y", "a", "b"]
    assert deleted.wire_args(again=True) == ["x", "y", "a", "b"]


@pytest.mark.parametrize(
    ("script", "keys", "args", "resend", "complaint"),
    [
        (_OPEN, ("ns:meta",), (1, "x"), None, "by name"),
        (_OPEN, ("ns:meta",), {"schema": 1}, None, "got schema"),
        (_OPEN, ("ns:meta",), {"epoch": "x", "schema": 1}, None, "got epoch, schema"),
        (_OPEN, ("ns:meta",), {**_OPEN_ARGS, "more": 1}, None, "got schema, epoch, more"),
        (_OPEN, ("ns:meta",), {"schema": "1", "epoch": "x"}, None, "takes schema as"),
        (_OPEN, ("ns:meta",), {"schema": 1, "epoch": b"x"}, None, "takes epoch as"),
        (_OPEN, ("ns:meta",), {"schema": 1, "epoch": ("x",)}, None, "one value for epoch"),
        (_OPEN, ("ns:meta",), _OPEN_ARGS, {"age": 1}, "no argument age"),
        (_OPEN, ("ns:meta",), _OPEN_ARGS, {"schema": "2"}, "takes schema as"),
        (_OPEN, ("ns:meta", "ns:meta"), _OPEN_ARGS, None, "takes the keys meta"),
        (_OPEN, ("ns:other",), _OPEN_ARGS, None, "takes meta of the form"),
        (_DELETE, _INDEX + _BESIDE, {**_NAMES, "names...": "a"}, None, "a tuple for names..."),
        (_DELETE, _INDEX + _BESIDE[1:], _NAMES, None, "takes the keys meta, size"),
        (_DELETE, _INDEX + _BESIDE[::-1], _NAMES, None, "takes entries... of the form"),
        (_DELETE, _INDEX[::-1] + _BESIDE, _NAMES, None, "takes meta of the form"),
    ],
)
def test_calls_that_mismatch_their_headers_fail(
    script: Script, keys: tuple[str, ...], args: Any, resend: Any, complaint: str
) -> None:
    """The same check runs for every command of the session (see the conftest)."""
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        Command(script, keys, args, id, resend)


def _calls() -> Iterator[tuple[str, ast.Call, dict[str, ast.expr], str]]:
    """Yield each call `Command(SCRIPT, ...)` in the package, where SCRIPT is a constant that holds a script.

    Each item has the location, the call, the values of the local names, and the name of the script.
    """
    for file in sorted(_PACKAGE.rglob("*.py")):
        text = file.read_text()
        if "Script(" not in text:  # files without scripts are not parsed, which saves seconds
            continue
        tree = ast.parse(text)
        known = {}
        for node in ast.walk(tree):
            match node:
                case ast.Assign([ast.Name(constant)], ast.Call(ast.Name("Script"), [ast.Constant(str(name))])):
                    known[constant] = name
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            local = dict[str, ast.expr]()
            for node in ast.walk(function):
                match node:
                    case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                        local[name] = value
            for node in ast.walk(function):
                match node:
                    case ast.Call(ast.Name("Command"), [ast.Name(constant), *_]) if constant in known:
                        yield f"{file.name}:{node.lineno}", node, local, known[constant]


def test_scripts_are_called_with_their_header_names() -> None:
    """Each call in the package names the arguments in the order of the script's header.

    This also checks calls that no test makes.
    """
    called = set()
    for where, call, local, name in _calls():
        args = call.args[2]
        if isinstance(args, ast.Name):
            args = local[args.id]
        assert isinstance(args, ast.Dict), f"{where}: arguments must be a mapping literal, so that they can be compared"
        names = [None if key is None else ast.literal_eval(key) for key in args.keys]
        wanted = [slot.name for slot in Script(name).header.argv]
        remaining = iter(wanted)
        if None not in names:
            assert names == wanted, where
        else:  # None stands for a `**`, whose arguments are checked when the command is created
            assert all(each in remaining for each in names if each is not None), (where, names, wanted)
        called.add(name)
    assert called == set(headers.scripts())
