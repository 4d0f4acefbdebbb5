"""`agentperf inspect KEY`: a key of the library in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.cli.console import Exit, NotFound, Target, counted, new_table, out, print_json, printable, quoted
from agentperf_redis.cli.key_kinds import Known, known
from agentperf_redis.command import Command, Reply
from agentperf_redis.errors import CorruptState

_SHOWN_BYTES = 400
"""Maximum number of bytes that are shown of a string, or of one value in a collection."""
_HIDDEN = "…"
_MIN_TEXT = 24
"""Minimum width of a column, so that a word of a record such as ``fence=1795969213058472`` is not split."""


@dataclass(frozen=True, slots=True)
class Content:
    """The stored value of a key.

    Attributes:
        type: the type of the value, as the command TYPE reports it.
        ttl_s: seconds until the key expires; None if it never expires.
        size: the number of fields or members; None for a string.
        items: the first fields or members with their values; for a string, one item without a name.
        complete: whether `items` has all fields or members; for a string, whether it has the whole text.
    """

    type: str
    ttl_s: float | None
    size: int | None
    items: list[tuple[str, str]]
    complete: bool


def inspect(target: Target, key: str, limit: int) -> Exit:
    """Print the kind of a key, its content, the meaning of its fields, and its TTL."""
    meaning = known(key)
    # A connection creates the key `meta` of its namespace. So connect with the namespace of the inspected key, and
    # leave all other namespaces unchanged.
    place = target if meaning is None else replace(target, namespace=meaning.namespace)
    with place.connect() as perf:
        content = _read(perf, key, limit)
    if content is not None and meaning is not None:
        items = [(name, _HIDDEN if meaning.hides(name) else value) for name, value in content.items]
        content = replace(content, items=items)
    if content is None:
        would = "" if meaning is None else f"; it would hold {meaning.holds}"
        raise NotFound(f"key {quoted(key)}{printable(would)}")
    if target.as_json:
        print_json("inspect", _plain(key, meaning, content))
        return Exit.OK
    out.print(printable(key), style="bold", soft_wrap=True)
    for label, text in _facts(meaning, content):
        out.print(f"{label:<6}{printable(text)}", soft_wrap=True)
    if content.items and content.size is None:
        out.print()
        out.print(printable(content.items[0][1]), soft_wrap=True)
    elif content.items:
        out.print()
        table = new_table("", ["name", "value", "meaning"], [])
        table.min_text = _MIN_TEXT
        for name, value in content.items:
            text, words = ("", "") if meaning is None else meaning.meaning(name, value)
            table.add_row(printable(name), printable(value), printable(f"{text}: {words}" if words else text))
        out.print(table)
    if not content.complete:
        out.print("There is more; --limit shows more." if content.size is not None else "There is more.")
    return Exit.OK


def _facts(meaning: Known | None, content: Content) -> list[tuple[str, str]]:
    if meaning is None:
        holds = "unknown: this library has no key of this form"
    else:
        holds = meaning.holds
        if content.type != meaning.kind.type:
            holds += f". But this is a {content.type}, and a {meaning.kind.type} belongs here: another program wrote it"
    noun = {"hash": "field", "list": "element", "stream": "event"}.get(content.type, "member")
    size = "" if content.size is None else f" with {counted(content.size, noun)}"
    ttl = "none: it stays until it is deleted" if content.ttl_s is None else f"{content.ttl_s:.3f} s"
    return [("holds", holds), ("type", content.type + size), ("TTL", ttl)]


def _plain(key: str, meaning: Known | None, content: Content) -> dict[str, Any]:
    items = []
    for name, value in content.items:
        text, words = ("", "") if meaning is None else meaning.meaning(name, value)
        items.append({"name": name, "value": value, "meaning": text or None, "value_in_words": words or None})
    return {
        "key": key,
        "known": meaning is not None,
        "namespace": None if meaning is None else meaning.namespace,
        "service": None if meaning is None else meaning.service or None,
        "resource": None if meaning is None else meaning.resource or None,
        "holds": None if meaning is None else meaning.holds,
        "type": content.type,
        "expected_type": None if meaning is None else meaning.kind.type,
        "ttl_s": content.ttl_s,
        "size": content.size,
        "items": items,
        "complete": content.complete,
    }


def _read(perf: AgentPerf, key: str, limit: int) -> Content | None:
    """Read a key of any type, and change nothing. Return None if the key does not exist."""

    def run(name: str, *args: str) -> Reply:
        return perf.backend.run(Command(name, (key,), args, lambda reply: reply))

    type_ = _text(run("TYPE"))
    if type_ == "none":
        return None
    ttl_ms = run("PTTL")
    ttl_s = ttl_ms / 1000 if isinstance(ttl_ms, int) and ttl_ms >= 0 else None
    if type_ == "string":
        data = run("GETRANGE", "0", str(_SHOWN_BYTES))
        text = _text(data)
        whole = isinstance(data, bytes) and len(data) <= _SHOWN_BYTES
        return Content(type_, ttl_s, None, [("", text if whole else text[:_SHOWN_BYTES])], whole)
    if type_ not in _READERS:  # the type of a Redis module; this library never writes such types
        return Content(type_, ttl_s, None, [], complete=True)
    count, read = _READERS[type_]
    size = run(count)
    if not isinstance(size, int):
        raise CorruptState(key, f"an unexpected reply {size!r}")
    items = read(run, min(limit, size))[:limit]
    return Content(type_, ttl_s, size, [(name, value[:_SHOWN_BYTES]) for name, value in items], len(items) >= size)


Run = Callable[..., Reply]


def _hash(run: Run, limit: int) -> list[tuple[str, str]]:
    """Read fields page by page until `limit` are found. One reply with all fields could be too large."""
    found: dict[str, str] = {}
    cursor = "0"
    while True:
        reply = run("HSCAN", cursor, "COUNT", "100")
        match reply:
            case [bytes(after), list(words)]:
                found.update(_pairs(words))
                cursor = after.decode()
        if cursor == "0" or len(found) >= limit:
            return sorted(found.items())


def _zset(run: Run, limit: int) -> list[tuple[str, str]]:
    reply = run("ZRANGE", "0", str(limit - 1), "WITHSCORES")
    return _pairs(reply) if isinstance(reply, list) else []


def _list(run: Run, limit: int) -> list[tuple[str, str]]:
    return [(str(at), _text(run("LINDEX", str(at)))) for at in range(limit)]


def _stream(run: Run, limit: int) -> list[tuple[str, str]]:
    """Read the newest events first."""
    reply = run("XREVRANGE", "+", "-", "COUNT", str(limit))
    found = []
    for entry in reply if isinstance(reply, list) else []:
        match entry:
            case [bytes(name), list(words)]:
                found.append((name.decode(), " ".join(f"{field}={value}" for field, value in _pairs(words))))
    return found


_READERS: dict[str, tuple[str, Callable[[Run, int], list[tuple[str, str]]]]] = {
    "hash": ("HLEN", _hash),
    "zset": ("ZCARD", _zset),
    "list": ("LLEN", _list),
    "stream": ("XLEN", _stream),
}


def _pairs(words: list[Any]) -> list[tuple[str, str]]:
    texts = [_text(word) for word in words]
    return list(zip(texts[::2], texts[1::2], strict=False))


def _text(reply: Reply) -> str:
    """Decode a text. Bytes that are not UTF-8 are shown as escapes."""
    return reply.decode(errors="backslashreplace") if isinstance(reply, bytes) else str(reply)
