"""Measures what single operations cost on the connected server: processor time, network and memory.

The operations run on scratch keys, ``<namespace>:doctor-<random>:{...}``. So a user needs no rights on other keys. No
process reads the scratch keys, and no list of resources names them. They are deleted at the end; a key that cannot be
deleted expires after a minute.

The calls run one at a time, each in its own round trip. The processor time is that of the server's main thread, as
reported by INFO. It includes reading and writing the sockets, which takes longer than a plain GET itself. The processor
time that other clients cause is measured beforehand and subtracted.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeVar

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer.commands import ANY, Granted, Pool, acquire, register, release
from agentperf_redis.balancer.model import AgentInstance, LoadBalancingStrategy, Outcome
from agentperf_redis.cache.commands.entries import put, read, report_reads
from agentperf_redis.cache.commands.settings import deploy
from agentperf_redis.cache.entry_format import payload
from agentperf_redis.cache.model import Policy, Settings
from agentperf_redis.cache.process.access_buffer import NO_REPORT, AccessReport
from agentperf_redis.cli.doctor import find_layout, parsed_info
from agentperf_redis.cli.plan import Cost, Costs
from agentperf_redis.command import Batch, Command, Reply
from agentperf_redis.errors import AgentPerfError, BackendUnavailable
from agentperf_redis.metrics.accumulator import OK, Accumulator, Series
from agentperf_redis.metrics.buffer import FlushBatch, PackedAccumulator
from agentperf_redis.metrics.commands import flush
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.transport.address import ServerKind
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.executor import Executor
from agentperf_redis.transport.resp import pack_call
from agentperf_redis.transport.topology import Topology

T = TypeVar("T")

CALLS, LEAST_CALLS, MAX_S = 500, 20, 0.3
"""Each operation is measured over 500 calls. On a slow network, this ends after 0.3 s, but not before 20 calls."""
IDLE_S = 0.2
"""For this many seconds, the processor time that the server spends on other clients is measured."""
ENTRIES, CACHE_BYTES, LEAST_ENTRIES = 1000, 8_000_000, 8
"""Entries of the scratch cache. If the values are large, there are fewer entries (but at least 8), so that all entries
together take at most about 8 MB."""
INSTANCES, CAPACITY = 500, 10
KEPT_MS = 60_000
_AGENTS = 10
_EXECUTIONS = 10
_READS = 101
_AT_ONCE = 100
_KEY_BYTES = 58
"""Memory that MEMORY USAGE omits for each key: the slots of the key in the tables of keys and of TTLs. Measured: 44
bytes on Valkey 9.1, 72 bytes on Redis 8.2."""
_MAY_NOT = "the ACL user may not do"
"""Words that are in the reason of a BackendUnavailable if its cause is a missing right."""
_NO_KEYS = {"tag", "bus", "entry_prefix", "lease_prefix", "reply_prefix"}
"""Fields of `CacheKeys` that are not keys."""
_WIDTHS = (("10s", 10, 19), ("1m", 60, 16), ("1h", 3600, 13), ("1d", 86_400, 10))
"""For each width of metrics slices: its name, the width in s, and the length of the time in names of keys."""


def measured_costs(backend: Backend, value_bytes: int) -> Costs:
    """Measure the costs on the connected server, or on one node of a Cluster. This takes up to about 3 s.

    Args:
        backend: the server and namespace.
        value_bytes: size of the values in the cache.

    Raises:
        BackendUnavailable: the server does not reply.
        AgentPerfError: the server refuses a call. The message quotes the server and names the rights that are needed.
    """
    namespace = f"{backend.namespace}:doctor-{secrets.token_hex(4)}"
    try:
        with _Probe.of(backend, f"{namespace}:{{lb:plan}}") as probe:
            pool = _pool_costs(probe, namespace)
        with _Probe.of(backend, f"{namespace}:{{cache:plan}}") as probe:
            cache = _cache_costs(probe, namespace, value_bytes)
        with _Probe.of(backend, keys.metrics_tag(namespace, _SHARD)) as probe:
            metrics = _metrics_costs(probe, namespace)
    except AgentPerfError as error:
        reason = error.reason if isinstance(error, BackendUnavailable) else str(error)
        if isinstance(error, BackendUnavailable) and _MAY_NOT not in reason:
            raise
        raise AgentPerfError(
            f"the costs cannot be measured: {reason}. The measurement writes keys {namespace}:*. A user needs the "
            "rights that `agentperf doctor --acl` prints, and +info +memory|usage"
        ) from None
    return Costs(**pool, **cache, **metrics)


class _Probe:
    """A connection to one server, with the scratch keys that were made there.

    Args:
        server: the driver for the connection.
    """

    def __init__(self, server: Executor) -> None:
        self.server = server
        self.made: set[str] = set()
        self._idle: float | None = None

    @staticmethod
    @contextlib.contextmanager
    def of(backend: Backend, key: str) -> Iterator[_Probe]:
        """Connect to the node of a key. At the end of the block, delete the scratch keys."""
        topology, address = find_layout(backend), backend.address
        node = topology.node_for(key)
        if node is not None and address.kind in (ServerKind.CLUSTER, ServerKind.SENTINEL):
            address = replace(address, kind=ServerKind.STANDALONE, nodes=((node.host, node.port),))
        with contextlib.closing(
            Executor(Connector(address), Topology(address), None, backend.deadline, None)
        ) as server:
            probe = _Probe(server)
            try:
                yield probe
            finally:
                probe.delete()

    def run(self, commands: Sequence[Command[T]]) -> list[T]:
        """Run commands in pipelines. Each pipeline also sets a TTL on the scratch keys."""
        found: list[T] = []
        for first in range(0, len(commands), _AT_ONCE):
            part = commands[first : first + _AT_ONCE]
            expire = [Command("PEXPIRE", (key,), (KEPT_MS,), bool) for key in self.made]
            both: tuple[Command[Any], ...] = (*part, *expire)
            for result in self.server.run(Batch(both).settled())[: len(part)]:
                if isinstance(result, AgentPerfError):
                    raise result
                found.append(result)
        return found

    def delete(self) -> None:
        """Delete the scratch keys, as far as the server allows it. The keys that are left expire."""
        made = sorted(self.made)
        for first in range(0, len(made), _AT_ONCE):
            commands = tuple(Command("UNLINK", (key,), (), bool) for key in made[first : first + _AT_ONCE])
            with contextlib.suppress(BackendUnavailable):
                self.server.run(Batch(commands).settled())

    def cost(self, make: Callable[[], Command[T]]) -> tuple[Cost, list[T]]:
        """Measure an operation. Return its mean cost, and the results of the calls.

        Args:
            make: returns the command of the next call.
        """
        if self._idle is None:
            begun, before = time.perf_counter(), self._cpu()
            time.sleep(IDLE_S)
            self._idle = (self._cpu() - before) / (time.perf_counter() - begun)
        (first,) = self.run([make()])  # not measured: the first call also sends the script
        results, received, sent = [first], 0, 0
        before, begun = self._cpu(), time.perf_counter()
        while len(results) <= CALLS and (time.perf_counter() < begun + MAX_S or len(results) <= LEAST_CALLS):
            command = make()
            reply, result = self.server.run(_with_reply(command))
            received += len(pack_call(command, by_source=False, again=False))
            sent += resp_bytes(reply)
            results.append(result)
        others = self._idle * (time.perf_counter() - begun)
        calls = len(results) - 1
        return Cost(max(0.0, self._cpu() - before - others) / calls, received / calls, sent / calls), results

    def _cpu(self) -> float:
        """Return the processor time that the server has used so far, s."""
        facts = self.server.run(Command("INFO", (), ("cpu",), parsed_info))
        both = [facts.get(f"used_cpu_{kind}_main_thread", facts.get(f"used_cpu_{kind}")) for kind in ("user", "sys")]
        try:
            return sum(float(each or "") for each in both)
        except ValueError:
            raise AgentPerfError("INFO does not report the processor time of the server") from None

    def memory(self, names: Sequence[str]) -> int:
        """Return the memory of keys, bytes."""
        usage = [Command("MEMORY", (), ("USAGE", name, "SAMPLES", 0), lambda reply: int(reply or 0)) for name in names]
        return sum(size + _KEY_BYTES for size in self.run(usage) if size)


def _with_reply(command: Command[T]) -> Command[tuple[Reply, T]]:
    return Command(command.script, command.keys, command.args, lambda reply: (reply, command.decode(reply)))


def resp_bytes(reply: Reply) -> int:
    """Return the size of a reply in wire format."""
    if isinstance(reply, bytes):
        return len(b"$%d\r\n\r\n" % len(reply)) + len(reply)
    if isinstance(reply, list):
        return len(b"*%d\r\n" % len(reply)) + sum(map(resp_bytes, reply))
    return len(b"$-1\r\n") if reply is None else len(f":{reply}\r\n")


def _pool_costs(probe: _Probe, namespace: str) -> dict[str, Any]:
    pool = Pool.of(namespace, "plan")
    names = [key for name, key in pool.keys._asdict().items() if name != "tag"]
    probe.made.update(names)
    fleet = [AgentInstance(f"instance-{number}", "plan", max_capacity=CAPACITY) for number in range(INSTANCES)]
    probe.run([register(pool, each, LoadBalancingStrategy.LEAST_LOADED, 0) for each in fleet])
    empty = probe.memory(names)
    numbers = count()
    tokens: list[str] = []

    def acquired() -> Command[Any]:
        tokens.append(f"@{secrets.token_hex(4)}-{next(numbers):x}")
        return acquire(pool, tokens[-1], KEPT_MS, ANY)

    acquiring, granted = probe.cost(acquired)
    held = [(token, grant) for token, grant in zip(tokens, granted, strict=True) if isinstance(grant, Granted)]
    if len(held) < len(granted):
        raise AgentPerfError(f"an acquire on a free pool was answered by {granted[-1]!r}")
    leases = (probe.memory(names) - empty) / len(held)
    left = iter(held[:-1])  # if `cost` makes more calls than there are leases, `last` is released several times
    last = held[-1]

    def released() -> Command[bool]:
        token, grant = next(left, last)
        return release(pool, token, grant.facts[0], outcome=Outcome.OK, response_time=0.5)

    releasing, _ = probe.cost(released)
    return {
        "acquire": acquiring,
        "release": releasing,
        "instance_bytes": empty / INSTANCES,
        "lease_bytes": max(0.0, leases),
    }


def _cache_costs(probe: _Probe, namespace: str, value_bytes: int) -> dict[str, Any]:
    where = keys.cache(namespace, "cache", "plan")
    entries = max(LEAST_ENTRIES, min(ENTRIES, CACHE_BYTES // value_bytes))
    index = [key for name, key in where._asdict().items() if name not in _NO_KEYS]
    probe.made.update(index)
    probe.run([deploy(where, Settings(Policy.LRU, (0, 0, entries), 0, (0, 0, KEPT_MS)))])
    numbers = count()
    data = secrets.token_bytes(value_bytes)
    kept: list[str] = []

    def stored() -> Command[Any]:
        name = f"plan-{next(numbers):08d}"
        kept.append(name)
        return put(
            where,
            name,
            payload("0123456789", 0, 0, (), data),
            "0123456789",
            until_ms=10**14,
            seen=0,
            again=False,
            ttl_ms=KEPT_MS,
            tier=None,
            token="",
            origin="doctor",
            writer="doctor",
            report=NO_REPORT,
            tags=(),
        )

    try:
        probe.run([stored() for _ in range(entries)])
        memory = probe.memory([*index, *(where.entry(name) for name in kept)])
        names = iter(kept * (1 + CALLS // entries + 1))
        reading, _ = probe.cost(lambda: read(where, next(names)))
        sequence = count(1)

        def reported(reads: int) -> Command[Any]:
            chosen = tuple((name, 1) for name in kept[:reads])
            return report_reads(where, "doctor", AccessReport(next(sequence), 0, 0, 0, chosen))

        many = min(_READS, entries)
        report, _ = probe.cost(lambda: reported(1))
        reports, _ = probe.cost(lambda: reported(many))
        putting, _ = probe.cost(stored)
    finally:
        # `delete` removes all keys in `made`. The entries are added only now, because `run` sets a TTL on all keys in
        # `made`, and the entries already have a TTL.
        probe.made.update(map(where.entry, kept))
    return {
        "read": reading,
        "report": report,
        "reported": reports.above(report, many - 1),
        "put": putting,
        "entry_bytes": memory / entries,
    }


def _names_in_shard(shard: int) -> list[str]:
    found: list[str] = []
    for number in count():
        name = f"plan-{number}"
        if keys.metrics_shard(name) == shard:
            found.append(name)
            if len(found) == _AGENTS:
                return found
    raise AssertionError  # `count` never ends


_SHARD = 0


@dataclass(frozen=True, slots=True)
class _Work:
    agents: int
    executions: int


def _metrics_costs(probe: _Probe, namespace: str) -> dict[str, Any]:
    agents = _names_in_shard(_SHARD)
    seconds = KEPT_MS / 1000
    retention = Retention(seconds, seconds, seconds, seconds, recent=seconds, slow=seconds)
    sequence = count(1)

    def flushed(work: _Work) -> Command[Any]:
        now = time.monotonic()
        packed = []
        for agent in agents[: work.agents]:
            accumulator = Accumulator(now)
            durations = [0.5 * 1.1**number for number in range(work.executions)]
            accumulator.aggregate([part for duration in durations for part in (now, duration, OK, 0.0)])
            packed.append(PackedAccumulator(Series(_SHARD, keys.metrics_series(agent)), 10, accumulator))
        batch = FlushBatch(_SHARD, "doctor", next(sequence), packed)
        return flush(namespace, batch, now=now, retention=retention, firm=True)

    def cost(work: _Work) -> Cost:
        found, replies = probe.cost(lambda: flushed(work))
        for reply in (replies[0], replies[-1]):  # the first and the last flush may write different slices
            probe.made.update(_metrics_keys(namespace, agents, reply.now))
        return found

    one, several, full = cost(_Work(1, 1)), cost(_Work(_AGENTS, 1)), cost(_Work(_AGENTS, _EXECUTIONS))
    return {
        "flush": one,
        "agent": several.above(one, _AGENTS - 1),
        "execution": full.above(several, _AGENTS * (_EXECUTIONS - 1)),
    }


def _metrics_keys(namespace: str, agents: Sequence[str], now: float) -> Iterator[str]:
    """Yield the keys that a flush at the server's time `now` (s since 1970) has written."""
    yield keys.metrics_agents(namespace, _SHARD)
    yield keys.metrics_settings(namespace, _SHARD)
    yield keys.metrics_writer(namespace, _SHARD, "doctor")
    tag = keys.metrics_tag(namespace, _SHARD)
    for agent in agents:
        series = keys.metrics_series(agent)
        for key in (keys.metrics_total, keys.metrics_latest, keys.metrics_slow):
            yield key(namespace, _SHARD, series)
        for name, width, shown in _WIDTHS:
            yield f"{tag}:slices:{name}:{series}"
            for start in (now - width, now):
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(start - start % width))
                yield f"{tag}:{name}:{stamp[:shown]}:{series}"
