"""The error for a missing optional package names the package and the command that installs it."""

from __future__ import annotations

import importlib

import pytest

from agentperf_redis.extras import MissingExtra, extra, install_command


def test_missing_package_is_named_with_the_line_that_installs_it() -> None:
    with pytest.raises(MissingExtra) as met, extra("django"):
        importlib.import_module("no_such_package_here.backends")
    assert str(met.value) == 'this needs the package no_such_package_here: pip install "agentperf-redis[django]"'
    assert install_command("django") in str(met.value)
    assert met.value.name == "no_such_package_here"


def test_fault_of_this_package_stays_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError) as met, extra("django"):
        importlib.import_module("agentperf_redis.no_such_module")
    assert not isinstance(met.value, MissingExtra)
