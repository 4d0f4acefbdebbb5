"""Runs Django's own tests of caches and sessions with the cache backend of this library.

This module is a separate program, since a process has only one set of Django settings. Its PYTHONPATH leads to the
packages `cache` and `sessions_tests` of Django's tests (see `tests/borders/test_django.py`). Its arguments are the URL
of the server, the import path of a cache backend, and the names of the tests to run.
"""

from __future__ import annotations

import os
import sys
import uuid
from typing import Any

import django
from asgiref.sync import async_to_sync
from django.conf import settings
from django.test import TestCase, override_settings
from django.test.runner import DiscoverRunner

from agentperf_redis.integrations.django import AgentPerfCache

METHODS = (
    *("add", "get", "set", "touch", "delete", "get_many", "set_many", "delete_many"),
    *("get_or_set", "has_key", "incr", "decr", "incr_version", "decr_version", "clear"),
)


class AsyncCache(AgentPerfCache):  # type: ignore[misc,unused-ignore]
    """A cache whose blocking methods call the asyncio methods, so that Django's blocking tests also cover asyncio."""


def _through_asyncio(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return async_to_sync(getattr(self, f"a{name}"))(*args, **kwargs)

    return method


for _name in METHODS:
    setattr(AsyncCache, _name, _through_asyncio(_name))


def main(url: str, backend: str, *labels: str) -> int:
    """Run tests. Returns the number of failures."""
    os.environ["AGENTPERF_NAMESPACE"] = uuid.uuid4().hex
    alias = {"BACKEND": backend, "LOCATION": url}
    settings.configure(
        CACHES={"default": alias},
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.sessions", "cache", "sessions_tests"],
        SECRET_KEY="for these tests",
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        MIDDLEWARE=[],
        USE_TZ=False,
    )
    django.setup()
    from cache.tests import BaseCacheTests, caches_setting_for_tests

    @override_settings(CACHES=caches_setting_for_tests(base=alias))
    class CacheTests(BaseCacheTests, TestCase):  # type: ignore[misc,unused-ignore]
        """Django's tests of every cache backend."""

        # These two tests expect a full cache to drop a third or all of its entries. Our backend drops only one entry.
        test_cull = None
        test_zero_cull = None

    sys.modules[__name__].CacheTests = CacheTests  # type: ignore[attr-defined]
    failures: int = DiscoverRunner(verbosity=2).run_tests(list(labels))
    return failures


if __name__ == "__main__":
    from tests.support import django_suite

    sys.exit(django_suite.main(*sys.argv[1:]))
