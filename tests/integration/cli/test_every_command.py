"""Every command keeps its promises about output, JSON, exit codes, server faults and narrow terminals.

The tests list the commands of the program itself, so they fail if a new command has no example here.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.cli import console
from agentperf_redis.cli.tables import FittedTable
from tests.support.commandline import OK, UNREACHABLE, USAGE, Done, Run, Watching
from tests.support.every_command import EXAMPLES, commands, fill, groups, release
from tests.support.schemas import SCHEMAS
from tests.support.servers import Server, free_port

COMMANDS = dict(commands())
ON_SERVER = [
    name for name in COMMANDS if name in EXAMPLES and not EXAMPLES[name].local and not EXAMPLES[name].own_exits
]
QUICK = [name for name in COMMANDS if name in EXAMPLES and not EXAMPLES[name].slow]
SLOW = [name for name in COMMANDS if name in EXAMPLES and EXAMPLES[name].slow]


def test_every_command_has_an_example_and_a_schema() -> None:
    assert set(COMMANDS) == set(EXAMPLES), "add the command to tests/support/every_command.py"
    assert set(COMMANDS) <= set(SCHEMAS), "add the command to tests/support/schemas.py"


@pytest.fixture
def token(perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Fill the namespace, and return the token of a lease. An execution of the agent "hung" runs during the test."""
    monkeypatch.setattr("agentperf_redis.metrics.flusher.MIN_AGE_S", 0.0)
    token = fill(perf)
    with perf.metrics.track("hung"):
        perf.metrics.workers()  # sends a heartbeat, which names the running execution
        yield token
    release(perf)


@pytest.fixture
def call(agentperf: Run, namespace: str) -> Callable[..., Done]:
    """Run the example of a command."""

    def run(name: str, *more: str, token: str = "@none") -> Done:
        if EXAMPLES[name].needs:
            pytest.importorskip(EXAMPLES[name].needs)
        chosen = (word.replace("<token>", token).replace("<namespace>", namespace) for word in EXAMPLES[name].words)
        return agentperf(*name.split(), *chosen, *more)

    return run


def checked(name: str, text: str) -> dict[str, Any]:
    """Return the JSON of a command after a check against its schema."""
    found: dict[str, Any] = json.loads(text)
    jsonschema.validate(found, SCHEMAS[name])
    assert (found["kind"], found["version"]) == (name, 1)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if EXAMPLES[name].needs else name for name in QUICK]
)
def test_output_and_json_are_as_promised(call: Callable[..., Done], perf: AgentPerf, token: str, name: str) -> None:
    done = call(name, token=token)
    assert (done.returncode, done.stderr) == (OK, "")
    for text in EXAMPLES[name].shows:
        assert text in done.stdout
    if EXAMPLES[name].changes:
        token = fill(perf)
    done = call(name, "--json", token=token)
    assert (done.returncode, done.stderr) == (OK, "")
    checked(name, done.stdout)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ON_SERVER)
def test_empty_namespace_is_no_fault(call: Callable[..., Done], name: str) -> None:
    done = call(name)
    assert done.returncode == EXAMPLES[name].empty
    assert EXAMPLES[name].says in done.stdout + done.stderr
    done = call(name, "--json")
    assert done.returncode == EXAMPLES[name].empty
    if done.returncode == OK:
        checked(name, done.stdout)
    else:
        assert done.stdout == ""


@pytest.mark.thorough
@pytest.mark.parametrize("name", ON_SERVER)
def test_absent_server_is_reported_at_once(call: Callable[..., Done], name: str) -> None:
    port = free_port()
    for more in ((), ("--json",)):
        started = time.monotonic()
        done = call(name, *more, "--url", f"redis://:hunter2@127.0.0.1:{port}", "--timeout", "600")
        assert (done.returncode, done.stdout) == (UNREACHABLE, "")
        assert f"nothing listens on 127.0.0.1:{port}; is a server running there? `agentperf up`" in done.stderr
        assert "hunter2" not in done.stderr
        assert time.monotonic() - started < 60


@pytest.mark.thorough
@pytest.mark.standalone
@pytest.mark.parametrize("name", ON_SERVER)
def test_wrong_password_is_called_wrong(call: Callable[..., Done], server: Server, name: str) -> None:
    done = call(name, "--url", f"redis://me:hunter2@127.0.0.1:{server.port}", "--timeout", "600")
    assert (done.returncode, done.stdout) == (UNREACHABLE, "")
    assert "user name or password are wrong" in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in ON_SERVER if not EXAMPLES[name].changes])
def test_numbers_are_whole_in_60_columns(
    call: Callable[..., Done], token: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[FittedTable] = []
    render = FittedTable.__rich_console__

    def record(table: FittedTable, *args: Any) -> Any:
        tables.append(table)
        return render(table, *args)

    monkeypatch.setattr(FittedTable, "__rich_console__", record)
    monkeypatch.setattr(console.out, "soft_wrap", False)  # as on a terminal
    for width in (80, 60):
        monkeypatch.setattr(console.out, "width", width)
        text = call(name, token=token).stdout
        assert "…" not in text
        words = text.split()
        numbers = [
            cell for table in tables for column in table.columns if column.justify == "right" for cell in column.cells
        ]
        assert {str(number) for number in numbers if number} <= set(words), text
        if not EXAMPLES[name].raw:
            assert max(map(len, text.splitlines()), default=0) <= width, text
        tables.clear()


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in QUICK if not EXAMPLES[name].changes])
def test_closed_pipe_ends_quietly(
    call: Callable[..., Done], token: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ((), ("--json",)):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as closed, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", closed)
            done = call(name, *more, token=token)
        assert (done.returncode, done.stderr) == (console.Exit.CLOSED_PIPE, "")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ON_SERVER)
def test_server_may_be_named_before_the_command(
    agentperf: Run, server: Server, namespace: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = EXAMPLES[name].words
    monkeypatch.setenv("AGENTPERF_REDIS_URL", f"redis://127.0.0.1:{free_port()}")
    options = ("--url", server.url, "--namespace", namespace, "--timeout", "60", "--json")
    *group, last = name.split()
    for start in ([*options, *group], [*group, *options]):
        done = agentperf(*start, last, *words)
        assert done.returncode == EXAMPLES[name].empty, done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_each_value(agentperf: Run, name: str) -> None:
    done = agentperf(*name.split(), "-h")
    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout == agentperf(*name.split(), "--help").stdout
    assert "--json" in done.stdout
    assert re.search(r" (TEXT|INTEGER|FLOAT|PATH)\b", done.stdout) is None, "an option has no metavar"


@pytest.mark.thorough
@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_option_exits_2(agentperf: Run, name: str) -> None:
    done = agentperf(*name.split(), "--nonsense")
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "--nonsense" in done.stderr


def test_groups_take_the_options_of_a_server() -> None:
    for name, group in groups():
        assert {"url", "namespace", "timeout", "as_json"} <= {each.name for each in group.params}, (
            f"make the group {name} with `options.group`"
        )


@pytest.mark.thorough
def test_slow_commands_print_json(agentperf: Run, tmp_path: Path) -> None:
    assert set(SLOW) == {"up", "down", "demo", "exporter", "serve"}
    (tmp_path / "one.py").write_text("def f(a=[]): pass\n")
    checked("demo", agentperf("demo", "--path", str(tmp_path), "--workers", "1", "--json").stdout)
    checked("up", agentperf("up", "--json").stdout)
    checked("down", agentperf("down", "--json").stdout)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["exporter", "serve"])
def test_page_prints_json_when_it_listens(
    program_line: Callable[..., AbstractContextManager[Watching]], server: Server, namespace: str, name: str
) -> None:
    words = (name, "--port", "0", "--json", "--url", server.url, "--namespace", namespace)
    with program_line(*words) as watching:
        lines = [watching.line()]
        while lines[-1] != "}\n":
            lines.append(watching.line())
        checked(name, "".join(lines))
        watching.process.terminate()
        assert watching.end() == (OK, "")
