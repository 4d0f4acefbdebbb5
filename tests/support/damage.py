"""Damages stored state: every field of every key of a namespace, one at a time, with values that no script writes."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from agentperf_redis.errors import AgentPerfError, BackendUnavailable, ScriptFailed
from tests.support.changed import changed_bytes

T = TypeVar("T")

TEXTS = ("", "x", "nan", "inf", "-1", "1e400", "9" * 25, "253402300800000")
"""The values that replace a field, or one number or word of it. The last value is the start of the year 10000 in ms."""
NAMES = ("", "x", "9" * 25)
"""The values that replace the name of a member."""
SCORES = (float("inf"), float("-inf"), -1.0, 1.5, 1e25, 253402300800000.0)
"""The values that replace the score of a member of a sorted set."""
_PART = re.compile(r"(?<==)\S+|(?<![\w=.-])\d[\d.]*(?=[ /]|$)")
"""Matches the value of a word "name=value", or a number that stands alone."""
_POISON = re.compile(r"-?922337203685477\d{4}|(?<![a-z])-?(?:nan|inf)(?![a-z])")
"""Matches a number that results from arithmetic on a damaged one, or from converting it to an integer."""
_NO_POISON = re.compile(r"""'[^']*'|"[^"]*"|(?:_per_minute|_execution_time|\bttl)=(?:inf|nan)""")
"""Matches the parts of a result in which such a number is no fault: texts, missing limits and durations."""

State = Mapping[str, tuple[bytes, int]]
"""By key: the value as DUMP returns it, and its expiry as PEXPIRETIME returns it."""


_READ = """\
local all = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  all[#all + 1] = key
  all[#all + 1] = redis.call('DUMP', key)
  all[#all + 1] = redis.call('PEXPIRETIME', key)
end
return all
"""
_WRITE = """\
for _, key in ipairs(redis.call('KEYS', '*')) do redis.call('DEL', key) end
for at = 1, #ARGV, 3 do
  local expiry_ms = tonumber(ARGV[at + 2])
  redis.call('RESTORE', ARGV[at], math.max(0, expiry_ms), ARGV[at + 1], 'ABSTTL')
end
return 1
"""
_UNDO = (
    """\
local function shown(key)
  local kind, texts = redis.call('TYPE', key).ok, {}
  if kind == 'hash' then
    local pairs = redis.call('HGETALL', key)
    for i = 1, #pairs, 2 do texts[#texts + 1] = pairs[i] .. ' = ' .. pairs[i + 1] end
  elseif kind == 'zset' then
    local pairs = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
    for i = 1, #pairs, 2 do texts[#texts + 1] = pairs[i] .. ' at ' .. pairs[i + 1] end
  elseif kind == 'list' then texts = redis.call('LRANGE', key, 0, -1)
  elseif kind == 'string' then texts = {redis.call('GET', key)}
  elseif kind == 'stream' then texts = {redis.call('XLEN', key) .. ' entries'}
  end
  table.sort(texts)
  return texts
end
local before, changed = {}, {}
for at = 1, #ARGV, 3 do before[ARGV[at]] = {ARGV[at + 1], tonumber(ARGV[at + 2])} end
for _, key in ipairs(redis.call('KEYS', '*')) do
  local former = before[key]
  if not former or former[1] ~= redis.call('DUMP', key) or former[2] ~= redis.call('PEXPIRETIME', key) then
    changed[key] = {redis.call('PEXPIRETIME', key), shown(key)}
  end
end
for key in pairs(before) do
  if redis.call('EXISTS', key) == 0 then changed[key] = {-2, {}} end
end
if next(changed) == nil then return {} end
"""
    + _WRITE.replace("return 1\n", "")
    + """\
local found = {}
for key, later in pairs(changed) do
  found[#found + 1] = {key, shown(key), later[2], later[1] == redis.call('PEXPIRETIME', key) and 1 or 0}
end
return found
"""
)
"""Restores the state in ARGV. Returns for each changed key its name, former texts, later texts, and 1 if the expiry is
the same."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One change of the stored state.

    Attributes:
        name: a text with the key, the field and the new value.
        inflict: makes the change through the given client, which must decode replies.
    """

    name: str
    inflict: Callable[[Any], object]


class Namespace:
    """All keys on a server that nothing else uses.

    Args:
        raw: a client with `decode_responses`.
        binary: a client without `decode_responses`.
        every: 1 tries all damages of each field. 4 tries a quarter of them: for one field the first, fifth, ..., for
            the next field the second, sixth, ..., and so on. So similar fields, such as those of two instances, get
            different damages.
    """

    def __init__(self, raw: Any, binary: Any, every: int = 1) -> None:
        self.raw = raw
        self._every, self._turn = every, itertools.count()
        self._read = binary.register_script(_READ)
        self._write = raw.register_script(_WRITE)
        self._undo = raw.register_script(_UNDO)

    def state(self) -> State:
        """Return the whole state."""
        flat = self._read()
        return {
            name.decode(): (dump, expiry_ms)
            for name, dump, expiry_ms in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        }

    def restore(self, state: State) -> None:
        """Replace everything by a former state."""
        self._write(args=_flat(state))

    def undo(self, before: State) -> dict[str, tuple[list[str], list[str]]]:
        """Restore a former state. Returns the former and the later contents of each key that had changed.

        The DUMP of an unchanged hash may differ, because the server rehashes it. So the contents decide whether a key
        has changed.
        """
        found = self._undo(args=_flat(before))
        return {key: (former, later) for key, former, later, same in sorted(found) if former != later or not same}

    def damages(self, only: Callable[[str], bool] = lambda _: True) -> Iterator[Damage]:
        """Yield every damage of every key, for keys that `only` accepts."""
        for name in sorted(self.raw.keys()):
            if only(name):
                yield from self._of_key(name)

    def random_damages(self, source: random.Random, count: int) -> Iterator[Damage]:
        """Yield damages by random bytes: a value that is cut off or changed in one place, or foreign bytes.

        The client must have ``encoding_errors="surrogateescape"``, so that bytes that are not UTF-8 can be stored.
        """
        names = sorted(self.raw.keys())
        for _ in range(count):
            yield self._random_of_key(source.choice(names), source)

    def _random_of_key(self, name: str, source: random.Random) -> Damage:
        kind = self.raw.type(name)
        if source.random() < _CHANCE_OF_ANOTHER_TYPE:
            other = source.choice([other for other in _MAKERS if other != kind])
            return Damage(f"{name} as {other}", _remade(name, _MAKERS[other]))
        match kind:
            case "hash":
                field, value = source.choice(sorted(self.raw.hgetall(name).items()))
                text = _randomly_damaged(value, source)
                if source.random() < _CHANCE_OF_ANOTHER_NAME:
                    text = _randomly_damaged(field, source)
                    return Damage(f"{name} {field} -> {text[:60]!r}", _field_renamed(name, field, text, value))
                return Damage(f"{name} {field} = {text[:60]!r}", _call("hset", name, _as_bytes(field), text))
            case "zset":
                member, score = source.choice(self.raw.zrange(name, 0, -1, withscores=True))
                if source.random() < _CHANCE_OF_ANOTHER_NAME:
                    text = _randomly_damaged(member, source)
                    return Damage(f"{name} {member} -> {text[:60]!r}", _renamed(name, member, text, score))
                bad = source.choice((-score, score + 0.5, score * 1e9, source.uniform(-1e16, 1e16), source.random()))
                return Damage(f"{name} {member} at {bad}", _call("zadd", name, {member: bad}))
            case "list":
                at = source.randrange(self.raw.llen(name))
                text = _randomly_damaged(self.raw.lindex(name, at), source)
                return Damage(f"{name}[{at}] = {text[:60]!r}", _call("lset", name, at, text))
            case "stream":
                text = _randomly_damaged("registered", source)
                return Damage(f"{name} with {text[:60]!r}", _call("xadd", name, {"kind": text, text or b"-": "p0"}))
        text = _randomly_damaged(self.raw.get(name), source)
        return Damage(f"{name} = {text[:60]!r}", _call("set", name, text, keepttl=True))

    def _of_key(self, name: str) -> Iterator[Damage]:
        kind = self.raw.type(name)
        for other, make in _MAKERS.items():
            if other != kind:
                yield Damage(f"{name} as {other}", _remade(name, make))
        match kind:
            case "hash":
                for field, value in self.raw.hgetall(name).items():
                    for text in self._damaged(value):
                        yield Damage(f"{name} {field} = {text[:60]!r}", _call("hset", name, field, text))
            case "string":
                expiry = {"keepttl": True}
                for text in self._damaged(self.raw.get(name)):
                    yield Damage(f"{name} = {text[:60]!r}", _call("set", name, text, **expiry))
            case "zset":
                for member, score in self.raw.zrange(name, 0, -1, withscores=True):
                    for bad in self._some(SCORES):
                        yield Damage(f"{name} {member} at {bad}", _call("zadd", name, {member: bad}))
                    for text in NAMES:
                        yield Damage(f"{name} {member} -> {text[:60]!r}", _renamed(name, member, text, score))
            case "list":
                for at, value in enumerate(self.raw.lrange(name, 0, -1)):
                    for text in self._damaged(value):
                        yield Damage(f"{name}[{at}] = {text[:60]!r}", _call("lset", name, at, text))
            case "stream":
                yield Damage(f"{name} with another entry", _call("xadd", name, {"kind": "x", "odd": "inf"}))

    def _some(self, values: Sequence[T]) -> Sequence[T]:
        return values[next(self._turn) % self._every :: self._every]

    def _damaged(self, value: str) -> Iterator[str]:
        """Yield damaged forms of a value. Each form has a text in place of the value, or of a number or word in it."""
        yield from (text for text in self._some(TEXTS) if text != value)
        for part in _PART.finditer(value):
            if part[0] != value:
                for text in self._some(TEXTS):
                    yield value[: part.start()] + text + value[part.end() :]


def _flat(state: State) -> list[str | bytes | int]:
    return [part for name, pair in state.items() for part in (name, *pair)]


_CHANCE_OF_ANOTHER_TYPE = 0.05
_CHANCE_OF_ANOTHER_NAME = 0.2


def _randomly_damaged(text: str, source: random.Random) -> bytes:
    return changed_bytes(_as_bytes(text), source)


def _as_bytes(text: str) -> bytes:
    """Return the stored bytes of a text that was read by a client with ``encoding_errors="surrogateescape"``."""
    return text.encode(errors="surrogateescape")


def _field_renamed(name: str, field: str, text: bytes, value: str) -> Callable[[Any], object]:
    def inflict(raw: Any) -> None:
        raw.hdel(name, _as_bytes(field))
        raw.hset(name, text, _as_bytes(value))

    return inflict


_MAKERS: dict[str, Callable[[Any, str], object]] = {
    "string": lambda raw, name: raw.set(name, "x"),
    "hash": lambda raw, name: raw.hset(name, "x", "y"),
    "zset": lambda raw, name: raw.zadd(name, {"x": 1.0}),
    "list": lambda raw, name: raw.rpush(name, "x"),
}


def _call(method: str, *args: Any, **options: Any) -> Callable[[Any], object]:
    return lambda raw: getattr(raw, method)(*args, **options)


def _remade(name: str, make: Callable[[Any, str], object]) -> Callable[[Any], object]:
    def inflict(raw: Any) -> None:
        raw.delete(name)
        make(raw, name)

    return inflict


def _renamed(name: str, member: str, text: str | bytes, score: float) -> Callable[[Any], object]:
    def inflict(raw: Any) -> None:
        raw.zrem(name, member)
        raw.zadd(name, {text: score})

    return inflict


def faults(
    namespace: Namespace,
    run: Callable[[Any], Any],
    damages: Iterator[Damage],
    operations: Mapping[str, Callable[[], Any]],
) -> list[str]:
    """Run each operation on each damaged state. Return a line for each promise that was broken.

    An operation that fails has written nothing, and raises an error that the library documents for damaged state. An
    operation that succeeds neither returns nor stores a number that results from arithmetic on a damaged number.

    Args:
        namespace: the keys, undamaged.
        run: runs the command or the flow that an operation makes.
        damages: the damages to try.
        operations: the operations, by name.
    """
    whole = namespace.state()
    found = []
    for damage in list(damages):
        namespace.restore(whole)
        damage.inflict(namespace.raw)
        before = namespace.state()
        for name, make in operations.items():
            where = f"{name} after {damage.name}"
            refused = None
            try:
                result = run(make())
            except Exception as error:  # noqa: BLE001  any undocumented error breaks a promise
                refused = f"{type(error).__name__}: {str(error)[:200]}"
                if not isinstance(error, AgentPerfError) or isinstance(error, (ScriptFailed, BackendUnavailable)):
                    found.append(f"{where}: {refused}")
            else:
                if _POISON.search(_NO_POISON.sub("", repr(result))):
                    found.append(f"{where}: returned {result!r:.300}")
            changes = namespace.undo(before)
            if changes and refused:
                found.append(f"{where}: {refused} after writing {sorted(changes)}")
            known = _poisons(text for former, _ in changes.values() for text in former)
            stored = [text for _, later in changes.values() for text in later if not _poisons((text,)) <= known]
            if stored:
                found.append(f"{where}: stored {stored}")
    namespace.restore(whole)
    return found


def _poisons(texts: Iterable[str]) -> set[str]:
    return {found[0] for text in texts for found in _POISON.finditer(text)}
