"""Tests of the codec: round trips, refused values, hostile bytes, and cache keys of arguments."""

from __future__ import annotations

import contextlib
import enum
import pickle
import subprocess
import sys
import zlib
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgpack
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.codec.codec import MAX_DEPTH, Codec, canonical
from agentperf_redis.codec.storable import Registry
from agentperf_redis.errors import InvalidArgument, Undecodable


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float = 0.5


@dataclass
class Path:
    points: list[Point]
    length: float = field(init=False, default=0.0)
    note: str = field(default="", compare=False)


class Pair(NamedTuple):
    left: int
    right: str


class Answer(pydantic.BaseModel):
    text: str = pydantic.Field(alias="body")
    score: float = 0.0
    at: tuple[int, ...] = ()


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and other.cents == self.cents

    def __hash__(self) -> int:
        return hash(self.cents)

    def __repr__(self) -> str:
        return f"Money({self.cents})"


@dataclass(eq=False)
class OnlyItself:
    x: int = 0


registry = Registry()
for known in (Colour, Rights, Point, Path, Pair, Answer):
    registry.add(known)
registry.add(Money, dump=lambda money: money.cents, load=Money)
codec = Codec(registry=registry)


def described(value: Any) -> str:
    """Describe a value and its types at every level as text. In the text, NaN equals NaN, and 1 differs from True."""
    if isinstance(value, (list, tuple)):
        inside = [described(item) for item in value]
    elif isinstance(value, dict):
        inside = [f"{described(key)}={described(item)}" for key, item in value.items()]
    elif isinstance(value, Path):
        inside = [described(value.points), described(value.length), described(value.note)]
    elif isinstance(value, (set, frozenset)):
        inside = sorted(map(described, value))
    elif isinstance(value, np.ndarray):
        inside = [str(value.dtype), str(value.shape), value.tobytes().hex()]
    else:
        return f"{type(value).__name__}:{value!r}"
    return f"{type(value).__name__}({', '.join(inside)})"


def same(one: Any, two: Any) -> bool:
    return described(one) == described(two)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.dates()
    | st.datetimes()
    | st.datetimes(
        timezones=st.just(UTC) | st.builds(lambda s: timezone(timedelta(seconds=s)), st.integers(-86399, 86399))
    )
    | st.times()
    | st.timedeltas()
    | st.sampled_from([*Colour, Rights.READ, Rights.READ | Rights.WRITE, Point(1), Pair(1, "2"), Money(3)])
    | st.builds(np.float64, st.floats())
    | st.builds(np.int32, st.integers(-(2**31), 2**31 - 1))
)
hashable = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(
    scalars | hashable | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(hashable, inner)
        | st.sets(hashable)
        | st.builds(Path, st.lists(inner))  # a field of a dataclass may hold any value
    ),
    max_leaves=12,
)


@given(values)
def test_any_value_round_trips_with_its_type(value: Any) -> None:
    assert same(codec.decode(codec.encode(value)), value)


@pytest.mark.parametrize(
    "value",
    [
        1.1,
        Decimal("1.1"),
        Decimal("sNaN123"),
        Decimal("-0E+5"),
        True,
        1,
        1.0,
        -0.0,
        [True, 1, 1.0],
        {1: "a", "1": "b", (1, 2): {"c"}, None: frozenset({b"d"})},
        {1.5: 1, False: 2},
        2**63 - 1,
        2**64 - 1,
        2**64,
        -(2**63),
        -(2**63) - 1,
        2**4000,
        float("nan"),
        float("inf"),
        -float("inf"),
        complex(float("nan"), -0.0),
        "\ud800 alone",
        {"\ud800": 1},
        "\x00",
        b"",
        bytearray(b"x"),
        [bytearray(b"x"), b"x"],
        datetime(2026, 1, 2, 3, 4, 5, 6),  # noqa: DTZ001  the naive datetime is intended
        datetime(2026, 1, 2, tzinfo=UTC),
        datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=5, minutes=30, seconds=1))),
        date.min,
        time(1, 2, 3, 4, tzinfo=timezone(timedelta(hours=-2))),
        timedelta.min,
        timedelta.max,
        UUID(int=5),
        (),
        ((),),
        [()],
        set(),
        [],
        {},
        [[], [[]], {}],
        Colour.RED,
        Rights.READ | Rights.WRITE,
        Path([Point(1, 2.5)]),
        Pair(1, "b"),
        Money(5),
        np.float32(1.5),
        np.bool_(True),
        np.datetime64("2026-01-02T03:04", "ms"),
        np.str_("é"),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.ones((2, 3))),
        np.zeros((0, 3)),
        np.array(5),
        np.array([b"ab", b"c"]),
        np.array([["x", "yz"]]),
        [np.array([True, False]), {"a": np.complex64(1j)}],
    ],
    ids=repr,
)
def test_edge_values_round_trip_with_their_type(value: Any) -> None:
    assert same(codec.decode(codec.encode(value)), value)


def test_aware_datetime_keeps_its_instant_and_offset() -> None:
    summer = datetime(2026, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    back = codec.decode(codec.encode(summer))
    assert back == summer
    assert back.utcoffset() == timedelta(hours=2)


def test_dataclass_round_trips_without_running_init() -> None:
    path = Path([Point(1)], note="n")
    path.length = 7.5
    back = codec.decode(codec.encode(path))
    assert back == path
    assert (back.length, back.note) == (7.5, "n")


def test_pydantic_model_round_trips_completely() -> None:
    answer = Answer(body="why", at=(1, 2))
    back = codec.decode(codec.encode(answer))
    assert back == answer
    assert type(back) is Answer
    assert back.at == (1, 2)
    assert back.model_fields_set == {"text", "at"}


def test_decoded_array_owns_its_memory() -> None:
    back = codec.decode(codec.encode(np.zeros(3)))
    back[0] = 1.0
    assert back.tolist() == [1.0, 0.0, 0.0]


class Shouting(str):
    __slots__ = ()


class Nowhere(tzinfo):
    def utcoffset(self, moment: datetime | None, /) -> None:
        return None

    dst = utcoffset

    def tzname(self, moment: datetime | None, /) -> str:
        return "nowhere"


def recursive_list() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def recursive_tuple() -> tuple[list[Any]]:
    inner: list[Any] = []
    value = (inner,)
    inner.append({"a": value})
    return value


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def laughs() -> list[Any]:
    value: list[Any] = ["ha"]
    for _ in range(60):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Fraction(1, 3),
        print,
        int,
        Shouting("x"),
        OnlyItself(),
        {"a": [1, {2: object()}]},
        iter(()),
        memoryview(b"x"),
        [memoryview(b"x")],
        msgpack.ExtType(1, b"x"),
        [msgpack.Timestamp(1)],
        datetime(2026, 1, 1, tzinfo=Nowhere()),
        time(1, tzinfo=ZoneInfo("Europe/Berlin")),
        np.array([object()]),
        np.zeros(2, dtype=[("a", "i4")]),
        np.ma.masked_array([1, 2], mask=[False, True]),
        np.longdouble(1),
        np.dtype("i4"),
        recursive_list(),
        recursive_tuple(),
        deep(MAX_DEPTH + 1),
        deep(1100),
        (deep(MAX_DEPTH),),
        laughs(),
        [laughs(), {1}],
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_cannot_round_trip_are_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Codec(max_bytes=50_000, registry=registry).encode(value)
    assert caught.value.argument == "value"
    assert str(caught.value)


def test_refused_object_names_the_decorator() -> None:
    with pytest.raises(InvalidArgument, match=r"decorated with @agentperf_redis\.storable; not builtins\.object"):
        Codec(registry=Registry()).encode(object())


def test_deepest_allowed_value_round_trips() -> None:
    assert codec.decode(codec.encode(deep(MAX_DEPTH))) == deep(MAX_DEPTH)
    assert codec.decode(codec.encode([*deep(MAX_DEPTH), 2**70])) == [*deep(MAX_DEPTH), 2**70]


def nested(levels: int) -> bytes:
    return b"m" + b"\x91" * (levels - 1) + b"\x90"


def test_depth_limit_is_the_same_in_decode() -> None:
    assert codec.decode(nested(MAX_DEPTH)) == deep(MAX_DEPTH)
    for data in (
        nested(MAX_DEPTH + 1),
        b"m" + b"\x81\x01" * MAX_DEPTH + b"\x80",
        b"m" + b"\x92\xc7\x00\x20" * MAX_DEPTH + b"\x90",
    ):
        with pytest.raises(Undecodable, match="nested"):
            codec.decode(data)
    assert codec.decode(codec.encode([[1]] * 200)) == [[1]] * 200, "many containers, but not nested"
    array: Any = np.zeros(1)
    for _ in range(MAX_DEPTH - 2):
        array = [array]
    assert codec.decode(codec.encode(array))
    with pytest.raises(InvalidArgument, match="nested"):
        codec.encode([array])


def test_array_claims_are_limited_like_its_bytes() -> None:
    small = Codec(max_bytes=1000)
    assert small.decode(small.encode(np.empty((0, 1000)))).shape == (0, 1000)
    for value in (np.empty((0, 1001)), np.empty(0, "S1001"), np.bytes_(b"x" * 1001)):
        with pytest.raises(InvalidArgument, match="at most 1000"):
            small.encode(value)
    for items in (["<f8", [0, 1001], b""], ["|S1001", [0], b""], ["<U251", [0], b""]):
        with pytest.raises(Undecodable):
            small.decode(packed([ext(36), *items]))


@pytest.mark.parametrize("header", [b"\xdd\x00\x00\x14\x00", b"\xdc\x14\x00", b"\xdf\x00\x00\x0a\x00"])
def test_longer_claim_than_data_is_refused_before_decoding(header: bytes) -> None:
    with pytest.raises(Undecodable, match="cut off"):
        codec.decode(b"m" + header + b"\xc0" * 5000)


def test_size_limit_holds_for_encode_and_decode() -> None:
    small = Codec(max_bytes=100, compress_above=None)
    assert len(small.encode("x" * 98)) == 101
    for value in ("x" * 99, ["x"] * 60, b"x" * 5000):
        with pytest.raises(InvalidArgument, match="at most 100 bytes"):
            small.encode(value)
    with pytest.raises(Undecodable, match="maximum"):
        small.decode(codec.encode(list(range(200))))


def test_only_large_compressible_values_are_deflated() -> None:
    text = "the same again " * 1000
    assert codec.encode(text)[:1] == b"z"
    assert len(codec.encode(text)) < 300
    assert codec.decode(codec.encode(text)) == text
    assert codec.encode("small")[:1] == b"m"
    assert Codec(compress_above=None).encode(text)[:1] == b"m"
    noise = np.random.default_rng(5).bytes(5000)
    assert codec.encode(noise)[:1] == b"m"
    assert codec.decode(codec.encode(noise)) == noise


def test_deflate_bomb_stops_at_size_limit() -> None:
    bomb = b"z" + zlib.compress(b"\xc0" * 50_000_000)
    assert len(bomb) < 100_000
    with pytest.raises(Undecodable, match="inflates to more"):
        codec.decode(bomb)


class Canary:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (pytest.fail, ("a pickle was executed",))


def packed(value: Any) -> bytes:
    return b"m" + bytes(msgpack.packb(value))


def ext(code: int, data: bytes = b"") -> msgpack.ExtType:
    return msgpack.ExtType(code, data)


HOSTILE = {
    "nothing": b"",
    "no form": b"\x01",
    "form only": b"m",
    "another form": b"Z\xc0",
    "trailing": packed(1) + b"\x00",
    "cut": packed([1, 2])[:-1],
    "pickle": pickle.dumps(Canary()),
    "pickle in form": b"m" + pickle.dumps(Canary()),
    "json": b'{"a": 1}',
    "forged length": b"m\xdd\xff\xff\xff\xff",
    "forged map": b"m\xdf\x7f\xff\xff\xff",
    "forged text": b"m\xdb\xff\xff\xff\xff",
    "deep": b"m" + b"\x91" * 1100 + b"\xc0",
    "bad utf-8": b"m\xa2\xc3\x28",
    "unused type": b"m\xc1",
    "unknown ext": packed(ext(42, b"x")),
    "negative ext": packed(ext(5 - 128 + 128, b"x")),
    "ext of keys": packed([ext(39), "a", 1]),
    "timestamp": b"m\xd6\xff\x00\x00\x00\x01",
    "timestamp of 12": b"m\xc7\x0c\xff" + bytes(12),
    "timestamp in long form": b"m\x92\x01\xc9\x00\x00\x00\x04\xff" + bytes(4),
    "timestamp as key": b"m\x81\xd6\xff\x00\x00\x00\x01\x01",
    "lone mark": packed(ext(32)),
    "mark behind": packed([1, ext(32)]),
    "mark as key": b"m\x81" + packed(ext(33))[1:] + b"\x01",
    "two marks": packed([ext(32), ext(33)]),
    "fat mark": packed([ext(32, b"x"), 1]),
    "set of lists": packed([ext(33), [1]]),
    "dict of odd length": packed([ext(35), 1]),
    "dict with list as key": packed([ext(35), [1], 2]),
    "key is a list": b"m\x81\x90\x01",
    "bad decimal": packed(ext(5, b"eins")),
    "bad uuid": packed(ext(6, b"12")),
    "bad date": packed(ext(8, b"2026-99-99")),
    "bad datetime": packed(ext(7, b"\xff")),
    "bad timedelta": packed(ext(10, b"1:2")),
    "huge timedelta": packed(ext(10, b"999999999999:0:0")),
    "bad complex": packed(ext(4, b"123")),
    "unknown class": packed([ext(38), "os.system", "true"]),
    "class that is no text": packed([ext(38), ["x"], "true"]),
    "member unknown": packed([ext(38), f"{__name__}.Colour", "GREEN"]),
    "fields missing": packed([ext(38), f"{__name__}.Point", {"x": 1}]),
    "fields too many": packed([ext(38), f"{__name__}.Point", {"x": 1, "y": 1.0, "__class__": 1}]),
    "model of another shape": packed([ext(38), f"{__name__}.Answer", [{"text": "a"}, {}, []]]),
    "array of objects": packed([ext(36), "|O", [1], bytes(8)]),
    "array of no size": packed([ext(36), "<U0", [1 << 40], b""]),
    "array too short": packed([ext(36), "<f8", [2], bytes(8)]),
    "array of negative shape": packed([ext(36), "<f8", [-1, -1], bytes(8)]),
    "array of huge shape": packed([ext(36), "<f8", [1 << 62, 1 << 62, 0], b""]),
    "array of records": packed([ext(36), "i4,i4", [1], bytes(8)]),
    "array of text": packed([ext(36), "<f8", [1], "12345678"]),
    "scalar too long": packed([ext(37), "<f8", bytes(16)]),
    "not deflated": b"znonsense",
    "deflated, cut": b"z" + zlib.compress(b"\xc0" * 100)[:-1],
    "deflated, trailing": b"z" + zlib.compress(b"\xc0") + b"x",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_undecodable(data: bytes) -> None:
    with pytest.raises(Undecodable) as caught:
        codec.decode(data)
    assert caught.value.reason


@given(st.binary())
def test_arbitrary_bytes_decode_or_raise_undecodable(data: bytes) -> None:
    for form in (b"", b"m", b"z"):
        try:
            value = codec.decode(form + data)
        except Undecodable:
            continue
        assert same(codec.decode(codec.encode(value)), value)


@given(values, st.data())
def test_damaged_bytes_decode_or_raise_undecodable(value: Any, data: st.DataObject) -> None:
    damaged = bytearray(codec.encode(value))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Undecodable):
        codec.decode(bytes(damaged))


@pytest.mark.parametrize("argument", ["max_bytes", "compress_above"])
@pytest.mark.parametrize("value", [0, -1, True, "5", 1.5])
def test_invalid_codec_settings_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=argument):
        Codec(**{argument: value})


def test_plain_values_do_not_import_numpy() -> None:
    program = (
        "import sys; from agentperf_redis.codec.codec import Codec; c = Codec(); c.decode(c.encode([1, (2,)]));"
        "assert 'numpy' not in sys.modules and 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Cache keys of arguments

DIFFERENT = [
    None, True, False, 0, 1, 1.0, 0.0, -0.0, "1", "", b"1", bytearray(b"1"), Decimal(1), Decimal("1.0"), 1 + 0j, 2**64,
    [], (), set(), frozenset(), {}, [1], (1,), {1}, frozenset({1}), {1: 1}, {"1": 1}, {1: "1"}, {True: 1}, [1, 2], [2, 1],
    [[1], 2], [[1, 2]], date(2026, 1, 1), datetime(2026, 1, 1), "2026-01-01", UUID(int=1), Colour.RED, "RED", "r",  # noqa: DTZ001
    Rights.READ, Point(1), Point(1, 2.0), np.int64(1), np.int32(1), np.array([1]), np.array([[1]]), "\ud800", timedelta(1),
]  # fmt: skip


def test_different_values_or_types_have_different_keys() -> None:
    assert len({canonical(value) for value in DIFFERENT}) == len(DIFFERENT)


def test_key_ignores_order_of_dicts_and_sets() -> None:
    assert canonical({"a": 1, "b": {2: 3, 1: 4}}) == canonical({"b": {1: 4, 2: 3}, "a": 1})
    assert canonical({"x", "y", 1, (2, 3)}) == canonical({(2, 3), 1, "y", "x"})


@given(st.dictionaries(hashable, hashable | st.lists(hashable, max_size=3), max_size=5), st.randoms())
def test_shuffled_dict_has_the_same_key(value: dict[Any, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    shuffled = dict(items)
    assert canonical(shuffled, registry) == canonical(value, registry)


def test_key_does_not_depend_on_hash_seed() -> None:
    program = (
        "from agentperf_redis.codec.codec import canonical; from decimal import Decimal;"
        "print(canonical((({'b', 'a', 'c'}, {'z': 1, 'y': (Decimal('1.1'), 2**70)}), None)).hex())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


class WithKey:
    def __init__(self, model: str) -> None:
        self.model = model

    def __cache_key__(self) -> str:
        return self.model


def test_cache_key_method_defines_the_key() -> None:
    assert canonical(WithKey("a")) == canonical(WithKey("a"))
    assert canonical(WithKey("a")) != canonical(WithKey("b"))
    assert canonical(WithKey("a")) != canonical("a")


def test_dataclass_key_includes_all_of_its_state() -> None:
    assert canonical(Path([Point(1)], note="a")) == canonical(Path([Point(1)], note="a"))
    assert canonical(Path([Point(1)])) != canonical(Path([Point(2)]))
    assert canonical(Path([Point(1)], note="a")) != canonical(Path([Point(1)], note="b"))
    extended = Path([Point(1)])
    vars(extended)["tenant"] = "b"
    assert canonical(extended) != canonical(Path([Point(1)]))


@pytest.mark.parametrize(
    "value",
    [object(), OnlyItself(), print, recursive_list(), deep(MAX_DEPTH + 1), np.array([object()])],
    ids=lambda v: type(v).__name__,
)
def test_value_without_identity_has_no_key(value: Any) -> None:
    with pytest.raises(InvalidArgument):
        canonical({"argument": value})


@pytest.mark.parametrize(
    "shape",
    [
        [[1], 2],
        ["a", 2],
        [b"a", 2],
        [2.0, 1],
        [-1, -2],
        [True, 2],
        [None],
        [[]],
        [ext(2, (2**70).to_bytes(10, "big")), 0],
        [1] * 65,
        {"a": 1},
        "ab",
        2,
    ],
    ids=[str(number) for number in range(13)],
)
def test_invalid_array_shapes_are_refused_before_use(shape: Any) -> None:
    packed = msgpack.packb([ext(36), "<i8", shape, bytes(16)])
    with pytest.raises(Undecodable):
        Codec().decode(b"m" + packed)


def test_empty_array_keeps_its_nonzero_lengths() -> None:
    value = np.empty((0, 5, 2))
    assert Codec().decode(Codec().encode(value)).shape == (0, 5, 2)
