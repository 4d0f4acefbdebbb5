"""`agentperf exporter`: serves `/metrics` for Prometheus, sends OTLP, or does both, until it is stopped."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.cli.console import Exit, Target, err, out, print_json
from agentperf_redis.cli.extras import failed, needs_extra
from agentperf_redis.errors import AgentPerfError, InvalidArgument
from agentperf_redis.export.reading import Reading
from agentperf_redis.windows import window_seconds

DEFAULT_PORT = 9464
"""The port that OpenTelemetry's exporters for Prometheus use by default."""
MAX_EVERY_S = 3600.0


def exporter(target: Target, host: str, port: int | None, otlp: str | None, every: str, *, as_json: bool) -> Exit:
    """Export until SIGTERM. One process may serve `/metrics` and send OTLP."""
    if otlp is None and port is None:
        port = DEFAULT_PORT
    stopped = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm(stopped))
        perf = stack.enter_context(target.connect(patient=True))
        faults = Faults()
        sends = None if otlp is None else stack.enter_context(_sending(perf, otlp, every, faults))
        listens = None if port is None else stack.enter_context(_serving(perf, host, port, faults))
        if as_json:
            print_json("exporter", {"namespace": perf.backend.namespace, "url": listens, "otlp": sends})
        else:
            if listens is not None:
                out.print(f"Metrics of namespace {perf.backend.namespace}: {listens}")
            if sends is not None:
                out.print(f"Metrics of namespace {perf.backend.namespace} are sent to {sends} every {every}")
        out.file.flush()
        stopped.wait()
    return Exit.OK


class Faults:
    """Reports on stderr when the export of a part begins to fail, and when it works again. Reports each change once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._present: dict[str, str] = {}

    def note(self, reading: Reading) -> None:
        """Report each part whose export began to fail, or works again, since the last reading."""
        for part in reading.took:
            self.changed(part, reading.errors.get(part))

    def changed(self, part: str, error: AgentPerfError | str | None) -> None:
        """Note the result of the export of a part: an error, or None if the export worked. Report only a change."""
        with self._lock:
            before, now = self._present.get(part), None if error is None else str(error)
            if now is None:
                self._present.pop(part, None)
            else:
                self._present[part] = now
        if now is not None and before is None:
            err.print(f"agentperf: {part} are not exported: {now}", style="red")
        elif now is None and before is not None:
            err.print(f"agentperf: {part} are exported again")


@contextlib.contextmanager
def _serving(perf: AgentPerf, host: str, port: int, faults: Faults) -> Iterator[str]:
    """Serve on a thread. Yields the URL."""
    with needs_extra("prometheus"):
        from agentperf_redis.export.prometheus import Exporter, listening
    try:
        server = listening(Exporter(perf, faults.note), host, port)
    except OSError as error:
        failed(f"cannot listen on {host}:{port}: {error.strerror or error}")
    thread = threading.Thread(target=server.serve_forever, name="agentperf-exporter", daemon=True)
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def _sending(perf: AgentPerf, otlp: str, every: str, faults: Faults) -> Iterator[str]:
    """Send OTLP on a thread while the block runs. Yields the URL without its secrets."""
    interval = window_seconds(every, "--every")
    if interval > MAX_EVERY_S:
        raise InvalidArgument("--every", every, "one second to one hour")
    with needs_extra("otel"):
        from agentperf_redis.export.otlp import Pusher, endpoint, masked
    url = endpoint("--otlp", otlp)
    # `Faults` already reports each failure once. Without this level, the SDK would also log every attempt.
    logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)
    pusher = Pusher(perf, url, interval, faults.note, lambda error: faults.changed("metrics by OTLP", error))
    pusher.start()
    try:
        yield masked(url)
    finally:
        pusher.stop()


@contextlib.contextmanager
def _ended_by_sigterm(stopped: threading.Event) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
