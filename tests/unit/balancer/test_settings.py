"""The settings of a pool: invalid ones are refused, and the README lists the defaults."""

from __future__ import annotations

import re
from dataclasses import asdict
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


def test_readme_lists_the_default_settings() -> None:
    text = README.read_text(encoding="utf-8")
    table = re.findall(
        r"^\| `(\w+)` \| ([\w.]+) \| \S", text[text.index("| setting | default | why |") :], re.MULTILINE
    )
    listed = {name: default for name, default in table if name in PoolSettings.__dataclass_fields__}
    assert listed == {name: str(value) for name, value in asdict(PoolSettings()).items()}
