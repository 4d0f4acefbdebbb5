"""A namespace of metrics as it is once its slices have filled up, without waiting ninety days."""

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
"""How keys spell slices and their beginnings, by their width in s."""


def fill_slices(client: Any, namespace: str, retention: Retention, *, agents: int, per_second: int) -> int:
    """Leave on a server what agents do that have run so often, at any time, for as long as anything is kept.

    One slice of each width is written by flushes that hold as many executions as belong into it, durations lognormal with
    sigma 0.8; it is copied to the names of all others that live at the same time, and to all agents. Counts of all time
    are those of a day.

    Returns:
        Bytes of the server's used memory that this takes.
    """
    source = random.Random(1)
    agent, slices = "busy-00", dict[int, Any]()
    scratch = [f"{namespace}.{width}" for width in WIDTHS]
    for (width, (kind, _)), of in zip(WIDTHS.items(), scratch, strict=True):
        buffer = Buffer(on_first=lambda: None, clock=lambda: 0.0)
        for _ in range(width * per_second):
            buffer.record(agent, source.lognormvariate(0.7, 0.8), OK)
        flush(client, of, buffer, retention)
        if retention.ttls[width]:
            (slices[width],) = client.scan_iter(f"{of}:*:{kind}:*:{agent}", count=1000)
    whole = scratch[-1]
    before = used_memory(client)
    pipeline = client.pipeline(transaction=False)
    now = datetime.now(UTC)
    for name in (f"busy-{number:02d}" for number in range(agents)):
        for key_of in (keys.metrics_total, keys.metrics_recent, keys.metrics_slow):
            shard = keys.metrics_shard(agent)
            pipeline.copy(key_of(whole, shard, agent), key_of(namespace, shard, name))
        for width, life in retention.ttls.items():
            kind, spelt = WIDTHS[width]
            for number in range(round(life / width) + 1 if life else 0):
                begin = (now - timedelta(seconds=width * number)).strftime(spelt)
                key = f"{keys.metrics_tag(namespace, keys.metrics_shard(agent))}:{kind}:{begin}:{name}"
                pipeline.copy(slices[width], key)
                pipeline.pexpire(key, round(life * 1000) + 1)
        pipeline.execute()
    taken = used_memory(client) - before
    for of in scratch:
        client.unlink(*client.scan_iter(f"{of}:*", count=1000))
    return taken


def used_memory(client: Any) -> int:
    """Return the server's used memory without the buffers of the connection that has filled it.

    They take 50 kB after a flush, for as long as the server sees fit: as much as a third of what a small namespace takes.
    """
    filled_by = client.client_id()
    client.connection_pool.disconnect()
    wait_until(lambda: not client.client_list(client_id=[filled_by]), "the connection to be gone")
    return int(client.info("memory")["used_memory"])


def flush(client: Any, namespace: str, buffer: Buffer, retention: Retention) -> None:
    """Send all that a buffer holds, as recorded just now."""
    buffer.aggregate()
    while batches := buffer.batches():
        for batch in batches:
            command = commands.flush(namespace, batch, now=0.0, retention=retention, firm=True)
            assert isinstance(command.script, Script)
            client.eval(command.script.source, len(command.keys), *command.keys, *command.wire_args())
            buffer.settled(batch, 0)
