"""The rules for every Lua script and for every call of a script. The contract tests and the conftest check them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from agentperf_redis.command import Command
from agentperf_redis.script import Script
from agentperf_redis.script_header import Header, Slot, parse_header
from tests.support.places import LUA

_SECTIONS = ("KEYS", "ARGV", "RETURNS", "REPEAT", "ERRORS", "COST")
_INCLUDE = re.compile(r"^--@include (\w+)$", re.MULTILINE)
_TOKEN = re.compile(
    r"""(?P<comment>--\[(=*)\[.*?\]\2\]|--[^\n]*)|(?P<string>'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|\[(=*)\[.*?\]\4\])""",
    re.DOTALL | re.VERBOSE,
)
_COLUMNS = 120
_SLOT = re.compile(
    r"-- +([a-z]\w*(?:\.\.\.)?) +(STRING|HASH|ZSET|LIST|SET|STREAM|any|int|float|text|bytes)\b(?: +(\S.*))?"
)
_CONSTANT_INDEX = re.compile(r"\b(KEYS|ARGV)\[\s*(\d+)\s*\]")
_BINDING = re.compile(r"local\s+([\w\s,]+?)\s*=\s*(.+)", re.DOTALL)

_BANNED_NAMES = {
    r"\btostring\b": "tostring loses digits from 10^14 up; use string.format('%.0f', n)",
    r"\bmath\.random": "pass randomness in ARGV",
    r"\bos\.": "use the server's time: redis.call('TIME')",
    r"\b(?:loadstring|dofile|require|io|print|setmetatable|getfenv|setfenv)\b": "not allowed in a script",
    r"\b(?:cmsgpack|struct|bit)\.": "fakeredis has no such library",
    r"\bredis\.(?:replicate_commands|set_repl|breakpoint|sha1hex|setresp)\b": "not allowed in a script",
}
_KEYWORDS = {
    *("and", "break", "do", "else", "elseif", "end", "false", "for", "function"),
    *("if", "in", "local", "nil", "not", "or", "repeat", "return", "then"),
    *("true", "until", "while"),
}
_GLOBALS = {
    *("redis", "KEYS", "ARGV", "string", "math", "table", "cjson", "tonumber", "type"),
    *("ipairs", "pairs", "next", "select", "unpack", "error", "pcall", "assert"),
}
_BANNED_COMMANDS = {
    *("KEYS", "SCAN", "RANDOMKEY", "FLUSHALL", "FLUSHDB", "CONFIG", "SCRIPT", "EVAL", "EVALSHA", "SELECT", "SWAPDB"),
    *("MOVE", "MIGRATE", "SUBSCRIBE", "PSUBSCRIBE", "WAIT", "BLPOP", "BRPOP", "BZPOPMIN", "SHUTDOWN", "MONITOR"),
}


def fragments() -> set[Path]:
    """Return the files that scripts include."""
    return {file for name in scripts() for file in _included(LUA / f"{name}.lua").values()}


def _included(script: Path) -> dict[str, Path]:
    found = {}
    for name in _INCLUDE.findall(script.read_text()):
        own = script.parent / "includes" / f"{name}.lua"
        found[name] = own if own.is_file() else LUA / "includes" / f"{name}.lua"
    return found


def scripts() -> list[str]:
    """Return the names of all scripts, such as "balancer/acquire"."""
    files = (file for file in LUA.glob("*/*.lua") if file.parent.name != "includes")
    return sorted(str(file.relative_to(LUA).with_suffix("")) for file in files)


@cache
def _known() -> frozenset[str]:
    return frozenset(scripts())  # without the scripts of tests, so `misfit` ignores them


def fragments_of(name: str) -> dict[str, str]:
    """Return the texts of the fragments that a script includes, by name."""
    return {fragment: file.read_text() for fragment, file in _included(LUA / f"{name}.lua").items()}


def problems(text: str, included: Mapping[str, str]) -> list[str]:
    """Return the problems of a script.

    Args:
        text: text of its file.
        included: texts of its fragments, by name.
    """
    header = parse_header(text)
    found = [*_of_header(text, header)]
    bound: dict[tuple[str, int], str] = {}
    indexed: set[str] = set()
    for where, part in (("", text), *((f"fragment {name}: ", body) for name, body in included.items())):
        bindings, rest = _split(_without(part, "comment"))
        for statement in bindings:
            found += [where + problem for problem in _bind(statement, bound)]
        bare = {f"{kind}[{index}]" for kind, index in _CONSTANT_INDEX.findall(rest)}
        found += [f"{where}bare {name} below the first lines" for name in sorted(bare)]
        indexed |= set(re.findall(r"#\s*(KEYS|ARGV)\b", part)) | set(re.findall(r"\b(KEYS|ARGV)\[\s*[A-Za-z_]", part))
        indexed |= set(re.findall(r"\bunpack\(\s*(KEYS|ARGV)\b", part))
        found += [where + problem for problem in _banned(part)]
        if len(re.findall(r"""['"]TIME['"]""", _without(part, "comment"))) > 1:
            found.append(f"{where}calls TIME in more than one place; read it once")
        found += [where + problem for problem in _undeclared(part, "\n".join((text, *included.values())))]
        if where and _INCLUDE.search(part):
            found.append(f"{where}includes another fragment; only one level is allowed")
    if len(header.keys) == 1:
        found += _of_single_key(header.keys[0], "\n".join((text, *included.values())))
    for kind, slots in (("KEYS", header.keys), ("ARGV", header.argv)):
        found += _compare(
            kind, slots, {index: name for (of, index), name in bound.items() if of == kind}, kind in indexed
        )
    return found


def layout_problems(text: str) -> list[str]:
    """Return where the text of a script or a fragment differs from the standard layout of Lua files.

    A line has at most 120 columns. In the header, the names under KEYS and ARGV begin in column 6. All types begin in
    one column, two spaces after the longest name. All texts begin in one column, two spaces after the longest type. The
    texts of REPEAT, ERRORS and COST begin in column 12.
    """
    lines = text.splitlines()
    found = [f"line {at} has {len(line)} columns" for at, line in enumerate(lines, 1) if len(line) > _COLUMNS]
    slots, section = list[tuple[int, int, int, int, int, int]](), ""
    for at, line in enumerate(lines, 1):
        if not line.startswith("--") or line.startswith("--@"):
            break
        if start := re.match(r"-- (KEYS|ARGV|RETURNS|REPEAT|ERRORS|COST)\b", line):
            section = start[1]
            if section in ("REPEAT", "ERRORS", "COST") and not re.match(r"-- (?:REPEAT  |ERRORS  |COST    )\S", line):
                found.append(f"line {at}: the text of {section} begins in column 12")
        elif section in ("KEYS", "ARGV") and (slot := _SLOT.match(line)):
            slots.append((at, slot.start(1), slot.end(1), slot.start(2), slot.start(3), len(slot[2])))
        elif section in ("REPEAT", "ERRORS", "COST") and not re.match(r"--         \S", line):
            found.append(f"line {at}: the text of {section} continues in column 12")
    if slots:
        types = max(slot[2] for slot in slots) + 2
        texts = types + max(longest for *_, longest in slots) + 2
        for at, name, _, type_, shape, _ in slots:
            if (name, type_) != (5, types):
                found.append(f"line {at}: the name begins in column 6, the type in column {types + 1}")
            if shape != texts and shape >= 0:
                found.append(f"line {at}: the text begins in column {texts + 1}")
    return found


def returns_from_script(fragment: str) -> bool:
    """Return whether a fragment has a `return` outside any function. This `return` would end the whole script."""
    blocks = list[str]()
    for word in re.findall(r"\b(function|if|do|repeat|end|until|return)\b", _without(fragment, "comment", "string")):
        if word in ("end", "until"):
            blocks.pop()
        elif word != "return":
            blocks.append(word)
        elif "function" not in blocks:
            return True
    return False


def misfit(command: Command[object]) -> str | None:
    """Return how a command's keys and arguments differ from its script's header; None if they match.

    Arguments are compared by name, order and type. Keys are compared by count, and by shape if the header has a shape.
    """
    if not isinstance(command.script, Script) or command.script.name not in _known():
        return None
    wanted, name, args = _wanted(command.script.source), command.script.name, command.args
    if not isinstance(args, Mapping):
        return f"{name} takes its arguments by name: {', '.join(wanted.types) or 'none'}"
    if tuple(args) != tuple(wanted.types):
        return f"{name} takes the args {', '.join(wanted.types) or 'none'}; got {', '.join(args) or 'none'}"
    resent = command.resend_args or {}
    if unknown := set(resent) - set(args):
        return f"{name} takes no argument {', '.join(sorted(unknown))}, which resend_args contains"
    for each, value in (*args.items(), *resent.items()):
        many = each.endswith("...")
        if isinstance(value, tuple) != many:
            return f"{name} takes {'a tuple' if many else 'one value'} for {each}; got {value!r}"
        if not many and not isinstance(value, wanted.types[each]):
            return f"{name} takes {each} as {wanted.types[each]}; got {value!r}"
    return _misfit_of_keys(name, wanted.keys, command.keys)


@dataclass(frozen=True)
class _Wanted:
    """The arguments and keys that a script expects. They are cached, because every command is checked.

    Attributes:
        types: the allowed Python types of each argument, by name, in the order of the header.
        keys: name and pattern of each key, in the order of the header.
    """

    types: dict[str, tuple[type, ...]]
    keys: tuple[tuple[str, re.Pattern[str]], ...]


_TYPES = {"int": (int,), "float": (int, float), "text": (str, int), "bytes": (bytes,), "any": (str, bytes, int)}
"""The Python types that are valid for each type in a header. A text may be an int: some arguments are "-" or a
capacity."""


@cache
def _wanted(source: str) -> _Wanted:
    header = parse_header(source.removeprefix("#!lua\n"))
    return _Wanted(
        {slot.name: _TYPES[slot.type] for slot in header.argv},
        tuple((slot.name, _pattern(slot.shape)) for slot in header.keys),
    )


def _pattern(shape: str) -> re.Pattern[str]:
    """Return a pattern for the keys of a shape. There, `agentperf` stands for any namespace, `<...>` for any name."""
    parts = re.split(r"(<\w+>|^agentperf(?=:))", re.split(r"[;,]? ", shape, maxsplit=1)[0].rstrip(",;"))
    return re.compile("".join(".*" if at % 2 else re.escape(part) for at, part in enumerate(parts)), re.DOTALL)


def _misfit_of_keys(name: str, wanted: tuple[tuple[str, re.Pattern[str]], ...], given: tuple[str, ...]) -> str | None:
    single = [each for each in wanted if not each[0].endswith("...")]
    many = wanted[len(single) :]
    rest = len(given) - len(single)
    if rest < 0 or (rest % len(many) if many else rest):
        return f"{name} takes the keys {', '.join(each for each, _ in wanted)}; got {len(given)} keys"
    each_many = rest // len(many) if many else 0
    for key, (slot, pattern) in zip(given, (*single, *(each for each in many for _ in range(each_many))), strict=True):
        if not pattern.fullmatch(key):
            return f"{name} takes {slot} of the form {pattern.pattern}; got {key}"
    return None


def _of_header(text: str, header: Header) -> Iterator[str]:
    if not re.match(r"^-- \w+: .+", text):
        yield "the first line is not `-- name: purpose`"
    top = text[: re.search(r"^(?!--)|^--@|\Z", text, re.MULTILINE).start()]  # type: ignore[union-attr]  # \Z matches
    for section in _SECTIONS:
        if not re.search(rf"^-- {section}\b", top, re.MULTILINE):
            yield f"the header has no {section}"
        elif section not in ("KEYS", "ARGV") and not header.notes.get(section, "").strip():
            yield f"the header has nothing under {section}"
    if not header.keys:
        yield "the script has no key; KEYS[1] carries the hash tag"


def _of_single_key(slot: Slot, whole: str) -> Iterator[str]:
    """Yield the uses of other keys, and the commands that may delete the key.

    On a Cluster, a script with a single key also runs while the slot of this key is being moved
    (`resp.needs_whole_slot`). The node that runs the script may lack other keys. If the script deleted its key, the
    server would refuse the script's next access to the key.
    """
    if slot.many:
        yield "the only key is repeated; a script that runs with one key or with several needs another one"
    for name, first in re.findall(r"""\bp?call\(\s*['"](\w+)['"]\s*(?:,\s*([^,)]+))?""", _without(whole, "comment")):
        if first and first.strip() != slot.name.upper():
            yield f"{name} uses {first.strip()}, but the header has only {slot.name}"
    # A ZREM of '' removes no member, so it cannot delete the key.
    removing = re.sub(r"""['"]ZREM['"],\s*\w+,\s*''""", "", _without(whole, "comment"))
    for name in re.findall(r"""\bp?call\(\s*['"](\w+)['"]""", removing):
        if re.fullmatch(r"DEL|UNLINK|RENAME|MOVE|GETDEL|HDEL|[LRSZ]POP\w*|LTRIM|LREM|[SZ]REM\w*", name):
            yield f"{name} may delete the only key"


@cache
def _without(text: str, *kinds: str) -> str:
    """Replace comments, and tokens of the given kinds, by spaces. Line breaks stay."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0]) if found.lastgroup in kinds or found["comment"] else found[0]

    return _TOKEN.sub(blank, text)


def _split(code: str) -> tuple[list[str], str]:
    """Return the leading statements that name KEYS and ARGV, and the code after them."""
    lines = code.splitlines()
    statements: list[str] = []
    for at, line in enumerate(lines):
        if not line.strip():
            continue
        if line.startswith("local ") and "function" not in line and (_refers(line) or (statements and _plain(line))):
            statements.append(line)
            continue
        if statements and line.startswith(" ") and statements[-1].rstrip().endswith(","):
            statements[-1] += line
            continue
        return statements, "\n".join(lines[at:])
    return statements, ""


def _refers(line: str) -> bool:
    return re.search(r"\b(KEYS|ARGV)\b", line) is not None


def _plain(line: str) -> bool:
    """Return whether a line defines only numeric constants, such as limits."""
    return re.fullmatch(r"local [\w\s,]+=[\s\d,.]+", line) is not None


def _bind(statement: str, bound: dict[tuple[str, int], str]) -> Iterator[str]:
    match = _BINDING.fullmatch(statement.strip())
    if match is None:
        if _refers(statement):
            yield f"cannot read the names in: {statement.strip()}"
        return
    names = [name.strip() for name in match[1].split(",")]
    values = _apart(match[2])
    if len(names) != len(values):
        yield f"{len(names)} names for {len(values)} values: {statement.strip()}"
        return
    for name, value in zip(names, values, strict=True):
        slots = _CONSTANT_INDEX.findall(value)
        if len(slots) > 1:
            yield f"{name} is made of several values: {value}"
        for kind, index in slots:
            if (kind, int(index)) in bound:
                yield f"{kind}[{index}] is named twice"
            bound[kind, int(index)] = name


def _apart(values: str) -> list[str]:
    parts, depth = [""], 0
    for character in values:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _compare(kind: str, slots: tuple[Slot, ...], bound: dict[int, str], indexed: bool) -> Iterator[str]:
    single = [slot.name for slot in slots if not slot.many]
    many = [slot.name for slot in slots if slot.many]
    if [slot.many for slot in slots] != [False] * len(single) + [True] * len(many):
        yield f"{kind}: repeated values come last"
    for index, name in enumerate(single, 1):
        if index not in bound:
            yield f"{kind}[{index}], {name} in the header, has no name in the first lines"
        elif bound[index] != name.upper():
            yield f"{kind}[{index}] is {name} in the header and {bound[index]} in the code, not {name.upper()}"
    for index in sorted(set(bound) - set(range(1, len(single) + 1))):
        yield f"{kind}[{index}], {bound[index]} in the code, is not in the header"
    if indexed and not many:
        yield f"{kind} is indexed or counted, but the header has no name... for any number of values"
    if many and not indexed:
        yield f"{kind}: the header has {', '.join(many)}, which the code does not use"


@cache
def _declared(whole: str) -> frozenset[str]:
    """Return the names that a script with its fragments declares, the keywords, and the globals of the server."""
    everything = _without(whole, "comment", "string")
    declared = _KEYWORDS | _GLOBALS
    for names in re.findall(r"\blocal\s+(?!function\b)([\w\s,]+?)(?=\s*(?:=|(?<!,)\n|;|$))", everything):
        declared |= set(re.findall(r"\w+", names))
    declared |= set(re.findall(r"\blocal\s+function\s+(\w+)", everything))
    for names in re.findall(r"\bfunction\b[\s\w.:]*\(([^)]*)\)", everything):
        declared |= set(re.findall(r"\w+", names))
    for names in re.findall(r"\bfor\s+([\w\s,]+?)\s*(?:=|\bin\b)", everything):
        declared |= set(re.findall(r"\w+", names))
    return frozenset(declared)


def _undeclared(part: str, whole: str) -> Iterator[str]:
    """Yield names that are declared nowhere, such as mistyped ones. Lua would treat them as globals at run time."""
    declared = _declared(whole)
    braces = 0
    for token in re.finditer(r"[{}]|(?<![\w.:])[A-Za-z_]\w*|\.\.\s*[A-Za-z_]\w*", _without(part, "comment", "string")):
        name = token[0].lstrip(". ")
        braces += (name == "{") - (name == "}")
        is_field = braces and re.match(r"\s*=[^=]", token.string[token.end() :])
        if name.isidentifier() and name not in declared and not is_field:
            yield f"{name} is declared nowhere"


def _banned(text: str) -> Iterator[str]:
    code = _without(text, "comment", "string")
    for pattern, why in _BANNED_NAMES.items():
        if re.search(pattern, code):
            yield f"{pattern}: {why}"
    for command in re.findall(r"""\bp?call\(\s*['"](\w+)['"]""", _without(text, "comment")):
        if command.upper() in _BANNED_COMMANDS:
            yield f"calls {command}"
