"""Headless Chromium on the web page: what a person sees, and what the browser complains about."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = 1440, 390
"""Widths of a screen on a desk and of a phone, px."""
LOOKS = ((WIDE, False), (NARROW, True), (WIDE, True), (NARROW, False))
"""Width of the screen, and whether the user prefers dark pages. The first two contain each value once."""
SERIOUS = ("serious", "critical")
"""A page must have no finding of axe-core with one of these impacts."""


def chromium() -> Path | None:
    """Return a Chromium, or None if none is installed. The variable AGENTPERF_TEST_CHROMIUM can name another one."""
    found = os.environ.get("AGENTPERF_TEST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return None if found is None else Path(found)


def require() -> Path:
    """Return an installed Chromium, or skip the test with the reason why it cannot run."""
    pytest.importorskip("playwright", reason='needs playwright: pip install -e ".[browser]"')
    pytest.importorskip("axe_playwright_python", reason='needs axe: pip install -e ".[browser]"')
    found = chromium()
    if found is None:
        pytest.skip("needs a Chromium: apt-get install chromium, or AGENTPERF_TEST_CHROMIUM=/path/to/it")
    return found


@dataclass
class Visit:
    """A tab that shows pages of one dashboard.

    Attributes:
        page: playwright's page.
        origin: scheme, host and port of the dashboard.
        complaints: errors and warnings on the console, uncaught exceptions, and unexpected failed responses.
        elsewhere: addresses of requests to other hosts.
    """

    page: Any
    origin: str
    complaints: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Collect what the browser complains about from now on."""
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        self.page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        # A page about an unreachable Redis server has the status 503. Chromium reports this status as an error.
        if message.type in ("error", "warning") and "503 (Service Unavailable)" not in message.text:
            self.complaints.append(f"{message.type}: {message.text}")

    def _on_request(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "about") and f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.elsewhere.append(request.url)

    async def open(self, path: str) -> None:
        """Load a page, and wait until its style sheet and script are loaded."""
        await self.page.goto(self.origin + path, wait_until="load")

    async def overflow(self) -> int:
        """Return by how many px the page is wider than the screen."""
        found: int = await self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        return found

    async def kept(self) -> dict[str, float]:
        """Return how many nodes, event listeners and heap bytes the page keeps after a garbage collection."""
        session = await self.page.context.new_cdp_session(self.page)
        await session.send("Performance.enable")
        await session.send("HeapProfiler.collectGarbage")
        metrics = {each["name"]: each["value"] for each in (await session.send("Performance.getMetrics"))["metrics"]}
        await session.detach()
        return {name: metrics[name] for name in ("Nodes", "JSEventListeners", "JSHeapUsedSize")}

    async def accessibility(self) -> list[str]:
        """Return the serious and critical findings of axe-core."""
        from axe_playwright_python.async_playwright import Axe

        results = await Axe().run(self.page)
        return [
            f"{each['impact']} {each['id']}: {each['help']}: {[node['html'][:200] for node in each['nodes'][:3]]}"
            for each in results.response["violations"]
            if each["impact"] in SERIOUS
        ]


@asynccontextmanager
async def browsing(origin: str, *, width: int = WIDE, dark: bool = False, script: bool = True) -> AsyncIterator[Visit]:
    """Open a tab.

    Args:
        origin: scheme, host and port of the dashboard.
        width: width of the screen, px.
        dark: whether the user prefers dark pages.
        script: whether JavaScript is switched on.
    """
    from playwright.async_api import async_playwright

    found = chromium()
    assert found is not None, "call `require` first"
    async with async_playwright() as playwright:
        # In containers, tests run as root. The sandbox of Chromium cannot start as root.
        browser = await playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            context = await browser.new_context(
                viewport={"width": width, "height": 900},
                color_scheme="dark" if dark else "light",
                java_script_enabled=script,
                reduced_motion="reduce",
            )
            visit = Visit(await context.new_page(), origin)
            visit.listen()
            yield visit
        finally:
            await browser.close()


async def screenshots(
    origin: str, paths: Iterable[tuple[str, str]], folder: Path, label: str, looks: Iterable[tuple[int, bool]]
) -> list[str]:
    """Take pictures of pages, and check each page.

    Args:
        origin: scheme, host and port of the dashboard.
        paths: name and path of each page.
        folder: where the pictures are written.
        label: the state of the dashboard, for the names of the pictures.
        looks: each width of the screen, and whether the user prefers dark pages.

    Returns:
        Everything that is wrong with the pages.
    """
    wrong: list[str] = []
    for width, dark in looks:
        async with browsing(origin, width=width, dark=dark) as visit:
            for name, path in paths:
                where = f"{label} {name} at {width} px, {'dark' if dark else 'light'}"
                await visit.open(path)
                await visit.page.screenshot(
                    path=folder / f"{label}-{name}-{width}-{'dark' if dark else 'light'}.png", full_page=True
                )
                if await visit.overflow() > 0:
                    wrong.append(f"{where}: the page is {await visit.overflow()} px too wide")
                wrong += [f"{where}: {each}" for each in await visit.accessibility()]
            wrong += [f"{label} at {width} px: {each}" for each in visit.complaints]
            wrong += [f"{label} at {width} px: request to {each}" for each in visit.elsewhere]
    return wrong
