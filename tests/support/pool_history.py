"""The history of a pool: the scripts of the balancer log their actions, and a check replays the log.

The log is a list next to the pool's keys. It is in the order of execution, so one pass over it finds every violation.
It also contains the actions whose replies were lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from agentperf_redis.balancer import PoolSettings, commands
from agentperf_redis.balancer.history import _SAMPLE
from agentperf_redis.script import Script
from tests.support.mutants import Change

SCRIPTS = [each for each in (*vars(commands).values(), _SAMPLE) if isinstance(each, Script)]
"""The scripts that lease and free units. A sample, like each operation, frees the units whose leases have expired."""

JUMPY = PoolSettings(
    eject_after=1,
    base_ejection_time=0.005,
    max_ejection_time=0.01,
    adaptive=True,
    slow_after=0.1,
    slow_start=0.01,
    rate_burst=0.05,
)
"""With these settings, ejections, probes, adaptive limits, warm-ups and rate limits occur all the time."""

_LOG = "call('RPUSH', STATE .. ':log', {})\n"
_LOGGED = (
    # (line of a script, entry to log, whether to log it before or after this line)
    ("      record = 'load=' .. load .. ' limit='", "format('grant %s %s %.0f %d', TOKEN, id, fence, limit)", "before"),
    (
        "call('HSET', STATE, token, write(r.id",
        "format('grant %s %s %.0f %d', token, r.id, r.fence, r.limit)",
        "before",
    ),
    ("call('HDEL', STATE, TOKEN)\n", "'free ' .. TOKEN .. ' ' .. holder", "after"),
    ("          self.free(id, tonumber(fence))\n", "'end ' .. name .. ' ' .. id .. ' ' .. fetched", "after"),
)
LOGGING: tuple[Change, ...] = tuple(
    (line, line + _LOG.format(what) if side == "after" else _LOG.format(what) + line) for line, what, side in _LOGGED
)
"""Changes that make the scripts log each grant, each release and each expiry."""


class Unsound(Exception):
    """Raised when a history violates a guarantee."""


def check_history(history: Iterable[str]) -> dict[str, str]:
    """Replay the actions of the scripts; return the leases held at the end.

    Raises:
        Unsound: a grant exceeded the capacity, a token was granted twice, a fencing token did not rise, or a script
            freed capacity that no lease held.
    """
    live: dict[str, str] = {}
    held = Counter[str]()
    granted: set[str] = set()
    fences: dict[str, int] = {}
    for number, entry in enumerate(history):
        what, token, instance, *rest = entry.split(" ")
        if what != "grant":
            if live.pop(token, None) != instance:
                raise Unsound(f"{number}: {entry}, which was not held")
            held[instance] -= 1
            if rest == ["0"]:  # a grant that its waiter did not fetch in time; the waiter may queue again
                granted.discard(token)
            continue
        fence, limit = map(int, rest)
        if held[instance] >= limit:
            raise Unsound(f"{number}: {entry}, but all {limit} were held")
        if token in granted:
            raise Unsound(f"{number}: {entry}, for the second time")
        if fence <= fences.get(instance, 0):
            raise Unsound(f"{number}: {entry}, after fence {fences[instance]}")
        live[token] = instance
        held[instance] += 1
        granted.add(token)
        fences[instance] = fence
    return live


def check_histories(histories: Sequence[Sequence[str]]) -> dict[str, str]:
    """Replay the histories of the shards of a pool; return the leases held at the end.

    Raises:
        Unsound: a history is unsound, a token was granted in two shards, or an instance was leased in two shards.
    """
    live: dict[str, str] = {}
    shard_of: dict[str, int] = {}
    for shard, history in enumerate(histories):
        live |= check_history(history)
        for entry in history:
            if entry.startswith("grant "):
                for name in entry.split(" ")[1:3]:
                    if shard_of.setdefault(name, shard) != shard:
                        raise Unsound(f"{entry}, for the second time: also in shard {shard_of[name]}")
    return live


def check_replies(history: Iterable[str], seen: Iterable[str]) -> None:
    """Check that the replies received by the workers match the actions logged by the scripts.

    Args:
        history: the log of the scripts.
        seen: ``got TOKEN`` for each lease that a worker received, ``freed TOKEN`` for each lease that it released.

    Raises:
        Unsound: a worker received a token without exactly one grant in the log, or released a token without exactly
            one release in the log.
    """
    entries = [entry.split(" ")[:2] for entry in history]
    granted = Counter(token for what, token in entries if what == "grant")
    freed = Counter(token for what, token in entries if what == "free")
    for line in seen:
        what, token = line.split(" ")
        if what == "got" and granted[token] != 1:
            raise Unsound(f"a worker got {token}, which was granted {granted[token]} times")
        if what == "freed" and freed[token] != 1:
            raise Unsound(f"a worker freed {token}, which was freed {freed[token]} times")
