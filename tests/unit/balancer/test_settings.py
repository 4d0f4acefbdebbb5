"""The settings of a pool: invalid ones are refused, and help and README state the defaults."""

from __future__ import annotations

import inspect
import re
from dataclasses import asdict, fields
from typing import Any

import pytest

from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.errors import InvalidArgument
from tests.support.places import README


@pytest.mark.parametrize(
    "facts",
    [
        {"eject_after": 0},
        {"base_ejection_time": 0},
        {"base_ejection_time": 10, "max_ejection_time": 5},
        {"max_ejection_share": 1.1},
        {"panic_threshold": 0},
        {"slow_after": -1},
        {"adaptive": 1},
        {"slow_start": float("nan")},
        {"rate_burst": -1},
        {"unhealthy_threshold": 0},
        {"healthy_threshold": True},
    ],
)
def test_bad_setting_is_refused_by_its_name(facts: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        PoolSettings(**facts)
    assert caught.value.argument in facts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"base_ejection_time": 400},
            "base_ejection_time is 400; allowed: seconds up to max_ejection_time, 300",
        ),
        (
            {"max_ejection_time": 5},
            "max_ejection_time is 5; allowed: seconds from base_ejection_time, 10, to 86400",
        ),
        (
            {"base_ejection_time": 40, "max_ejection_time": 30},
            "max_ejection_time is 30; allowed: seconds from base_ejection_time, 40",
        ),
        ({"max_ejection_time": 0}, "max_ejection_time is 0; allowed: seconds from 0.001 to 86400"),
    ],
)
def test_ejection_beyond_its_maximum_names_the_given_argument(given: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        PoolSettings(**given)  # type: ignore[arg-type]
    assert str(refused.value).startswith(message)
    assert PoolSettings(base_ejection_time=400, max_ejection_time=400).base_ejection_time == 400


def test_readme_names_the_defaults_of_the_settings_to_tune() -> None:
    (bullet,) = re.findall(
        r"^- \*\*Settings\.\*\* The `PoolSettings`.*?(?=\n\n|\n- )",
        README.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    named = dict(re.findall(r"`(\w+)`\s\((\w+)", bullet))
    defaults = {name: str(value) for name, value in asdict(PoolSettings()).items()}
    assert len(named) >= 4
    assert {name: defaults.get(name) for name in named} == named


def test_help_explains_every_setting_with_its_default() -> None:
    text = inspect.getdoc(PoolSettings) or ""
    explained = dict(re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(explained) == [field.name for field in fields(PoolSettings)]
    assert [name for name, reason in explained.items() if "Default" not in reason] == []
