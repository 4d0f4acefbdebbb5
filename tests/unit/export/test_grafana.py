"""The dashboard is valid for Grafana's SDK, its queries are PromQL, and they name only exported metrics and labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis.export.families import FAMILIES, FamilyKind, values
from agentperf_redis.export.text import Form, exposed_name, text
from tests.support import exposition
from tests.support.readings import reading

grafana = pytest.importorskip(
    "agentperf_redis.export.grafana", reason="needs the extra grafana", exc_type=ModuleNotFoundError
)
promql = pytest.importorskip("promql_parser")
pytestmark = pytest.mark.thorough  # the imported packages are large

OF_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds."""


def queries() -> list[str]:
    return [query for panels in grafana.ROWS.values() for panel in panels for query, _ in panel.queries]


def selectors(query: str) -> Iterator[Any]:
    """Yield the vector selectors of a query, as a PromQL parser sees them."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)

    assert promql.walk(promql.parse(query.replace("$__rate_interval", "1m")), visit, None)
    yield from found


def test_dashboard_is_valid_for_the_sdk() -> None:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    written = json.loads(grafana.dashboard())
    read = Dashboard.from_json(written)
    assert json.loads(JSONEncoder().encode(read)) == written
    assert [panel["title"] for panel in written["panels"] if panel["type"] == "row"] == list(grafana.ROWS)
    shown = [target["expr"] for panel in written["panels"] for target in panel.get("targets", ())]
    assert shown == queries()
    assert grafana.dashboard() == grafana.dashboard()


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(grafana.dashboard())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def test_queries_name_only_exported_metrics_and_labels() -> None:
    page = exposition.plain(text(values(reading("a")), Form.PLAIN))
    labels: dict[str, set[str]] = {}
    for name, own in page.values:
        labels.setdefault(name, set(OF_PROMETHEUS)).update(label for label, _ in own)
    found = [selector for query in queries() for selector in selectors(query)]
    assert len(found) > 20
    for selector in found:
        assert selector.name in labels, f"{selector.name} is not exported"
        used = {matcher.name for matcher in selector.matchers.matchers}
        assert used <= labels[selector.name], f"{selector.name} has no labels {used - labels[selector.name]}"


def test_dashboard_shows_every_family_of_agents() -> None:
    """Some panels show sums over types or models, so it is easy to leave out a metric."""
    from agentperf_redis.export.families import AGENTS

    shown = {selector.name for query in queries() for selector in selectors(query)}
    names = {each.name + "_bucket" if each.kind is FamilyKind.HISTOGRAM else exposed_name(each) for each in AGENTS}
    assert names <= shown
    assert set(AGENTS) < set(FAMILIES)
