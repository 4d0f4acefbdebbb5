"""`agentperf up` and `agentperf down`: a server for people who have none."""

from __future__ import annotations

from pathlib import Path

from agentperf_redis.cli.console import Exit, err, out, print_json
from agentperf_redis.embedded import data_folder, ensure, running, stop


def up(data: Path | None, *, as_json: bool) -> Exit:
    """Start the server of a data folder, or find it running."""
    folder = data_folder(str(data) if data else None)
    was_running = running(folder) is not None
    ensure(folder)
    server = running(folder)
    if server is None:
        err.print(f"agentperf: the server in {folder} ended at once; see its log there", style="red", markup=False)
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
    out.print(server.url, markup=False)
    err.print(
        f"Valkey {server.version} {'runs already' if was_running else 'is up'} (process {server.pid}), "
        f"data in {server.folder}.",
        markup=False,
    )
    err.print(
        "agentperf commands find it by themselves; programs: AgentPerf('embedded://"
        f"{'' if data is None else server.folder}'). `agentperf down` stops it.",
        markup=False,
    )
    return Exit.OK


def down(data: Path | None, *, as_json: bool) -> Exit:
    """Stop the server of a data folder. None running is fine too."""
    folder = data_folder(str(data) if data else None)
    stopped = stop(folder)
    if as_json:
        print_json("down", {"stopped": stopped, "folder": str(folder)})
    else:
        err.print(f"Stopped; the data stay in {folder}." if stopped else f"No server runs in {folder}.", markup=False)
    return Exit.OK
