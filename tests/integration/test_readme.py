"""The README's programs run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import Server

README = Path(__file__).resolve().parents[2] / "README.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_there_is_a_program_for_each_service_both_ways() -> None:
    for service in ("perf.metrics", "perf.cache(", "perf.tiered_cache(", "perf.balancer()"):
        assert any(service in program for program in PROGRAMS)
    assert sum("asyncio.run" in program for program in PROGRAMS) >= 3


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program_runs(program: str, server: Server, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        env={**os.environ, "AGENTPERF_REDIS_URL": server.url, "PYTHONPATH": str(README.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
