"""Tests of the demo's checks on constructed evidence: sound evidence passes, and each fault fails its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agentperf_redis.balancer.model import AgentInstance, InstanceStatus, LoadBalancingStrategy, PoolStatus
from agentperf_redis.demo.checks import Evidence, checks
from agentperf_redis.demo.journal import Account, Journal
from agentperf_redis.demo.report import Casualty

KILLED_AT = 100.0


def account(number: int, keys: list[str], steps: int, *, through: bool = True) -> Account:
    made = Account(Path(f"{number}"), process=f"host:{number}:x")
    made.began.update(keys)
    made.used.update({"a": 5, "b": 5})
    made.steps = [(90.0 + at, "reader") for at in range(steps)]
    made.result = {"digest": "d" * 64, "lines": 1, "findings": 1, "worst": []} if through else None
    return made


def pool(peak: int = 2, load: int = 0) -> PoolStatus:
    instance = AgentInstance("reader-1", "reader", current_load=load, max_capacity=2)
    status = InstanceStatus(instance, peak_load=peak, served=1, failed=0, failed_in_a_row=0, fence=1)
    return PoolStatus("reader", LoadBalancingStrategy.LEAST_LOADED, (status,), waiting=0, granted=0, overdue=0)


def evidence() -> Evidence:
    """Evidence of three workers. The third was killed at time 100.0. It held one lease and had two unflushed steps."""
    victim = account(2, ["c"], 10, through=False)
    return Evidence(
        accounts=[account(0, ["a"], 10), account(1, ["b"], 10), victim],
        failed=[],
        victim=victim,
        killed_at=KILLED_AT,
        casualty=Casualty(2, 5, ("reader",), 3.0),
        left=[],
        pools=[pool()],
        regained={"reader": 2},
        granted={"reader": 33},
        tried={"reader": 2},
        recorded={"reader": 28},
    )


def test_sound_evidence_passes_every_check() -> None:
    for check in checks(evidence()):
        assert check.held, check


def test_kill_may_separate_a_step_from_its_model_call() -> None:
    for count in (27, 28, 29):
        assert all(check.held for check in checks(replace(evidence(), calls={"reader": count, "other": 5})))


def test_run_without_a_kill_omits_kill_checks() -> None:
    sound = evidence()
    alive = replace(
        sound,
        accounts=sound.accounts[:2],
        victim=None,
        killed_at=None,
        casualty=None,
        granted={"reader": 20},
        tried={},
        recorded={"reader": 20},
    )
    found = checks(alive)
    assert all(check.held for check in found)
    assert not any("killed while" in check.promise for check in found)


def change_digest(sound: Evidence) -> Evidence:
    assert sound.accounts[0].result is not None
    sound.accounts[0].result["digest"] = "e" * 64
    return sound


def compute_again(sound: Evidence) -> Evidence:
    sound.accounts[0].began["b"] += 1
    return sound


def compute_nothing(sound: Evidence) -> Evidence:
    for each in sound.accounts:
        each.began.clear()
    return sound


BROKEN: dict[str, tuple[str, Callable[[Evidence], Evidence]]] = {
    "a worker failed": (
        "every worker that was not killed",
        lambda sound: replace(sound, failed=["worker 1 ended with exit code 1: Boom"]),
    ),
    "a worker has no result": (
        "every worker that was not killed",
        lambda sound: replace(
            sound, accounts=[sound.accounts[0], account(1, [], 10, through=False), sound.accounts[2]]
        ),
    ),
    "reports differ": ("every worker's report", change_digest),
    "a key was computed twice": ("each computation", compute_again),
    "nothing was computed": ("each computation", compute_nothing),
    "the victim's capacity never came back": (
        "its capacity came back",
        lambda sound: replace(sound, casualty=Casualty(2, 5, ("reader",), None), regained={"reader": 1}),
    ),
    "the victim held nothing": (
        "one worker was killed",
        lambda sound: replace(sound, casualty=Casualty(2, 5, (), 3.0), granted={"reader": 32}),
    ),
    "its lease never ended": (
        "its capacity came back",
        lambda sound: replace(sound, casualty=Casualty(2, 5, ("reader",), None)),
    ),
    "a unit is missing": ("its capacity came back", lambda sound: replace(sound, regained={"reader": 1})),
    "over capacity": ("no instance ever had more", lambda sound: replace(sound, pools=[pool(peak=3)])),
    "a lease is left": ("no lease is left", lambda sound: replace(sound, left=["reader"])),
    "load is left": ("no lease is left", lambda sound: replace(sound, pools=[pool(load=1)])),
    "a grant without a step": ("leases granted", lambda sound: replace(sound, granted={"reader": 34})),
    "a step without a grant": ("leases granted", lambda sound: replace(sound, granted={"reader": 31})),
    "no grants": ("leases granted", lambda sound: replace(sound, granted={})),
    "a step not recorded": ("every step is in the metrics", lambda sound: replace(sound, recorded={"reader": 26})),
    "recorded twice": ("every step is in the metrics", lambda sound: replace(sound, recorded={"reader": 31})),
    "a call without a step": (
        "every recorded step is also",
        lambda sound: replace(sound, calls={"reader": 30}),
    ),
    "a step without a call": (
        "every recorded step is also",
        lambda sound: replace(sound, calls={"reader": 26}),
    ),
    "nothing recorded": ("every step is in the metrics", lambda sound: replace(sound, recorded={})),
}


@pytest.mark.parametrize(("promise", "spoil"), BROKEN.values(), ids=BROKEN.keys())
def test_each_fault_fails_only_its_own_check(promise: str, spoil: Callable[[Evidence], Evidence]) -> None:
    broken = [check.promise for check in checks(spoil(evidence())) if not check.held]
    assert len(broken) == 1
    assert broken[0].startswith(promise)


def test_victim_that_survives_fails_the_checks() -> None:
    away = replace(evidence(), casualty=None, killed_at=None, granted={"reader": 32}, recorded={"reader": 30})
    broken = {check.promise.split(" ")[0] for check in checks(away) if not check.held}
    assert broken == {"every", "one", "its"}


def test_growing_journal_is_read_in_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    read = Account(path)
    read.update()
    assert read.files == 0

    journal = Journal(path)
    journal.hello("host:1:x")
    journal.began("reader a.py")
    journal.computed("reader a.py", 0.25)
    journal.used("reader a.py")
    journal.step("reader", "reader-1")
    journal.lost("critic")
    journal.reviewed("odd\udcff.py")
    with path.open("ab") as file:
        file.write(b"used\treader")
    read.update()
    assert (read.process, read.files, read.lost) == ("host:1:x", 1, 1)
    assert read.began == read.used == {"reader a.py": 1}
    assert read.spent == {"reader a.py": 0.25}
    assert [agent for _, agent in read.steps] == ["reader"]
    assert read.instances == {"reader-1": 1}

    with path.open("ab") as file:
        file.write(b" b.py\n")
    journal.finished({"digest": "d"})
    journal.close()
    read.update()
    read.update()
    assert read.used == {"reader a.py": 1, "reader b.py": 1}
    assert read.result == {"digest": "d"}


def test_journal_with_unknown_lines_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="nonsense"):
        Account(path).update()
