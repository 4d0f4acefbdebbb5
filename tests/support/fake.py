"""fakeredis for the unit layer. It runs scripts in this process within a millisecond, almost like a server."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import fakeredis

from agentperf_redis.command import Batch, Command, Flow, Pause, Reply, Wait
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.script import Script


class Fake:
    """An empty simulated server and a minimal driver for commands and flows.

    A flow's pauses take no time, and its waits end at once without a wake-up. `pauses` records both. The driver raises
    the errors of redis-py, because only the executor converts them, and no executor is used here.

    Args:
        ms_per_script: how many ms the server's clock advances before each script. It does not advance otherwise, so
            nothing expires while the test pauses. If None, scripts get the machine's time.

    Attributes:
        client: a raw client of the simulated server, with `decode_responses`.
        pauses: the seconds of each Pause and Wait of a flow.
    """

    def __init__(self, ms_per_script: int | None = None) -> None:
        server = fakeredis.FakeServer()
        self.client: Any = fakeredis.FakeRedis(server=server, decode_responses=True)
        self._bytes: Any = fakeredis.FakeRedis(server=server)
        self.pauses: list[float] = []
        self._ms_per_script, self._now_ms = ms_per_script, 1_800_000_000_000

    def run(self, what: Command[Any] | Batch[Any] | Flow[Any]) -> Any:
        """Run a command, a batch or a flow, and return its result."""
        if isinstance(what, Command):
            return what.decode(self._reply(what))
        flow: Generator[Any, Any, Any] = iter(what) if isinstance(what, Batch) else what
        resume: Callable[[], object] = partial(flow.send, None)
        while True:
            try:
                step = resume()
            except StopIteration as end:
                return end.value
            try:
                result = self._perform(step)
            except Exception as error:  # noqa: BLE001  the flow gets every error
                resume = partial(flow.throw, error)
            else:
                resume = partial(flow.send, result)

    def _perform(self, step: object) -> Any:
        if isinstance(step, Command):
            return step.decode(self._reply(step))
        if isinstance(step, Batch):
            return [self._settled(command) for command in step.commands]
        assert isinstance(step, (Pause, Wait))
        self.pauses.append(step.seconds)
        return False if isinstance(step, Wait) else None

    def _settled(self, command: Command[Any]) -> Any:
        try:
            return command.decode(self._reply(command))
        except AgentPerfError as error:
            return error

    def _reply(self, command: Command[Any]) -> Reply:
        if isinstance(command.script, Script):
            return self._bytes.eval(
                self._timed(command.script.source), len(command.keys), *command.keys, *command.wire_args()
            )
        return self._bytes.execute_command(command.script, *command.keys, *command.wire_args())

    def _timed(self, source: str) -> str:
        if self._ms_per_script is None:
            return source
        self._now_ms += self._ms_per_script
        seconds, ms = divmod(self._now_ms, 1000)
        return re.sub(r"(redis\.)?call\('TIME'\)", f"{{'{seconds}', '{ms * 1000}'}}", source)

    def close(self) -> None:
        """Close both clients."""
        self.client.close()
        self._bytes.close()


@contextmanager
def fake_server() -> Iterator[str]:
    """Run the TCP server of fakeredis, and yield its URL. The server calls itself fakeredis and lacks INFO."""
    server = fakeredis.TcpFakeServer(("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"redis://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
