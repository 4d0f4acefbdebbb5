"""A user's project that tests a program with the plugin `agentperf_redis.testing`, and how to run its tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

from tests.support.places import ROOT

FOUR_TESTS = """
    import asyncio

    from agentperf_redis import AgentInstance, AgentPerf, track_performance

    def test_caches_are_shared(agentperf):
        with AgentPerf() as other:  # as the tested program makes it
            other.cache("answers").put("why", 42)
        assert agentperf.cache("answers").get("why") == 42

    def test_each_test_begins_without_data(agentperf):
        async def main():
            docs = agentperf.tiered_cache("docs")
            await docs.aio.put("page", "text")
            return await docs.aio.get("page"), await agentperf.cache("answers").aio.get("why")

        assert asyncio.run(main()) == ("text", None)

    def test_executions_are_counted(agentperf):
        @track_performance("coder", agentperf.metrics)
        def work():
            pass

        work()
        agentperf.metrics.flush()
        assert agentperf.metrics.snapshots()["coder"].task_count == 1

    def test_capacity_is_limited(agentperf):
        lb = agentperf.balancer()
        lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=1))
        with lb.lease("coder") as lease:
            assert lease.instance.id == "coder-1"
            assert lb.acquire("coder") is None
"""
"""Four tests: blocking and asyncio, metrics, caches and a load balancer."""

NOTES = """
    import os
    from pathlib import Path

    import pytest

    @pytest.fixture(autouse=True)
    def _noted(agentperf_url):
        folder = Path(agentperf_url.removeprefix("unix://")).parent
        with Path("folders").open("a") as notes:
            print(folder, file=notes)
"""
"""A conftest that writes the folder of each test's server into the file `folders`."""


class Project:
    """A project of a user.

    Args:
        folder: the folder of the project. It must be empty.
        settings: further lines of its pytest.ini.
        files: the sources of its modules, by name.
    """

    def __init__(self, folder: Path, settings: str = "", **files: str) -> None:
        self.folder = folder
        (folder / "pytest.ini").write_text(f"[pytest]\n{settings}\n", encoding="utf-8")
        for name, source in files.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")

    def start(self, *options: str, with_plugin: bool = True) -> subprocess.Popen[str]:
        """Start ``pytest`` in a process group of its own. Its stdout and stderr are one stream of text."""
        of_the_user = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "AGENTPERF_REDIS_URL", "AGENTPERF_NAMESPACE"))
        }
        installed = bool(entry_points(group="pytest11", name="agentperf"))
        plugin = "no:agentperf" if not with_plugin else "agentperf" if installed else "agentperf_redis.testing"
        parallel = ("-p", "xdist") if "-n" in options else ()
        return subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                *parallel,
                "-p",
                plugin,
                *options,
            ],
            cwd=self.folder,
            # Only the plugins named above are loaded. Other installed plugins may warn, and warnings are errors here.
            env={**of_the_user, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *options: str, with_plugin: bool = True) -> tuple[int, str]:
        """Run ``pytest`` to its end. Return its exit code and its output."""
        program = self.start(*options, with_plugin=with_plugin)
        output, _ = program.communicate(timeout=120)
        return program.returncode, output

    def servers(self) -> list[Path]:
        """Return the folders of the servers that the tests used, from the file that `NOTES` writes."""
        notes = self.folder / "folders"
        return sorted({Path(line) for line in notes.read_text().splitlines()}) if notes.exists() else []
