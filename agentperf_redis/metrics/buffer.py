"""What a process has recorded and the server has not confirmed yet. No I/O here.

The way of a sample: `Buffer.record` appends it to the open `Cell` of its series (a list, under a lock, nothing else).
Every ten seconds of server time the open cells roll over into the next step, so that a sample held back by an outage
still lands in the slice it belongs to. `Buffer.close_open_cells` adds samples up into counts, `Buffer.parcels` packs
the cells of each shard into a `Parcel` with the next number of that shard. A parcel never changes until it is settled;
what is recorded meanwhile waits for the next one. So a parcel can be sent any number of times, and counts once.

What is bounded: series (`SERIES_MOST`, then ``__other__``), raw samples of a cell (`RAW_MOST`, the rest is counted
only), cells (steps become coarser as they age beyond the life of the finer slices, and when there are too many).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from heapq import nlargest
from typing import NamedTuple

from agentperf_redis import arguments, keys
from agentperf_redis.metrics.histogram import ZERO, bucket_index
from agentperf_redis.metrics.model import OTHER

STEP_S = 10
"""Width of the finest slice."""
SERIES_MOST = 4000
"""Series one process holds apart; 2000 agents are what the server takes, spans come on top."""
RAW_MOST = 1000
"""Raw samples kept of a cell, and of a series on the server."""
RAW_REFILL_PER_S = 50.0
"""Raw samples a second that a busy series may send on after its first 1000: a sample of now, and no flood."""
SLOW_MOST = 50
"""Slowest samples that are sent on whatever the refill allows."""
CELLS_MOST = 20_000
"""About 100 MB of counts in an outage of days; then steps become coarser early."""
COUNTS_MOST = 2000
"""Counters of a cell: 720 buckets at most, and error types; what goes beyond is ``__other__``."""
PARCEL_CELLS = 32
"""Cells of one script call: about 3 ms of the server's time."""
WRITER_KEEP_S = 3600.0
"""How long the server remembers the number of a writer's last parcel."""
_UNCERTAIN_S = WRITER_KEEP_S - 60.0

COARSER = {10: 60, 60: 3600, 3600: 86_400, 86_400: 86_400}
"""The next wider slice."""

OK = "ok"
FAILED = "err"
CANCELLED = "cancelled"
MODEL = "mdl:"
_OTHER_ERROR = f"{FAILED}:{OTHER}"


class Series(NamedTuple):
    """A line of counts: an agent, a span of it, a measure of it."""

    shard: int
    name: str
    """Percent-encoded, see `keys.metrics_series`."""


class Part(NamedTuple):
    """A span of an agent by its path, or a further measure such as ``ttft``: recorded under its own name."""

    agent: str
    path: tuple[str, ...] = ()
    measure: str = ""


@lru_cache(maxsize=1024)
def _bucket_field(bucket: int | str) -> str:
    return f"h:{bucket}"


@lru_cache(maxsize=4096)
def _fields_of_outcome(outcome: str) -> tuple[str, ...]:
    if outcome.startswith(FAILED + ":"):
        return FAILED, outcome
    return (outcome,)


class Cell:
    """What one series got in one step."""

    __slots__ = ("counts", "fresh", "max_us", "min_us", "newest", "oldest", "raw", "raw_dropped")

    def __init__(self, now: float) -> None:
        self.fresh: list[tuple[float, int, str]] = []
        """Samples not yet added up."""
        self.counts: Counter[str] = Counter()
        self.min_us: int | None = None
        self.max_us = 0
        self.oldest = now
        self.newest = now
        self.raw: list[tuple[float, int, str]] = []
        self.raw_dropped = 0

    def fold(self) -> None:
        """Add up the fresh samples."""
        fresh = self.fresh
        if not fresh:
            return
        self.fresh = []
        times = [us for _, us, _ in fresh]
        counts = self.counts
        counts["n"] += len(times)
        least, most = min(times), max(times)
        self.min_us = least if self.min_us is None else min(self.min_us, least)
        self.max_us = max(self.max_us, most)
        for outcome, count in Counter([outcome for _, _, outcome in fresh]).items():
            for name in _fields_of_outcome(outcome):
                counts[name if name in counts or len(counts) < COUNTS_MOST else _OTHER_ERROR] += count
        counts["sum_us"] += sum(times)
        for bucket, count in Counter([bucket_index(us) if us else ZERO for us in times]).items():
            counts[_bucket_field(bucket)] += count
        self.newest = max(self.newest, fresh[-1][0])
        self._keep(fresh)

    def merge(self, other: Cell) -> None:
        """Take another cell in. Both folded."""
        self.counts.update(other.counts)
        if other.min_us is not None:
            self.min_us = other.min_us if self.min_us is None else min(self.min_us, other.min_us)
        self.max_us = max(self.max_us, other.max_us)
        self.oldest = min(self.oldest, other.oldest)
        self.newest = max(self.newest, other.newest)
        self.raw_dropped += other.raw_dropped
        self._keep(other.raw)

    def add(self, counts: Mapping[str, int]) -> None:
        """Add to further counters."""
        own = self.counts
        for name, value in counts.items():
            if name not in own and len(own) >= COUNTS_MOST and name.startswith(MODEL):
                name = MODEL + OTHER + name[name.rindex(":") :]  # noqa: PLW2901  counted there instead
            own[name] += value

    def _keep(self, samples: Iterable[tuple[float, int, str]]) -> None:
        self.raw.extend(samples)
        self.thin(RAW_MOST)

    def thin(self, allowed: int) -> None:
        """Keep the newest raw samples, as many as allowed, and the slowest."""
        excess = len(self.raw) - allowed
        if excess <= 0:
            return
        early = self.raw[:excess]
        slowest = nlargest(SLOW_MOST, early, key=lambda sample: sample[1]) if allowed < RAW_MOST else []
        self.raw = slowest + self.raw[excess:]
        self.raw_dropped += excess - len(slowest)


class PackedCell(NamedTuple):
    """A cell on its way: the series it belongs to, and the width in s of the slice it must stay within."""

    series: Series
    width_s: int
    cell: Cell


@dataclass(slots=True)
class Parcel:
    """The cells of one shard that travel, and count, together."""

    shard: int
    writer: str
    seq: int
    cells: list[PackedCell]
    first_sent: float | None = None
    """When an attempt was first made whose outcome is unknown."""

    @property
    def samples(self) -> int:
        """Executions in it."""
        return sum(packed.cell.counts["n"] for packed in self.cells)


@dataclass(slots=True)
class _Shard:
    writer: str
    seq: int = 0
    waiting: dict[tuple[str, int, int], PackedCell] = field(default_factory=dict)
    """By series, step and width."""
    parcel: Parcel | None = None


def _no_wider(limit: int, _step: int, width: int) -> bool:
    return width <= limit


class Buffer:
    """The samples of one process.

    Args:
        on_first: called when something was recorded after a time of nothing; quick, on the recording thread.
        clock: seconds that never go back.
    """

    def __init__(self, *, on_first: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_first = on_first
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Begin empty, as another writer: at first, and in a forked child, where the parent flushes its own."""
        self.writer = uuid.uuid4().hex[:12]
        # Reentrant, since a signal handler or a collected generator may record while this very thread records.
        self._lock = threading.RLock()
        self._cells: dict[str | Part, Cell] = {}
        self._series: dict[str | Part, Series] = {}
        self._rolled: list[tuple[int, dict[str | Part, Cell]]] = []
        self._offset = time.time() - self._clock()  # until the server told its time
        self._step = 0
        self._step_end = float("-inf")
        # What follows belongs to whoever packs, one at a time.
        self._packing = threading.RLock()
        self._shards: dict[int, _Shard] = {}
        self._raw_allowance: dict[Series, tuple[float, float]] = {}
        self._counted = 0
        self._dropped = 0
        self._uncertain = 0
        self._samples_dropped = 0
        self._other = 0

    # -- recording

    def record(self, agent: str | Part, us: int, outcome: str) -> None:
        """Note an execution.

        Args:
            agent: the agent, or a part of it.
            us: duration, whole microseconds.
            outcome: ``ok``, ``err``, ``err:<type>`` or ``cancelled``.
        """
        now = self._clock()
        with self._lock:
            if now >= self._step_end:
                self._roll(now)
            try:
                cell = self._cells[agent]
            except (KeyError, TypeError):
                cell = self._open(agent, now)
            fresh = cell.fresh
            fresh.append((now, us, outcome))
            if len(fresh) >= RAW_MOST:
                cell.fold()

    def record_part(self, part: str | Part, us: int, outcome: str, self_us: int) -> None:
        """Note an execution or span together with the time that was its own, us."""
        now = self._clock()
        with self._lock:
            if now >= self._step_end:
                self._roll(now)
            cell = self._cells[part] if part in self._cells else self._open(part, now)
            cell.counts["self_us"] += self_us
            cell.fresh.append((now, us, outcome))
            if len(cell.fresh) >= RAW_MOST:
                cell.fold()

    def add(self, agent: str | Part, counts: Mapping[str, int]) -> None:
        """Add to further counters of a series, such as tokens: ``tok_in``, ``mdl:<model>:tok_in``."""
        now = self._clock()
        with self._lock:
            if now >= self._step_end:
                self._roll(now)
            cell = self._cells[agent] if agent in self._cells else self._open(agent, now)
            cell.add(counts)
            cell.newest = max(cell.newest, now)

    def _roll(self, now: float) -> None:
        if self._cells:
            self._rolled.append((self._step, self._cells))
            self._cells = {}
        self._step = int((now + self._offset) // STEP_S) * STEP_S
        self._step_end = self._step + STEP_S - self._offset

    def _open(self, agent: str | Part, now: float) -> Cell:
        agent = self._known(agent)
        first = not self._cells
        cell = self._cells.get(agent)
        if cell is None:
            cell = self._cells[agent] = Cell(now)
        if first:
            self._on_first()
        return cell

    def _known(self, given: object) -> str | Part:
        """Return the series to count under: what was given, or `OTHER` when there are too many."""
        key = given if isinstance(given, Part) else arguments.name("agent_name", given)
        if key in self._series:
            return key
        if len(self._series) >= SERIES_MOST:
            key = Part(OTHER, (OTHER,)) if isinstance(key, Part) else OTHER
        part = key if isinstance(key, Part) else Part(key)
        self._series[key] = Series(keys.metrics_shard(part.agent), keys.metrics_series(*part))
        return key

    # -- packing

    def close_open_cells(self) -> None:
        """Move everything recorded so far to where it waits to be packed."""
        with self._packing:
            with self._lock:
                if self._cells:
                    self._rolled.append((self._step, self._cells))
                    self._cells = {}
                rolled, self._rolled = self._rolled, []
                series = self._series
            for step, cells in rolled:
                for agent, cell in cells.items():
                    cell.fold()
                    self._wait(PackedCell(series[agent], STEP_S, cell), step)

    def _wait(self, packed: PackedCell, step: int) -> None:
        shard = self._shards.get(packed.series.shard)
        if shard is None:
            shard = self._shards[packed.series.shard] = _Shard(self.writer)
        place = (packed.series.name, step, packed.width_s)
        known = shard.waiting.get(place)
        if known is None:
            shard.waiting[place] = packed
        else:
            known.cell.merge(packed.cell)

    def coarsen(self, lives: dict[int, float]) -> None:
        """Merge waiting cells that are older than the slices they were made for, and more when there are too many.

        Args:
            lives: for each width in s, how long such a slice lives after its end, s.
        """
        with self._packing:
            now = self._clock() + self._offset
            for shard in self._shards.values():
                self._coarsen(shard, lambda step, width: step + width + lives.get(width, 0.0) <= now)
            width = STEP_S
            while self.waiting_cells > CELLS_MOST and width < COARSER[width]:
                for shard in self._shards.values():
                    self._coarsen(shard, partial(_no_wider, width))
                width = COARSER[width]

    def _coarsen(self, shard: _Shard, due: Callable[[int, int], bool]) -> None:
        for place, packed in list(shard.waiting.items()):
            _, step, width = place
            wider = width
            while wider < COARSER[wider] and due(step // wider * wider, wider):
                wider = COARSER[wider]
            if wider != width:
                del shard.waiting[place]
                self._wait(PackedCell(packed.series, wider, packed.cell), step // wider * wider)

    @property
    def waiting_cells(self) -> int:
        """Cells that wait to be packed."""
        return sum(len(shard.waiting) for shard in self._shards.values())

    def parcels(self) -> list[Parcel]:
        """Return one parcel for each shard that has closed cells: the one under way, or else a new one."""
        with self._packing:
            now = self._clock()
            found = []
            for number, shard in self._shards.items():
                parcel = shard.parcel
                if parcel is None and shard.waiting:
                    places = list(shard.waiting)[:PARCEL_CELLS]
                    cells = [shard.waiting.pop(place) for place in places]
                    shard.seq += 1
                    parcel = shard.parcel = Parcel(number, shard.writer, shard.seq, cells)
                    for packed in cells:
                        self._ration(packed, now)
                elif parcel is not None and parcel.first_sent is not None and now - parcel.first_sent > _UNCERTAIN_S:
                    # Whether it was counted can no longer be found out. More likely not: send it as another writer.
                    self._uncertain += parcel.samples
                    shard.writer = parcel.writer = uuid.uuid4().hex[:12]
                    shard.seq = parcel.seq = 1
                    parcel.first_sent = None
                if parcel is not None:
                    found.append(parcel)
            return found

    def _ration(self, packed: PackedCell, now: float) -> None:
        """Let a series send its first 1000 raw samples, and then as many as it earns with time."""
        allowance, since = self._raw_allowance.get(packed.series, (float(RAW_MOST), now))
        allowance = min(RAW_MOST, allowance + (now - since) * RAW_REFILL_PER_S)
        cell = packed.cell
        cell.thin(int(allowance))
        self._raw_allowance[packed.series] = (max(0.0, allowance - len(cell.raw)), now)
        self._samples_dropped += cell.raw_dropped
        cell.raw_dropped = 0

    def unanswered(self, parcel: Parcel, sent: float) -> None:
        """Note that a parcel was sent and may or may not have been counted."""
        if parcel.first_sent is None:
            parcel.first_sent = sent

    def settled(self, parcel: Parcel, other: int) -> None:
        """Note that the server has counted a parcel, `other` samples of it under ``__other__``."""
        with self._packing:
            shard = self._shards.get(parcel.shard)
            if shard is not None and shard.parcel is parcel:
                shard.parcel = None
                self._counted += parcel.samples
                self._other += other

    def refused(self, parcel: Parcel, part: str) -> int:
        """Give up the series of a parcel whose key is corrupt; the server refused before it wrote anything.

        Args:
            parcel: what was sent.
            part: the corrupt key without its tag, such as ``total:research``.

        Returns:
            How many executions were given up; 0 when the key is none of a series of the parcel.
        """
        with self._packing:
            shard = self._shards.get(parcel.shard)
            kind, colon, name = part.partition(":")
            if shard is None or shard.parcel is not parcel or not colon or kind == "w":
                return 0
            name = name.rpartition(":")[2]  # a slice has its time before its name, and a name has no colon

            def concerned(series: Series) -> bool:
                if kind == "parts":
                    return series.name.startswith((name + "/", name + "#"))
                return series.name == name

            lost = sum(packed.cell.counts["n"] for packed in parcel.cells if concerned(packed.series))
            parcel.cells = [packed for packed in parcel.cells if not concerned(packed.series)]
            self._dropped += lost
            shard.seq += 1  # another content, another number: a late copy of the old one is refused
            parcel.seq = shard.seq
            if not parcel.cells:
                shard.parcel = None
            return lost

    def synchronise(self, server_s: float, at: float) -> None:
        """Learn the server's time: `server_s` at our clock's `at`. Used to cut steps where the server cuts slices."""
        with self._lock:
            self._offset = server_s - at

    # -- looking

    @property
    def empty(self) -> bool:
        """Whether everything recorded was confirmed."""
        return not self._cells and not self._rolled and not any(s.parcel or s.waiting for s in self._shards.values())

    def tallies(self) -> tuple[int, int, int, int, int, int]:
        """Return executions counted, pending, dropped, uncertain; raw samples dropped; executions under __other__."""
        with self._packing:
            self.close_open_cells()
            pending = 0
            samples_dropped = self._samples_dropped
            for shard in self._shards.values():
                waiting = [packed.cell for packed in shard.waiting.values()]
                pending += sum(cell.counts["n"] for cell in waiting)
                samples_dropped += sum(cell.raw_dropped for cell in waiting)
                if shard.parcel is not None:
                    pending += shard.parcel.samples
            return self._counted, pending, self._dropped, self._uncertain, samples_dropped, self._other
