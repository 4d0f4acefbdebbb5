"""A circuit breaker: while a node is known not to answer, commands for it fail at once, without using their deadline.

Retries cover a shorter outage. The breaker opens when a command got no answer within a whole deadline and a probe after
it got none either. So one slow command or one lost connection does not open it. While it is open, a thread of the
process probes the node a few times a second, and the first answer closes it: no command of a caller serves as the
probe. Commands already in flight when it opens are retried until their deadline.

Source: M. Nygard, "Release It!" (2007), chapter 5, with a separate probe instead of the half-open state.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from functools import partial

from agentperf_redis.background import Background
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.transport.topology import Node, Topology

_log = logging.getLogger("agentperf_redis")

PROBE_S = 0.5
"""Timeout of a probe. A server slower than this has answered no caller for a whole deadline."""
_MIN_PROBE_PAUSE_S, _MAX_PROBE_PAUSE_S = 0.15, 0.3
"""Pause between probes: recovery is detected within a second, and a thousand processes do not probe in step."""
_CALM_S = 1.0
"""After a successful probe, further suspicions of the node are ignored for this time."""


class _Outage:
    """A node that does not answer."""

    __slots__ = ("refused", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.refused = 0


class Breaker:
    """Knows which nodes do not answer. Shared by all drivers of a backend, and safe under threads.

    Args:
        topology: the layout by which commands are routed.
        attempt_timeout_s: minimum seconds without an answer until a command causes a suspicion: the default deadline.
        answers: probes a node, within `PROBE_S`.
        learn: refreshes the layout; None for a fixed layout.
        recovered: called on a background thread when a node answers again and commands pass.

    Attributes:
        open: the nodes that do not answer. Usually empty, which is all that the fast path of a command checks.
    """

    def __init__(
        self,
        topology: Topology,
        attempt_timeout_s: float,
        answers: Callable[[Node], bool],
        learn: Callable[[], object] | None,
        recovered: Callable[[], None],
    ) -> None:
        self._topology = topology
        self._attempt_timeout_s = attempt_timeout_s
        self._answers = answers
        self._learn = learn
        self._recovered = recovered
        # Separate from the probes: the recovery runs commands, which may meet the next outage, and that needs a probe.
        self._recovery = Background("agentperf-recovery", lingers=False)
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: start closed. The threads belong to the parent, and the state of the nodes is unknown."""
        self.open: dict[Node, _Outage] = {}
        self._lock = threading.Lock()
        """Held while an outage is recorded, so that none is recorded after `stop`."""
        self._stopped = False
        self._calm_until: dict[Node, float] = {}
        self._watches: dict[Node, Background] = {}
        """A thread for each suspected node. It ends when the suspicion ends."""

    def refusal(self, node: Node | None) -> BackendUnavailable | None:
        """Return the error for a command to this node, or None to let the command pass."""
        outage = self.open.get(node) if node is not None else None
        if outage is None:
            return None
        outage.refused += 1  # without the lock: the count is for the log only
        silent_s = time.monotonic() - outage.since
        reason = f"it has not answered for {silent_s:.1f} s; commands fail at once until it does"
        return BackendUnavailable(self._topology.address.masked, "not_applied", reason)

    def suspect(self, node: Node, deadline_s: float) -> None:
        """Report a command that got no answer from this node within its deadline. Does not block."""
        if deadline_s < self._attempt_timeout_s:  # a short deadline must not cause refusals for longer ones
            return
        if self._needs_probe(node):
            watch = self._watches.get(node)
            if watch is None:
                watch = self._watches.setdefault(node, Background("agentperf-breaker", lingers=False))
            watch.put(partial(self._probe, node, watch))

    def stop(self) -> None:
        """Refuse nothing from now on: the last commands of a closing client are tried, whatever the state."""
        with self._lock:
            self._stopped = True
            self.open.clear()
        for watch in list(self._watches.values()):
            watch.close(0.0)

    def _needs_probe(self, node: Node) -> bool:
        """Whether a suspicion of this node is new and needs a probe."""
        return not (self._stopped or node in self.open or self._calm_until.get(node, 0.0) > time.monotonic())

    def _probe(self, node: Node, watch: Background) -> None:
        """Probe a suspected node, and refuse its commands if it does not answer."""
        if not self._needs_probe(node):
            return
        if self._answers(node):
            self._calm_until[node] = time.monotonic() + _CALM_S
            return
        with self._lock:
            if self._stopped:
                return
            outage = self.open[node] = _Outage(time.monotonic() - self._attempt_timeout_s)
        _log.warning("%s does not answer: commands for it fail at once until it does", self._name(node))
        self._probe_later(node, outage, watch)

    def _probe_later(self, node: Node, outage: _Outage, watch: Background) -> None:
        due = time.monotonic() + random.uniform(_MIN_PROBE_PAUSE_S, _MAX_PROBE_PAUSE_S)
        watch.at(due, partial(self._probe_again, node, outage, watch))

    def _probe_again(self, node: Node, outage: _Outage, watch: Background) -> None:
        """Let commands pass again once a node answers or is no longer in use."""
        if self.open.get(node) is not outage:  # stopped
            return
        try:
            cause = self._closing_reason(node)
        except BaseException:
            self.open.pop(node, None)  # a fault of the probe must not refuse commands forever
            raise
        if not cause:
            self._probe_later(node, outage, watch)
            return
        with self._lock:
            if self._stopped:
                return
            self.open.pop(node, None)
        seconds = time.monotonic() - outage.since
        refused = outage.refused
        _log.warning("%s %s, after %.1f s; commands that failed at once: %d", self._name(node), cause, seconds, refused)
        self._recovery.put(self._recovered)

    def _name(self, node: Node) -> str:
        address = self._topology.address.masked
        return address if self._topology.fixed else f"{node.host}:{node.port} of {address}"

    def _closing_reason(self, node: Node) -> str:
        """Return the reason why the breaker may close, or an empty text."""
        if self._answers(node):
            return "answers again"
        if self._learn is not None:
            self._learn()  # refused commands refresh nothing, and another node may have taken over
        return "" if self._topology.uses(node) else "is no longer in use"
