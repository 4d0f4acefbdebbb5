"""Changes replies and bytes in one place, at random."""

from __future__ import annotations

import random
from typing import Any

_ODD: tuple[Any, ...] = (
    *(None, 0, 1, -1, -9, 2**53, 2**63 - 1, -(2**63), b"", b"x", b"nan", b"inf", b"-1", b"1e400", b"9" * 25),
    *(
        b"\xff\xfe",
        b"%zz",
        b"1_0",
        b" 1",
        b"\xd9\xa3",
        b"-",
        b"=",
        b"a=b",
        [],
        [b"x"],
        [[]],
        [None],
        1.5,
        b"\0" * 70_000,
    ),
)
_INSERTED = (b"", b"\xff", b"-", b" ", b",", b"=", b":", b"|", b"9" * 30, b"nan", b"%", b"\0", b"1e5")


def changed(reply: Any, source: random.Random) -> Any:
    """Return a copy of the reply that differs in one place."""
    if isinstance(reply, list) and reply and source.random() < 0.85:
        items = list(reply)
        at = source.randrange(len(items))
        match source.randrange(8):
            case 0:
                del items[at]
            case 1:
                items.insert(at, source.choice(_ODD))
            case 2:
                other = source.randrange(len(items))
                items[at], items[other] = items[other], items[at]
            case 3:
                return items[:at]
            case _:
                items[at] = changed(items[at], source)
        return items
    if isinstance(reply, bytes) and source.random() < 0.7:
        return changed_bytes(reply, source)
    if isinstance(reply, int) and source.random() < 0.5:
        return source.choice((reply + 1, reply - 1, -reply, reply * 2**40, reply ^ (1 << source.randrange(62))))
    return source.choice(_ODD)


def changed_bytes(data: bytes, source: random.Random) -> bytes:
    """Return a changed copy: it is cut off, or one part is replaced, removed or repeated."""
    at = source.randrange(len(data) + 1)
    length = source.choice((0, 1, 1, 2, 8, 64))
    match source.randrange(6):
        case 0:
            return data[:at]
        case 1:
            return data[at:]
        case 2:
            return data[:at] + source.randbytes(source.choice((1, 2, 9))) + data[at + length :]
        case 3:
            return data[:at] + data[at : at + length] * 2 + data[at + length :]
        case 4 if data:
            flipped = bytearray(data)
            flipped[at % len(data)] ^= 1 << source.randrange(8)
            return bytes(flipped)
        case _:
            return data[:at] + source.choice(_INSERTED) + data[at + length :]
