"""Fills all time slices of a metrics namespace without waiting for ninety days."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

from agentperf_redis import keys
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.accumulator import OK
from agentperf_redis.metrics.buffer import Buffer
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.script import Script
from tests.support.servers import wait_until

WIDTHS = {
    10: ("10s", "%Y-%m-%dT%H:%M:%S"),
    60: ("1m", "%Y-%m-%dT%H:%M"),
    3600: ("1h", "%Y-%m-%dT%H"),
    86_400: ("1d", "%Y-%m-%d"),
}
"""Name and time format of slices in keys, by their width in s."""


class Past:
    """Records executions with end times in the past, by the server's clock.

    Args:
        raw: a client of the server.
        namespace: the namespace.

    Attributes:
        now: the server's time when this object was made, s since 1970.
        buffer: the buffer for executions. Its clock shows the time that `at` has set.
    """

    def __init__(self, raw: Any, namespace: str) -> None:
        self._raw = raw
        self._namespace = namespace
        self._clock = 0.0
        self.buffer = Buffer(on_first=lambda: None, clock=lambda: self._clock)
        seconds, micros = raw.time()
        self.now: float = seconds + micros / 1e6
        self.buffer.synchronise(self.now, 0.0)

    def at(self, age: float) -> Buffer:
        """Return the buffer. Its next executions end `age` seconds ago. `age` must not rise from call to call."""
        self._clock = -age
        return self.buffer

    def count(self, retention: Retention = Retention()) -> None:  # noqa: B008  a Retention is immutable
        """Send all recorded executions to the slices that the retention still keeps."""
        self._clock = 0.0
        self.buffer.aggregate()
        self.buffer.downsample(retention.ttls)
        while batches := self.buffer.batches():
            for batch in batches:
                now_ms = round(self.now * 1000)
                command = commands.flush(
                    self._namespace, batch, now=0.0, retention=retention, firm=True, server_ms=now_ms
                )
                assert isinstance(command.script, Script)
                reply = self._raw.eval(command.script.source, len(command.keys), *command.keys, *command.wire_args())
                assert reply[0] == commands.COUNTED
                self.buffer.settled(batch, 0)


def fill_slices(client: Any, namespace: str, retention: Retention, *, agents: int, per_second: int) -> int:
    """Write the metrics of agents that have run at a constant rate for longer than the retention.

    Flushes write one open slice of each width, and one closed slice if slices of this width are closed. Each slice
    has as many executions as the rate requires, with lognormal durations of sigma 0.8. These slices are copied to all
    other times within the TTL of their width, and to all agents. The all-time counts cover one day.

    Returns:
        The server's memory that the metrics use, in bytes.
    """
    source = random.Random(1)
    agent = "busy-00"
    shard = keys.metrics_shard(agent)
    tag = keys.metrics_tag(namespace, shard)
    scratch = [f"{namespace}.{width}" for width in WIDTHS]
    lines: dict[int, str] = {}
    open_slices: dict[int, Any] = {}
    for (width, (kind, _)), of in zip(WIDTHS.items(), scratch, strict=True):
        times = [source.lognormvariate(0.7, 0.8) for _ in range(width * per_second)]
        buffer = Buffer(on_first=lambda: None, clock=lambda: 0.0)
        for seconds in times:
            buffer.record(agent, seconds, OK)
        flush(client, of, buffer, retention)
        past = Past(client, f"{of}.closed")
        for seconds in times:
            past.at(past.now % width + 1.5 * width).record(agent, seconds, OK)
        past.at(0.0).record(agent, 1.0, OK)
        past.count(retention)
        if retention.ttls[width]:
            (open_slices[width],) = client.scan_iter(f"{of}:*:{kind}:*:{agent}", count=1000)
            for line in client.lrange(f"{keys.metrics_tag(f'{of}.closed', shard)}:slices:{kind}:{agent}", 0, -1):
                lines[width] = (line if isinstance(line, str) else line.decode()).partition(" ")[2]
    whole = scratch[-1]
    before = used_memory(client)
    pipeline = client.pipeline(transaction=False)
    now = datetime.now(UTC)
    for name in (f"busy-{number:02d}" for number in range(agents)):
        for key_of in (keys.metrics_total, keys.metrics_latest, keys.metrics_slow):
            pipeline.copy(key_of(whole, shard, agent), key_of(namespace, shard, name))
        for width, open_slice in open_slices.items():
            kind, spelt = WIDTHS[width]
            ttl_ms = round(retention.ttls[width] * 1000) + 1
            closed = f"{tag}:slices:{kind}:{name}"
            for number in range(round(retention.ttls[width] / width), -1, -1):
                begin = (now - timedelta(seconds=width * number)).strftime(spelt)
                if number and width in lines:
                    pipeline.rpush(closed, f"{begin} {lines[width]}")
                else:
                    key = f"{tag}:{kind}:{begin}:{name}"
                    pipeline.copy(open_slice, key)
                    pipeline.pexpire(key, ttl_ms)
            pipeline.pexpire(closed, ttl_ms)
        pipeline.execute()
    taken = used_memory(client) - before
    for of in scratch:
        client.unlink(*client.scan_iter(f"{of}*", count=1000))
    return taken


def used_memory(client: Any) -> int:
    """Return the server's used memory without the buffers of this client's connection.

    After a flush, the buffers keep 50 kB for an unspecified time. This is a third of the memory of a small namespace.
    """
    filled_by = client.client_id()
    client.connection_pool.disconnect()
    wait_until(lambda: not client.client_list(client_id=[filled_by]), "the connection to close")
    return int(client.info("memory")["used_memory"])


def flush(client: Any, namespace: str, buffer: Buffer, retention: Retention) -> None:
    """Send the whole content of a buffer, as if it had just been recorded."""
    buffer.aggregate()
    while batches := buffer.batches():
        for batch in batches:
            command = commands.flush(namespace, batch, now=0.0, retention=retention, firm=True)
            assert isinstance(command.script, Script)
            client.eval(command.script.source, len(command.keys), *command.keys, *command.wire_args())
            buffer.settled(batch, 0)
