"""`agentperf lb` on pools that programs use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, PoolSettings, keys
from tests.support import records
from tests.support.commandline import FAILURE, NOT_FOUND, OK, USAGE, Run, document, has_line, shown
from tests.support.servers import Raw, Server, wait_until


@pytest.fixture
def lb(agentperf: Run, perf: AgentPerf) -> Run:
    """Run `agentperf lb` on the test's namespace. The pool "planner" has the instances p0 and p1."""
    for name in ("p0", "p1"):
        perf.balancer().register_instance(AgentInstance(name, "planner", max_capacity=2))
    return partial(agentperf, "lb")


def test_status_lists_pools_and_their_instances(lb: Run, perf: AgentPerf) -> None:
    held = perf.balancer().acquire("planner")
    perf.balancer().register_instance(AgentInstance("[red]", "odd"))
    text = shown(lb("status"))
    for words in (("planner", "least_loaded", "1/4"), ("p0", "up", "1/2"), ("p1", "up", "0/2"), ("[red]", "up")):
        assert has_line(text, *words), text
    found = document(lb("status", "planner", "--json"), "lb status")
    (pool,) = found["pools"]
    assert (pool["pool"], pool["load"], pool["capacity"], pool["granted"]) == ("planner", 1, 4, 1)
    assert [(each["instance"], each["load"]) for each in pool["instances"]] == [("p0", 1), ("p1", 0)]
    assert perf.balancer().release(held)


def test_commands_show_and_change_all_shards_as_one_pool(agentperf: Run, perf: AgentPerf) -> None:
    balancer = perf.balancer()
    balancer.configure_pool("divided", shards=4)
    for number in range(8):
        balancer.register_instance(AgentInstance(f"p{number}", "divided", max_capacity=1))
    held = balancer.acquire_many("divided", 8)
    lb = partial(agentperf, "lb")
    text = shown(lb("status", "divided"))
    assert has_line(text, "divided", "least_loaded", "8/8"), text
    assert "divided has 4 shards." in text
    (pool,) = document(lb("status", "divided", "--json"), "lb status")["pools"]
    assert (pool["shards"], pool["load"], pool["granted"], len(pool["instances"])) == (4, 8, 8, 8)
    assert len(document(lb("leases", "divided", "--json"), "lb leases")["leases"]) == 8
    assert len(document(lb("events", "divided", "--once", "--json"), "lb events")["events"]) == 8
    assert document(lb("repair", "divided", "--json"), "lb repair")["instances"] == 8
    lease = held[0].lease
    assert lease is not None
    assert document(lb("release", "divided", lease.token, "--yes", "--json"), "lb release")["freed"] is True
    assert document(lb("drain", "divided", held[1].id, "--json"), "lb drain")["draining"] is True
    assert document(lb("remove", "divided", held[2].id, "--yes", "--json"), "lb remove")["removed"] is True
    assert len(balancer.status("divided")[0].instances) == 7
    assert has_line(shown(agentperf("series", "--pool", "divided")), "load")
    balancer.release_many(held)


def test_shown_lease_tokens_can_be_released(
    lb: Run, perf: AgentPerf, raw: Raw, namespace: str, start_waiting: Callable[[], threading.Thread]
) -> None:
    held = [perf.balancer().acquire("planner") for _ in range(4)]
    first = held[0]
    assert first is not None
    assert first.lease is not None
    token = first.lease.token
    waiting = start_waiting()
    found = document(lb("leases", "planner", "--json"), "lb leases")
    assert {each["process"] for each in found["leases"]} == {perf.backend.process}
    (mine,) = (each for each in found["leases"] if each["token"] == token)
    assert (mine["instance"], mine["fence"], mine["fetched"]) == (first.id, first.lease.fence, True)
    (waiter,) = found["waiters"]
    text = shown(lb("leases", "planner"))
    assert has_line(text, token, first.id, perf.backend.process)
    assert has_line(text, waiter["token"], waiter["process"])

    unconfirmed = lb("release", "planner", token)
    assert (unconfirmed.returncode, unconfirmed.stdout) == (USAGE, "")
    assert "--yes" in unconfirmed.stderr
    state = keys.pool(namespace, "planner").state
    assert raw.hexists(state, token)
    queued = lb("release", "planner", waiter["token"], "--yes")
    assert "queue entry" in queued.stdout
    left = document(lb("leases", "planner", "--json"), "lb leases")["waiters"]
    assert waiter["token"] not in {each["token"] for each in left}  # the waiter queues again with a new token
    ended = lb("release", "planner", token, "--yes")
    assert (ended.returncode, ended.stderr) == (OK, "")
    assert f"the lease of {perf.backend.process} on {first.id}" in ended.stdout
    assert "its capacity is free" in ended.stdout
    assert perf.balancer().release(first) is False
    again = lb("release", "planner", token, "--yes")
    assert (again.returncode, again.stdout) == (NOT_FOUND, "")
    for each in held[1:]:
        assert perf.balancer().release(each)
    waiting.join(60)  # the waiter got a lease and released it
    none_left = lb("leases", "planner")
    assert (none_left.returncode, none_left.stdout) == (OK, "")
    assert "no leases and no waiters" in none_left.stderr


@pytest.fixture
def start_waiting(perf: AgentPerf, namespace: str, raw: Raw) -> Any:
    """Return a function that starts a thread. The thread waits in the queue of the pool "planner" for at most a minute."""
    threads: list[threading.Thread] = []

    def start() -> threading.Thread:
        def wait() -> None:
            perf.balancer().release(perf.balancer().acquire("planner", wait=60))

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
        wait_until(lambda: raw.zcard(keys.pool(namespace, "planner").waitq) == 1, "a thread to wait in the queue")
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive()


def test_drain_waits_for_the_last_lease(lb: Run, perf: AgentPerf) -> None:
    balancer = perf.balancer()
    held = balancer.acquire("planner")
    assert held is not None
    busy = lb("drain", "planner", held.id, "--wait", "0.1")
    assert busy.returncode == FAILURE
    assert "still busy" in busy.stdout
    assert document(lb("drain", "planner", held.id, "--json"), "lb drain")["idle"] is False
    others = [balancer.acquire("planner") for _ in range(3)]
    assert [each.id for each in others if each is not None] == [{"p0": "p1", "p1": "p0"}[held.id]] * 2
    release = threading.Timer(0.5, balancer.release, [held])
    release.start()
    idle = lb("drain", "planner", held.id, "--wait", "20")
    release.join()
    assert idle.returncode == OK
    assert "idle: it can be stopped" in idle.stdout
    assert document(lb("undrain", "planner", held.id, "--json"), "lb undrain")["draining"] is False
    back = balancer.acquire("planner")
    assert back is not None
    assert back.id == held.id
    for each in (*others, back):
        balancer.release(each)


def test_remove_deletes_a_confirmed_instance(lb: Run, perf: AgentPerf) -> None:
    assert lb("remove", "planner", "p0").returncode == USAGE
    assert len(perf.balancer().instances["planner"]) == 2
    done = lb("remove", "planner", "p0", "--yes")
    assert (done.returncode, done.stderr) == (OK, "")
    assert "Removed p0 from planner" in done.stdout
    assert [each.id for each in perf.balancer().instances["planner"]] == ["p1"]
    assert lb("remove", "planner", "p0", "--yes").returncode == NOT_FOUND


def test_marked_instance_leaves_and_returns(lb: Run, perf: AgentPerf) -> None:
    text = shown(lb("mark-unhealthy", "planner", "p0"))
    assert text == "p0 of planner takes no new work until it is marked healthy.\n"
    taken = [perf.balancer().acquire("planner") for _ in range(2)]
    assert [each.id for each in taken if each] == ["p1", "p1"]
    assert document(lb("mark-healthy", "planner", "p0", "--json"), "lb mark-healthy")["healthy"] is True
    back = perf.balancer().acquire("planner")
    assert back is not None
    assert back.id == "p0"
    for each in (*taken, back):
        perf.balancer().release(each)


def test_update_changes_only_given_values(lb: Run, perf: AgentPerf) -> None:
    more = ("--label", "gpu", "--label", "eu", "--requests-per-minute", "60")
    text = shown(lb("update", "planner", "p0", "--capacity", "7", *more))
    assert text == "p0 of planner: capacity 7, weight 1, labels eu, gpu, 60 requests per minute.\n"
    found = document(lb("update", "planner", "p0", "--weight", "2.5", "--json"), "lb update")
    assert (found["capacity"], found["weight"], found["labels"], found["requests_per_minute"]) == (
        7,
        2.5,
        ["eu", "gpu"],
        60,
    )
    text = shown(lb("update", "planner", "p0", "--label", "", "--requests-per-minute", "inf"))
    assert text == "p0 of planner: capacity 7, weight 2.5, labels none.\n"
    (pool,) = perf.balancer().status("planner")
    assert [each.instance.max_capacity for each in pool.instances] == [7, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give at least one of --capacity, --weight, --label"),
        (("--capacity", "0"), "--capacity is 0; allowed: a whole number from 1"),
        (("--weight", "nan"), "--weight is nan"),
        (("--requests-per-minute", "-1"), "--requests-per-minute is -1.0"),
    ],
)
def test_invalid_updates_exit_2(lb: Run, words: tuple[str, ...], message: str) -> None:
    done = lb("update", "planner", "p0", *words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert message in done.stderr


def test_status_gives_reason_and_start_of_each_absence(lb: Run, perf: AgentPerf, raw: Raw, namespace: str) -> None:
    balancer = perf.balancer()
    assert "out of rotation" not in shown(lb("status", "planner"))
    balancer.configure("planner", PoolSettings(eject_after=1, base_ejection_time=250))  # the ejection outlasts the test
    for number in range(2, 4):
        balancer.register_instance(AgentInstance(f"p{number}", "planner", max_capacity=2))
    before = time.time()
    failed = balancer.acquire("planner")
    assert failed is not None
    balancer.release(failed, outcome="error")
    others = [name for name in ("p0", "p1", "p2", "p3") if name != failed.id]
    balancer.mark_unhealthy("planner", others[0])
    balancer.drain("planner", others[1])
    (pool,) = document(lb("status", "planner", "--json"), "lb status")["pools"]
    found = {each["instance"]: (each["out_since"], each["out_reason"]) for each in pool["instances"]}
    assert found[others[2]] == (None, None)
    for name, reason in (
        (failed.id, "ejected for its outcomes, for_ms=250000, in_a_row=1"),
        (others[0], "marked unhealthy by hand or by its program (`agentperf lb mark-healthy`)"),
        (others[1], "draining: marked by hand or by its program (`agentperf lb undrain`)"),
    ):
        since, text = found[name]
        assert abs(since - before) < 60
        assert text == reason
    text = shown(lb("status"))
    assert "out of rotation" in text
    assert has_line(text, failed.id, "ejected for its outcomes")
    raw.delete(keys.pool(namespace, "planner").events)
    assert has_line(shown(lb("status")), failed.id, "unknown", "ejected for its outcomes")


def test_status_shows_rests_with_end_and_cause(lb: Run, perf: AgentPerf) -> None:
    balancer = perf.balancer()
    limited = balancer.acquire("planner")
    assert limited is not None
    balancer.release(limited, outcome="rate_limited", retry_after=5000)
    cooled = {"p0": "p1", "p1": "p0"}[limited.id]
    balancer.cool_down("planner", cooled, 7000)
    (pool,) = document(lb("status", "planner", "--json"), "lb status")["pools"]
    found = {each["instance"]: each for each in pool["instances"]}
    for name, seconds, why in ((limited.id, 5000, "rate_limited"), (cooled, 7000, "cooled_down")):
        assert found[name]["state"] == "resting"
        assert seconds - 60 < found[name]["resting_s"] <= seconds
        assert found[name]["out_reason"].endswith(f"for_ms={seconds}000, why={why}")
    assert has_line(shown(lb("status")), limited.id, "resting: rate-limited by its service")


def test_repair_corrects_manual_changes(lb: Run, perf: AgentPerf, raw: Raw, namespace: str) -> None:
    state = keys.pool(namespace, "planner").state
    records.change(raw, state, "p1", load=2)
    raw.hset(state, "@orphan", "lease instance=p0 fence=5")
    assert "corrected the load of 1, dropped 1 orphaned lease or queue entry that" in lb("repair", "planner").stdout
    assert lb("repair", "planner").stdout == "Checked 2 instances of planner: nothing to repair.\n"
    assert perf.balancer().status("planner")[0].current_load == 0
    again = document(lb("repair", "planner", "--json"), "lb repair")
    assert (again["instances"], again["wrong"], again["orphans"]) == (2, 0, 0)


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (("status", "unknown"), "pool 'unknown'"),
        (("leases", "unknown"), "pool 'unknown'"),
        (("drain", "unknown", "p0"), "pool 'unknown'"),
        (("drain", "planner", "p9"), "instance 'p9' in pool 'planner'"),
        (("undrain", "planner", "p9"), "instance 'p9' in pool 'planner'"),
        (("remove", "planner", "p9", "--yes"), "instance 'p9' in pool 'planner'"),
        (("release", "planner", "@a:1:b:1", "--yes"), "token '@a:1:b:1' in pool 'planner'"),
        (("repair", "unknown"), "pool 'unknown'"),
        (("mark-healthy", "planner", "p9"), "instance 'p9' in pool 'planner'"),
        (("mark-unhealthy", "planner", "p9"), "instance 'p9' in pool 'planner'"),
        (("update", "planner", "p9", "--capacity", "3"), "instance 'p9' in pool 'planner'"),
    ],
)
def test_missing_objects_exit_4_and_change_nothing(
    lb: Run, raw: Raw, namespace: str, words: tuple[str, ...], missing: str
) -> None:
    pool = keys.pool(namespace, "planner")
    before = (set(raw.scan_iter(f"{namespace}:*")), raw.hgetall(pool.state))
    done = lb(*words)
    assert (done.returncode, done.stdout) == (NOT_FOUND, "")
    assert done.stderr == f"agentperf: not found: {missing}\n"
    assert (set(raw.scan_iter(f"{namespace}:*")), raw.hgetall(pool.state)) == before


@pytest.mark.parametrize(
    "words", [("leases",), ("drain", "planner", "p0", "--wait", "-1"), ("repair", ""), ("nonsense",)]
)
def test_wrong_usage_exits_2(lb: Run, words: tuple[str, ...]) -> None:
    done = lb(*words)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr


@pytest.mark.thorough
def test_events_are_printed_and_followed(
    lb: Run, perf: AgentPerf, server: Server, namespace: str, tmp_path: Path
) -> None:
    balancer = perf.balancer()
    balancer.configure("planner", PoolSettings(eject_after=1, base_ejection_time=250))  # the ejection outlasts the test
    for each in [balancer.acquire("planner") for _ in range(2)]:
        balancer.release(each, outcome="error" if each and each.id == "p0" else "ok")
    balancer.drain("planner", "p1")
    text = shown(lb("events", "planner", "--once"))
    assert [line.split()[2:4] for line in text.splitlines()] == [
        ["registered", "p0"],
        ["registered", "p1"],
        ["ejected", "p0"],
        ["draining", "p1"],
        ["panic", "unhealthy=1"],  # no healthy instance is left
    ]
    assert "for_ms=250000 in_a_row=1" in text
    found = document(lb("events", "planner", "--once", "--limit", "2", "--json"), "lb events")["events"]
    assert [(each["event"], each["instance"]) for each in found] == [("draining", "p1"), ("panic", None)]
    assert abs(found[0]["at"] - time.time()) < 60

    (pool,) = document(lb("status", "planner", "--json"), "lb status")["pools"]
    assert [(each["state"], each["limit"]) for each in pool["instances"]] == [("ejected", 2), ("draining", 0)]
    assert pool["settings"]["eject_after"] == 1
    assert pool["panic_s"] is not None

    seen = tmp_path / "seen"
    # If a shell runs the tests as a background job, child processes ignore SIGINT. So the program sets a handler.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from agentperf_redis.cli import main; main()"
    program = [sys.executable, "-c", code, "lb", "events", "planner", "--json"]
    place = {**os.environ, "AGENTPERF_REDIS_URL": server.url, "AGENTPERF_NAMESPACE": namespace}
    with seen.open("w") as file, subprocess.Popen(program, stdout=file, env=place) as follower:
        try:
            wait_until(lambda: len(seen.read_text().splitlines()) == 5, "the past events", timeout=90.0)
            balancer.undrain("planner", "p1")
            wait_until(lambda: len(seen.read_text().splitlines()) == 7, "the new events")
            lines = [json.loads(line)["event"] for line in seen.read_text().splitlines()]
            assert lines[-2:] == ["undrained", "calm"]
            follower.send_signal(signal.SIGINT)
            assert follower.wait(10) == 130
        finally:
            follower.kill()


def test_events_of_an_unknown_pool_exit_4(lb: Run) -> None:
    assert lb("events", "unknown", "--once").returncode == NOT_FOUND
