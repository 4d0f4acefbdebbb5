"""Drives the terminal view without a terminal, and fills a namespace for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from textual.pilot import Pilot

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.top.app import TopApp
from agentperf_redis.top.tables import FittedTable

NARROW, WIDE = (80, 24), (200, 60)
_TIMEOUT_S = 30.0

RULES = """
[[alert]]
name = "agents fail"
agents = "*"
when = "failure_rate > 20%"
window = "5m"
"""


def fill(perf: AgentPerf) -> AgentInstance | None:
    """Use each service: two agents, two caches, a pool with an unhealthy instance, and alert rules.

    Returns:
        An instance that holds a lease.
    """
    for number in range(40):
        perf.metrics.record_execution("planner", 0.2 + number / 100, number % 4 > 0, "TimeoutError")
    for _ in range(10):
        perf.metrics.record_execution("critic", 1.5, True)
    perf.metrics.record_llm("critic", model="m-1", tokens_in=1200, tokens_out=300, cost=0.25)
    with perf.metrics.track("planner"), perf.metrics.span("planner", "think"):
        pass
    perf.metrics.flush()
    answers, docs = perf.cache("answers", max_size=50), perf.tiered_cache("docs")
    for number in range(6):
        answers.put(f"key {number}", number, tags=("letters",))
        answers.get(f"key {number}")
    answers.get("missing")
    docs.put("page", "text", "hot")
    answers.flush()
    docs.flush()
    lb = perf.balancer()
    for number in range(3):
        lb.register_instance(AgentInstance(id=f"coder-{number}", agent_type="coder", max_capacity=4))
    lb.mark_unhealthy("coder", "coder-2")
    perf.alerts.deploy(text=RULES)
    perf.alerts.evaluate(as_of=time.time() + 70)  # rules are due at full minutes; the next full minute is within 60 s
    return lb.acquire("coder")


class Screen:
    """A running terminal view.

    Args:
        app: the view.
        pilot: its driver.
    """

    def __init__(self, app: TopApp, pilot: Pilot[None]) -> None:
        self.app = app
        self.pilot = pilot

    @property
    def text(self) -> str:
        """The screen as text, without spaces at the ends of lines."""
        strips = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips)

    @property
    def rows(self) -> list[str]:
        """The first cell of each row of the table that has the keyboard focus."""
        table = self.app.focused
        assert isinstance(table, FittedTable), table
        return [str(table.get_row_at(number)[0]) for number in range(table.row_count)]

    def has(self, *words: str) -> bool:
        """Whether a line of the screen contains all words."""
        return any(all(word in line for word in words) for line in self.text.splitlines())

    async def press(self, *keys: str) -> None:
        """Press keys one after another."""
        await self.pilot.press(*keys)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until the condition holds; otherwise fail, and show the screen."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {what}; the screen:\n{self.text}")
            await asyncio.sleep(0.02)

    async def shows(self, *words: str) -> None:
        """Wait until a line of the screen contains all words."""
        await self.until(lambda: self.has(*words), f"a line with {words}")


@asynccontextmanager
async def screen(
    perf: AgentPerf, size: tuple[int, int] = NARROW, every: float = 0.2, window: str = "10m", **options: Any
) -> AsyncIterator[Screen]:
    """Run the terminal view."""
    app = TopApp(perf, window, every)
    async with app.run_test(size=size, **options) as pilot:
        yield Screen(app, pilot)
