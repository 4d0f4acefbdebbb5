"""Access traces, generated or read from a file, and the hits of textbook caches on them. Each access is one key."""

from __future__ import annotations

import gzip
import heapq
import math
import random
from bisect import bisect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate, cycle
from itertools import count as numbers
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


def mix(count: int, keys: int, seed: int) -> list[str]:
    """Return a trace of two to four patterns, whose shares change from phase to phase.

    The patterns are stable and drifting popularity, a loop, a scan of new keys, repeated reads of recent keys, births,
    and a small pool that alternates with a large one. Some traces change the pattern at each access, others at every
    4th or 32nd access.
    """
    chance = random.Random(seed)
    patterns = [
        chance.choice(_PATTERNS)(chance, f"{at}-", max(20, int(keys * chance.uniform(0.3, 1))), count)
        for at in range(chance.randint(2, 4))
    ]
    phases = chance.choice([1, 1, 2, 3, 4, 6, 8])
    shares = [[chance.expovariate(1) + 0.05 for _ in patterns] for _ in range(phases)]
    burst = chance.choice([1, 1, 4, 32])
    trace: list[str] = []
    while len(trace) < count:
        pattern = chance.choices(patterns, shares[min(phases - 1, len(trace) * phases // count)])[0]
        trace.extend(pattern(len(trace)) for _ in range(burst))
    return trace[:count]


def _stable(chance: random.Random, name: str, keys: int, _: int) -> Callable[[int], str]:
    draw = _ranks(keys, chance.uniform(0.6, 1.2), chance)
    return lambda _: f"{name}{draw()}"


def _drifting(chance: random.Random, name: str, keys: int, count: int) -> Callable[[int], str]:
    draw, turns = _ranks(keys, chance.uniform(0.8, 1.1), chance), chance.uniform(0.3, 3)
    return lambda at: f"{name}{int(draw() + keys * turns * at / count)}"


def _looping(chance: random.Random, name: str, keys: int, _: int) -> Callable[[int], str]:
    key = cycle(range(max(5, int(keys * chance.uniform(0.01, 0.3)))))
    return lambda _: f"{name}{next(key)}"


def _scanning(_: random.Random, name: str, __: int, ___: int) -> Callable[[int], str]:
    key = numbers()
    return lambda _: f"{name}{next(key)}"


def _recent(chance: random.Random, name: str, keys: int, _: int) -> Callable[[int], str]:
    """Read a new key, or a recent key at an exponential distance from the top of a stack sorted by last access."""
    distance, new = max(5, keys * chance.uniform(0.01, 0.1)), chance.uniform(0.05, 0.3)
    stack: list[str] = []
    fresh = numbers()

    def draw(_: int) -> str:
        back = len(stack) if chance.random() < new else int(chance.expovariate(1 / distance))
        stack.append(stack.pop(-1 - back) if back < len(stack) else f"{name}{next(fresh)}")
        del stack[:-keys]
        return stack[-1]

    return draw


def _born(chance: random.Random, name: str, keys: int, _: int) -> Callable[[int], str]:
    life, gap, reads = keys * chance.uniform(0.01, 0.1), chance.randint(2, 8), numbers()
    return lambda _: f"{name}{next(reads) // gap - int(chance.expovariate(1 / life))}"


def _two_pools(chance: random.Random, name: str, keys: int, _: int) -> Callable[[int], str]:
    pools = cycle([("a", max(3, int(keys * chance.uniform(0.005, 0.05)))), ("b", keys)])

    def draw(_: int) -> str:
        pool, size = next(pools)
        return f"{name}{pool}{chance.randrange(size)}"

    return draw


_PATTERNS = (_stable, _stable, _drifting, _looping, _scanning, _recent, _recent, _born, _two_pools)


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
            if held.get(candidate) == -until:  # skips outdated heap entries
                del held[candidate]
    return hits
