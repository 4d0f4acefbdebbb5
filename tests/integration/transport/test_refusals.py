"""A server refuses all writes for a while. A call waits until the refusals end, or reports that it changed nothing."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from agentperf_redis.backend import Backend
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.transport.exchange import MAX_CONNECTIONS
from tests.support.driving import Run, add
from tests.support.servers import Raw, Server, wait_until

LONG_S = 60.0


@contextlib.contextmanager
def slow_script(server: Server, raw: Raw) -> Iterator[None]:
    """Another user's script that never ends. The server answers again once the script is killed."""
    raw.config_set("lua-time-limit", 1)
    with server.client(socket_timeout=LONG_S) as other, ThreadPoolExecutor(1) as pool:
        endless = pool.submit(other.eval, "while true do end", 0)
        wait_until(lambda: "BUSY" in refusal(raw), "the slow script")
        try:
            yield
        finally:
            raw.execute_command("SCRIPT", "KILL")
        with pytest.raises(redis.ResponseError, match="killed"):
            endless.result(LONG_S)


@contextlib.contextmanager
def failed_snapshot(server: Server, raw: Raw) -> Iterator[None]:
    """A server whose disk refuses snapshots, so that it refuses writes."""
    folder = server.nodes[0].folder / "gone"
    folder.mkdir()
    raw.config_set("dir", str(folder))
    raw.config_set("save", "3600 1")
    folder.rmdir()
    wait_until(lambda: snapshot(raw) == "err", "the failure of a snapshot")
    yield
    folder.mkdir()
    raw.config_set("dir", str(folder))
    wait_until(lambda: snapshot(raw) == "ok", "a snapshot")


@contextlib.contextmanager
def lost_primary(server: Server, raw: Raw) -> Iterator[None]:
    """A replica that lost its primary, and may not send old data."""
    raw.config_set("replica-serve-stale-data", "no")
    with replica_of_nothing(server, raw):
        yield


@contextlib.contextmanager
def replica_of_nothing(server: Server, raw: Raw) -> Iterator[None]:
    """A read-only replica, like the former primary after a failover. Nothing listens on the port of its primary."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        raw.replicaof("127.0.0.1", unused.getsockname()[1])
        yield
        raw.replicaof("NO", "ONE")


@contextlib.contextmanager
def too_few_replicas(server: Server, raw: Raw) -> Iterator[None]:
    """A primary that needs a replica for each write, and has none."""
    raw.config_set("min-replicas-to-write", 1)
    yield
    raw.config_set("min-replicas-to-write", 0)


@contextlib.contextmanager
def no_connection_left(server: Server, raw: Raw) -> Iterator[None]:
    """A server that accepts no further connection."""
    raw.ping()
    before = raw.config_get("maxclients")["maxclients"]
    raw.config_set("maxclients", len(raw.client_list()))
    yield
    raw.config_set("maxclients", before)


def refusal(raw: Raw) -> str:
    """Return the error with which the server refuses a PING, or an empty text if the PING succeeds."""
    try:
        raw.ping()
    except redis.ResponseError as error:
        return f"{type(error).__name__} {error}"
    return ""


def snapshot(raw: Raw) -> str:
    """Start a snapshot, and return the result of the last snapshot that ended."""
    with contextlib.suppress(redis.ResponseError):  # raised if a snapshot is already running
        raw.bgsave()
    return str(raw.info("persistence")["rdb_last_bgsave_status"])


Refuse = Callable[[Server, Raw], contextlib.AbstractContextManager[None]]
REFUSALS: dict[Refuse, str] = {
    slow_script: "it is busy with a slow script",
    failed_snapshot: "it cannot save to disk and refuses writes",
    lost_primary: "the replica has lost its primary",
    replica_of_nothing: "it is a read-only replica",
    too_few_replicas: "it has fewer replicas than min-replicas-to-write",
    # The server sends an error reply and closes the connection at once, so the reply may be lost on the way.
    no_connection_left: "it has reached its maxclients|closed by server|reset by peer|Broken pipe",
}


@pytest.mark.thorough
@pytest.mark.standalone
@pytest.mark.parametrize("refuse", REFUSALS, ids=lambda each: each.__name__)
def test_refused_write_is_not_applied_and_succeeds_after_the_refusal(
    refuse: Refuse,
    start_server: Callable[..., Server],
    server_kind: str,
    connect: Callable[..., Backend],
    run: Run,
    namespace: str,
) -> None:
    server = start_server(server_kind, "--enable-protected-configs", "yes")
    patient = connect(server.url, deadline=LONG_S)

    def is_refused() -> bool:
        with pytest.raises(BackendUnavailable) as error:
            run(connect(server.url, deadline=0.5), add(namespace))
        return error.value.outcome == "not_applied" and re.search(REFUSALS[refuse], str(error.value)) is not None

    with server.client() as raw, ThreadPoolExecutor(1) as pool:
        with refuse(server, raw):
            # If the server or the machine is busy, the reply to the last attempt may come after the deadline. Then the
            # outcome is unknown, so try again.
            wait_until(is_refused, "a refusal of each attempt within the deadline")
            waiting = pool.submit(patient.run, add(namespace))
        assert waiting.result(LONG_S) == 1, "executed once"
        assert raw.get(f"{namespace}:counter") == "1"


@pytest.mark.thorough
@pytest.mark.servers("valkey", "redis82")
def test_command_waits_while_the_server_loads_its_data(
    start_server: Callable[..., Server], server_kind: str, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    """The server loads 8,192 commands in 3 s. After every 1,024 commands, it answers clients with a LOADING error."""
    server = start_server(server_kind, "--key-load-delay", "400", aof=True)
    with server.client() as raw:
        pipeline = raw.pipeline(transaction=False)
        for number in range(8192):
            pipeline.set(f"{namespace}:{number}", "")
        pipeline.execute()
        server.restart()
        assert run(connect(server.url, deadline=LONG_S), add(namespace)) == 1
        assert int(raw.info("errorstats")["errorstat_LOADING"]["count"]) > 0


@pytest.mark.thorough
@pytest.mark.standalone
def test_script_that_the_server_evicted_still_runs(
    start_server: Callable[..., Server], server_kind: str, connect: Callable[..., Backend], run: Run, namespace: str
) -> None:
    """Valkey and Redis 8 keep the last 500 scripts that they received by EVAL."""
    server = start_server(server_kind)
    backend = connect(server.url)
    assert run(backend, add(namespace)) == 1
    with server.nodes[0].client() as raw:
        for number in range(600):
            raw.eval(f"return {number}", 0)
        evicted = raw.info("stats").get("evicted_scripts", 0)
    assert run(backend, add(namespace)) == 2
    assert evicted == 0 if server_kind == "redis70" else evicted > 0


@pytest.mark.thorough
@pytest.mark.servers("valkey")
def test_call_beyond_the_connections_of_a_process_is_not_sent(
    own_server: Server, connect: Callable[..., Backend], namespace: str
) -> None:
    backend = connect(own_server.url, deadline=LONG_S)
    assert backend.run(add(namespace, 0)) == 0
    own_server.pause()
    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        calls = [pool.submit(backend.run, add(namespace)) for _ in range(MAX_CONNECTIONS)]
        wait_until(lambda: backend._executor._places.qsize() == 0, "all connections to be in use")
        with pytest.raises(BackendUnavailable, match="connections of this process were busy") as refused:
            backend.run(add(namespace), deadline=0.2)
        assert refused.value.outcome == "not_applied"
        own_server.resume()
        assert sorted(call.result(LONG_S) for call in calls) == list(range(1, MAX_CONNECTIONS + 1))
    assert backend.run(add(namespace)) == MAX_CONNECTIONS + 1
