"""Tests of the assessments of `agentperf doctor`, for given facts about a server."""

from __future__ import annotations

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cli import doctor
from agentperf_redis.cli.attempts import Refusal, refusals
from agentperf_redis.command import Reply
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.resp import ServerError
from agentperf_redis.transport.topology import Node, Topology
from tests.support.fake import fake_server


@pytest.mark.parametrize(
    ("times_ms", "level", "found"),
    [
        ([0.25] * 100, "ok", "median 0.250 ms, p99 0.250 ms over 100 round trips"),
        ([0.25] * 99 + [500.0], "ok", "median 0.250 ms, p99 0.250 ms over 100 round trips"),
        ([0.25] * 98 + [500.0] * 2, "note", "median 0.250 ms, p99 500.000 ms over 100 round trips"),
        ([10.0] * 100, "ok", "median 10.000 ms, p99 10.000 ms over 100 round trips"),
        ([10.5] * 100, "note", "median 10.500 ms, p99 10.500 ms over 100 round trips"),
    ],
)
def test_latency_is_slow_above_10_ms_p99(times_ms: list[float], level: str, found: str) -> None:
    finding = doctor.assess_latency(times_ms)
    assert (finding.subject, finding.level, finding.found) == ("latency", level, found)
    assert ("SLOWLOG" in finding.advice) == (level == "note")


@pytest.mark.parametrize(
    ("facts", "level"),
    [
        ({"redis_version": "6.2.7"}, "bad"),
        ({"redis_version": "7.0.15"}, "note"),
        ({"redis_version": "7.2.10"}, "note"),
        ({"redis_version": "7.2.11"}, "ok"),
        ({"redis_version": "8.2.1"}, "note"),
        ({"redis_version": "8.2.2"}, "ok"),
        ({"redis_version": "8.10.0"}, "ok"),
        ({"redis_version": "7.2.4", "valkey_version": "9.0.2"}, "note"),
        ({"redis_version": "7.2.4", "valkey_version": "9.0.3"}, "ok"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.9"}, "bad"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.0"}, "ok"),
        ({"redis_version": "8.2.4", "arch_bits": "64"}, "ok"),
        ({"redis_version": "8.2.4", "arch_bits": "32"}, "bad"),
    ],
)
def test_versions_that_are_too_old_or_have_known_faults_are_named(facts: dict[str, str], level: str) -> None:
    assert doctor.assess_version(facts).level == level


def test_server_without_a_version_gets_a_note() -> None:
    finding = doctor.assess_version({"redis_mode": "standalone"})
    assert (finding.level, finding.found) == ("note", "not reported")


# The texts are error replies of Redis 7.0, Redis 8.2 and Valkey 9.1.
@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("NOPERM User me has no permissions to run the 'hset' command", "grant +hset;"),
        ("ERR ACL failure in script: User me has no permissions to run the 'hset' command", "grant +hset;"),
        ("NOPERM User access-key has no permissions to run the 'hset' command", "grant +hset;"),
        ("ERR The user executing the script can't run this command or subcommand", "grant +hset;"),
        ("ERR The user executing the script can't access at least one of the keys mentioned in ...", "grant ~ns:*"),
        ("ERR The user executing the script can't publish to the channel mentioned in the command", "grant &ns:*"),
        ("NOPERM No permissions to access a key", "grant ~ns:*"),
        ("NOPERM No permissions to access a channel", "grant &ns:*"),
        ("ERR Unknown Redis command called from script script: 8d2", "the server does not have the command"),
        ("OOM command not allowed when used memory > 'maxmemory'.", ""),
        ("READONLY You can't write against a read only replica.", ""),
    ],
)
def test_refused_command_is_bad_with_the_remedy(text: str, advice: str) -> None:
    (finding,) = doctor.assess_commands([Refusal(("HSET",), text)], "ns")
    assert (finding.level, finding.found) == ("bad", f"HSET: {text}")
    assert finding.advice.startswith(advice)
    assert bool(finding.advice) == bool(advice)


def test_server_of_fakeredis_is_not_bad() -> None:
    with fake_server() as url:
        backend = Backend(url)
        findings = doctor.examine(backend)
        backend.close()
    assert {each.subject for each in findings} == {"commands", "facts", "latency", "scripts"}
    assert {each.level for each in findings} <= {"ok", "note"}


@pytest.mark.parametrize(
    ("policy", "level"),
    [("noeviction", "ok"), ("volatile-lru", "note"), ("allkeys-lru", "bad"), ("allkeys-random", "bad"), ("", "bad")],
)
def test_policies_that_evict_leases_are_bad(policy: str, level: str) -> None:
    assert doctor.assess_eviction({"maxmemory_policy": policy}).level == level


@pytest.mark.parametrize(
    ("used", "limit", "level"), [(84, 100, "ok"), (86, 100, "note"), (100, 100, "note"), (86, 0, "note")]
)
def test_memory_near_its_limit_gets_a_note(used: int, limit: int, level: str) -> None:
    finding = doctor.assess_memory({"used_memory": str(used * 2**20), "maxmemory": str(limit * 2**20)})
    assert finding.level == level
    assert f"{used}.0 MiB" in finding.found


@pytest.mark.parametrize(
    ("facts", "level"),
    [
        ({"aof_enabled": "1", "aof_last_write_status": "ok"}, "ok"),
        ({"aof_enabled": "1", "aof_last_write_status": "err"}, "bad"),
        ({"aof_enabled": "0", "rdb_last_bgsave_status": "ok"}, "note"),
        ({"aof_enabled": "0", "rdb_last_bgsave_status": "err"}, "bad"),
    ],
)
def test_persistence_is_assessed_by_restart_loss(facts: dict[str, str], level: str) -> None:
    assert doctor.assess_persistence(facts).level == level


def test_replica_role_is_bad_for_writes() -> None:
    assert doctor.assess_replication({"role": "slave"}).level == "bad"
    primary = doctor.assess_replication({"role": "master", "connected_slaves": "2"})
    assert (primary.level, primary.found) == ("ok", "primary, 2 replicas")


def test_only_the_command_that_the_server_does_not_know_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SSUBSCRIBE, Valkey 8.0 refuses SUNSUBSCRIBE: the connection has no subscription."""
    unknown, unsubscribed = "ERR unknown command 'SSUBSCRIBE'", "NOSUB 'sunsubscribe' command executed not in ..."

    def replies(connector: Connector, node: Node, request: bytes, count: int, timeout_s: float) -> list[Reply]:
        return [b""] * (count - 3) + [ServerError(unknown), b"PONG", ServerError(unsubscribed)]

    monkeypatch.setattr(Connector, "requests", replies)
    address = Backend("redis://127.0.0.1").address
    node = Node("127.0.0.1", 6379)
    assert refusals(Connector(address), Topology(address), node, "ns", 1.0) == [Refusal(("SSUBSCRIBE",), unknown)]
