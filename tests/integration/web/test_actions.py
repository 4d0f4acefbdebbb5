"""Each action of the web page makes only the change that it announces, and the next page reports this change."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Callable, Iterator

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.balancer.model import InstanceState
from agentperf_redis.web import app
from agentperf_redis.web.actions import ACTIONS
from tests.support.every_command import fill, release
from tests.support.servers import Server
from tests.support.web import Browser

Act = Callable[..., str]


@pytest.fixture
def browser(perf: AgentPerf, runner: asyncio.Runner) -> Iterator[Browser]:
    """A browser at a site with actions, in a namespace where each service is in use."""
    fill(perf)
    yield Browser(runner, app(perf, allow_actions=True, refresh=0.05))
    release(perf)


@pytest.fixture
def act(browser: Browser) -> Act:
    """Send the form of an action as the page does. Returns the notice on the next page."""
    shown = browser.get("/alerts")
    assert shown.status == 200
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', shown.text)
    assert found is not None

    def run(name: str, back: str = "/alerts", **fields: str) -> str:
        reply = browser.post(f"/actions/{name}", {"csrf": found[1], "back": back, **fields})
        assert reply.status == 303, reply.text
        assert reply.headers["location"] == back
        page = browser.get(back)
        assert page.status == 200
        notice = re.search(r'class="message notice"[^>]*>(.*?)</p>', page.text, re.DOTALL)
        assert notice is not None
        assert 'class="message notice"' not in browser.get(back).text, "it is shown once"
        return html.unescape(notice[1]).strip()

    return run


def state_of(perf: AgentPerf, instance: str) -> InstanceState:
    (pool,) = perf.balancer().status("coder")
    (found,) = (each.state for each in pool.instances if each.instance.id == instance)
    return found


def test_instance_is_drained_and_marked(perf: AgentPerf, act: Act) -> None:
    of = {"pool": "coder", "instance": "p0", "back": "/pools"}
    assert act("drain", **of) == "p0 of coder takes no new work."
    assert state_of(perf, "p0") is InstanceState.DRAINING
    assert act("undrain", **of) == "p0 of coder is no longer draining."
    assert act("mark-unhealthy", **of) == "p0 of coder takes no new work until it is marked healthy."
    assert state_of(perf, "p0") is InstanceState.UNHEALTHY
    assert act("mark-healthy", **of) == "p0 of coder is marked healthy."
    assert state_of(perf, "p0") is InstanceState.UP
    assert (
        act("drain", pool="coder", instance="nobody") == "Nothing was done. Not found: instance nobody in pool coder."
    )


def test_rule_is_silenced(perf: AgentPerf, act: Act) -> None:
    assert act("silence", rule="failing", **{"for": "1h"}) == "failing is silenced for 1h."
    assert perf.alerts.list().rules[0].silenced_until
    assert act("unsilence", rule="failing") == "The silence of failing has ended."
    assert "rule is 'nothing'" in act("silence", rule="nothing", **{"for": "1h"})
    assert act("silence", rule="failing", **{"for": "soon"}).startswith("Failed: ")


def test_cache_is_cleared_piece_by_piece(perf: AgentPerf, act: Act) -> None:
    cache, of = perf.cache("answers"), {"cache": "answers", "service": "cache", "confirmed": "yes"}
    for key in ("a", "b", "<script>alert(1)</script>", "k" * 300):
        cache.put(key, key, tags=["new"] if key == "b" else [])
    assert act("delete-key", key="a", **of) == "Removed a from cache answers."
    assert act("delete-key", key="a", **of) == "Nothing was done. Not found: key a in cache answers."
    assert "<script>" in act("delete-key", key="<script>alert(1)</script>", **of)
    assert act("delete-key", key="k" * 300, **of)[-20:]
    assert act("invalidate-tag", tag="new", **of) == "Every entry of cache answers with the tag new is a miss."
    assert [cache.get(key, fresh=True) for key in ("a", "b", "k" * 300)] == [None] * 3
    assert act("clear-cache", **of).startswith("Cleared cache answers, which held ")
    assert cache.get("why?", fresh=True) is None
    assert act("clear-cache", cache="answers", service="tiered", confirmed="yes").endswith("Not found: cache answers.")
    assert act("clear-cache", cache="answers", service="lb", confirmed="yes").startswith("Failed: service is 'lb'")
    assert act("clear-cache", cache="\n", service="cache", confirmed="yes").startswith("Failed: cache is ")


def test_deletions_need_a_ticked_box(browser: Browser, perf: AgentPerf) -> None:
    cache = perf.cache("answers")
    cache.put("a", 1, tags=["new"])
    assert cache.get("a", fresh=True) == 1
    cache.flush()  # so that the page lists the tags and the most-read keys
    page = browser.get("/cache?name=answers").text
    csrf = re.search(r'name="csrf" value="([0-9a-f]+)"', page)
    assert csrf is not None
    of = {"csrf": csrf[1], "cache": "answers", "service": "cache"}
    for name, fields in (("delete-key", {"key": "a"}), ("invalidate-tag", {"tag": "new"}), ("clear-cache", {})):
        forms = [form for form in re.findall(r"<form.*?</form>", page, re.DOTALL) if f"/actions/{name}" in form]
        assert forms, name
        assert all(re.search(r'type="checkbox" name="confirmed" value="yes" required', form) for form in forms)
        for box in ({}, {"confirmed": ""}, {"confirmed": "no"}):
            assert browser.post(f"/actions/{name}", of | fields | box).status == 400
    assert cache.get("a", fresh=True) == 1
    page = browser.get("/pools").text + browser.get("/alerts").text
    assert 'name="confirmed"' not in page, "what can be undone at once needs none"


def test_incomplete_forms_are_refused(browser: Browser, act: Act) -> None:
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', browser.get("/alerts").text)
    assert found is not None
    for name, (_, fields) in ACTIONS.items():
        for left_out in fields:
            form = dict.fromkeys(set(fields) - {left_out}, "x") | {"csrf": found[1]}
            reply = browser.post(f"/actions/{name}", form)
            assert (reply.status, reply.text) == (400, f"The form has no field {left_out}.\n")
    assert browser.post("/actions/flush-all", {"csrf": found[1]}).status == 404
    assert browser.get("/actions/drain").status == 405


def test_action_leads_to_no_other_site(browser: Browser, act: Act) -> None:
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', browser.get("/alerts").text)
    assert found is not None
    for back in ("//evil.example", "https://evil.example", "/\\evil.example", "", "x"):
        form = {"csrf": found[1], "back": back, "rule": "failing"}
        reply = browser.post("/actions/unsilence", form)
        assert (reply.status, reply.headers["location"]) == (303, "/")


@pytest.mark.thorough
def test_absent_server_is_reported(own_server: Server, namespace: str, runner: asyncio.Runner) -> None:
    perf = AgentPerf(own_server.url, namespace=namespace, deadline=0.3)
    browser = Browser(runner, app(perf, allow_actions=True, refresh=0.05))
    fill(perf)
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', browser.get("/alerts").text)
    assert found is not None
    release(perf)
    own_server.kill()
    form = {"csrf": found[1], "back": "/pools", "pool": "coder", "instance": "p0"}
    assert browser.post("/actions/drain", form).status == 303
    page = browser.get("/pools")
    assert (page.status, "Failed: redis://127.0.0.1" in page.text) == (503, True)
    runner.run(perf.aclose())
