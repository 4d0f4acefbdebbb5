"""`agentperf up` and `agentperf down`: start and stop the embedded server."""

from __future__ import annotations

import shlex
from pathlib import Path

from agentperf_redis.cli.console import Exit, err, out, print_json
from agentperf_redis.embedded import data_folder, ensure, running, stop


def up(data: Path | None, *, as_json: bool) -> Exit:
    """Start the server of a data folder, unless it runs already."""
    folder = data_folder(str(data) if data else None)
    was_running = running(folder) is not None
    ensure(folder)
    server = running(folder)
    if server is None:
        err.print(f"agentperf: the server in {folder} exited at once; its log is there", style="red")
        return Exit.FAILURE
    if as_json:
        print_json(
            "up",
            {
                "url": server.url,
                "pid": server.pid,
                "valkey_version": server.version,
                "folder": str(server.folder),
                "was_running": was_running,
            },
        )
        return Exit.OK
    out.print(server.url)
    err.print(
        f"Valkey {server.version} {'is already running' if was_running else 'is up'} (process {server.pid}), "
        f"data in {server.folder}.",
    )
    is_default = data is None
    err.print(
        f"Programs:  export AGENTPERF_REDIS_URL={server.url}\n"
        f"Keys:      redis-cli -s {shlex.quote(str(server.socket))}\n"
        f"Stop:      agentperf down{'' if is_default else f' --data {shlex.quote(str(data))}'}; its data stays\n"
        + ("agentperf commands find it without a URL." if is_default else "")
    )
    return Exit.OK


def down(data: Path | None, *, as_json: bool) -> Exit:
    """Stop the server of a data folder. If no server runs, this is not an error."""
    folder = data_folder(str(data) if data else None)
    stopped = stop(folder)
    if as_json:
        print_json("down", {"stopped": stopped, "folder": str(folder)})
    else:
        err.print(f"Stopped; the data stays in {folder}." if stopped else f"No server runs in {folder}.")
    return Exit.OK
