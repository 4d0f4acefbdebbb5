"""The app: it reads the view of the active screen every two seconds, even during an outage."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.app import App, ScreenStackError
from textual.binding import Binding, BindingType
from textual.screen import Screen

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.alerts import flows
from agentperf_redis.alerts.model import AlertState
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from agentperf_redis.top import cells
from agentperf_redis.top.screens import ListingScreen, ReadNow, Viewed
from agentperf_redis.views.agents import AgentsView, AgentView
from agentperf_redis.views.alerts import service_of
from agentperf_redis.views.reading import Fault, Parts
from agentperf_redis.views.text import counted, printable
from agentperf_redis.views.timeline import WINDOWS

EVERY_S = 2.0
_SHARE = 4.0
"""The pause after a read is at least this many times as long as the read, so that a slow server is not overloaded."""


class TopApp(App[None]):
    """The terminal view.

    Args:
        perf: the client.
        window: the initial window.
        every: pause between two reads, s.
    """

    TITLE = "agentperf top"
    ENABLE_COMMAND_PALETTE = False
    CSS_PATH = "top.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("w", "window(1)", "Window"),
        Binding("W", "window(-1)", "Shorter window", show=False),
        Binding("p,space", "pause", "Pause", key_display="p"),
        Binding("t", "theme", "Light/dark", show=False),
        Binding("question_mark", "keys", "Keys", key_display="?"),
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", "Quit", show=False, priority=True),
    ]

    def __init__(self, perf: AgentPerf, window: str, every: float = EVERY_S) -> None:
        super().__init__()
        self._perf = perf
        self._every = every
        self._windows = WINDOWS if window in WINDOWS else (window, *WINDOWS)
        self.window = window
        self.paused_at: float | None = None
        self._wake = asyncio.Event()
        self._read_at: float | None = None
        self._ahead_s = 0.0
        self._away: tuple[float, str] | None = None
        self._faults: tuple[Fault, ...] = ()
        self._firing = 0

    def on_mount(self) -> None:
        """Show the listings, and begin to read."""
        self.push_screen(ListingScreen())
        self.run_worker(self._follow(), name="reader", exclusive=True)

    async def _follow(self) -> None:
        while True:
            self._wake.clear()
            began = time.monotonic()
            await self._read_once()
            pause = max(self._every, _SHARE * (time.monotonic() - began))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), None if self.paused_at is not None else pause)

    async def _read_once(self) -> None:
        screen = self._viewed()
        if screen is None:
            return
        asked = screen.asked(), self.window, self.paused_at
        try:
            view = screen.reading(self._perf, self.window, self.paused_at)
        except InvalidArgument as error:  # for example, the filter contains a control character
            self._faults = (Fault("view", str(error)),)
            self._show_state()
            return
        parts = Parts(view=view, alerts=_firing(self._perf))
        away: BackendUnavailable | None = None
        try:
            await self._perf.backend.arun(parts.read())
        except BackendUnavailable as error:
            away = error
        if not self.is_running:  # the user has quit meanwhile, and the widgets are gone
            return
        if away is not None:
            since = time.time() if self._away is None else self._away[0]
            self._away = since, away.reason
        else:
            self._away, self._read_at = None, time.time()
            self._firing = parts.get("alerts", 0)
            found: Any = parts.get("view", None)
            end = _end_of(found)
            if end and asked[2] is None:
                self._ahead_s = end - self._read_at
            self._faults = parts.faults + (getattr(found, "faults", ()) or ())
            is_read = not any(fault.part == "view" for fault in parts.faults)
            if is_read and screen.is_current and asked == (screen.asked(), self.window, self.paused_at):
                screen.show(found)
        self._show_state()

    def _viewed(self) -> Viewed | None:
        """Return the screen if it shows data and is ready. None also after the user has quit: widgets are gone then."""
        try:
            screen: Screen[Any] = self.screen
        except ScreenStackError:
            return None
        return screen if self.is_running and isinstance(screen, Viewed) and screen.is_ready else None

    def _show_state(self) -> None:
        screen = self._viewed()
        if screen is None:
            return
        backend = self._perf.backend
        firing = counted(self._firing, "alert") + (" fires" if self._firing == 1 else " fire")
        words = [
            f"agentperf · last {self.window}",
            "" if self._read_at is None else cells.clock(self._read_at),
            firing if self._firing else "",
            f"namespace {backend.namespace} at {backend.address.masked}",
        ]
        text = Text(printable(" · ".join(filter(None, words))), no_wrap=True, overflow="ellipsis")
        screen.headline(text, self._state())
        screen.set_class(self._away is not None, "old")

    def _state(self) -> Text:
        lines = []
        if self._away is not None:
            since, reason = self._away
            numbers = "No numbers yet" if self._read_at is None else f"OLD numbers of {cells.clock(self._read_at)}"
            lines.append(f"{numbers}: the server is away since {cells.clock(since)}, trying again ({reason})")
        if self.paused_at is not None:
            lines.append(f"PAUSED at {cells.clock(self.paused_at)}; p continues")
        lines += [f"{fault.part} could not be read: {fault.text}" for fault in self._faults]
        return Text("\n".join(map(printable, lines)))

    @on(ReadNow)
    def _wake_up(self) -> None:
        self._wake.set()

    def action_window(self, by: int) -> None:
        """Change the window."""
        at = self._windows.index(self.window)
        self.window = self._windows[(at + by) % len(self._windows)]
        self._show_state()
        self._wake.set()

    def action_pause(self) -> None:
        """Pause, or continue. While paused, all windows and sort orders show the agents as of one time.

        That time is the time of the last reading, by the server's clock. The same clock dates all records.
        """
        now = self._ahead_s + (time.time() if self._read_at is None else self._read_at)
        self.paused_at = now if self.paused_at is None else None
        self._show_state()
        self._wake.set()

    def action_theme(self) -> None:
        """Change between dark and light."""
        self.theme = "textual-light" if self.theme == "textual-dark" else "textual-dark"

    def action_keys(self) -> None:
        """Show all keys, or hide them."""
        if self.screen.query("HelpPanel"):
            self.action_hide_help_panel()
        else:
            self.action_show_help_panel()


def _end_of(view: Any) -> float:
    """Return the time up to which a view of agents reaches, by the server's clock; 0 for other views."""
    if isinstance(view, AgentView):
        return view.metrics.interval.end
    return view.interval.end if isinstance(view, AgentsView) else 0.0


def _firing(perf: AgentPerf) -> Flow[int]:
    overview = yield from flows.overview(service_of(perf))
    return sum(alert.state is AlertState.FIRING for alert in overview.alerts)
