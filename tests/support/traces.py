"""Access traces, generated or read from a file, and the hits of textbook caches on them. Each access is one key."""

from __future__ import annotations

import gzip
import heapq
import math
import random
from bisect import bisect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

_GZIP_MAGIC = b"\x1f\x8b"


def read_trace(path: Path) -> list[str]:
    """Read a trace: one key per line, plain or gzip. Empty lines are ignored."""
    data = path.read_bytes()
    if data.startswith(_GZIP_MAGIC):
        data = gzip.decompress(data)
    return [line for line in data.decode(errors="surrogateescape").splitlines() if line]


def zipf(count: int, keys: int, skew: float, seed: int = 1) -> list[str]:
    """Return a trace of stable popularity, like that of pages, words or prompts: key n has the frequency n^-skew."""
    draw = _ranks(keys, skew, random.Random(seed))
    return [f"z{draw()}" for _ in range(count)]


def zipf_scan_loop(count: int, keys: int, seed: int = 1) -> list[str]:
    """Return a trace of stable popularity. Some phases also contain a scan of new keys or a loop of `keys / 4` keys."""
    chance = random.Random(seed)
    draw = _ranks(keys, 0.9, chance)
    trace: list[str] = []
    scanned = looped = 0
    phase = max(1, count // 20)
    while len(trace) < count:
        match len(trace) // phase % 4:
            case 1:
                scanned += 1
                trace.append(f"s{scanned}")
            case 3:
                looped += 1
                trace.append(f"l{looped % max(1, keys // 4)}")
            case _:
                pass
        trace.append(f"z{draw()}")
    return trace[:count]


def drift(count: int, keys: int, turns: float, seed: int = 1) -> list[str]:
    """Return a trace of drifting popularity: the skew is constant, and all ranks shift by `keys * turns` in total."""
    draw = _ranks(keys, 1.0, random.Random(seed))
    return [f"d{int(draw() + keys * turns * at / count)}" for at in range(count)]


def births(count: int, life: int, seed: int = 1) -> list[str]:
    """Return a trace like news: a new key every 4 accesses. On average, a read is of the `life`-th newest key."""
    chance = random.Random(seed)
    return [f"b{at // 4 - int(chance.expovariate(1 / life))}" for at in range(count)]


def loop(count: int, keys: int) -> list[str]:
    """Return a trace that repeats the same keys in order: an LRU smaller than the loop always misses."""
    return [f"l{at % keys}" for at in range(count)]


def _ranks(keys: int, skew: float, chance: random.Random) -> Callable[[], int]:
    weights = list(accumulate(rank**-skew for rank in range(1, keys + 1)))
    return lambda: bisect(weights, chance.random() * weights[-1])


def lru_hits(trace: Sequence[str], size: int) -> int:
    """Return the hits of a textbook LRU."""
    held: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for key in trace:
        if key in held:
            hits += 1
            held.move_to_end(key)
        else:
            if len(held) >= size:
                held.popitem(last=False)
            held[key] = None
    return hits


def optimal_hits(trace: Sequence[str], size: int) -> int:
    """Return the hits of an optimal cache. It evicts the key whose next access is the latest; this may be the new key.

    Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5 (1966).
    """
    upcoming: dict[str, float] = {}
    after = [math.inf] * len(trace)
    for at in range(len(trace) - 1, -1, -1):
        after[at] = upcoming.get(trace[at], math.inf)
        upcoming[trace[at]] = at
    held: dict[str, float] = {}
    """Position of the next access of each resident key."""
    latest: list[tuple[float, str]] = []
    hits = 0
    for key, again in zip(trace, after, strict=True):
        hits += key in held
        held[key] = again
        heapq.heappush(latest, (-again, key))
        while len(held) > size:
            until, candidate = heapq.heappop(latest)
            if held.get(candidate) == -until:  # otherwise, the key has a newer heap entry
                del held[candidate]
    return hits
