"""Many clients that are never closed cause a warning; one client that lives until the process ends causes none."""

from __future__ import annotations

import gc
import uuid
import warnings
from collections.abc import Iterator

import pytest

from agentperf_redis.open_clients import FIRST_WARNING_AT, OpenClient, place_of_creation

PLACE = "app.py:7"


@pytest.fixture
def address() -> Iterator[str]:
    """A server's URL that only this test uses. The open clients of the process are counted by URL and namespace."""
    yield f"redis://{uuid.uuid4().hex}/0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def test_tenth_open_client_warns_with_its_place(address: str) -> None:
    kept = [OpenClient(address, "agentperf", PLACE) for _ in range(FIRST_WARNING_AT - 1)]
    with pytest.warns(RuntimeWarning, match="10 clients") as shown:
        kept.append(OpenClient(address, "agentperf", PLACE))
    assert PLACE in str(shown[0].message)
    kept += [OpenClient(address, "agentperf", PLACE) for _ in range(89)]
    with pytest.warns(RuntimeWarning, match="100 clients"):
        kept.append(OpenClient(address, "agentperf", PLACE))
    for each in kept:
        each.closed()


def test_closed_clients_do_not_warn(address: str) -> None:
    for _ in range(3 * FIRST_WARNING_AT):
        client = OpenClient(address, "agentperf", PLACE)
        client.closed()
        client.closed()


def test_clients_of_several_namespaces_do_not_warn(address: str) -> None:
    kept = [OpenClient(address, f"tenant-{number}", PLACE) for number in range(2 * FIRST_WARNING_AT)]
    for each in kept:
        each.closed()


def test_dropped_clients_warn_and_count(address: str) -> None:
    def drop() -> None:
        OpenClient(address, "agentperf", PLACE)
        gc.collect()

    for _ in range(FIRST_WARNING_AT - 1):
        with pytest.warns(ResourceWarning, match=PLACE):
            drop()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        drop()
    assert {each.category for each in shown} == {ResourceWarning, RuntimeWarning}


def test_place_of_creation_is_outside_the_library() -> None:
    assert place_of_creation().startswith(__file__)
