"""Which tests a run includes, and their order.

Plain `pytest` runs the quick tests on Valkey. `--thorough` runs the other tests. Two parts of `--thorough` have their
own options: `--long` runs the tests marked `thorough` and those in tests/borders, on Valkey; `--other-servers` runs the
tests on the other kinds of server. `--everything` runs all. If a file is named on the command line, all of its tests
run. A test marked `servers` runs on the listed kinds only.

A test with the fixture `call` has two versions: for the blocking and for the asyncio methods. Plain `pytest` runs one
of the two. `pytest --other-api` runs the same tests as plain `pytest`, but the other version of each test that has
two.

`--thorough` omits two kinds of repetitions, which `--everything` runs:

- The two versions of a test run the same flow, and tests/contract/test_parity.py compares their code. A server
  cannot tell the versions apart, so only one version runs on each of the other kinds of server.
- A test marked `thorough` runs on Valkey and on one other kind of server, unless its mark `servers` names more kinds.

A checksum of the test's name chooses the version and the server, so that each method and each server has its share.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.places import ROOT

OPTIONS = {
    "--thorough": "run only the tests that plain pytest omits",
    "--long": "of these, run the long ones",
    "--other-servers": "of these, run those on the other servers",
    "--everything": "run all tests",
    "--other-api": "run plain pytest's tests of blocking methods with the asyncio methods, and the other way round",
}
VERSIONS = ("sync", "async")
"""The parameters of the fixture `call`."""
BORDERS = ROOT / "tests" / "borders"
"""The tests with packages of other projects. Plain pytest does not run these tests."""
UNIT = ROOT / "tests" / "unit"
"""The tests that need no server."""


def parts(config: pytest.Config) -> tuple[bool, bool]:
    """Return whether a run includes the long tests, and whether it includes those on the other servers."""
    both = config.getoption("--thorough") or config.getoption("--everything")
    return both or config.getoption("--long"), both or config.getoption("--other-servers")


def omitted_folders(config: pytest.Config) -> tuple[Path, ...]:
    """Return the folders of which a run includes no test, unless they are named on the command line."""
    long, other_servers = parts(config)
    if long:
        return ()
    return (BORDERS, UNIT) if other_servers else (BORDERS,)


def chosen(config: pytest.Config, items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Return the tests that a run includes."""
    if config.getoption("--everything"):
        return set(items)
    long, other_servers = parts(config)
    other_api = config.getoption("--other-api")
    if not (long or other_servers):
        named = {config.invocation_params.dir / argument.partition("::")[0] for argument in config.args}
        return {item for item in items if item.path in named or is_quick(item, other_api=other_api)}
    found = set[pytest.Item]()
    if long:
        found |= {item for item in items if _is_on_usual_server(item) and _is_long(item)}
    if other_servers:
        found |= _without_repetitions(item for item in items if not _is_on_usual_server(item))
    if config.getoption("--thorough"):
        found |= {item for item in items if is_quick(item, other_api=True) and not is_quick(item)}
    return found


def ordered(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """Order the tests so that each worker of pytest-xdist begins with its share of the tests marked `waits`.

    A worker gets a range of adjacent tests. After these, it takes tests from the end of another worker's range.
    """
    first, others = list[pytest.Item](), list[pytest.Item]()
    for item in items:
        (others if item.get_closest_marker("waits") is None else first).append(item)
    remaining, found = iter(others), list[pytest.Item]()
    for index in range(workers):
        size = (len(items) - len(found)) // (workers - index)
        mine = first[index::workers]
        found += [*mine, *itertools.islice(remaining, max(0, size - len(mine)))]
    return found


def is_quick(item: pytest.Item, *, other_api: bool = False) -> bool:
    """Return whether plain pytest, or `pytest --other-api`, runs the test."""
    return not _is_long(item) and _is_on_usual_server(item) and _is_chosen_version(item, other=other_api)


def _is_long(item: pytest.Item) -> bool:
    return item.get_closest_marker("thorough") is not None or _is_about_borders(item.path)


@functools.cache
def _is_about_borders(path: Path) -> bool:
    return path.is_relative_to(BORDERS)


def _without_repetitions(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Return the tests on unusual servers without the repetitions that the docstring of this module names."""
    found, same = set[pytest.Item](), defaultdict[str, list[pytest.Item]](list)
    for item in filter(_is_chosen_version, items):
        if not _is_long(item) or item.get_closest_marker("servers") is not None:
            found.add(item)
        else:
            same[_name(item, *VERSIONS, _parameters(item)["server_kind"])].append(item)
    for name, repetitions in same.items():
        repetitions.sort(key=lambda item: item.nodeid)
        found.add(repetitions[zlib.crc32(name.encode()) % len(repetitions)])
    return found


def _is_on_usual_server(item: pytest.Item) -> bool:
    only = item.get_closest_marker("servers")
    usual = "valkey" if only is None else only.args[0]
    return _parameters(item).get("server_kind") in (None, usual)


def _is_chosen_version(item: pytest.Item, *, other: bool = False) -> bool:
    """Return whether a checksum chose this version of a test that has a blocking and an asyncio version.

    Args:
        item: the test.
        other: whether to choose the other version.
    """
    version: object = _parameters(item).get("call")
    if version not in VERSIONS:  # some tests use the name `call` for another parameter
        return True
    return version == VERSIONS[(zlib.crc32(_name(item, *VERSIONS).encode()) + other) % 2]


def _name(item: pytest.Item, *without: str) -> str:
    """Return the name of a test without these parameters."""
    function, _, parameters = item.name.removesuffix("]").partition("[")
    return "-".join([item.path.name, function, *(each for each in parameters.split("-") if each not in without)])


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params
