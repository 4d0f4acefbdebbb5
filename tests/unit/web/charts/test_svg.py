from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from markupsafe import Markup

from agentperf_redis.web.charts.svg import curve, element, hover_areas, tidy
from agentperf_redis.windows import Interval


def test_texts_and_attributes_are_escaped() -> None:
    hostile = "<script>\"'&"
    found = element("text", hostile, aria_label=hostile)
    parsed = ET.fromstring(found)
    assert (parsed.text, parsed.get("aria-label")) == (hostile, hostile)
    assert "<script" not in found


def test_elements_inside_are_not_escaped_again() -> None:
    assert element("g", element("title", "a&b")) == "<g><title>a&amp;b</title></g>"
    assert isinstance(element("g"), Markup)


def test_attributes_without_a_value_are_left_out() -> None:
    assert (
        element("rect", x=1.0, rx=None, class_="s1", text_anchor="end") == '<rect x="1" class="s1" text-anchor="end"/>'
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.00 s", "1 s"),
        ("1.50 s", "1.5 s"),
        ("75.0%", "75%"),
        ("1,000", "1,000"),
        ("100 ms", "100 ms"),
        ("0.05", "0.05"),
    ],
)
def test_labels_of_round_numbers_have_no_trailing_zeros(text: str, expected: str) -> None:
    assert tidy(text) == expected


def test_curve_is_interrupted_where_there_is_no_value() -> None:
    assert curve([1.0, 2.0, None, 2.0, 2.0], 2.0, 10.0) == "M100 5L300 0M700 0L900 0"


def test_lone_value_becomes_a_short_line() -> None:
    assert curve([None, 1.0, None, None], 2.0, 10.0) == "M291.67 5H458.33"


def test_curve_of_nothing_is_empty() -> None:
    assert curve([], 1.0, 10.0) == ""
    assert curve([None, None], 1.0, 10.0) == ""


def test_curve_stays_inside_its_height() -> None:
    assert curve([5.0, 5.0], 1.0, 10.0) == "M250 0L750 0"
    assert curve([5.0, 5.0], 0.0, 10.0) == "M250 10L750 10"


def test_each_step_has_a_description_for_the_pointer() -> None:
    found = hover_areas([Interval(0, 60), Interval(60, 120)], ["p95 1 s", "no data"], 100)
    assert found.count("<title>") == 2
    assert "Jan 1 00:01:00 to 00:02:00 UTC: no data" in found
