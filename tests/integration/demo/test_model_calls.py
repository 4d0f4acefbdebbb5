"""`agentperf demo --llm`: every view shows tokens, cost and models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.demo.model_calls import NOTE
from agentperf_redis.demo.team import AGENTS
from agentperf_redis.top.details import AgentDetail
from agentperf_redis.top.lines import FIGURES
from agentperf_redis.web import app
from agentperf_redis.web.pages.text import cost, number
from tests.support import exposition
from tests.support.commandline import Done, Run, document, has_line, shown
from tests.support.markup import parsed
from tests.support.servers import Server
from tests.support.web import Browser

pytestmark = pytest.mark.thorough

SOURCE = '"""A file."""\nimport json\nfrom os import path\n\n\ndef half(number):\n    return json.dumps(number / 2)\n'


@pytest.fixture
def demo(agentperf: Run, server: Server, namespace: str, tmp_path: Path) -> Callable[..., Done]:
    """Run `agentperf demo` on two equal files, in the namespace of the test."""
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(SOURCE)
    shared = ("--url", server.url, "--namespace", namespace, "--path", str(tmp_path), "--workers", "1")
    return lambda *words: agentperf("demo", *shared, *words)


def test_demo_with_model_calls_shows_them_in_every_view(
    demo: Callable[..., Done], agentperf: Run, perf: AgentPerf, runner: asyncio.Runner
) -> None:
    report = json.loads(demo("--llm", "--json").stdout)
    assert report["ok"], report["checks"]
    found = perf.metrics.snapshots()
    assert {agent: each.llm_calls for agent, each in found.items()} == dict.fromkeys(AGENTS, 2)
    assert (found["reader"].tokens_in, found["reader"].tokens_out > 0) == (2 * -(-len(SOURCE) // 4), True)
    assert {agent: each["calls"] for agent, each in report["model_calls"].items()} == dict.fromkeys(AGENTS, 2)
    everything = perf.metrics.combined()

    status = shown(agentperf("status"))
    plain = document(agentperf("status", "--json"), "status")["models"]
    assert set(plain) == {"demo-small", "demo-large"}
    for model, use in plain.items():
        assert use["calls"] == 4
        assert everything.models[model].cost == pytest.approx(use["cost"])
        assert has_line(status, model, "4", str(use["tokens_in"]), str(use["tokens_out"]), f"{use['cost']:.6g}")
    assert has_line(shown(agentperf("show", "critic")), "demo-large", "2", str(found["critic"].tokens_in))

    line = document(agentperf("top", "--count", "1", "--json"), "top")
    assert (line["tokens_in"], line["cost"]) == (everything.tokens_in, pytest.approx(everything.cost))
    top = AgentDetail("critic")
    view = perf.backend.run(top.read(perf, "1h", None))
    assert view is not None
    assert "tokens, cost" in top.summary(view)[1]
    models = next(part for part in top.parts if part.name == "Models")
    assert [[column.cell(row) for column in models.columns][:2] for row in models.rows(view)] == [["demo-large", "2"]]
    assert "cost" in {figure.title for figure in FIGURES}

    browser = Browser(runner, app(perf))
    row = parsed(browser.get("/agents?window=1h").text).row("critic")
    tokens = found["critic"].tokens_in + found["critic"].tokens_out
    assert {number(tokens), cost(found["critic"].cost)} <= set(row)
    page = browser.get("/agent?name=critic&window=1h").text.replace("\u200b", "")
    assert parsed(page).row("demo-large")[1] == "2"
    assert f"{everything.llm_calls} model calls" in browser.get("/?window=1h").text

    exposed = exposition.plain(browser.get("/metrics", accept="text/plain").text)
    assert exposed.value("agentperf_agent_llm_calls_total", agent="critic", model="demo-large") == 2
    labels = {"agent": "critic", "model": "demo-large"}
    assert exposed.value("agentperf_agent_tokens_total", type="input", **labels) == found["critic"].tokens_in
    assert exposed.value("agentperf_agent_cost_total", **labels) == pytest.approx(found["critic"].cost)


def test_report_says_that_no_model_is_called(demo: Callable[..., Done], agentperf: Run) -> None:
    done = demo("--llm")
    for text in (done.stdout, done.stderr):
        assert NOTE in text
    assert "4 to a token" in " ".join(agentperf("demo", "--help").stdout.split())


def test_demo_without_the_option_records_no_model_call(demo: Callable[..., Done], perf: AgentPerf) -> None:
    done = demo()
    assert "tokens" not in done.stdout + done.stderr
    assert {each.llm_calls for each in perf.metrics.snapshots().values()} == {0}
