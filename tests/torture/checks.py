"""The checks of a torture run. Each yields sentences that say what was wrong, and none if the guarantee held."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf

from tests.support.pool_history import Unsound, check_histories, check_replies
from tests.torture.journal import Line
from tests.torture.work import TTL_KEYS, TTL_S

STALE_S = 0.25
"""A local copy may miss the write of another process for this long, s."""
TTL_ROUNDING_S = 0.005
"""Difference between a TTL and the time for which an entry can be read: TTLs are rounded to milliseconds."""


def undocumented_errors(lines: Iterable[Line]) -> Iterator[str]:
    """Each error that a worker met must be one that the library documents."""
    for line in lines:
        if line.kind == "fault":
            yield f"worker {line.worker}, {line.values[0]}: {line.values[2]}"


# The balancer


def unsound_leases(histories: Sequence[Sequence[str]], lines: Iterable[Line]) -> Iterator[str]:
    """No grant exceeds the capacity, no token is granted twice, fencing tokens rise, and the replies match the log.

    Args:
        histories: the log of the scripts in each shard of the pool.
        lines: the journals.
    """
    seen = [f"{line.kind} {line.values[0]}" for line in lines if line.kind in ("got", "freed")]
    try:
        check_histories(histories)
        check_replies(chain.from_iterable(histories), seen)
    except Unsound as unsound:
        yield str(unsound)


# The caches


@dataclass(slots=True)
class Write:
    """A write of a unique value, an invalidation, or a computation whose value may be stored.

    Attributes:
        value: the written value. The value of an invalidation is never read.
        worker: the process.
        begun: when the write began.
        settled: the time of the reply or, for a computed value, the begin of the computation. A write that begins later
            is certainly newer. Infinite if no reply came, because the write may then take effect at any time.
        keys: the keys that it changes.
    """

    value: str
    worker: int
    begun: float
    settled: float
    keys: Sequence[str]


def _writes(lines: Sequence[Line]) -> dict[str, Write]:
    writes: dict[str, Write] = {}
    for line in lines:
        if line.kind == "write":
            _, value, keys = line.values
            writes[value] = Write(value, line.worker, line.at, inf, keys)
        elif line.kind == "wrote":
            writes[line.values[0]].settled = line.at
        elif line.kind == "computes":
            key, value, _ = line.values
            writes[value] = Write(value, line.worker, line.at, line.at, [key])
    return writes


class _Newest:
    """The acknowledged writes of one key. `before` finds the newest write that was settled before a given time."""

    def __init__(self, writes: Iterable[Write]) -> None:
        self._settled: list[float] = []
        self._begun: list[Write] = []
        for write in sorted(writes, key=lambda each: each.settled):
            latest = write if not self._begun or write.begun > self._begun[-1].begun else self._begun[-1]
            self._settled.append(write.settled)
            self._begun.append(latest)

    def before(self, at: float) -> Write | None:
        """Return the write that began last among the writes that were settled before a time."""
        found = bisect_left(self._settled, at)
        return self._begun[found - 1] if found else None


def stale_reads(lines: Sequence[Line]) -> Iterator[str]:
    """No read returns a value that is older than a write, or an invalidation, that was acknowledged before the read.

    A read that may use a local copy may miss writes that other processes made in the last STALE_S. Overlapping writes
    have no order. A computed value counts as written when its computation began, so a later invalidation must win.
    """
    writes = _writes(lines)
    by_key: dict[str, list[Write]] = defaultdict(list)
    own: dict[tuple[str, int], list[Write]] = defaultdict(list)
    for write in writes.values():
        if write.settled == inf or (len(write.keys) == 1 and write.settled == write.begun):
            continue  # no reply came, or the value of a computation was perhaps not stored
        for key in write.keys:
            by_key[key].append(write)
            own[key, write.worker].append(write)
    newest = {key: _Newest(of) for key, of in by_key.items()}
    newest_own = {key: _Newest(of) for key, of in own.items()}
    for line in lines:
        if line.kind != "read":
            continue
        key, value, begun, fresh = line.values
        found = writes.get(value)
        if found is None or key not in found.keys:
            yield f"worker {line.worker} read {value!r} under {key}, where it was never written"
            continue
        limits = [(newest.get(key), begun if fresh else begun - STALE_S), (newest_own.get((key, line.worker)), begun)]
        for which, until in limits:
            newer = which.before(until) if which is not None else None
            if newer is not None and newer.begun > found.settled:
                yield f"worker {line.worker} read {found} of {key} at {begun:.3f}, after {newer}"
                break


def values_past_their_ttl(lines: Sequence[Line]) -> Iterator[str]:
    """No value is returned after its TTL has ended."""
    stored: dict[str, float] = {}
    for line in lines:
        if line.kind == "found" and line.values[0] in TTL_KEYS:
            _, value, _ = line.values
            if value.startswith(f"{line.worker}."):
                stored[value] = min(line.at, stored.get(value, inf))
    for line in lines:
        if line.kind == "found" and line.values[1] in stored:
            key, value, asked = line.values
            until = stored[value] + TTL_S + TTL_ROUNDING_S
            if asked > until:
                yield f"worker {line.worker} got {value} of {key} at {asked:.3f}, after its end at {until:.3f}"


def double_computations(lines: Sequence[Line], lease_s: float, outages: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Two processes compute a value at the same time only if the lease of the first may have ended.

    A process that cannot use the server computes without a lease. The cache warns of that, and the journal has the
    warning.

    Args:
        lines: the journals.
        lease_s: TTL of the lease.
        outages: begin and end of each period in which the server may be unreachable, or may lose a lease.
    """
    ended = {line.values[1]: line.at for line in lines if line.kind == "computed"}
    warned: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        if line.kind == "warned":
            warned[line.worker].append(line.at)
    running: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for line in sorted((line for line in lines if line.kind == "computes"), key=lambda line: line.at):
        key, value, asked = line.values
        # Only TTL_KEYS are checked, because TTL_KEYS are never invalidated. An invalidation ends the lease, so a second
        # computation may begin during the first.
        if key not in TTL_KEYS or any(asked <= at <= line.at for at in warned[line.worker]):
            continue
        for asked_before, until, other in running[key]:
            undisturbed = not any(begin < line.at and end > asked_before for begin, end in outages)
            if line.at < until and line.at - asked_before < lease_s and undisturbed:
                yield f"{value} of {key} was computed at {line.at:.3f}, while {other} was computed until {until:.3f}"
        running[key].append((asked, ended.get(value, inf), value))


# The metrics


def lost_or_doubled_counts(lines: Sequence[Line], stored: Mapping[str, int], killed: set[int]) -> Iterator[str]:
    """A process that ended normally counted everything. A killed process lost only counts that were not confirmed."""
    recorded, counted, ended = Counter[int](), Counter[int](), dict[int, tuple[int, int, int]]()
    for line in lines:
        if line.kind == "records":
            recorded[line.worker] = line.values[0]
        elif line.kind == "delivered":
            counted[line.worker] = line.values[0]
        elif line.kind == "ended":
            of, was_counted, dropped, pending = line.values
            ended[line.worker] = of, was_counted, dropped + pending
    for worker, upto in recorded.items():
        count = stored.get(f"agent-{worker}", 0)
        if worker in ended:
            of, was_counted, left = ended[worker]
            if not of == was_counted == count or left:
                yield f"agent-{worker}: {of} recorded, {was_counted} confirmed, {count} stored, {left} left"
        elif worker not in killed:
            yield f"worker {worker} neither ended nor was killed"
        elif not counted[worker] <= count <= upto:
            yield f"agent-{worker}, killed: {upto} recorded, at least {counted[worker]} confirmed, {count} stored"


# The alerts


def lost_or_renamed_alerts(lines: Iterable[Line], logged: Sequence[str], received: Sequence[str]) -> Iterator[str]:
    """Each transition is delivered at least once, and each delivery carries the id of a transition.

    Args:
        lines: the journals.
        logged: ids of the transitions that the server logged.
        received: ids of the notifications that the receiver got, including repeated deliveries.
    """
    for what, ids in (("reported", {line.values[0] for line in lines if line.kind == "transition"}), ("got", received)):
        for unknown in sorted(set(ids) - set(logged)):
            yield f"the transition {unknown} was {what}, and is not in the log"
    for lost in sorted(set(logged) - set(received)):
        yield f"no receiver got the transition {lost}"
    for twice in [each for each, count in Counter(logged).items() if count > 1]:
        yield f"the transition {twice} is in the log twice"
