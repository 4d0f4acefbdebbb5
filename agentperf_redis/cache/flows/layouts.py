"""Follows a cache from one layout to another while programs use it.

A layout has a number of shards and a layout number. The layout number rises with each change and is part of the tags in
the Redis keys, so no two layouts share keys. `flows.resharding` changes the layout in four steps. Each step may be
repeated or interrupted:

1. `begin`: the new number of shards is written to the settings of the cache. Programs that read the settings now wait.
2. `exchange`: each old shard is closed (fence.lua). From then on, scripts refuse to use the shard, and plain reads find
   epochs that mark it as closed. When all old shards are closed, the new shards are prepared, and the settings switch
   to the new layout. This takes milliseconds. A program that meets a closed shard waits for the switch. If no other
   process makes the switch, the program makes it. So a command that is killed half-way blocks no program.
3. The command that changes the layout moves all entries. Each program moves the entries that it uses (`pull`).
4. `settle`: the old shards, now empty, are deleted. A record that they are closed stays for a day.

Why no write is lost, and no invalidated value returns:

- A program learns a new layout only from the settings, so only after all old shards were closed. A closed shard gets no
  write. So an entry lies first in its old shard, then in both shards, then in its new shard.
- A program reads or changes a key in its new shard only after it has seen that the old shard does not have the key.
- To move an entry: mark the key in the new shard (expect.lua), read the entry in the old one, store it in the new one
  if the mark is still there (adopt.lua), remove it from the old one (forget.lua). Each write, deletion and pop in the
  new shard deletes the mark of its key. So if the mark is still there, the key was never changed in the new shard.
  Until the mark was set, the old shard had the entry; since then, a change would have deleted the mark.
- Moved entries keep their versions. Each new shard's clock starts above the clocks of all old shards. So a clear or tag
  invalidation in a new shard also covers entries that are moved there later. Invalidations in an old shard are not
  copied: the epochs and tag marks of the closed shard decide which of its entries are valid.
- Limits: a new shard has its final limits, minus the part that the old layout still uses. If a cache is nearly full, a
  sixteenth of its entries is evicted first, so that there is room for new ones.
- Compute leases are not moved. A value that is being computed at the switch is returned to its caller but not stored.

Until the move has ended, a call on a key costs a second round trip. The first call on a key that has not been moved
costs seven more round trips.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from agentperf_redis import keys as key_names
from agentperf_redis.backend import Backend
from agentperf_redis.cache import commands
from agentperf_redis.cache.arguments import chunks
from agentperf_redis.cache.commands.replies import NoSettings
from agentperf_redis.cache.model import NONE_GIVEN, Settings
from agentperf_redis.command import Batch, Flow, Pause
from agentperf_redis.errors import CorruptState
from agentperf_redis.keys import CacheKeys
from agentperf_redis.random_numbers import uniform

T = TypeVar("T")

_ATTEMPTS: Final = 100
"""Maximum attempts to move an entry. An attempt fails only if another process moves or changes the entry."""
_LOOKS: Final = 5
_LOOK_S: Final = 0.02
"""A program waits _LOOKS times, about _LOOK_S seconds each, for another program to make the switch. Then it makes the
switch itself."""
CLOSED_KEPT_MS: Final = 86_400_000
"""How long the shards of an old layout stay marked as closed."""
HEADROOM: Final = 16
"""Before the layout of a full cache changes, one of this many entries is evicted."""


def exchanged(backend: Backend, service: str, name: str) -> Flow[Settings | None]:
    """Return the settings of a cache. If its layout is being exchanged, wait for the switch, or make it."""
    own, looks = key_names.cache(backend.namespace, service, name), 0
    while True:
        stored = yield from commands.stored_settings(own)
        if not isinstance(stored, Settings):
            return None
        if not stored.target:
            return stored
        if looks == _LOOKS:
            yield from exchange(backend, service, name, stored)
        else:
            yield from Pause(_LOOK_S * uniform(0.5, 1.5))
            looks += 1


def exchange(backend: Backend, service: str, name: str, stored: Settings) -> Flow[None]:
    """Close the old layout and switch to the new one. Several processes may do so at the same time.

    Args:
        backend: the server and namespace.
        service: "cache" or "tiered".
        name: name of the cache.
        stored: the settings of the cache, which contain the new number of shards.
    """
    own = key_names.cache(backend.namespace, service, name)
    count, layout = stored.target, stored.layout
    old = key_names.cache_shards(backend.namespace, service, name, stored.shards, layout)
    new = key_names.cache_shards(backend.namespace, service, name, count, layout + 1)
    closed = yield from Batch(tuple(commands.fence(where, backend.process) for where in old))
    yield from make_room(old, stored, count)
    left = yield from Batch(tuple(commands.forget(where, ()) for where in old))
    sizes = {at: (entries, size) for at, (entries, size, _) in enumerate(left)}
    kept = [limits_in_use(sizes, at, len(old), count) for at in range(count)]
    settings = replace(stored.own, shards=count)
    clock = max(each.clock for each in closed)
    totals = continued([each.counters for each in closed], count)
    yield from Batch(tuple(commands.deploy(where, settings.of_shard(at)) for at, where in enumerate(new)))
    yield from Batch(tuple(commands.prepare(where, clock, kept[at], totals[at]) for at, where in enumerate(new)))
    after = yield from commands.relayout(own, "switch", count, layout)
    if isinstance(after, Settings) and (after.layout, after.shards) == (layout + 1, count) and after.own != settings:
        # Another process has already switched the layout, and then the limits were changed. The `deploy` above may have
        # overwritten the new limits, so deploy them again.
        yield from Batch(tuple(commands.deploy(where, after.own.of_shard(at)) for at, where in enumerate(new)))


def make_room(old: Sequence[CacheKeys], settings: Settings, count: int) -> Flow[None]:
    """Evict entries until each old shard is within `limits_allowed`, before entries move to `count` shards."""
    allowed = limits_allowed(settings, count)
    busy = list(range(len(old)))
    while busy:
        evicted = yield from Batch(tuple(commands.thin(old[at], *allowed[at]) for at in busy))
        busy = [at for at, count in zip(busy, evicted, strict=True) if count]


def limits_allowed(settings: Settings, count: int) -> list[tuple[int, int]]:
    """Return the maximum entries and bytes of each old shard before its entries move to `count` shards.

    The bytes are 0 if there is no limit.
    """
    shares = [replace(settings.own, shards=count).of_shard(at) for at in range(count)]
    split, merged = max(1, count // settings.shards), max(1, settings.shards // count)

    def part(limit: int) -> int:
        return (limit - -(-limit // HEADROOM)) * split // merged

    found = []
    for at in range(settings.shards):
        related = [shares[number] for number in related_shards(at, settings.shards, count)]
        size = min(share.max_bytes for share in related)
        found.append((max(1, part(min(sum(share.capacities) for share in related))), size and max(1, part(size))))
    return found


def related_shards(at: int, count: int, other: int) -> Sequence[int]:
    """Return which of `other` shards share keys with shard `at` of a layout with `count` shards."""
    return range(at, other, count) if other > count else (at % other,)


def limits_in_use(left: Mapping[int, tuple[int, int]], at: int, before: int, count: int) -> tuple[int, int]:
    """Return how many entries and bytes of a new shard's limits the old shards still use.

    Args:
        left: entries and bytes left in the old shards, by shard number: at least in those that share keys with the new
            shard.
        at: number of the new shard.
        before: number of old shards.
        count: number of new shards.
    """
    parts = max(1, count // before)
    sources = [left[number] for number in related_shards(at, count, before)]
    return -(-sum(entries for entries, _ in sources) // parts), -(-sum(size for _, size in sources) // parts)


def release_limits(new: Sequence[CacheKeys], old: Sequence[CacheKeys], numbers: Iterable[int]) -> Flow[None]:
    """Let the new shards with these numbers use the parts of their limits that the old shards have freed."""
    concerned = list(numbers)
    sources = sorted({number for at in concerned for number in related_shards(at, len(new), len(old))})
    left = yield from Batch(tuple(commands.forget(old[number], ()) for number in sources))
    sizes = {number: (entries, size) for number, (entries, size, _) in zip(sources, left, strict=True)}
    kept = [limits_in_use(sizes, at, len(old), len(new)) for at in concerned]
    yield from Batch(tuple(commands.lower(new[at], its) for at, its in zip(concerned, kept, strict=True)))


def continued(counters: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Divide the counters of the old shards among `count` new shards. Their sums stay the same."""
    found = []
    for at in range(count):
        sources = [each for number, each in enumerate(counters) if number % count == at]
        found.append(tuple(map(sum, zip(*sources, strict=True))) if sources else (0,) * len(counters[0]))
    return found


def pull(settings: Settings, new: Sequence[CacheKeys], old: Sequence[CacheKeys], names: Iterable[str]) -> Flow[None]:
    """Move entries to the new layout. Afterwards no old shard has any of the keys, and none will ever have one again.

    Args:
        settings: the settings of the cache.
        new: the shards of the new layout.
        old: the shards of the old layout, which are closed.
        names: stored names of the keys.
    """
    left = list(dict.fromkeys(names))
    for _ in range(_ATTEMPTS):
        there = yield from Batch(tuple(commands.present(place(old, name), name) for name in left))
        left = [name for name, is_there in zip(left, there, strict=True) if is_there]
        if not left:
            return
        yield from move(settings, new, old, left)
        yield from release_limits(new, old, {key_names.cache_shard(name, len(new)) for name in left})
    raise CorruptState(place(old, left[0]).meta, "an entry that cannot be moved to the new layout")


def move(settings: Settings, new: Sequence[CacheKeys], old: Sequence[CacheKeys], names: Sequence[str]) -> Flow[None]:
    """Try once to move entries. `pull` explains the arguments."""
    marks: dict[str, int] = {}
    groups = _grouped(new, names)
    marked = yield from Batch(tuple(commands.expect(where, chunk) for where, chunk in groups))
    for (where, chunk), its in zip(groups, marked, strict=True):
        if isinstance(its, NoSettings):  # the server has lost the shard, or the move has just ended
            yield from _prepare_again(settings, new, where)
            return
        marks.update(zip(chunk, its, strict=True))
    groups = _grouped(old, names)
    found: dict[str, commands.Exported] = {}
    for (_, chunk), its_entries in zip(
        groups, (yield from Batch(tuple(commands.export(where, chunk) for where, chunk in groups))), strict=True
    ):
        found.update({name: each for name, each in zip(chunk, its_entries, strict=True) if each is not None})
    gone = [name for name in names if name not in found]
    groups = _grouped(new, list(found))
    adopted = yield from Batch(
        tuple(commands.adopt(where, [(each, marks[each], found[each]) for each in chunk]) for where, chunk in groups)
    )
    for (where, chunk), done in zip(groups, adopted, strict=True):
        if isinstance(done, NoSettings):
            yield from _prepare_again(settings, new, where)
        else:
            gone += [name for name, is_done in zip(chunk, done, strict=True) if is_done]
    yield from Batch(tuple(commands.forget(where, chunk) for where, chunk in _grouped(old, gone)))


def place(shards: Sequence[CacheKeys], name: str) -> CacheKeys:
    """Return the keys of the shard of a stored name."""
    return shards[key_names.cache_shard(name, len(shards))]


def _grouped(shards: Sequence[CacheKeys], names: Sequence[str]) -> list[tuple[CacheKeys, list[str]]]:
    of: dict[CacheKeys, list[str]] = {}
    for name in names:
        of.setdefault(place(shards, name), []).append(name)
    return [(where, chunk) for where, its in of.items() for chunk in chunks(its)]


def _prepare_again(settings: Settings, new: Sequence[CacheKeys], where: CacheKeys) -> Flow[None]:
    """Prepare a shard that has lost its data. If no more entries move to the shard, it stays unchanged."""
    share = replace(settings.own, shards=len(new)).of_shard(list(new).index(where))
    yield from commands.deploy(where, share, NONE_GIVEN)  # keeps limits that another process has set
    yield from commands.prepare(where, 0, (0, 0), (0,) * len(commands.COUNTERS))
