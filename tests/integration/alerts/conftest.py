"""Fixtures of the alerts."""

from __future__ import annotations

import pytest

from tests.support.evaluators import Evaluators
from tests.support.servers import Server
from tests.support.workers import Workers


@pytest.fixture
def evaluators(workers: Workers, server: Server, namespace: str) -> Evaluators:
    """Three processes that evaluate alerts; one of them is killed while it evaluates."""
    return Evaluators(workers.start, server.url, namespace)
