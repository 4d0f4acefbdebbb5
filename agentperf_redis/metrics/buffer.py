"""What a process has recorded and the server has not confirmed yet. No I/O here.

The way of a sample: `Buffer.record` puts it at the end of the lane of its series, a plain list, without a lock.
`Buffer.fold` takes what the lanes hold and adds it up in a `Cell` for each series and each ten seconds of server time,
so that a sample held back by an outage still lands in the slice it belongs to. `Buffer.parcels` packs the cells of each
shard into a `Parcel` with the next number of that shard. A parcel never changes until it is settled; what is recorded
meanwhile waits for the next one. So a parcel can be sent any number of times, and counts once.

What is bounded: series (`SERIES_MOST`, then ``__other__``), samples in a lane (`LANE_MOST`, then the recording thread
folds), raw samples of a cell (`RAW_MOST`, the rest is counted only), cells (they become coarser as they age beyond the
life of the finer slices, and when there are too many).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from agentperf_redis import arguments, keys
from agentperf_redis.metrics.accumulator import ITEMS, RAW_MOST, Cell, Part, Samples, Series
from agentperf_redis.metrics.model import OTHER

STEP_S = 10
"""Width of the finest slice."""
SERIES_MOST = 4000
"""Series one process holds apart; 2000 agents are what the server takes, spans come on top."""
RAW_REFILL_PER_S = 50.0
"""Raw samples a second that a busy series may send on after its first 1000: a sample of now, and no flood."""
CELLS_MOST = 20_000
"""About 1.6 kB each with 60 different durations, so 32 MB in an outage of days; then steps become coarser early."""
RAW_WAITING_MOST = 100_000
"""Raw samples that wait through an outage, 13 MB; the newest stay."""
LANE_MOST = 1000
"""Samples of a series that are not added up yet; the next second's flush does it, or else the thread that records."""
_LANE_ITEMS_MOST = LANE_MOST * ITEMS
PARCEL_CELLS = 32
"""Cells of one script call: about 3 ms of the server's time."""
PARCEL_SAMPLES = 2000
"""Raw samples after which a parcel is full: about as much again."""
WRITER_KEEP_S = 3600.0
"""How long the server remembers the number of a writer's last parcel."""
_UNCERTAIN_S = WRITER_KEEP_S - 60.0

COARSER = {10: 60, 60: 3600, 3600: 86_400, 86_400: 86_400}
"""The next wider slice."""


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
        self._lanes: dict[str | Part, Samples] = {}
        self.reset()

    def reset(self) -> None:
        """Begin empty, as another writer: at first, and in a forked child, where the parent flushes its own."""
        self.writer = uuid.uuid4().hex[:12]
        self._lanes.clear()
        self._series: dict[str | Part, Series] = {}
        self._room = 0
        """Items of a lane at which who records has more to do: fold it, or with 0, announce that there is something."""
        self._offset = time.time() - self._clock()  # until the server told its time
        self._synchronised = False
        # Reentrant, since a signal handler or a collected generator may record while this very thread folds.
        self._lock = threading.RLock()
        self._folding = False
        self._shards: dict[int, _Shard] = {}
        self._raw_allowance: dict[Series, tuple[float, float]] = {}
        self._counted = 0
        self._dropped = 0
        self._uncertain = 0
        self._samples_dropped = 0
        self._other = 0

    # -- recording

    def record(self, agent: str | Part, seconds: float, outcome: str, own: float = 0.0) -> None:
        """Note an execution. Needs no lock: extending a list is one step, and a fold leaves what comes after it.

        Args:
            agent: the agent, or a part of it.
            seconds: its duration.
            outcome: ``ok``, ``err``, ``err:<type>`` or ``cancelled``.
            own: of a span, how much of it was its own, s.
        """
        try:
            lane = self._lanes[agent]
        except (KeyError, TypeError):
            lane = self._lane(agent)
        lane += (self._clock(), seconds, outcome, own)
        if len(lane) >= self._room:
            self._look_up(lane)

    def add(self, agent: str | Part, counts: Mapping[str, int]) -> None:
        """Add to further counters of a series, such as tokens: ``tok_in``, ``mdl:<model>:tok_in``."""
        now = self._clock()
        with self._lock:
            self._cell(self._known(agent), now).add(counts)
        self._look_up([])

    def _look_up(self, lane: Samples) -> None:
        """Do what is due now and then, after something was recorded."""
        if not self._room:
            self._room = _LANE_ITEMS_MOST
            self._on_first()
        if len(lane) >= _LANE_ITEMS_MOST:
            self.fold()

    def _lane(self, given: object) -> Samples:
        with self._lock:
            return self._lanes.setdefault(self._known(given), [])

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

    def announce_next(self) -> None:
        """Call `on_first` again for what is recorded from now on."""
        self._room = 0

    def fold(self) -> None:
        """Add up everything recorded so far, to wait for being packed."""
        with self._lock:
            if self._folding:  # by a record made within, see __init__
                return
            self._folding = True
            try:
                for key, lane in list(self._lanes.items()):
                    if lane:
                        self._fold(key, lane)
            finally:
                self._folding = False

    def _fold(self, key: str | Part, lane: Samples) -> None:
        samples = lane[:]
        del lane[: len(samples)]  # others may have appended since
        while samples:
            step = self._step(samples[0])
            end = len(samples)
            if self._step(samples[-ITEMS]) != step:
                ends = range(0, end, ITEMS)
                end = next((at for at in ends if self._step(samples[at]) != step), end)
            self._cell(key, samples[0]).fold(samples[:end] if end < len(samples) else samples)
            del samples[:end]

    def _step(self, when: float) -> int:
        return int((when + self._offset) // STEP_S) * STEP_S

    def _cell(self, key: str | Part, when: float) -> Cell:
        """Return the waiting cell of a series for a moment."""
        series = self._series[key]
        shard = self._shards.get(series.shard)
        if shard is None:
            shard = self._shards[series.shard] = _Shard(self.writer)
        place = (series.name, self._step(when), STEP_S)
        packed = shard.waiting.get(place)
        if packed is None:
            packed = shard.waiting[place] = PackedCell(series, STEP_S, Cell(when))
        else:
            packed.cell.newest = max(packed.cell.newest, when)
        return packed.cell

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
        """Hold what waits within bounds: for when it could not be sent.

        Cells that are older than the slices they were made for are merged, and more when there are too many. Of raw
        samples, the newest of each series are kept, as many as the server would keep, and the slowest of each cell, all
        while there is room.

        Args:
            lives: for each width in s, how long such a slice lives after its end, s.
        """
        with self._lock:
            now = self._clock() + self._offset
            for shard in self._shards.values():
                self._coarsen(shard, lambda step, width: step + width + lives.get(width, 0.0) <= now)
            width = STEP_S
            while self.waiting_cells > CELLS_MOST and width < COARSER[width]:
                for shard in self._shards.values():
                    self._coarsen(shard, partial(_no_wider, width))
                width = COARSER[width]
            self._thin()

    def _thin(self) -> None:
        total = 0
        newest_first = sorted(
            (packed for shard in self._shards.values() for packed in shard.waiting.values()),
            key=lambda packed: -packed.cell.newest,
        )
        room: dict[str, int] = {}
        for packed in newest_first:
            cell, name = packed.cell, packed.series.name
            cell.thin(room.get(name, RAW_MOST))
            room[name] = max(0, room.get(name, RAW_MOST) - cell.raw_count)
            if total + cell.raw_count > RAW_WAITING_MOST:
                cell.drop_raw()
            total += cell.raw_count

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
        """Return one parcel for each shard that has cells waiting: the one under way, or else a new one."""
        with self._lock:
            now = self._clock()
            found = []
            for number, shard in self._shards.items():
                parcel = shard.parcel
                if parcel is None and shard.waiting:
                    shard.seq += 1
                    parcel = shard.parcel = Parcel(number, shard.writer, shard.seq, self._take(shard, now))
                elif parcel is not None and parcel.first_sent is not None and now - parcel.first_sent > _UNCERTAIN_S:
                    # Whether it was counted can no longer be found out. More likely not: send it as another writer.
                    self._uncertain += parcel.samples
                    shard.writer = parcel.writer = uuid.uuid4().hex[:12]
                    shard.seq = parcel.seq = 1
                    parcel.first_sent = None
                if parcel is not None:
                    found.append(parcel)
            return found

    def _take(self, shard: _Shard, now: float) -> list[PackedCell]:
        cells: list[PackedCell] = []
        samples = 0
        for place in list(shard.waiting)[:PARCEL_CELLS]:
            packed = shard.waiting.pop(place)
            self._ration(packed, now)
            cells.append(packed)
            samples += packed.cell.raw_count
            if samples >= PARCEL_SAMPLES:
                break
        return cells

    def _ration(self, packed: PackedCell, now: float) -> None:
        """Let a series send its first 1000 raw samples, and then as many as it earns with time."""
        allowance, since = self._raw_allowance.get(packed.series, (float(RAW_MOST), now))
        allowance = min(RAW_MOST, allowance + (now - since) * RAW_REFILL_PER_S)
        cell = packed.cell
        cell.thin(int(allowance))
        self._raw_allowance[packed.series] = (max(0.0, allowance - cell.raw_count), now)
        self._samples_dropped += cell.raw_dropped
        cell.raw_dropped = 0

    def unanswered(self, parcel: Parcel, sent: float) -> None:
        """Note that a parcel was sent and may or may not have been counted."""
        if parcel.first_sent is None:
            parcel.first_sent = sent

    def settled(self, parcel: Parcel, other: int = 0, outdated: int = 0) -> None:
        """Note that the server has counted a parcel.

        Args:
            parcel: what was sent.
            other: executions of it that went to ``__other__``.
            outdated: raw samples of it that were too old to be kept.
        """
        with self._lock:
            shard = self._shards.get(parcel.shard)
            if shard is not None and shard.parcel is parcel:
                shard.parcel = None
                self._counted += parcel.samples
                self._other += other
                self._samples_dropped += outdated

    def refused(self, parcel: Parcel, part: str) -> int:
        """Give up the series of a parcel whose key is corrupt; the server refused before it wrote anything.

        Args:
            parcel: what was sent.
            part: the corrupt key without its tag, such as ``total:research``.

        Returns:
            How many executions were given up; 0 when the key is none of a series of the parcel.
        """
        with self._lock:
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
            self._synchronised = True

    def server_ms(self, at: float) -> int:
        """Return the server's time at our clock's `at`, ms since 1970; -1 while it has not told it."""
        return int((at + self._offset) * 1000) if self._synchronised else -1

    # -- looking

    @property
    def empty(self) -> bool:
        """Whether everything recorded was confirmed."""
        return not any(list(self._lanes.values())) and not any(
            shard.parcel or shard.waiting for shard in list(self._shards.values())
        )

    @property
    def doubtful(self) -> bool:
        """Whether something was sent of which it is not known whether it was counted."""
        parcels = [shard.parcel for shard in list(self._shards.values())]
        return any(parcel is not None and parcel.first_sent is not None for parcel in parcels)

    def tallies(self) -> tuple[int, int, int, int, int, int]:
        """Return executions counted, pending, dropped, uncertain; raw samples dropped; executions under __other__."""
        with self._lock:
            self.fold()
            pending = 0
            samples_dropped = self._samples_dropped
            for shard in self._shards.values():
                waiting = [packed.cell for packed in shard.waiting.values()]
                pending += sum(cell.counts["n"] for cell in waiting)
                samples_dropped += sum(cell.raw_dropped for cell in waiting)
                if shard.parcel is not None:
                    pending += shard.parcel.samples
            return self._counted, pending, self._dropped, self._uncertain, samples_dropped, self._other
