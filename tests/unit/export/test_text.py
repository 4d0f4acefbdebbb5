"""The text of the exporter has the same content as that of prometheus_client."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from agentperf_redis.export import prometheus
from agentperf_redis.export.families import values
from agentperf_redis.export.reading import Reading
from agentperf_redis.export.text import Form, text
from tests.support import exposition
from tests.support.readings import reading

HARD_NAMES = ('quo"te', "back\\slash", "per%cent %s {}", "zwölf", "{le=1}", "a,b", "#", " ")


def written_by_the_library(found: Reading, form: Form, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(prometheus, "read", lambda _: found)
    unread: Any = None
    collector: Any = prometheus.Collector(unread, native=form is Form.NATIVE)
    if form is Form.PLAIN:
        return generate_latest(collector).decode()
    version = "2.0.0" if form is Form.NATIVE else "1.0.0"
    written: bytes = generate_openmetrics(collector, version=version)  # type: ignore[no-untyped-call]
    return written.decode()


@pytest.mark.parametrize("form", Form)
def test_text_equals_that_of_prometheus_client(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reading(*HARD_NAMES)
    parse = exposition.plain if form is Form.PLAIN else exposition.openmetrics
    ours, theirs = text(values(found), form), written_by_the_library(found, form, monkeypatch)
    assert parse(ours) == parse(theirs)
    assert [line for line in ours.splitlines() if line.startswith("#")] == [
        line for line in theirs.splitlines() if line.startswith("#")
    ]


@pytest.mark.parametrize("form", Form)
def test_empty_namespace_has_all_families(form: Form) -> None:
    written = text(values(Reading("n", "1")), form)
    parse = exposition.plain if form is Form.PLAIN else exposition.openmetrics
    found = parse(written)
    assert found.kinds["agentperf_agent_execution_seconds"] == "histogram"
    assert found.value("agentperf_up") == 1
    assert written.endswith("# EOF\n") == (form is not Form.PLAIN)


def test_labels_survive_the_round_trip() -> None:
    found = exposition.openmetrics(text(values(reading(*HARD_NAMES)), Form.OPENMETRICS))
    agents = {dict(labels)["agent"] for labels in found.of("agentperf_agent_execution_seconds_count")}
    assert agents == set(HARD_NAMES)


def test_native_form_has_no_classic_buckets() -> None:
    found = exposition.openmetrics(text(values(reading("a")), Form.NATIVE))
    assert found.of("agentperf_agent_execution_seconds_bucket") == {}
    assert len(found.native) == 1
