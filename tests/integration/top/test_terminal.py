"""`agentperf top` as a program in a real terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

import pytest

from agentperf_redis import AgentPerf
from tests.support.places import ROOT
from tests.support.screens import fill
from tests.support.servers import Server
from tests.support.terminals import terminal

COMMAND = [sys.executable, "-c", "from agentperf_redis.cli import main; main()", "top"]
LEAVES_SCREEN = b"\x1b[?1049l"


@pytest.mark.thorough
def test_whole_session_in_a_terminal(start_server: Callable[..., Server], namespace: str) -> None:
    server = start_server(aof=True)
    with AgentPerf(server.url, namespace=namespace) as perf:
        held = fill(perf)
        perf.balancer().release(held)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = ["--url", server.url, "--namespace", namespace, "--every", "0.5", "--timeout", "0.5"]
    with terminal([*COMMAND, *words], env) as shown:
        shown.shows("planner", "41", "24.4%")
        shown.shows("1 Agents", "2 Caches", "3 Pools", "4 Alerts")
        shown.shows("Open", "Sort", "Filter", "Window", "Pause", "Quit")
        shown.press("r")
        shown.shows("tasks ▲")
        shown.press("/crit\r")
        shown.shows("planner", absent=True)
        shown.press("/")
        shown.press("\x1b")
        shown.shows("planner")
        shown.click(16, 2)  # the tab of caches
        shown.shows("answers", "85.7%")
        shown.press("1")
        shown.shows("planner")
        shown.press("\x1b[B\r")  # down, enter
        shown.shows("agent planner")
        shown.shows("Errors (1)")
        server.kill()
        shown.shows("OLD numbers of")
        shown.shows("41 tasks")
        server.restart()
        shown.shows("OLD numbers of", absent=True)
        shown.press("p")
        shown.shows("PAUSED at")
        shown.press("p")
        shown.shows("PAUSED at", absent=True)
        shown.press("\x7f")  # backspace
        shown.shows("critic")
        shown.press("q")
        assert shown.ends() == 0
        _, left, after = shown.output.partition(LEAVES_SCREEN)
        assert left
        assert not re.search(rb"\w", re.sub(rb"\x1b\[[?<>=\d;]*\w", b"", after)), "no text after the screen"


@pytest.mark.thorough
def test_ctrl_c_and_no_colour(server: Server, namespace: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    with terminal([*COMMAND, "--url", server.url, "--namespace", namespace], env) as shown:
        shown.shows("No agent has recorded anything yet.")
        shown.press("\x03")
        assert shown.ends() == 0
