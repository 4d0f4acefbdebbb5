"""A circuit breaker: while a node is known not to answer, commands for it fail at once and do not take their deadline.

A shorter outage is ridden out by retries, as ever. The breaker opens when a command had no answer within a whole
deadline and a probe made then has none either; so one slow command, or one lost connection, opens nothing. While it is
open, a thread of the process probes the node a few times a second, and the first answer closes it: no caller's
command is the guinea pig. Commands already under way when it opens go on trying until their deadline.

Source: M. Nygard, "Release It!" (2007), chapter 5, with a probe of our own in place of the half-open state.
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
"""How long a probe waits. A server that answers slower than this has answered nobody for a whole deadline."""
_MIN_REST_S, _MAX_REST_S = 0.15, 0.3
"""Between probes: recovery is noticed within a second, and a thousand processes do not come back in step."""
_CALM_S = 1.0
"""After a probe that was answered, further suspicion of that node is ignored for this long."""


class _Outage:
    """A node that does not answer."""

    __slots__ = ("refused", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.refused = 0


class Breaker:
    """Knows which nodes do not answer. Shared by all drivers of a backend, and safe under threads.

    Args:
        topology: the layout that commands are sent by.
        attempt_timeout_s: seconds without an answer after which a command gives rise to suspicion: the usual deadline.
        answers: probes a node, within `PROBE_S`.
        learn: finds out the layout anew; None where there is nothing to find out.
        recovered: called on a background thread when a node answers again, and commands pass.

    Attributes:
        open: the nodes that do not answer. Empty in good times, which is all that a command's way looks at.
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
        # Apart from the probes: what it runs are commands, which may meet the next outage, and that has to be probed.
        self._recovery = Background("agentperf-recovery", lingers=False)
        self.after_fork()

    def after_fork(self) -> None:
        """In a forked child: the threads stayed with the parent, and nothing is known of the nodes."""
        self.open: dict[Node, _Outage] = {}
        self._lock = threading.Lock()
        """Held while an outage is noted, so that none is after `stop`."""
        self._stopped = False
        self._calm_until: dict[Node, float] = {}
        self._watches: dict[Node, Background] = {}
        """A thread for each suspected node, which ends when nothing is suspected of it any more."""

    def refusal(self, node: Node | None) -> BackendUnavailable | None:
        """Return what to tell the caller of a command for this node, or None to let it pass."""
        outage = self.open.get(node) if node is not None else None
        if outage is None:
            return None
        outage.refused += 1  # not locked: a count for the log
        silent_s = time.monotonic() - outage.since
        reason = f"it has not answered for {silent_s:.1f} s; commands fail at once until it does"
        return BackendUnavailable(self._topology.address.masked, "not_applied", reason)

    def suspect(self, node: Node, deadline_s: float) -> None:
        """Take note of a command that had no answer from this node within its deadline. Does not block."""
        if deadline_s < self._attempt_timeout_s:  # a caller in a hurry is no reason to refuse patient ones
            return
        if self._believed(node):
            watch = self._watches.get(node)
            if watch is None:
                watch = self._watches.setdefault(node, Background("agentperf-breaker", lingers=False))
            watch.put(partial(self._probe, node, watch))

    def stop(self) -> None:
        """Refuse nothing from here on: what a closing client still has to say is tried once more, whatever is known."""
        with self._lock:
            self._stopped = True
            self.open.clear()
        for watch in list(self._watches.values()):
            watch.close(0.0)

    def _believed(self, node: Node) -> bool:
        """Whether a suspicion of this node is news, and worth a probe."""
        return not (self._stopped or node in self.open or self._calm_until.get(node, 0.0) > time.monotonic())

    def _probe(self, node: Node, watch: Background) -> None:
        """Probe a node that is suspected, and keep commands from it if it does not answer."""
        if not self._believed(node):
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
        due = time.monotonic() + random.uniform(_MIN_REST_S, _MAX_REST_S)
        watch.at(due, partial(self._probe_again, node, outage, watch))

    def _probe_again(self, node: Node, outage: _Outage, watch: Background) -> None:
        """Let commands pass again once a node answers, or is in use no more."""
        if self.open.get(node) is not outage:  # stopped
            return
        try:
            what = self._change(node)
        except BaseException:
            self.open.pop(node, None)  # a fault of the probe must not keep commands away for good
            raise
        if not what:
            self._probe_later(node, outage, watch)
            return
        with self._lock:
            if self._stopped:
                return
            self.open.pop(node, None)
        seconds = time.monotonic() - outage.since
        refused = outage.refused
        _log.warning("%s %s, after %.1f s; commands that failed at once: %d", self._name(node), what, seconds, refused)
        self._recovery.put(self._recovered)

    def _name(self, node: Node) -> str:
        address = self._topology.address.masked
        return address if self._topology.fixed else f"{node.host}:{node.port} of {address}"

    def _change(self, node: Node) -> str:
        """Return why the breaker may close, in words; an empty text if it may not."""
        if self._answers(node):
            return "answers again"
        if self._learn is not None:
            self._learn()  # commands that fail at once learn nothing, and another node may serve by now
        return "" if self._topology.uses(node) else "is in use no more"
