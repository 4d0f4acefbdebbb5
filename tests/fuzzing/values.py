"""Values for the arguments of public calls: hostile values, and valid values that fit a parameter's name and type."""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from inspect import Parameter
from typing import Any
from uuid import UUID

from hypothesis import strategies as st

from agentperf_redis import (
    AgentInstance,
    FreshnessOptions,
    LoadBalancingStrategy,
    Outcome,
    PoolSettings,
    RankBy,
    Retention,
    Tier,
)
from agentperf_redis.agentperf import LockOptions, LRUOptions, TieredOptions
from agentperf_redis.codec.codec import Codec

Values = st.SearchStrategy[Any]
_OPTIONS: dict[str, Any] = {each.__name__: each for each in (FreshnessOptions, LockOptions, LRUOptions, TieredOptions)}


class UserError(Exception):
    """Raised by a function or an iterator of the caller. Calls may pass it on."""


class RudeError(Exception):
    """Raised by an object that was passed instead of a plain value. No call passes it on."""


class Rude:
    """An object whose every method raises an error."""

    def _raise(self, *_: object, **__: object) -> Any:
        raise RudeError("rude")

    __repr__ = __str__ = __eq__ = __float__ = __int__ = __index__ = _raise
    __hash__ = __lt__ = __contains__ = __getitem__ = _raise

    def _raise_as_user(self, *_: object, **__: object) -> Any:
        raise UserError("rude")

    __call__ = __len__ = __iter__ = __bool__ = _raise_as_user


class RudeText(str):
    """A text that cannot be compared or hashed."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise RudeError("rude")

    __hash__ = None  # type: ignore[assignment]


class Text(str):
    """A text whose class is defined by the caller."""

    __slots__ = ()


class Number(IntEnum):
    """A number whose class is defined by the caller."""

    ONE = 1


class LostZone(tzinfo):
    """A time zone that raises an error."""

    def utcoffset(self, _: datetime | None) -> timedelta:
        raise RudeError("lost")


def _raises(*_: object, **__: object) -> Any:
    raise UserError("raised")


async def _coroutine(*_: object, **__: object) -> int:
    return 1


class _Callable:
    def __call__(self, *_: object, **__: object) -> Any:
        return _coroutine()


def _generator(*_: object, **__: object) -> Any:
    yield 1


def _failing_items() -> Any:
    yield "k1"
    raise UserError("no more items")


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def _own_item() -> list[Any]:
    value: list[Any] = [1]
    value.append(value)
    return value


def _own_value() -> dict[str, Any]:
    value: dict[str, Any] = {"a": 1}
    value["b"] = value
    return value


TEXTS: Values = st.one_of(
    st.sampled_from(
        [
            *("", " ", "\0", "a\r\n", "\ud800", "x" * 201, "{", "}", "{}", "a}b{c", "*?[", "%", "%zz"),
            *("a:b", "a/b", "-", "#pool", "@t", "+p0", "\x7f", "e\u0301", "\u2028", "\U0001f916", "5", "nan", "inf"),
            *("1e400", "0x10", "1_0", "٣", "5m", "0s", "9" * 400 + "d", "]] redis.call('FLUSHALL')--", "None"),
        ]
    ),
    st.text(max_size=12),
    st.sampled_from([201, 70_000]).map("y".__mul__),
    st.builds(Text, st.sampled_from(["a", "p0", "planner"])),
)
NUMBERS: Values = st.one_of(
    st.sampled_from(
        [
            *(
                0,
                1,
                -1,
                2**31 - 1,
                2**31,
                2**53,
                2**53 + 1,
                2**63,
                2**64,
                -(2**63) - 1,
                10**400,
                True,
                False,
                Number.ONE,
            ),
            *(math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e-9, 0.5, 1e15, 1e300, sys.float_info.max, 253402300800.0),
            *(Decimal("NaN"), Decimal("sNaN"), Decimal("1e999999"), Decimal(1), Fraction(1, 3), 1j),
            Fraction(10**400),
        ]
    ),
    st.integers(),
    st.floats(),
)
CONTAINERS: Values = st.one_of(
    st.builds(_deep, st.sampled_from([3, 150, 1100])),
    st.builds(_own_item),
    st.builds(_own_value),
    st.builds(_failing_items),
    st.builds(iter, st.just(["a", "b"])),
    st.sampled_from([(), ("a",), ["a", 1], {"a"}, {1: 2}, {"a": 1}, [None], [["a"]], [""], b"x", [b"a"], range(3)]),
    st.lists(TEXTS, max_size=3),
)
CALLABLES: Values = st.sampled_from([_raises, _coroutine, _generator, functools.partial(_coroutine), Rude, _Callable()])
OBJECTS: Values = st.one_of(
    st.none(),
    st.builds(Rude),
    st.builds(RudeText, st.just("a")),
    st.builds(object),
    st.builds(datetime, st.just(2026), st.just(1), st.just(1), tzinfo=st.builds(LostZone)),
    st.sampled_from(
        [
            *(datetime.min, datetime.max, datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))), date(2026, 1, 1)),  # noqa: DTZ901  hostile
            *(timedelta(1), UUID(int=0), Tier.HOT, Outcome.OK, object, type, NotImplemented, Ellipsis, Exception),
            *(PoolSettings(), AgentInstance("p0", "planner"), LoadBalancingStrategy.RANDOM, UserError("value")),
        ]
    ),
)
HOSTILE: Values = st.one_of(TEXTS, NUMBERS, CONTAINERS, CALLABLES, OBJECTS)
"""Values of all kinds. Some of them are valid for some parameters."""

PLAIN: Values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9) | OBJECTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
"""Values to store."""
_COUNTS: Values = st.sampled_from([0, 1, 7, 10**6, -1, True, 2.0, math.nan, "3", None, 2**70, Decimal(3)])
_USAGE_WORDS = st.sampled_from(
    [
        *("usage", "usage_metadata", "prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "id"),
        *("output_tokens", "prompt_tokens_details", "cached_tokens", "model", "choices", "message", "type", "cost"),
        *("cache_read_input_tokens", "response", "metadata", "messages", "generations", "reasoning_tokens"),
    ]
)
USAGES: Values = st.recursive(
    _COUNTS | HOSTILE,
    lambda inner: st.dictionaries(_USAGE_WORDS, inner, max_size=5) | st.lists(inner, max_size=3),
    max_leaves=12,
)
"""Answers of language models, right and wrong."""

RULES = """
[[alert]]
name = "slow"
agents = "*"
when = "p95 > 2s"
window = "5m"
[[alert]]
name = "misses"
cache = "c*"
when = "hit_rate < 80%"
[[slo]]
name = "works"
agents = "a"
objective = "99.5%"
"""


@st.composite
def _damaged_rules(draw: st.DrawFn) -> str:
    text = RULES
    for _ in range(draw(st.integers(0, 3))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 12))
        text = (
            text[:at]
            + draw(st.text(max_size=5) | st.sampled_from(["nan", "9" * 30, '"', "=", "\n"]))
            + text[at + length :]
        )
    return text


def _several(of: list[Any]) -> Values:
    return st.lists(st.sampled_from(of), max_size=3)


_KEYS = ["k1", "k2", "", "a b", "{x}", "é" * 300, "k" * 5000, "m\n"]
_POOLS = ["planner", "coder", "a}b{c"]
_INSTANCES = ["p0", "p1", "new one"]
_AGENTS = ["a", "b c", "a/plan"]
_SHORT_S: Values = st.sampled_from([0, 0.001, 0.01])
_LENGTHS: Values = st.sampled_from(["5m", "1h", 60, "10s", 3600.0, None, "1d", 120])
_WITHIN_S: Values = st.sampled_from([0.05, 1, 30, 600.0, 86_400])

VALID: dict[str, Values] = {
    **dict.fromkeys(("key", "default"), st.sampled_from(_KEYS)),
    "keys": _several(_KEYS),
    "value": PLAIN,
    "values": st.dictionaries(st.sampled_from(_KEYS), PLAIN, max_size=3),
    "name": st.sampled_from(["c", "d", "a}b{c"]),
    "namespace": st.sampled_from(["n", "N.-_"]),
    **dict.fromkeys(("tags", "require", "labels", "ignore"), _several(["t1", "t2", "ä"])),
    **dict.fromkeys(("agent_type",), st.sampled_from(_POOLS)),
    **dict.fromkeys(("agent_types", "fallback"), _several(_POOLS)),
    **dict.fromkeys(("instance_id", "id"), st.sampled_from(_INSTANCES)),
    "instance_ids": _several(_INSTANCES),
    **dict.fromkeys(("agent_name", "agent", "other"), st.sampled_from(_AGENTS)),
    **dict.fromkeys(("agent_names",), _several(_AGENTS)),
    "agent_or_agents": st.none() | st.sampled_from(_AGENTS) | _several(_AGENTS),
    **dict.fromkeys(("error_type", "model"), st.sampled_from(["TimeoutError", "gpt:5"])),
    "token": st.sampled_from(["w:1", "@t", "x"]),
    "after": st.sampled_from(["1-1", "1764000000000-0"]),
    **dict.fromkeys(("affinity", "match", "rule"), st.sampled_from(["s*", "slow", "[a", "session 5"])),
    "version": st.sampled_from(["2", 2]),
    "strategy": st.sampled_from([None, *LoadBalancingStrategy, "random"]),
    "settings": st.sampled_from([PoolSettings(), PoolSettings(eject_after=2)]),
    "on_unavailable": st.sampled_from(["raise", "none", "miss", "compute"]),
    "outcome": st.sampled_from([*Outcome, "error"]),
    "policy": st.sampled_from(["lru", "tinylfu"]),
    "retention": st.sampled_from([Retention(), Retention(slices_10s=0)]),
    **dict.fromkeys(
        ("instance",), st.sampled_from([None, AgentInstance("p0", "planner"), AgentInstance("p1", "coder")])
    ),
    "instances": st.just([]),
    "parent": st.none(),
    "usage": USAGES,
    "not_failures": st.sampled_from([(), KeyError, (KeyError, UserError)]),
    **dict.fromkeys(("on_lost", "progress"), st.sampled_from([None, lambda *_: None])),
    "function": st.sampled_from(
        [lambda *_: 5, lambda *_: None, lambda *_: {"a": (1, 2)}, lambda *_: object(), _raises]
    ),
    "check": st.sampled_from([lambda _: True, lambda _: 5, _raises]),
    **dict.fromkeys(("dump", "load"), st.sampled_from([None, lambda value: value])),
    **dict.fromkeys(("wait", "blocking_timeout"), _SHORT_S),
    **dict.fromkeys(("window", "step", "other_window", "since"), _LENGTHS),
    **dict.fromkeys(
        ("as_of", "other_as_of"),
        st.sampled_from([None, 1_764_000_000.0, datetime.now(UTC), datetime(2026, 1, 1, tzinfo=UTC)]),
    ),
    **dict.fromkeys(
        ("ttl", "hot_ttl", "warm_ttl", "cold_ttl", "default_ttl", "soft_ttl", "lease", "max_hold"), _WITHIN_S
    ),
    **dict.fromkeys(
        ("heartbeat_ttl", "within", "seconds", "additional_time", "retry_after", "stale_if_error"), _WITHIN_S
    ),
    **dict.fromkeys(("jitter", "share", "early_refresh"), st.sampled_from([0, 0.1, 0.5])),
    "text": st.just(RULES) | _damaged_rules(),
    "path": st.none(),
    "if_version": st.sampled_from([0, 1, 2**53 - 1]),
    "shards": st.sampled_from([1, 2]),
    **dict.fromkeys(("weight",), st.sampled_from([0, 1, 2.5])),
    **dict.fromkeys(("max_capacity",), st.sampled_from([1, 5, 1000])),
    "count": st.sampled_from([1, 3, 500]),
    "codec": st.sampled_from([None, Codec(max_bytes=5000)]),
    "cls": st.builds(lambda: type("Stored", (), {})),
}
"""Valid values by the name of the parameter."""

NAMED: dict[tuple[str, str], Values] = {
    ("priority", "Tier"): st.sampled_from([*Tier, "hot"]),
    ("by", "RankBy"): st.sampled_from([*RankBy, "p95"]),
    ("items", "Iterable"): _several(_KEYS),
}
"""Valid values of parameters whose name has several meanings, by the name and a word of the annotation."""

BY_TYPE: dict[str, Values] = {
    "float": st.sampled_from([0, 0.5, 1, 10.0, 60]),
    "int": st.sampled_from([0, 1, 2, 5, 100]),
    "bool": st.booleans(),
    "object": HOSTILE,
    "Any": HOSTILE,
}
"""Valid values by the type, for parameters that are not listed by name."""

BOUNDED_WAITS = {"wait", "blocking_timeout", "timeout"}
"""Parameters for which a long time is valid: such a call may wait as long as it is allowed to."""
_MAX_WAIT_S = 0.02


def ends_soon(value: object) -> bool:
    """Return whether a value is a short time to wait, or is no valid time."""
    try:
        return not (isinstance(value, (int, float, Fraction)) and value > _MAX_WAIT_S)
    except RudeError:
        return True


def of(parameter: Parameter, own: Mapping[str, Values]) -> Values:
    """Return a strategy for the values of a parameter. Most of the values are valid, some are hostile.

    Args:
        parameter: the parameter.
        own: valid values that are specific to one callable, by the name of the parameter.

    Raises:
        LookupError: no valid value is known.
    """
    name, annotation = parameter.name, str(parameter.annotation)
    named = [each for (of, word), each in NAMED.items() if of == name and word in annotation]
    typed = [each for word, each in BY_TYPE.items() if word in annotation]
    valid = next(
        iter([*(of[name] for of in (own,) if name in of), *named, *([VALID[name]] if name in VALID else typed)]), None
    )
    if valid is None:
        raise LookupError(f"no valid value is known for {parameter}")
    if name == "backend":  # None is left out, because it is valid and creates the default backend
        return st.one_of(valid, valid, HOSTILE.filter(lambda value: value is not None))
    found = st.sampled_from([valid] * 5 + [HOSTILE]).flatmap(lambda strategy: strategy)
    return found.filter(ends_soon) if name in BOUNDED_WAITS else found


def expanded(function: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters of a function. The options of a TypedDict become keyword parameters with a default."""
    found = []
    for each in inspect.signature(function).parameters.values():
        options = re.fullmatch(r"Unpack\[(\w+)\]", str(each.annotation))
        if options is not None:
            for name, kind in _OPTIONS[options[1]].__annotations__.items():
                shown = getattr(kind, "__forward_arg__", str(kind))
                found.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=shown))
        elif each.name != "self":
            found.append(each)
    return found
