"""Every test runs in exactly one kind of run, except the repetitions that only `--everything` runs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import selection
from tests.support.places import ROOT


class Item:
    """A collected test, as far as the selection looks at it."""

    def __init__(
        self, name: str, *marks: str, servers: tuple[str, ...] = (), folder: str = "unit", **params: str
    ) -> None:
        parameters = "-".join(params.values())
        self.name = f"{name}[{parameters}]" if params else name
        self.path = Path(ROOT, "tests", folder, "test_it.py")
        self.nodeid = f"{self.path}::{self.name}"
        self.callspec = SimpleNamespace(params=params)
        self._marks = {mark: SimpleNamespace(args=()) for mark in marks}
        if servers:
            self._marks["servers"] = SimpleNamespace(args=servers)

    def get_closest_marker(self, name: str) -> Any:
        return self._marks.get(name)


KINDS = ("valkey", "redis82", "cluster")
PLAIN = [Item(f"test_{number}") for number in range(20)]
ON_SERVERS = [Item(f"test_s{number}", server_kind=kind) for number in range(20) for kind in KINDS]
LONG = [Item(f"test_l{number}", "thorough", server_kind=kind) for number in range(20) for kind in KINDS]
BOTH = [
    Item(f"test_b{number}", call=call, server_kind=kind)
    for number in range(20)
    for call in selection.VERSIONS
    for kind in KINDS
]
NAMED = [Item("test_n", "thorough", servers=KINDS, server_kind=kind) for kind in KINDS]
OTHER_PARAMETER = [Item("test_o", call=call, server_kind=kind) for call in ("get", "put") for kind in KINDS]
BORDER = [Item("test_d", folder="borders")]
ALL: Any = [*PLAIN, *ON_SERVERS, *LONG, *BOTH, *NAMED, *OTHER_PARAMETER, *BORDER]


def run(*options: str) -> set[Any]:
    config: Any = SimpleNamespace(
        getoption=lambda name: name in options, args=["tests"], invocation_params=SimpleNamespace(dir=ROOT)
    )
    return set(selection.chosen(config, ALL))


def kinds(items: list[Item], found: set[Any]) -> Counter[str]:
    return Counter(item.callspec.params["server_kind"] for item in items if item in found)


def test_runs_have_no_test_in_common() -> None:
    plain, long, other_servers = run(), run("--long"), run("--other-servers")
    assert not plain & long | plain & other_servers | long & other_servers
    assert run("--long", "--other-servers") == long | other_servers
    assert not run("--thorough") & plain
    assert run("--thorough") == long | other_servers | run("--other-api") - plain
    assert run("--everything") == set(ALL) == run("--thorough") | plain | repetitions()
    assert {*PLAIN, *BORDER, *NAMED, *OTHER_PARAMETER, *ON_SERVERS} <= plain | long | other_servers


def repetitions() -> set[Any]:
    """Return the tests on other servers that `--other-servers` omits."""
    return {item for item in {*LONG, *BOTH} - run("--other-servers") if item.callspec.params["server_kind"] != "valkey"}


def test_run_with_the_other_api_has_the_other_version_of_each_quick_test() -> None:
    plain, other = run(), run("--other-api")
    assert plain - {*BOTH} == other - {*BOTH}
    assert not plain & other & {*BOTH}
    assert {item.name.replace("async", "sync") for item in BOTH if item in plain} == {
        item.name.replace("async", "sync") for item in BOTH if item in other
    }


def test_plain_run_has_quick_tests_on_valkey_only() -> None:
    plain = run()
    assert set(PLAIN) <= plain
    assert not plain & {*LONG, *NAMED, *BORDER}
    assert kinds(ON_SERVERS, plain) == {"valkey": 20}


def test_each_version_runs_on_valkey_and_one_on_other_servers() -> None:
    plain, other_servers = run(), run("--other-servers")
    assert kinds(BOTH, plain) == kinds(BOTH, run("--other-api")) == {"valkey": 20}
    assert kinds(BOTH, other_servers) == {"redis82": 20, "cluster": 20}
    for found in (plain, other_servers):  # a checksum chooses the version of each test, so both versions occur
        assert min(Counter(item.callspec.params["call"] for item in BOTH if item in found).values()) > 4


def test_long_tests_run_on_valkey_and_one_other_server() -> None:
    assert kinds(LONG, run("--long")) == {"valkey": 20}
    other_servers = run("--other-servers")
    assert sum(kinds(LONG, other_servers).values()) == 20
    assert len({item.name.partition("[")[0] for item in LONG if item in other_servers}) == 20
    assert min(kinds(LONG, other_servers).values()) > 4
    assert kinds(NAMED, other_servers) == {"redis82": 1, "cluster": 1}, "its mark names more servers"


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
@pytest.mark.parametrize("waiting", [0, 1, 5, 30])
def test_each_worker_begins_with_its_share_of_the_longest(workers: int, waiting: int) -> None:
    longest = [Item(f"test_w{number}", "waits") for number in range(waiting)]
    items: Any = [*PLAIN, *longest, *PLAIN[:10]]
    found: Any = selection.ordered(items, workers)
    assert Counter(found) == Counter(items)
    starts, left = [], len(items)
    for index in range(workers):  # find the first test that pytest-xdist gives to each worker
        starts.append(len(items) - left)
        left -= left // (workers - index)
    shares = Counter(re.sub(r"\d", "", found[start].name) for start in starts)
    assert shares["test_w"] == min(workers, waiting)
