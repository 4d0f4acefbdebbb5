"""Makes the README's picture of the terminal view: `python -m tests.support.top_picture`.

It shows a real run: two processes of `tests.support.fleet` work for some minutes on a server of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from agentperf_redis import AgentPerf
from tests.support.places import DATA, ROOT
from tests.support.screens import screen
from tests.support.servers import Servers

PICTURE = DATA / "pictures" / "top.svg"
MAX_BYTES = 150_000
"""Maximum size of the picture, bytes. It is small, because the README shows several pictures."""
SIZE = (120, 16)
"""Columns and rows of the picture: those of a usual window, in which all text can be read in the README."""
_NAMESPACE = "agentperf"
_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""Rules that would load fonts from another host."""


async def drawn(url: str, namespace: str) -> str:
    """Return the picture of the agents in a namespace, as SVG without references to other hosts."""
    async with AgentPerf(url, namespace=namespace) as perf, screen(perf, SIZE, every=0.5, window="10m") as shown:
        await shown.shows("agent", "tasks ▼")
        await shown.until(lambda: len(shown.rows) > 1, "agents")
        await shown.shows("Open", "q Quit")
        svg = shown.app.export_screenshot(title="agentperf top", simplify=True)
    return _FONTS.sub("", svg)


def main() -> None:
    """Run the fleet, and draw the picture near its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the picture is written")
    parser.add_argument("--minutes", type=float, default=12.0, help="length of the run")
    given = parser.parse_args()
    servers = Servers()
    with contextlib.ExitStack() as stack:
        stack.callback(servers.stop)
        url = servers.fresh("valkey").url
        for seed in (1, 2):
            words = ("--url", url, "--namespace", _NAMESPACE, "--minutes", str(given.minutes), "--seed", str(seed))
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fleet", *words], env=os.environ | {"PYTHONPATH": str(ROOT)}
            )
            stack.callback(worker.wait)
            stack.callback(worker.terminate)
        time.sleep(given.minutes * 60 * 0.9)
        svg = asyncio.run(drawn(url, _NAMESPACE))
    size = len(svg.encode())
    if size > MAX_BYTES:
        raise ValueError(f"the picture has {size} bytes, more than {MAX_BYTES}")
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    given.picture.write_text(svg, encoding="utf-8")
    print(f"{given.picture}: {size} bytes")


if __name__ == "__main__":
    main()
