"""dogpile.cache's own tests of backends, serializers and mutexes, with the backend of this library.

dogpile.cache contains these tests for authors of backends. pytest runs this module in a process of its own (see
`tests/borders/test_dogpile.py`), since dogpile's tests use their own markers.
"""

from __future__ import annotations

import os
from typing import Any

from dogpile.cache import register_backend
from dogpile.testing import fixtures

URL, NAMESPACE = "DOGPILE_SUITE_URL", "DOGPILE_SUITE_NAMESPACE"
"""The environment variables with the URL of the server and the namespace."""

_register: Any = register_backend
_register("agentperf.suite", "agentperf_redis.integrations.dogpile", "AgentPerfBackend")


def _arguments(name: str, **others: Any) -> dict[str, Any]:
    place = {"url": os.environ.get(URL), "namespace": os.environ.get(NAMESPACE), "name": name}
    return {"arguments": place | others}


class _AgentPerf:
    backend = "agentperf.suite"
    config_args = _arguments("plain")


class TestBackend(_AgentPerf, fixtures._GenericBackendTestSuite):
    pass


class TestSerializer(fixtures._GenericSerializerTestSuite, TestBackend):
    pass


class TestMutex(_AgentPerf, fixtures._GenericMutexTestSuite):
    pass


class TestMutexWithTimeout(TestMutex):
    config_args = _arguments("timeout", lock_timeout=60)


class TestLocalCopies(TestBackend):
    config_args = _arguments("local", local_size=100, expiration_time=600)
