"""User classes: a decoded instance is equal and of the same type, or encoding is refused.

No part of an instance may be lost silently.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from functools import cached_property
from typing import Any, Generic, Literal, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, RootModel, create_model
from pydantic.dataclasses import dataclass as pydantic_dataclass

from agentperf_redis.codec.codec import Codec, canonical
from agentperf_redis.codec.storable import Registry
from agentperf_redis.errors import InvalidArgument, Undecodable

T = TypeVar("T")

BERLIN = ZoneInfo("Europe/Berlin")


def round_trip(value: Any, *classes: Any) -> Any:
    registry = Registry()
    for cls in classes:
        registry.add(cls)
    codec = Codec(registry=registry)
    return codec.decode(codec.encode(value))


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal and have the same types at every level."""
    if type(one) is not type(other):
        return False
    if dataclasses.is_dataclass(one):
        return one == other and same(vars_of(one), vars_of(other))
    if isinstance(one, BaseModel):
        return one == other and same(one.__getstate__(), other.__getstate__())
    if type(one) is dict:
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if type(one) in (list, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def vars_of(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


class Word(enum.StrEnum):
    YES = "yes"


class Tone(str, enum.Enum):  # noqa: UP042  the test needs an enum of strings that is no StrEnum
    DRY = "dry"


class Level(enum.IntEnum):
    LOW = 1


class Place(tuple[int, int], enum.Enum):  # noqa: SLOT001  no Enum has slots
    ORIGIN = (0, 0)


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Bits(enum.IntFlag, boundary=enum.KEEP):
    ONE = 1


class Unit(enum.Enum):
    METRE = "m"
    METER = "m"  # noqa: PIE796  an alias


class Open(enum.Enum):
    """An enum that creates a member for an unknown value."""

    KNOWN = "known"

    @classmethod
    def _missing_(cls, value: object) -> Open:
        made: Any = object.__new__(cls)
        made._name_ = "KNOWN" if value == "like known" else None
        made._value_ = value
        cls._value2member_map_[value] = made
        return made  # type: ignore[no-any-return]


class Fleeting(enum.Enum):
    """An enum that creates a member for an unknown value, like `Open`. Each created member equals only itself."""

    KNOWN = "known"

    @classmethod
    def _missing_(cls, value: object) -> Fleeting:
        made: Any = object.__new__(cls)
        made._name_, made._value_ = "KNOWN", value
        return made  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "member",
    [
        *(Word.YES, Tone.DRY, Level.LOW, Place.ORIGIN, Rights.READ, Rights.READ | Rights.WRITE, Rights(0)),
        *(Bits(5), Unit.METER, Open.KNOWN, Open("other"), Open("like known")),
    ],
    ids=repr,
)
def test_members_of_all_enum_kinds_round_trip(member: enum.Enum) -> None:
    assert round_trip(member, type(member)) is member or same(round_trip(member, type(member)), member)


def test_created_members_without_identity_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="Fleeting returns for its value"):
        round_trip(Fleeting("other"), Fleeting)


def test_distinct_members_have_distinct_keys() -> None:
    members = [Word.YES, Tone.DRY, Level.LOW, Rights(1), Rights(3), Bits(1), Bits(5), Open.KNOWN, Open("like known")]
    assert len({canonical(member) for member in members}) == len(members)


@dataclasses.dataclass
class Draft:
    text: str
    score: float = dataclasses.field(init=False)


@dataclasses.dataclass
class Beside:
    text: str

    def __post_init__(self) -> None:
        self.words = self.text.split()

    @cached_property
    def length(self) -> int:
        return len(self.text)


@dataclasses.dataclass(slots=True)
class Slotted:
    text: str


@dataclasses.dataclass
class Under:
    """Has a private slot besides its field."""

    __slots__ = ("__hidden", "text")
    text: str

    def hide(self, value: str) -> Under:
        self.__hidden = value
        return self

    @property
    def hidden(self) -> str:
        return self.__hidden


class Named(NamedTuple):
    left: int


class Extended(Named):
    """Has a `__dict__`, unlike its base class."""


def test_extra_dataclass_attributes_round_trip() -> None:
    value = Beside("a b")
    assert value.length == 3
    back = round_trip(value, Beside)
    assert same(back, value)
    assert back.words == ["a", "b"]
    assert "length" not in vars(back), "it is computed on access"
    assert canonical(value) == canonical(Beside("a b")), "a cached property does not affect the key"


def test_private_slots_round_trip_and_affect_keys() -> None:
    assert round_trip(Under("a").hide("b"), Under).hidden == "b"
    assert canonical(Under("a").hide("b")) != canonical(Under("a").hide("c"))


def test_unset_field_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"whose field score has a value"):
        round_trip(Draft("a"), Draft)
    with pytest.raises(InvalidArgument, match=r"it is at value\[1\]\['d'\]"):
        round_trip([1, {"d": Draft("a")}], Draft)


def test_changed_fields_make_stored_values_undecodable() -> None:
    one, other = Registry(), Registry()
    one.add(dataclasses.make_dataclass("Changed", ["a", "b"]), name="changed")
    other.add(dataclasses.make_dataclass("Changed", ["a"]), name="changed")
    for here, there, values in ((one, other, (1, 2)), (other, one, (1,))):
        stored = Codec(registry=here).encode(here.of_name("changed").cls(*values))  # type: ignore[union-attr]
        with pytest.raises(Undecodable, match="have changed"):
            Codec(registry=there).decode(stored)


@pytest.mark.parametrize("base", [dict, list, Exception, str])
def test_dataclasses_with_builtin_bases_are_refused(base: type) -> None:
    with pytest.raises(InvalidArgument, match=f"not also a {base.__name__}"):
        Registry().add(dataclasses.make_dataclass("Both", [("a", int)], bases=(base,)))


def test_named_tuple_with_extra_attributes_is_refused() -> None:
    assert same(round_trip(Extended(1), Extended), Extended(1))
    value = Extended(1)
    value.note = "n"  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="without extra attributes"):
        round_trip(value, Extended)


class Ref:
    pass


def broken(ref: Ref) -> Any:
    raise ValueError("closed")


async def later(ref: Ref) -> Any:
    return 1


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        (broken, "dump raised ValueError: 'closed'"),
        (lambda ref: later(ref), "dump is a blocking function"),  # noqa: PLW0108  must not be a coroutine function
        (lambda ref: ref.gone, "dump raised AttributeError"),
    ],
)
def test_error_of_dump_is_reported_with_path(dump: Callable[[Any], Any], message: str) -> None:
    registry = Registry()
    registry.add(Ref, dump=dump, load=lambda state: Ref())
    with pytest.raises(InvalidArgument, match=message):
        Codec(registry=registry).encode(Ref())
    with pytest.raises(InvalidArgument, match=r"it is at value\['r'\]"):
        Codec(registry=registry).encode({"r": Ref()})


@pytest.mark.parametrize("which", ["dump", "load"])
def test_async_functions_are_refused_at_registration(which: str) -> None:
    functions: dict[str, Any] = {"dump": lambda ref: 1, "load": lambda state: Ref(), which: later}
    with pytest.raises(InvalidArgument, match="a blocking function"):
        Registry().add(Ref, **functions)


class Ticket(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    id_: str = Field(default="", alias="id")
    id: int = Field(default=0, alias="db_id")


class Session(BaseModel):
    user: str
    _tenant: str = PrivateAttr(default="")
    _unset: int = PrivateAttr()

    def of(self, tenant: str) -> Session:
        self._tenant = tenant
        return self


class Rule(BaseModel):
    cls: str
    self_: str = Field(default="", alias="self")


class Event(BaseModel):
    model_config = ConfigDict(extra="allow")
    kind: str = Field(alias="ServerKind")


class Box(BaseModel, Generic[T]):
    item: T


class Names(RootModel[list[str]]):
    pass


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"


class Owner(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")

    @cached_property
    def label(self) -> str:
        return self.pet.kind


@pydantic_dataclass
class Checked:
    count: int


def labelled(owner: Owner) -> Owner:
    assert owner.label
    return owner


@pytest.mark.parametrize(
    "value",
    [
        Ticket.model_validate({"id": "T-7", "db_id": 7}),
        Session(user="u").of("a"),
        Rule.model_validate({"cls": "A", "self": "B"}),
        Event.model_validate({"ServerKind": "a", "kind": "b", "__dict__": 1, "model_fields": 2}),
        Box[int](item=1),
        Names(["a"]),
        labelled(Owner(pet=Dog())),
        Checked(3),
        Cat.model_construct(lives=3),
        Session.model_construct(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_round_trip_with_complete_state(value: Any) -> None:
    back = round_trip(value, type(value), *([Dog] if isinstance(value, Owner) else []))
    if isinstance(back, Owner):
        assert "label" not in vars(back), "it is computed on access"
        labelled(back)
    assert same(back, value)
    if isinstance(value, BaseModel):
        assert back.model_fields_set == value.model_fields_set


def test_private_model_state_affects_the_key() -> None:
    registry = Registry()
    registry.add(Session)
    assert canonical(Session(user="u").of("a"), registry) != canonical(Session(user="u").of("b"), registry)


def test_generic_model_is_registered_with_its_parameters() -> None:
    with pytest.raises(InvalidArgument, match=r"not .*Box\[int\]"):
        round_trip(Box[int](item=1), Box)


def test_unstorable_private_attribute_is_refused_with_path() -> None:
    value = Session(user="u").of("a")
    object.__setattr__(value, "__pydantic_private__", {"_tenant": object()})
    with pytest.raises(InvalidArgument, match=r"value\._tenant"):
        round_trip(value, Session)


class Fold(tzinfo):
    """A time zone that is not a ZoneInfo. Its clock shows one hour twice."""

    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=1 if moment is not None and moment.fold else 2)

    def dst(self, moment: datetime | None) -> timedelta:
        return timedelta(0)

    def tzname(self, moment: datetime | None) -> str:
        return "fold"


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN),
        datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=BERLIN),
        datetime(2026, 3, 29, 2, 30, tzinfo=BERLIN),
        datetime(2026, 3, 29, 2, 30, fold=1, tzinfo=BERLIN),
        datetime(2026, 7, 1, 12, tzinfo=BERLIN),
        datetime(2026, 7, 1, 12, tzinfo=UTC),
        datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=2))),
    ],
    ids=str,
)
def test_aware_times_round_trip_with_their_zone(moment: datetime) -> None:
    back = round_trip(moment)
    assert (back, back.fold, back.tzinfo) == (moment, moment.fold, moment.tzinfo)


def test_foreign_zone_is_refused_in_repeated_hour() -> None:
    with pytest.raises(InvalidArgument, match=r"zoneinfo\.ZoneInfo that has a key"):
        round_trip(datetime(2026, 10, 25, 2, 30, tzinfo=Fold()))


@pytest.mark.parametrize(
    "text",
    [
        "2026-07-01T12:00:00+02:00[Nowhere/Atlantis]",
        "2026-07-01T12:00:00+02:00[../x]",
        "2026-07-01T12:00:00+05:00[UTC]",
    ],
)
def test_unknown_or_differing_zones_are_undecodable(text: str) -> None:
    import msgpack

    with pytest.raises(Undecodable):
        Codec().decode(b"m" + msgpack.packb(msgpack.ExtType(7, text.encode())))


@pytest.mark.parametrize(
    "value",
    [np.bytes_(b"a\0"), np.str_("a\0"), np.int64(3), np.float32(0.5), np.bool_(True)],
    ids=repr,
)
def test_numpy_scalars_round_trip_with_trailing_nul(value: Any) -> None:
    back = round_trip(value)
    assert type(back) is type(value)
    assert back == value
    assert len(bytes(back)) == len(bytes(value)) if isinstance(value, bytes) else str(back) == str(value)


def test_numpy_scalar_its_dtype_cannot_restore_is_refused() -> None:
    value = np.longlong(3)
    if type(np.dtype(value.dtype.str).type(0)) is type(value):
        assert type(round_trip(value)) is type(value)  # this machine has only one integer type of this size
    else:
        with pytest.raises(InvalidArgument, match="is int64"):
            round_trip(value)


class Text(str):  # noqa: SLOT000  it has a __dict__
    pass


@pytest.mark.parametrize("value", [Text("a"), ["b", Text("a")], {"k": Text("a")}, {Text("k"): 1}, (Text("a"),)])
def test_subclasses_of_str_are_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="Text"):
        round_trip(value)


# Random classes: an instance of any class is decoded unchanged, or encoding is refused.

_NAMES = st.sampled_from(["a", "b_", "cls", "self_", "state", "values", "name", "fields", "model", "_x", "id", "id_"])
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.decimals(allow_nan=False)
    | st.datetimes(timezones=st.none() | st.just(UTC) | st.just(BERLIN)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def dataclass_instances(draw: st.DrawFn) -> Any:
    names = draw(st.lists(_NAMES, min_size=1, max_size=4, unique=True))
    slots = draw(st.booleans())
    how: dict[str, Any] = {
        "slots": slots,
        "frozen": draw(st.booleans()),
        "kw_only": draw(st.booleans()),
        "order": draw(st.booleans()),
    }
    compared = {name: draw(st.booleans()) for name in names}
    cls = dataclasses.make_dataclass(
        "Made", [(name, Any, dataclasses.field(compare=compared[name], default=None)) for name in names], **how
    )
    values = {name: draw(_VALUES) for name in names}
    instance = cls(**values)
    if not slots and draw(st.booleans()):
        vars(instance)["beside"] = draw(_VALUES)
    return instance


@st.composite
def enum_members(draw: st.DrawFn) -> Any:
    kind, values = draw(
        st.sampled_from(
            [
                (enum.Enum, st.integers() | st.text(max_size=3)),
                (enum.StrEnum, st.text(max_size=3)),
                (enum.IntEnum, st.integers(-5, 5)),
                (enum.Flag, st.sampled_from([1, 2, 4])),
                (enum.IntFlag, st.sampled_from([1, 2, 4])),
            ]
        )
    )
    mixin = draw(st.sampled_from([None, str, float, Decimal])) if kind is enum.Enum else None
    if mixin is not None:
        turn: Any = mixin
        values = st.integers(0, 9).map(turn)
    members = draw(st.dictionaries(st.sampled_from(["A", "B", "C", "name_", "D"]), values, min_size=1, max_size=4))
    make: Any = kind
    cls: Any = make("Made", members) if mixin is None else make("Made", members, type=mixin)
    chosen = draw(st.sampled_from([cls[name] for name in members]))
    if kind in (enum.Flag, enum.IntFlag) and draw(st.booleans()):
        for name in members:
            chosen |= cls[name]
    return chosen


@st.composite
def model_instances(draw: st.DrawFn) -> Any:
    names = draw(st.lists(_NAMES.filter(lambda name: not name.startswith("_")), min_size=1, max_size=4, unique=True))
    names = [name for name in names if name != "model"]
    aliases = dict(zip(names, draw(st.permutations(names)), strict=True)) if draw(st.booleans()) else {}
    extra: Any = draw(st.sampled_from(["ignore", "allow"]))
    base = type("Base", (BaseModel,), {"model_config": ConfigDict(extra=extra, frozen=draw(st.booleans()))})
    fields: Any = {name: (Any, Field(default=None, alias=aliases.get(name))) for name in names}
    private: Any = {"_hidden": (Any, PrivateAttr(default=None))} if draw(st.booleans()) else {}
    cls: Any = create_model("Made", __base__=base, **fields, **private)
    given = {aliases.get(name, name): draw(_VALUES) for name in names if draw(st.booleans())}
    if extra == "allow":
        given |= {"further": draw(_VALUES)}
    instance = cls.model_validate(given)
    if private:
        instance._hidden = draw(_VALUES)
    return instance


class_instances = st.one_of(dataclass_instances(), enum_members(), model_instances())


@given(st.data(), class_instances)
@settings(max_examples=100)
def test_random_class_instances_round_trip_or_are_refused(data: st.DataObject, instance: Any) -> None:
    check_round_trip(data, instance)


@pytest.mark.thorough
@given(st.data(), class_instances)
@settings(max_examples=1000)
def test_many_random_class_instances_round_trip_or_are_refused(data: st.DataObject, instance: Any) -> None:
    check_round_trip(data, instance)


def check_round_trip(data: st.DataObject, instance: Any) -> None:
    held = data.draw(st.sampled_from([instance, [instance], {"k": instance}, (1, instance)]))
    registry = Registry()
    try:
        registry.add(type(instance))
        codec = Codec(registry=registry)
        stored = codec.encode(held)
    except InvalidArgument:
        return
    assert same(codec.decode(stored), held)
    assert canonical(held, registry) == canonical(codec.decode(stored), registry)


# The registry


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: float = 0.5


class Pair(NamedTuple):
    left: int
    right: str


class Money:
    cents: int


def test_unregistered_class_is_undecodable() -> None:
    known = Registry()
    known.add(Point)
    with pytest.raises(Undecodable, match="no class is registered"):
        Codec(registry=Registry()).decode(Codec(registry=known).encode(Point(1)))


def test_registry_refuses_unsupported_registrations() -> None:
    own = Registry()
    with pytest.raises(InvalidArgument, match="dataclass"):
        own.add(object)
    with pytest.raises(InvalidArgument, match="a class"):
        own.add("Point")  # type: ignore[type-var]  # wrong on purpose
    with pytest.raises(InvalidArgument, match="dump and load together"):
        own.add(Money, dump=lambda money: money.cents)
    own.add(Point, name="point")
    with pytest.raises(InvalidArgument, match="other than that of Point"):
        own.add(Pair, name="point")
    assert own.add(Point, name="point") is Point
    assert b"point" in Codec(registry=own).encode(Point(1))


def test_public_decorator_uses_the_process_registry() -> None:
    import agentperf_redis

    @agentperf_redis.storable
    @dataclasses.dataclass(frozen=True)
    class Finding:
        line: int
        text: str

    codec = Codec()
    assert codec.decode(codec.encode([Finding(1, "x")])) == [Finding(1, "x")]


@pytest.mark.parametrize("fields", [["x"], ["x", "y", "z"]])
def test_named_tuples_of_other_lengths_are_undecodable(fields: list[str]) -> None:
    one, other = Registry(), Registry()
    one.add(collections.namedtuple("Pair", ["x", "y"]), name="pair")  # noqa: PYI024  the fields vary
    other.add(collections.namedtuple("Pair", fields), name="pair")  # noqa: PYI024
    stored = Codec(registry=one).encode(one.of_name("pair").cls(1, 2))  # type: ignore[union-attr]
    with pytest.raises(Undecodable, match="have changed"):
        Codec(registry=other).decode(stored)
