"""The ACL user of `agentperf doctor --acl` has the rights that all services need on every server, and no others."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from agentperf_redis import AgentInstance, AgentPerf, keys
from agentperf_redis.alerts.notify import deliver_all
from agentperf_redis.backend import Backend
from agentperf_redis.cache.operator import find_all
from agentperf_redis.cli import acl, attempts, doctor
from agentperf_redis.cli.app import app
from agentperf_redis.transport.address import ServerKind
from agentperf_redis.transport.connector import Connector
from tests.support.places import ROOT
from tests.support.servers import Raw, Server, wait_until


@dataclass
class User:
    """An ACL user, and a URL with its credentials."""

    name: str
    url: str
    server: Server

    def refused(self) -> list[str]:
        """Return the entries for this user in the ACL logs of the servers."""
        found = []
        for node in self.server.nodes:
            with node.client() as client:
                log = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in logged(client)]
                found += [f"{entry['reason']} {entry['object']}" for entry in log if entry["username"] == self.name]
        return found


def logged(client: Raw) -> list[list[str]]:
    client.set_response_callback("ACL LOG", lambda reply, **_: reply)
    entries: list[list[str]] = client.execute_command("ACL LOG")
    return entries


@pytest.fixture
def user(server: Server, namespace: str) -> Iterator[User]:
    """An ACL user with the rights that `agentperf doctor --acl` prints for the namespace of the test."""
    name = f"worker-{uuid.uuid4().hex[:8]}"
    rules = acl.rules(namespace, password=">secret")
    for node in server.nodes:
        with node.client() as client:
            client.execute_command("ACL", "SETUSER", name, *rules)
    yield User(name, server.url.replace("://", f"://{name}:secret@"), server)
    for node in server.nodes:
        with node.client() as client:
            client.execute_command("ACL", "DELUSER", name)


def use_metrics(perf: AgentPerf) -> None:
    metrics = perf.metrics
    with metrics.track("planner"), metrics.span("planner", "think"):
        metrics.record_llm("planner", model="m", tokens_in=3, cost=0.25)
    metrics.record_execution("planner", 0.1, success=False, error_type="TimeoutError")
    assert metrics.flush()
    assert metrics.snapshots(window=60)["planner"].task_count == 2
    assert metrics.rank()[0].metrics.agent_name == "planner"
    assert metrics.summary().active_agents == 1
    assert len(metrics.recent("planner")) == len(metrics.slowest("planner")) == 2
    metrics.record_execution("gone", 0.1, success=True)
    assert metrics.forget("gone")
    assert metrics.spans("planner").bottleneck
    assert metrics.compare("planner", window=60).second.agent_name == "planner"
    assert (len(metrics.workers()), metrics.running("planner")) == (1, ())


def use_caches(perf: AgentPerf) -> None:
    for cache in (perf.cache("answers", max_size=3, local_size=10), perf.tiered_cache("docs", hot_size=2)):
        for key in "abcde":
            assert cache.put(key, key, tags=["letters"])
        assert cache.get("e") == "e"
        assert cache.get_or_compute("f", lambda: "computed") == "computed"
        assert cache.delete("f")
        assert (cache.add("n", 1), cache.incr("n"), cache.touch("n", 9)) == (True, 2, True)
        assert cache.put("n", 3, if_version=0) is False
        assert cache.entry("n") is not None
        assert cache.ttl("n") is not None
        assert "n" in set(cache.scan())
        assert cache.pop("n") == 2
        cache.invalidate_tags("letters")
        assert cache.get("e") is None
        cache.put("g", 1, ttl=0.01)
        cache.clear()
        cache.sweep()
        assert (cache.keys(), cache.stats().size) == ([], 0)
    for existing in perf.backend.run(find_all(perf.backend)):
        assert perf.backend.run(existing.last_used()) is None
        assert perf.backend.run(existing.drop()) == 0


def use_alerts(perf: AgentPerf) -> None:
    text = '[[alert]]\nname = "a"\nagents = "*"\nwhen = "tasks >= 1"\nnotify = ["ops"]\n[notify.ops]\ncommand = ["/bin/{}"]'
    perf.alerts.deploy(text=text.format("false"))
    assert perf.alerts.evaluate(as_of=time.time() + 120).events
    assert deliver_all(perf.alerts._service, 60.0)
    perf.alerts.silence("a", "1h")
    perf.alerts.unsilence("a")
    assert len(perf.alerts.log()) == 3
    assert perf.alerts.test(text=text, since="10m").judged
    assert perf.alerts.list().receivers[0].attempts == 1
    perf.alerts.deploy(text="")


def use_balancer(perf: AgentPerf, strategy: str) -> None:
    lb = perf.balancer(strategy)
    for number in range(2):
        lb.register_instance(
            AgentInstance(f"i{number}", strategy, max_capacity=1, labels=frozenset({"gpu"})), heartbeat_ttl=9
        )
    with lb.lease(strategy, require=["gpu"], affinity="user 1") as lease:
        lease.check()
        second = lb.acquire(strategy)
        assert lb.acquire(strategy, wait=0.01) is None
        assert lb.release(second, outcome="error")
        assert [each.token for each in lb.leases(strategy).leases] == [lease.token]
    assert lb.drain(strategy, "i0")
    assert lb.wait_until_idle(strategy, "i0", wait=5)
    assert lb.undrain(strategy, "i0")
    assert lb.update_instance(strategy, "i0", max_capacity=2)
    assert lb.heartbeat(strategy, "i0") == []
    assert lb.select_instance(strategy) is not None
    lb.repair(strategy)
    assert lb.cool_down(strategy, "i0", 0.01)
    assert lb.remove_instance(strategy, "i1")
    lb.register_instance(AgentInstance("only", "short-lived"))
    lb.remove_instance("short-lived", "only")
    lb.register_instance(AgentInstance("only", "short-lived"))
    assert lb.delete_pool("short-lived")
    (status,) = lb.status(strategy)
    assert status.current_load == 0


def use_locks(perf: AgentPerf, other: AgentPerf) -> None:
    with perf.lock("one", timeout=60) as lock:
        assert lock.extend(60)
        assert lock.owned()
        assert other.lock("one").acquire(blocking_timeout=0.05) is False
    with perf.semaphore("four", 4):
        assert not other.semaphore("four", 4).locked()


def test_worker_may_use_every_service(user: User, namespace: str) -> None:
    with AgentPerf(user.url, namespace=namespace) as perf, AgentPerf(user.url, namespace=namespace) as other:
        use_metrics(perf)
        use_caches(perf)
        use_alerts(perf)
        for strategy in ("least_loaded", "weighted", "peak_ewma", "consistent_hash", "random"):
            use_balancer(perf, strategy)
        use_locks(perf, other)
        # Over the message bus, a write through one AgentPerf invalidates the local copy in the other AgentPerf.
        reader, writer = perf.cache("copies", local_size=10), other.cache("copies")
        writer.put("a", 1)
        wait_until(lambda: reader.get("a") == reader.get("a") == 1 and reader.stats().hits, "a first read")
        writer.put("a", 2)
        wait_until(lambda: reader.get("a") == 2, "the invalidation over the bus")
    done = CliRunner().invoke(app, ["status", "--json", "--url", user.url, "--namespace", namespace])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["agents"][0]["agent"] == "planner"
    for key in (keys.pool(namespace, "random").state, keys.pool(namespace, "random").events, keys.resources(namespace)):
        done = CliRunner().invoke(app, ["inspect", key, "--json", "--url", user.url])
        assert json.loads(done.stdout)["known"] is True
    assert user.refused() == []


@pytest.mark.privileged
def test_worker_may_run_the_demo_in_its_namespaces(user: User, tmp_path: Path) -> None:
    for node in user.server.nodes:
        with node.client() as client:
            client.execute_command("ACL", "SETUSER", user.name, "~agentperf-demo-*", "&agentperf-demo-*")
    (tmp_path / "a.py").write_text("import os\n")
    done = CliRunner().invoke(app, ["demo", "--url", user.url, "--path", str(tmp_path), "--workers", "1", "--json"])
    assert (done.exit_code, user.refused()) == (0, [])
    assert json.loads(done.stdout)["ok"] is True
    # The message on stderr contains a shell command that lists the keys of the demo with redis-cli. Each URL in this
    # command also works in redis-py. Together, the nodes at these URLs hold all keys.
    (look,) = re.findall("show the keys while it runs: (.*)", done.stderr)
    (pattern,) = re.findall("--pattern '(agentperf-demo-[0-9a-f]+:[*])'", look)
    shown: set[str] = set()
    for url in re.findall("redis://[^' ]+", look.replace("***", "secret")):
        with redis.Redis.from_url(url.replace(f"{user.name}:secret@", ""), decode_responses=True) as client:
            shown |= set(client.scan_iter(pattern))
            assert all(client.pttl(key) > 0 for key in client.scan_iter(pattern))
    assert {key.partition(":")[2] for key in shown} > {"meta", "resources", "{lb:reader}:state"}


def test_worker_has_no_other_rights(user: User, server: Server, namespace: str) -> None:
    host, _, port = user.url.rpartition("@")[2].partition(",")[0].partition("/")[0].partition(":")
    with redis.Redis(host=host, port=int(port), username=user.name, password="secret") as client:
        for words in (["FLUSHALL"], ["KEYS", "*"], ["CONFIG", "GET", "*"], ["ACL", "LIST"], ["GET", "another:key"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*words)
    assert {"command flushall", "key another:key"} < set(user.refused())


def test_rights_match_the_commands_in_use() -> None:
    scripts = "".join(path.read_text() for path in (ROOT / "lua").rglob("*.lua"))
    called = set(re.findall(r"\bp?call\('([A-Z]+)'", scripts))
    sent = set()
    for_operators = {"embedded.py", "memory.py", "scanning.py"}  # these modules need rights that no worker needs
    for path in (ROOT / "agentperf_redis").rglob("*.py"):
        if not {"cli", "demo"} & set(path.relative_to(ROOT).parts) and path.name not in for_operators:
            text = path.read_text()
            sent |= set(re.findall(r'(?:Command\(\s*|pack\(\(|how = \(|else \()"([A-Z]+)"', text))
            sent |= {word.upper() for word in re.findall(r'request\((?:channel, )?"([a-z]+)"', text)}  # sent by the bus
    granted = {right.upper().partition("|")[0] for right in acl.rights()}
    handshake = {"SELECT"}  # a handshake also sends AUTH and HELLO, which need no right
    assert granted == (called | sent | handshake | {"ECHO"}) - {"HELLO", "SENTINEL"}
    assert {words[0] for words in attempts.script_calls("k", "c")} == called
    clients = [*attempts.client_calls("k", 0, clustered=True), *attempts.bus_calls("c")]
    assert {words[0] for words in clients} | {"EVAL", "EVALSHA"} == (sent | handshake) - {"HELLO", "SENTINEL"}


def test_doctor_names_each_right_that_is_missing(user: User, namespace: str) -> None:
    """The test removes each right in turn. `doctor` reports the missing right in the server's words."""
    backend = Backend(user.url, namespace=namespace)
    assert commands_of(doctor.examine(backend)) == {("ok", "")}
    assert set(user.refused()) == {"command info"}
    clustered = backend.address.kind is ServerKind.CLUSTER
    (node, *_) = doctor.find_layout(backend).primaries
    topology = doctor.find_layout(backend)
    connector = Connector(replace(backend.address, kind=ServerKind.STANDALONE, nodes=((node.host, node.port),)))
    owner = next(each for each in user.server.nodes if each.port == node.port)
    with owner.client() as client:
        for right in acl.rights():
            if right in ("asking", "cluster|slots") and not clustered:
                continue
            client.execute_command("ACL", "SETUSER", user.name, f"-{right}")
            refused = attempts.refusals(connector, topology, node, namespace, 5.0)
            client.execute_command("ACL", "SETUSER", user.name, f"+{right}")
            named = {name.lower() for each in refused for name in each.commands}
            assert named == {right.partition("|")[0]}
            for finding in doctor.assess_commands(refused, namespace):
                assert finding.level == "bad"
                assert re.search("NOPERM|ACL|can't run", finding.found), finding
                assert f"+{right}" in finding.advice
    backend.close()


def commands_of(findings: list[doctor.Diagnosis]) -> set[tuple[str, str]]:
    return {(each.level, each.advice) for each in findings if each.subject == "commands"}


@pytest.mark.parametrize(("rule", "advice"), [("resetkeys", "grant ~"), ("resetchannels", "grant &")])
def test_doctor_names_missing_patterns(user: User, namespace: str, rule: str, advice: str) -> None:
    for node in user.server.nodes:
        with node.client() as client:
            client.execute_command("ACL", "SETUSER", user.name, rule)
    backend = Backend(user.url, namespace=namespace)
    found = commands_of(doctor.examine(backend))
    assert found == {("bad", f"{advice}{namespace}:*")}
    backend.close()
