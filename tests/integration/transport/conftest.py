"""Fixtures of the transport tests."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.driving import Run


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Run:
    """Run a flow. The test runs twice: with the blocking driver and with the asyncio driver."""
    if request.param == "sync":
        return lambda backend, flow: backend.run(flow)
    return lambda backend, flow: runner.run(backend.arun(flow))
