"""Encodes values as bytes. A decoded value is equal to the original and has the same type.

Hostile bytes raise an error. The first byte is a letter for the form: ``m`` for plain or ``z`` for deflated. The value
follows as msgpack, so a small value is readable with redis-cli. A value of a type that msgpack does not know is encoded
in one of two ways:

- a scalar (Decimal, UUID, datetime ...) is one msgpack extension with its text or bytes;
- a container (tuple, set, dict with unusual keys, numpy array, a user class) is a msgpack list. Its first item is an
  empty extension, called the *mark*. The other items of the list are the contents of the container. They are encoded in
  place, not as separate bytes. So a nested container adds only its mark and the headers of its lists. No user value can
  forge a mark.

The codec does not use pickle, and no name in the data causes an import: user classes are looked up in an explicit
`Registry`. A value that would not decode to an equal value is refused before anything is sent.

`canonical` makes cache keys from arguments. It uses the extensions of the codec, and sorts the items of dicts and sets
by their bytes.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, Final, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import msgpack
from msgpack import ExtType, Timestamp

from agentperf_redis import arguments
from agentperf_redis.codec.storable import REGISTRY, Registry, Storable, member_state, object_state
from agentperf_redis.codec.value_path import PLACE, path_of
from agentperf_redis.errors import InvalidArgument, Undecodable, shown

MAX_DEPTH: Final = 100
"""Maximum nesting of containers when encoding and decoding. Each level takes three Python frames, and the interpreter
allows 1,000."""
MAX_BYTES: Final = 1 << 20
"""Default maximum size of a packed value, bytes.

A limit is needed: a process that unpacked ten hostile megabytes grew by 712 MB (measured).
"""
COMPRESS_ABOVE: Final = 4096
"""Packed values of at least this many bytes are deflated by default.

At this size, deflating takes 19 us and inflating takes 10 us (measured).
"""
_SKIM_ABOVE: Final = 4096
"""Packed data of more than this many bytes is checked for completeness before it is decoded.

msgpack allocates a list as long as its header claims, at most one item for each byte of the data. In hostile data, the
header of every nested list may claim this maximum. Then a small message allocates little memory, but a large message
allocates a thousand times its own size.
"""
_MAX_DIMENSIONS: Final = 64
"""Maximum dimensions of an array, as in numpy 2."""
_KEY_BUDGET: Final = 16 << 20
"""Maximum size of the arguments of a cache key, bytes."""
_ZLIB_LEVEL: Final = 1
"""Level 1 shrinks source text to 30 % at 77 MB/s; the zlib default, level 6, to 25 % at 40 MB/s (measured)."""

_PLAIN, _DEFLATED = b"m", b"z"

_ALLOWED: Final = (
    "None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, datetime, date, time, "
    "timedelta, Decimal, UUID, numpy arrays and scalars without objects, and instances of classes "
    "that are decorated with @agentperf_redis.storable"
)

# Codes of the extensions. Stored values contain these codes, so the meaning of a code never changes.
_TEXT, _BIG_INT, _BYTEARRAY, _COMPLEX, _DECIMAL, _UUID, _DATETIME, _DATE, _TIME, _TIMEDELTA = range(1, 11)
_TUPLE, _SET, _FROZENSET, _DICT, _ARRAY, _NUMPY_SCALAR, _OBJECT, _KEY_OF_OBJECT = range(32, 40)

_MARKS = {code: ExtType(code, b"") for code in range(_TUPLE, _KEY_OF_OBJECT + 1)}
_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_CONTAINERS = frozenset({list, dict})
_PLAIN_TYPES = _SCALARS | _CONTAINERS
_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1

_FOLD_SUFFIX = "~"
"""Suffix of a time with fold=1: the second of two equal clock times after the clock was set back.

ISO 8601 cannot express the fold.
"""
_DTYPE = re.compile(r"[<>|][biufcSUmM][0-9]{1,9}(\[[0-9]{0,9}[A-Za-z]{1,2}\])?")
_ZONE = re.compile(r"[A-Za-z0-9_+\-]+(/[A-Za-z0-9_+\-]+){0,3}\]")
_LARGEST_FLOAT: Final = {"f": 8, "c": 16}
"""Maximum size of a storable float or complex item, bytes. It excludes long doubles, whose layout depends on the
machine."""
_NO_HEADERS = bytes(sorted(set(range(256)) - {*range(0x80, 0xA0), *range(0xDC, 0xE0)}))
"""All bytes that do not begin a msgpack list or map."""
_PERHAPS_TIMESTAMP = re.compile(rb"[\xd6\xd7]\xff|\xc7.\xff|\xc8..\xff|\xc9....\xff", re.DOTALL)
_COMPLEX_PARTS = struct.Struct(">dd")

M = TypeVar("M", datetime, time)

_first = operator.itemgetter(0)


class Codec:
    """Turns values into bytes and back.

    Args:
        max_bytes: maximum size of a packed value before compression, in bytes. It is checked when encoding and when
            decoding.
        compress_above: packed values of at least this many bytes are compressed (deflate); None compresses no value. A
            value that would not shrink is stored uncompressed.
        registry: the accepted user classes; by default the registry of the process.
    """

    __slots__ = ("compress_above", "max_bytes", "registry")

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        compress_above: int | None = COMPRESS_ABOVE,
        registry: Registry = REGISTRY,
    ) -> None:
        self.max_bytes = arguments.count("max_bytes", max_bytes)
        self.compress_above = None if compress_above is None else arguments.count("compress_above", compress_above)
        self.registry = registry

    def encode(self, value: object) -> bytes:
        """Encode a value.

        An aware datetime keeps its instant and its UTC offset. Its zone is kept only if it is a `zoneinfo.ZoneInfo`
        with a key.

        Args:
            value: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, datetime,
                date, time, timedelta, Decimal, UUID, numpy arrays and scalars, instances of registered classes; at
                most `MAX_DEPTH` nested containers.

        Returns:
            Bytes that `decode` turns into an equal value of the same type.

        Raises:
            InvalidArgument: the value or an item in it cannot be stored, or the value is too large. The message names
                the path of the item, such as ``value['files'][3]``.
        """
        if _is_plain(value, self.max_bytes):
            try:
                packed: bytes = msgpack.packb(value)
            except (OverflowError, UnicodeEncodeError, RuntimeError):
                packed = _Shaper(self.registry, self.max_bytes).pack(value)
        else:
            packed = _Shaper(self.registry, self.max_bytes).pack(value)
        if len(packed) > self.max_bytes:
            raise InvalidArgument("value", value, f"at most {self.max_bytes} bytes when packed, not {len(packed)}")
        if self.compress_above is not None and len(packed) >= self.compress_above:
            deflated = zlib.compress(packed, _ZLIB_LEVEL)
            if len(deflated) < len(packed):
                return _DEFLATED + deflated
        return _PLAIN + packed

    def decode(self, data: bytes) -> Any:
        """Decode bytes that `encode` returned.

        Args:
            data: the bytes. They may come from any source, even a hostile one.

        Returns:
            The value.

        Raises:
            Undecodable: `encode` did not make these bytes, or they name a class that is not registered in this process.
        """
        packed = self._unwrapped(data)
        reader = _Reader(self.registry, self.max_bytes)
        try:
            _check_structure(packed)
            value = msgpack.unpackb(packed, ext_hook=reader.extension, list_hook=reader.container, strict_map_key=False)
        except Undecodable:
            raise
        except Exception as error:  # foreign bytes may cause any error
            raise Undecodable(f"{type(error).__name__}: {shown(str(error))}") from error
        if reader.open_marks:
            raise Undecodable("a mark without a container")
        if b"\xff" in packed and _PERHAPS_TIMESTAMP.search(packed) and _holds_timestamp(packed):
            raise Undecodable("extension -1 is unknown")
        return value

    def _unwrapped(self, data: bytes) -> bytes:
        if len(data) > self.max_bytes + 1:
            raise Undecodable(f"{len(data)} bytes are more than the maximum of {self.max_bytes}")
        form = data[:1]
        if form == _PLAIN:
            return data[1:]
        if form != _DEFLATED:
            raise Undecodable(f"unknown form {form!r}")
        inflater = zlib.decompressobj()
        try:
            packed = inflater.decompress(data[1:], self.max_bytes + 1)
        except zlib.error as error:
            raise Undecodable(f"zlib: {error}") from error
        if len(packed) > self.max_bytes:
            raise Undecodable(f"inflates to more than the maximum of {self.max_bytes} bytes")
        if not inflater.eof or inflater.unused_data:
            raise Undecodable("deflated data is truncated or has trailing bytes")
        return packed


def canonical(value: object, registry: Registry = REGISTRY) -> bytes:
    """Encode arguments as a cache key: equal arguments of equal types have equal bytes.

    The order of the items of dicts and sets does not matter. Types matter: 1, 1.0, True and "1" have different keys,
    and so do a list and a tuple. The bytes are the same in every process and on every machine. Enum members, and
    dataclasses that compare by their fields, need no registration, because a key is never decoded. All attributes of a
    dataclass are part of its key, including fields with ``compare=False``. Any class may define the identity of its
    instances with a method ``__cache_key__()``.

    Args:
        value: as for `Codec.encode`.
        registry: the accepted user classes.

    Returns:
        The key as bytes; hash it if it may be long.

    Raises:
        InvalidArgument: an item cannot be part of a key. An example is an object that equals only itself and whose
            class is not registered.
    """
    return _Shaper(registry, _KEY_BUDGET, canonical=True).pack(value)


def _is_plain(value: object, budget: int) -> bool:
    """Return whether msgpack alone can encode the value and decode an equal value of the same types.

    It checks one level of nesting at a time, because the check of a level runs at C speed. A value that is too deep or
    larger than the budget is not plain; `_Shaper` then raises the error.
    """
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind not in _CONTAINERS:
        return False
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for container in level:
            items: Iterable[Any] = container
            if type(container) is dict:
                if not _SCALARS.issuperset(map(type, container)):
                    return False
                items = container.values()
            kinds = set(map(type, items))
            if kinds <= _SCALARS:
                continue
            if not kinds <= _PLAIN_TYPES:
                return False
            below += [item for item in items if type(item) in _CONTAINERS]
            if len(below) > budget:
                return False
        if not below:
            return True
        level = below
    return False


class _Shaper:
    """Turns one value into the input of msgpack, with extensions and marks."""

    __slots__ = ("_budget", "_canonical", "_max_bytes", "_registry", "_whole")

    def __init__(self, registry: Registry, budget: int, *, canonical: bool = False) -> None:
        self._registry = registry
        self._budget = self._max_bytes = budget
        self._canonical = canonical

    def pack(self, value: object) -> bytes:
        self._whole = value
        try:
            packed: bytes = msgpack.packb(self.shape(value, 0))
        except InvalidArgument as error:
            path = path_of(error.value, value)
            if path == error.argument:
                raise
            raise InvalidArgument(error.argument, error.value, f"{error.allowed}{PLACE}{path}") from None
        except MemoryError:
            raise
        except Exception as error:
            # There are three possible causes: (1) the stack was nearly full before this call; (2) another thread
            # changed the value during this call; (3) code of the user, such as a tzinfo or a property, raised an error.
            allowed = f"a value that can be traversed; this raised {type(error).__name__}: {shown(str(error))}"
            raise InvalidArgument("value", value, allowed) from error
        return packed

    def shape(self, value: Any, depth: int) -> Any:
        self._budget -= 1
        if self._budget < 0:
            raise InvalidArgument("value", self._whole, "a value with fewer items")
        kind = type(value)
        shaper = _SHAPERS.get(kind)
        if shaper is not None:
            return shaper(value)
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidArgument("value", self._whole, f"at most {MAX_DEPTH} nested containers")
        if kind is list:
            return [self.shape(item, depth) for item in value]
        if kind is tuple:
            return [_MARKS[_TUPLE], *[self.shape(item, depth) for item in value]]
        if kind is dict:
            return self._dict(value, depth)
        if kind is set or kind is frozenset:
            return self._set(value, depth)
        return self._object(value, kind, depth)

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        texts = all(type(key) is str for key in value)
        if texts and not self._canonical and all(map(arguments.encodable, value)):
            return {key: self.shape(item, depth) for key, item in value.items()}
        items = sorted(value.items(), key=_first) if texts and self._canonical else value.items()
        pairs = [(self.shape(key, depth), self.shape(item, depth)) for key, item in items]
        if self._canonical and not texts:
            pairs.sort(key=lambda pair: msgpack.packb(pair[0]))
        return [_MARKS[_DICT], *[part for pair in pairs for part in pair]]

    def _set(self, value: set[Any] | frozenset[Any], depth: int) -> Any:
        items = [self.shape(item, depth) for item in value]
        if self._canonical:
            items.sort(key=msgpack.packb)
        return [_MARKS[_SET if type(value) is set else _FROZENSET], *items]

    def _object(self, value: Any, kind: type, depth: int) -> Any:
        storable = self._registry.of_class(kind)
        if storable is not None:
            return [_MARKS[_OBJECT], storable.name, self.shape(_dumped(value, storable), depth)]
        if kind.__module__ == "numpy":
            shaped = _shape_numpy(value, kind, self._max_bytes)
            if depth == MAX_DEPTH and shaped[0] == _MARKS[_ARRAY]:  # an array's shape is one more nested container
                raise InvalidArgument("value", self._whole, f"at most {MAX_DEPTH} nested containers")
            return shaped
        if self._canonical and (identity := _identity_of(value, kind)) is not None:
            return [_MARKS[_KEY_OF_OBJECT], f"{kind.__module__}.{kind.__qualname__}", self.shape(identity[0], depth)]
        raise InvalidArgument("value", value, f"{_ALLOWED}; not {kind.__module__}.{kind.__qualname__}")


def _dumped(value: Any, storable: Storable) -> Any:
    """Call `dump` of a user class. Convert any error that it raises to InvalidArgument."""
    try:
        state = storable.dump(value)
    except InvalidArgument:
        raise
    except Exception as error:
        allowed = f"an instance that can be dumped; its dump raised {type(error).__name__}: {shown(str(error))}"
        raise InvalidArgument("value", value, allowed) from error
    if inspect.isawaitable(state):
        arguments.close_coroutine(state)
        raise InvalidArgument("value", value, "an instance whose dump is a blocking function")
    return state


def _identity_of(value: Any, kind: type) -> tuple[Any] | None:
    """Return a 1-tuple with the identity that an object has in a cache key; None if the object equals only itself."""
    if hasattr(kind, "__cache_key__"):
        identity = value.__cache_key__()
        if inspect.isawaitable(identity):
            arguments.close_coroutine(identity)
            raise InvalidArgument("value", value, "an object whose __cache_key__() is a blocking method")
        return (identity,)
    if isinstance(value, Enum):
        return (member_state(value),)
    if dataclasses.is_dataclass(kind) and kind.__eq__ is not object.__eq__:
        return (object_state(value),)
    return None


def _shape_text(value: str) -> str | ExtType:
    return value if arguments.encodable(value) else ExtType(_TEXT, value.encode("utf-8", "surrogatepass"))


def _shape_int(value: int) -> int | ExtType:
    if _MIN_INT <= value <= _MAX_INT:
        return value
    return ExtType(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _shape_datetime(value: datetime | time) -> ExtType:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise InvalidArgument("value", value, "a time whose zone knows its offset")
    text = value.isoformat() + _FOLD_SUFFIX * value.fold + _zone_suffix(value)
    return ExtType(_DATETIME if isinstance(value, datetime) else _TIME, text.encode())


def _zone_suffix(value: datetime | time) -> str:
    """Return the suffix for the zone of a time: ``[Europe/Berlin]``; empty if the offset suffices.

    When clocks change, an hour is repeated or skipped. A time within this hour is unequal to every time of another zone
    (PEP 495), so the offset alone would not restore an equal time.
    """
    zone = value.tzinfo
    if type(zone) is ZoneInfo and zone.key is not None:
        return f"[{zone.key}]"
    if isinstance(value, datetime) and zone is not None and not isinstance(zone, timezone):
        other = value.replace(fold=not value.fold)
        if other.utcoffset() != value.utcoffset():
            allowed = "a time that its clock shows once, or a time with a zoneinfo.ZoneInfo that has a key"
            raise InvalidArgument("value", value, allowed)
    return ""


def _shape_timedelta(value: timedelta) -> ExtType:
    return ExtType(_TIMEDELTA, f"{value.days}:{value.seconds}:{value.microseconds}".encode())


def _unchanged(value: Any) -> Any:
    return value


_SHAPERS: Final[dict[type, Callable[[Any], Any]]] = {
    type(None): _unchanged,
    bool: _unchanged,
    float: _unchanged,
    bytes: _unchanged,
    int: _shape_int,
    str: _shape_text,
    bytearray: lambda value: ExtType(_BYTEARRAY, bytes(value)),
    complex: lambda value: ExtType(_COMPLEX, _COMPLEX_PARTS.pack(value.real, value.imag)),
    Decimal: lambda value: ExtType(_DECIMAL, str(value).encode()),
    UUID: lambda value: ExtType(_UUID, value.bytes),
    datetime: _shape_datetime,
    date: lambda value: ExtType(_DATE, value.isoformat().encode()),
    time: _shape_datetime,
    timedelta: _shape_timedelta,
}


def _shape_numpy(value: Any, kind: type, max_bytes: int) -> Any:
    """Convert a numpy array or scalar for msgpack. Such a value exists only if numpy is imported."""
    numpy: Any = sys.modules["numpy"]
    if kind is not numpy.ndarray and not isinstance(value, numpy.generic):
        raise InvalidArgument("value", value, f"{_ALLOWED}; not numpy.{kind.__qualname__}")
    dtype = value.dtype
    if not _is_storable_dtype(dtype):
        raise InvalidArgument("value", value, f"numpy values of plain numbers, times or text; not of dtype {dtype}")
    if kind is not numpy.ndarray and kind is not numpy.dtype(dtype.str).type:
        allowed = f"numpy scalars that their dtype restores: {dtype.str} is {numpy.dtype(dtype.str).type.__name__}"
        raise InvalidArgument("value", value, allowed)
    if dtype.itemsize > max_bytes or max(value.shape, default=0) > max_bytes:
        raise InvalidArgument("value", value, f"an array whose item size and lengths are at most {max_bytes}")
    if kind is numpy.ndarray:
        return [_MARKS[_ARRAY], dtype.str, list(value.shape), value.tobytes()]
    return [_MARKS[_NUMPY_SCALAR], dtype.str, value.tobytes()]


def _is_storable_dtype(dtype: Any) -> bool:
    return (
        not dtype.hasobject
        and _DTYPE.fullmatch(dtype.str) is not None
        and 0 < dtype.itemsize <= _LARGEST_FLOAT.get(dtype.kind, dtype.itemsize)
    )


class _Mark:
    """A mark that was decoded: the first item of a container (see the top of this module)."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class _Reader:
    """The callbacks that msgpack calls while it decodes one value."""

    __slots__ = ("_max_bytes", "_registry", "open_marks")

    def __init__(self, registry: Registry, max_bytes: int) -> None:
        self._registry = registry
        self._max_bytes = max_bytes
        self.open_marks = 0
        """Number of decoded marks that have not yet been found at the start of a list. A mark that is left at the end
        was forged."""

    def extension(self, code: int, data: bytes) -> Any:
        load = _LOADERS.get(code)
        if load is not None:
            return load(data)
        if code not in _MARKS or code == _KEY_OF_OBJECT or data:
            raise Undecodable(f"extension {code} is unknown")
        self.open_marks += 1
        return _Mark(code)

    def container(self, items: list[Any]) -> Any:
        if not items or type(items[0]) is not _Mark:
            return items
        self.open_marks -= 1
        code = items.pop(0).code
        if code == _TUPLE:
            return tuple(items)
        if code == _SET:
            return set(items)
        if code == _FROZENSET:
            return frozenset(items)
        if code == _DICT:
            return dict(zip(items[::2], items[1::2], strict=True))
        if code == _OBJECT:
            name, state = items
            storable = self._registry.of_name(name)
            if storable is None:
                raise Undecodable(f"no class is registered as {shown(name)}")
            return storable.load(state)
        if code == _ARRAY:
            dtype, shape, data = items
            return _load_array(dtype, shape, data, self._max_bytes)
        dtype, data = items
        return _load_scalar(dtype, data, self._max_bytes)


def _load_int(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _load_datetime(kind: type[M], data: bytes) -> M:
    text, _, zone = data.decode().partition("[")
    parsed = kind.fromisoformat(text.removesuffix(_FOLD_SUFFIX))
    if text.endswith(_FOLD_SUFFIX):
        parsed = parsed.replace(fold=1)
    if not zone:
        return parsed
    if not _ZONE.fullmatch(zone):
        raise Undecodable(f"{shown(zone)} is not the name of a zone")
    local = parsed.replace(tzinfo=ZoneInfo(zone[:-1]))
    if local.utcoffset() != parsed.utcoffset():
        raise Undecodable(f"the zone {shown(zone)} has another offset here than where it was stored")
    return local


def _load_timedelta(data: bytes) -> timedelta:
    days, seconds, microseconds = map(int, data.split(b":"))
    return timedelta(days, seconds, microseconds)


_LOADERS: Final[dict[int, Callable[[bytes], Any]]] = {
    _TEXT: lambda data: data.decode("utf-8", "surrogatepass"),
    _BIG_INT: _load_int,
    _BYTEARRAY: bytearray,
    _COMPLEX: lambda data: complex(*_COMPLEX_PARTS.unpack(data)),
    _DECIMAL: lambda data: Decimal(data.decode()),
    _UUID: lambda data: UUID(bytes=data),
    _DATETIME: lambda data: _load_datetime(datetime, data),
    _DATE: lambda data: date.fromisoformat(data.decode()),
    _TIME: lambda data: _load_datetime(time, data),
    _TIMEDELTA: _load_timedelta,
}


def _load_array(dtype_text: Any, shape: Any, data: Any, max_bytes: int) -> Any:
    """Rebuild an array. The array owns its memory. numpy is imported only when a stored value needs it."""
    if (
        not (isinstance(dtype_text, str) and _DTYPE.fullmatch(dtype_text))
        or not isinstance(data, bytes)
        or not isinstance(shape, list)
    ):
        raise Undecodable("not a stored numpy array")
    import numpy as np

    dtype = np.dtype(dtype_text)
    if not _is_storable_dtype(dtype) or dtype.itemsize > max_bytes:
        raise Undecodable(f"dtype {dtype_text} is not storable")
    # First check that each length is an int. With a list among the lengths, `math.prod` could create a very long list.
    if len(shape) > _MAX_DIMENSIONS or not all(type(length) is int and 0 <= length <= max_bytes for length in shape):
        raise Undecodable(f"{shown(shape)} is not the shape of an array")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise Undecodable("the bytes do not fill the shape of the array")
    return np.ndarray(tuple(shape), dtype, buffer=data).copy() if data else np.empty(tuple(shape), dtype)


def _load_scalar(dtype_text: Any, data: Any, max_bytes: int) -> Any:
    array = _load_array(dtype_text, [], data, max_bytes)
    # NumPy drops the trailing NULs of an item that is read from an array. A scalar must keep its trailing NULs.
    if array.dtype.kind == "S":
        return array.dtype.type(data)
    if array.dtype.kind == "U":
        order = "be" if array.dtype.byteorder == ">" else "le"
        return array.dtype.type(data.decode(f"utf-32-{order}", "surrogatepass"))
    return array[()]


def _check_structure(packed: bytes) -> None:
    """Check that the data is not cut off and not nested too deeply, before any object is made from it.

    Raises:
        Undecodable: the data is cut off or nested too deeply.
    """
    if len(packed) > _SKIM_ABOVE:
        skimmer = msgpack.Unpacker(max_buffer_size=len(packed))
        skimmer.feed(packed)
        try:
            skimmer.skip()
        except msgpack.OutOfData:
            raise Undecodable("the data is cut off, or a length in it is wrong") from None
    if len(packed.translate(None, _NO_HEADERS)) > MAX_DEPTH:  # MAX_DEPTH containers or fewer cannot nest too deeply
        depth = sum(any(type(item) in _UNPACKED_CONTAINERS for item in level) for level in _levels(packed))
        if depth > MAX_DEPTH:
            raise Undecodable(f"more than {MAX_DEPTH} nested containers")


_UNPACKED_CONTAINERS = frozenset({tuple, dict})


def _levels(packed: bytes) -> Iterator[list[Any]]:
    """Unpack data without its extensions. Yields the outermost value, the items in it, the items in these, and so on.

    Raises:
        TypeError: the data has a dict as the key of another dict, so it cannot be decoded.
    """
    level: list[Any] = [msgpack.unpackb(packed, use_list=False, strict_map_key=False)]
    while level:
        yield level
        below: list[Any] = []
        for item in level:
            if type(item) is tuple:
                below += item
            elif type(item) is dict:
                below += [*item, *item.values()]
        level = below


def _holds_timestamp(packed: bytes) -> bool:
    """Return whether the bytes contain a timestamp, which msgpack decodes without calling the extension hook."""
    try:
        return any(type(item) is Timestamp for level in _levels(packed) for item in level)
    except TypeError:
        return True
