"""Fixtures for all layers. Servers are real (`tests/support/servers.py`), except `fake` for unit tests.

The module `tests/support/selection.py` decides which tests a run includes.

With `--as-acl-user`, all URLs name an ACL user with the rights that `agentperf doctor --acl` prints. A test then fails
if a server has refused anything to that user.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import re
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from agentperf_redis import history, keys
from agentperf_redis.command import Command
from tests.support import leftovers, selection
from tests.support.calls import Call
from tests.support.fake import Fake
from tests.support.headers import misfit
from tests.support.places import ROOT
from tests.support.programs import Programs
from tests.support.proxy import Proxy
from tests.support.servers import (
    Raw,
    Server,
    ServerKind,
    Servers,
    kinds,
    new_namespace,
    program,
    restrict_default_user,
    restricted,
)
from tests.support.workers import Workers

if TYPE_CHECKING:
    from agentperf_redis import AgentPerf
    from agentperf_redis.backend import Backend
    from tests.support.commandline import Run


def pytest_addoption(parser: pytest.Parser) -> None:
    for option, meaning in selection.OPTIONS.items():
        parser.addoption(option, action="store_true", help=meaning)
    parser.addoption("--as-acl-user", action="store_true", help="give the servers' default user the rights of a worker")


def pytest_configure(config: pytest.Config) -> None:
    # If a shell script starts pytest in the background, pytest ignores SIGINT. The programs that tests start would
    # inherit this setting.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for marker in (
        "thorough: takes long, in real time or in processor time; omitted by plain pytest",
        "servers(*kinds): runs on these kinds of server only; plain pytest uses the first",
        "waits: takes half a minute or longer; started first, so that no worker begins it at the end",
        "privileged: sends commands that no worker needs; skipped with --as-acl-user",
        "standalone: not on a Cluster, which would bypass the test's proxy or its changes to the server",
    ):
        config.addinivalue_line("markers", marker)
    if config.getoption("--as-acl-user"):
        restrict_default_user()
    if not _is_worker(config):  # only once: the workers of a parallel session inherit the mark
        leftovers.mark_session()
    _make_hypothesis_deterministic(config)


def _make_hypothesis_deterministic(config: pytest.Config) -> None:
    """Use the same examples in each run. Examples have no time limit, because their time depends on the machine's load.

    A test has 50 examples, half of Hypothesis' default. With `pytest --hypothesis-profile many`, it has 200 examples.
    With `pytest --hypothesis-profile explore`, Hypothesis searches for new examples.
    """
    import hypothesis

    unhurried: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("explore", **unhurried)
    for name, examples in (("steady", 50), ("many", 200)):
        hypothesis.settings.register_profile(name, derandomize=True, database=None, max_examples=examples, **unhurried)
    hypothesis.settings.load_profile(config.getoption("--hypothesis-profile", None) or "steady")


def pytest_report_header(config: pytest.Config) -> list[str]:
    chosen = [option for option in selection.OPTIONS if config.getoption(option)] or ["quick, on valkey"]
    lines = [f"servers: {', '.join(kinds())}; tests: {' '.join(chosen)}"]
    if program("redis70") is None:
        lines.append("servers: no redis-server 7.x on this machine, so the variant redis70 is omitted")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server_kind" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker
    chosen: tuple[ServerKind, ...] = kinds()
    only = marker("servers")
    if only is not None:
        unknown = set(only.args) - set(get_args(ServerKind))
        assert not unknown, f"unknown servers: {unknown}"
        chosen = tuple(kind for kind in only.args if kind in chosen)
    elif marker("standalone") is not None or {"proxy", "own_server"} & set(metafunc.fixturenames):
        # These tests use a proxy, or change one server process. They do not run on a Cluster, because the nodes of a
        # Cluster send their own addresses to clients. Clients that use these addresses would bypass the proxy or the
        # changed process. Other tests cover the behaviour of a Cluster.
        chosen = tuple(kind for kind in chosen if kind != "cluster")
    if only is None and _is_about_output(metafunc.definition.path):
        # Commands and pages show results of the services, and the services are tested on every kind of server. So
        # output is tested on two kinds only: on Valkey, and on a Cluster, where the output can differ.
        chosen = tuple(kind for kind in chosen if kind in ("valkey", "cluster"))
    long, other_servers = selection.parts(metafunc.config)
    if not other_servers or metafunc.definition.path.is_relative_to(selection.BORDERS):
        chosen = chosen[:1]  # tests in BORDERS take long, so they always run on one kind of server only
    elif not long:
        chosen = chosen[1:] or chosen[:1]
    metafunc.parametrize("server_kind", chosen)


@functools.cache
def _is_about_output(path: Path) -> bool:
    """Return whether a file tests what people see: commands, the terminal view or the web page."""
    parts = path.relative_to(ROOT / "tests").parts if path.is_relative_to(ROOT / "tests") else ()
    return (
        parts[:1] == ("integration",) and parts[1] in ("cli", "top", "views", "web") and parts[-1] != "test_doctor.py"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--as-acl-user"):
        for item in items:
            if item.get_closest_marker("privileged") is not None:
                item.add_marker(pytest.mark.skip("needs rights that no worker has"))
    unsteady = [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]{6,}", item.nodeid)]
    assert unsteady == [], "their names differ between processes, so that pytest -n cannot distribute them"
    chosen = selection.chosen(config, items)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    workers: int = config.workerinput["workercount"] if _is_worker(config) else 1  # type: ignore[attr-defined]
    items[:] = selection.ordered([item for item in items if item in chosen], workers)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests without garbage collection, which would visit the growing number of tests again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if was_enabled:
            gc.enable()


def pytest_collection_finish() -> None:
    """Exempt the collected tests and the loaded modules from garbage collection.

    They live until the end of the session. A full collection, which some tests call, would visit all of them.

    `gc.get_referrers` does not see exempted objects. Hypothesis before 6.148 warns if that function finds no object
    that refers to a generator. With these versions, nothing is exempted.
    """
    import hypothesis

    if hypothesis.__version_info__ >= (6, 148):
        gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import folders whose tests this run omits, unless the command line names these folders."""
    if collection_path not in selection.omitted_folders(config):
        return None
    named = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
    return None if any(path.is_relative_to(collection_path) for path in named) else True


@pytest.fixture(scope="session", autouse=True)
def _calls_fit_their_headers() -> Iterator[None]:
    """Check every command of this process against the header of its script."""
    make = Command.__init__

    @functools.wraps(make)
    def make_and_check(command: Command[Any], *args: Any, **kwargs: Any) -> None:
        make(command, *args, **kwargs)
        wrong = misfit(command)
        assert wrong is None, wrong

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Command, "__init__", make_and_check)
        yield


@pytest.fixture(scope="session", autouse=True)
def _redis_reads_its_version_once() -> Iterator[None]:
    """Save time: for every new client, redis-py reads its own version from the metadata of its package."""
    import redis.utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redis.utils.get_lib_version", functools.cache(redis.utils.get_lib_version))
        yield


@pytest.fixture(autouse=True)
def _default_backend_is_closed() -> Iterator[None]:
    """Fail a test that leaves the process-wide default backend open. No later test could set another default."""
    from agentperf_redis import backend

    yield
    left = backend._default
    if left is not None and not left.closed:
        left.close()
        pytest.fail(f"the test left the default backend open: {left!r}")


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """The servers of the session. `servers.fresh("cluster")` starts another server."""
    everything = Servers()
    yield everything
    everything.stop()


@pytest.fixture(autouse=True)
def _acl_user_was_refused_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --as-acl-user, fail a test during which a server refused a command, a key or a channel.

    The command line and the pages may be refused server commands that only operators need. They then show less.
    """
    if not restricted() or "servers" not in request.fixturenames:
        yield
        return
    servers: Servers = request.getfixturevalue("servers")
    yield
    optional = {f"command {right}" for right in ("scan", "info", "memory|usage", "memory")}
    refused = servers.refused() - (optional if _is_about_output(request.path) else set())
    assert refused == set(), "the servers refused these to the ACL user"


@pytest.fixture
def server(server_kind: ServerKind, servers: Servers) -> Iterator[Server]:
    """The session's shared server. Each test has its own namespace on it."""
    shared = servers.shared(server_kind)
    yield shared
    shared.recover()


@pytest.fixture(autouse=True)
def _scripts_are_stricter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Cluster, the server rejects a script that leaves its slot, and writes large numbers as Redis 7.2 does."""
    if getattr(request.node, "callspec", None) is None or request.node.callspec.params.get("server_kind") != "cluster":
        return
    from tests.support.script_texts import change_scripts, with_exponents, with_shebang

    change_scripts(monkeypatch, lambda text: with_shebang(with_exponents(text)))


@pytest.fixture
def own_server(server_kind: ServerKind, start_server: Callable[..., Server]) -> Server:
    """A fresh server, for tests that kill, pause, flush or configure it. It has no AOF; see `start_server`."""
    return start_server(server_kind)


@pytest.fixture
def start_server(servers: Servers) -> Iterator[Callable[..., Server]]:
    """Start a fresh server with `start_server(kind="valkey", *options, aof=False)`. The server ends with the test."""
    started: list[Server] = []

    def start(kind: ServerKind = "valkey", *options: str, aof: bool = False) -> Server:
        started.append(servers.fresh(kind, *options, aof=aof))
        return started[-1]

    yield start
    for each in started:
        servers.end(each)


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """A unique namespace, named after the test."""
    return new_namespace(request.node.name)


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    """A plain redis-py client of the server, with `decode_responses`, to inspect the stored state."""
    with server.client() as client:
        yield client


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """The only event loop of the test. It is created on first use."""
    with asyncio.Runner() as loop_runner:
        yield loop_runner


@pytest.fixture
def connect(runner: asyncio.Runner, namespace: str) -> Iterator[Callable[..., Backend]]:
    """Make a backend with `connect(url, ...)`; all arguments of Backend are allowed. The fixture closes the backend."""
    from agentperf_redis.backend import Backend

    made: list[Backend] = []

    def make(url: str, **options: Any) -> Backend:
        made.append(Backend(url, **{"namespace": namespace, **options}))
        return made[-1]

    yield make
    for each in reversed(made):
        runner.run(each.aclose())


@pytest.fixture
def backend(server: Server, connect: Callable[..., Backend]) -> Backend:
    """A Backend on the server, in the test's namespace."""
    return connect(server.url)


@pytest.fixture
def agentperf(
    server: Server,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run the command `agentperf` on the test's namespace, in this process."""
    from tests.support.commandline import runner

    monkeypatch.setenv("AGENTPERF_REDIS_URL", server.url)
    monkeypatch.setenv("AGENTPERF_NAMESPACE", namespace)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return runner(capsys, monkeypatch)


@pytest.fixture
def perf(server: Server, namespace: str, runner: asyncio.Runner) -> Iterator[AgentPerf]:
    """An AgentPerf on the server, in the test's namespace."""
    from agentperf_redis import AgentPerf

    made = AgentPerf(server.url, namespace=namespace)
    yield made
    runner.run(made.aclose())


@pytest.fixture(params=selection.VERSIONS)
def call(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Call:
    """Call a method of a client. The test runs twice: with the blocking methods, and with the asyncio methods."""
    return Call(runner if request.param == "async" else None)


@pytest.fixture
def make_proxy() -> Iterator[Callable[[Server], Proxy]]:
    """Put a proxy in front of a server of the test: `make_proxy(own_server)`."""
    made: list[Proxy] = []

    def make(target: Server) -> Proxy:
        made.append(Proxy(target.port))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def proxy(server: Server, make_proxy: Callable[[Server], Proxy]) -> Proxy:
    """A proxy in front of the shared server, with faults on demand: loss, delay and broken connections."""
    return make_proxy(server)


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Runs worker processes: `workers.run(function, [(0, url), (1, url)])`, `workers.start(function, url)`."""
    started = Workers()
    yield started
    started.close()


@pytest.fixture
def programs(tmp_path: Path, server: Server, namespace: str) -> Iterator[Programs]:
    """Runs programs as processes of their own: `programs.write("app.py", source)`, `programs.run("app")`."""
    made = Programs(tmp_path, server, namespace)
    yield made
    made.close()


@pytest.fixture
def counted(raw: Raw, namespace: str) -> Callable[[], int]:
    """Return a function that reads how many executions of the agent `worker` the server has counted."""
    where = keys.metrics_total(namespace, keys.metrics_shard("worker"), "worker")
    return lambda: int(raw.hget(where, "n") or 0)


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process sample no history. Otherwise, a slow test would find keys that its own calls did not write."""
    monkeypatch.setattr(history, "_FIRST_S", 1e6)


@pytest.fixture
def fake() -> Iterator[Fake]:
    """An empty simulated server (fakeredis), for unit tests that run scripts."""
    simulated = Fake()
    yield simulated
    simulated.close()


def _is_worker(config: pytest.Config) -> bool:
    """Return whether this process is a worker of a parallel session (pytest -n), not the controller."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if a process that it started still runs.

    In a parallel session, only the controller checks, for all workers together.
    """
    if _is_worker(session.config):
        return
    left = leftovers.after_timeout(session.config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    if left:
        session.config.stash[_LEFT_OVER] = left
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_LEFT_OVER = pytest.StashKey[dict[int, str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for pid, command in config.stash.get(_LEFT_OVER, {}).items():
        terminalreporter.write_line(f"ERROR: this session left process {pid} running: {command}", red=True)
