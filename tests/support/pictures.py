"""Makes the README's pictures of the web page: `python -m tests.support.pictures`.

They show a real run: two processes work for some minutes on a server of their own. Half-way through, an agent gets
slow and an instance fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support import chromium
from tests.support.dashboard import dashboard
from tests.support.places import ROOT
from tests.support.servers import Servers

FOLDER = ROOT / "tests" / "data" / "pictures"
MAX_BYTES = 150_000
"""Maximum size of a picture, bytes. It is small, because the README shows several pictures."""
PAGES = (("web-overview", "/", 850), ("web-agent", "/agent?name=coder", 850))
"""Name, path and height in px of each picture."""
WIDTH = 1200
NAMESPACE = "agentperf"


async def _take(origin: str, folder: Path) -> list[Path]:
    made = []
    for dark in (False, True):
        async with chromium.browsing(origin, width=WIDTH, dark=dark) as visit:
            for name, path, height in PAGES:
                await visit.page.set_viewport_size({"width": WIDTH, "height": height})
                await visit.open(path)
                made.append(folder / f"{name}-{'dark' if dark else 'light'}.png")
                await visit.page.screenshot(path=made[-1])
            assert not visit.complaints, visit.complaints
    return made


def take(url: str, folder: Path) -> list[Path]:
    """Take all pictures of the namespace on a server.

    Raises:
        ValueError: a picture is larger than `MAX_BYTES`.
    """
    with tempfile.TemporaryDirectory() as place, dashboard(url, NAMESPACE, Path(place) / "log") as origin:
        made = asyncio.run(_take(origin, folder))
    for each in made:
        if each.stat().st_size > MAX_BYTES:
            raise ValueError(f"{each} has {each.stat().st_size} bytes, more than {MAX_BYTES}")
    return made


def main() -> None:
    """Run the fleet and take the pictures near its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="length of the run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the pictures are written")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    servers = Servers()
    with contextlib.ExitStack() as stack:
        stack.callback(servers.stop)
        url = servers.fresh("valkey").url
        for seed in (1, 2):
            words = ("--url", url, "--namespace", NAMESPACE, "--minutes", str(given.minutes), "--seed", str(seed))
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fleet", *words], env=os.environ | {"PYTHONPATH": str(ROOT)}
            )
            stack.callback(worker.wait)
            stack.callback(worker.terminate)
        time.sleep(given.minutes * 60 * 0.9)
        for picture in take(url, given.folder):
            print(f"{picture}: {picture.stat().st_size} bytes")


if __name__ == "__main__":
    main()
