"""The settings of a pool, stored with it, and the reason for each default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agentperf_redis import arguments
from agentperf_redis.errors import InvalidArgument

_MIN_S = 0.001
_MAX_S = 86_400.0
_DEFAULT_MAX_EJECTION_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """The health and capacity settings of a pool. Stored with it: the last deployed ones apply to all processes.

    Args:
        eject_after: bad outcomes in a row (error, timeout, rejected, slow) that eject an instance; None for never.
            Default five, as in Envoy: one bad request with three retries ejects no instance.
        base_ejection_time: seconds of the first ejection; each further one in a row is twice as long. Default ten: long
            enough for a restart, short enough not to matter when the ejection was wrong.
        max_ejection_time: max seconds of an ejection. When this time has passed since an ejection ended, the next one
            is a first one again. Default five minutes.
        max_ejection_share: max share of the instances that may be ejected; one instance always may. Default a half:
            ejection alone never leads to panic, and of four instances two may be unhealthy.
        panic_threshold: when more than this share of the instances is unhealthy (ejected or failing checks), all of
            them get work again: the health data is more likely wrong than the instances, and the others could not
            carry the load. 1 for never.
        slow_after: response time in seconds from which an outcome is slow, and so bad; None for never. Default None: a
            model's response time depends on the length of its answer.
        adaptive: whether each instance has an adaptive concurrency limit, up to its max_capacity, that follows its
            outcomes. Default False: max_capacity is the configured limit.
        slow_start: seconds over which a new instance's capacity grows from a tenth to all of it; None for at once. It
            applies while at least half of the instances are healthy and warm. Default None: most agents have nothing
            to warm up.
        rate_burst: a lease is granted while the instance is at most this many seconds ahead of its rates. Default six,
            a tenth of a minute: in any minute, the leases before the last one use at most 1.1 times its rate. The last
            one may use any number of tokens; the next lease then waits longer.
        unhealthy_threshold: failed active checks in a row that make an instance unhealthy. Default three: one lost
            packet is not enough.
        healthy_threshold: passed checks in a row that make it healthy again. Default two: one lucky check is not
            enough.
    """

    eject_after: int | None = 5
    base_ejection_time: float = 10.0
    max_ejection_time: float = _DEFAULT_MAX_EJECTION_S
    max_ejection_share: float = 0.5
    panic_threshold: float = 0.5
    slow_after: float | None = None
    adaptive: bool = False
    slow_start: float | None = None
    rate_burst: float = 6.0
    unhealthy_threshold: int = 3
    healthy_threshold: int = 2

    def __post_init__(self) -> None:
        if self.eject_after is not None:
            arguments.count("eject_after", self.eject_after)
        arguments.seconds("base_ejection_time", self.base_ejection_time, minimum=_MIN_S, maximum=_MAX_S)
        max_ejection_time = arguments.seconds(
            "max_ejection_time", self.max_ejection_time, minimum=_MIN_S, maximum=_MAX_S
        )
        if self.base_ejection_time > max_ejection_time:
            if max_ejection_time == _DEFAULT_MAX_EJECTION_S:  # the default, not the caller's choice
                allowed = f"seconds up to max_ejection_time, {max_ejection_time:g}; raise that too for a longer one"
                raise InvalidArgument("base_ejection_time", self.base_ejection_time, allowed)
            allowed = f"seconds from base_ejection_time, {self.base_ejection_time:g}, to {_MAX_S:g}"
            raise InvalidArgument("max_ejection_time", self.max_ejection_time, allowed)
        arguments.amount("max_ejection_share", self.max_ejection_share, maximum=1.0)
        arguments.amount("panic_threshold", self.panic_threshold, minimum=0.01, maximum=1.0)
        if self.slow_after is not None:
            arguments.seconds("slow_after", self.slow_after, minimum=_MIN_S, maximum=_MAX_S)
        arguments.flag("adaptive", self.adaptive)
        if self.slow_start is not None:
            arguments.seconds("slow_start", self.slow_start, minimum=_MIN_S, maximum=_MAX_S)
        arguments.seconds("rate_burst", self.rate_burst, minimum=0.0, maximum=3600.0)
        arguments.count("unhealthy_threshold", self.unhealthy_threshold, maximum=1000)
        arguments.count("healthy_threshold", self.healthy_threshold, maximum=1000)

    def packed(self) -> str:
        """Return the settings in the format of #settings, which the scripts read by name."""
        stored = {
            "eject_after": self.eject_after or 0,
            "base_ejection_ms": _ms(self.base_ejection_time),
            "max_ejection_ms": _ms(self.max_ejection_time),
            "max_ejection_share": _share(self.max_ejection_share),
            "panic_threshold": _share(self.panic_threshold),
            "slow_after_us": 0 if self.slow_after is None else round(self.slow_after * 1_000_000),
            "adaptive": int(self.adaptive),
            "slow_start_ms": 0 if self.slow_start is None else _ms(self.slow_start),
            "rate_burst_ms": _ms(self.rate_burst),
            "unhealthy_threshold": self.unhealthy_threshold,
            "healthy_threshold": self.healthy_threshold,
        }
        return " ".join(f"{name}={value}" for name, value in stored.items())

    @staticmethod
    def unpacked(text: str) -> PoolSettings:
        """Undo `packed`.

        Raises:
            ValueError: for a text that `packed` did not write.
        """
        stored = dict(word.split("=") for word in text.split(" "))
        try:
            whole = {name: int(stored[name]) for name in _WHOLE}
            return PoolSettings(
                eject_after=whole["eject_after"] or None,
                base_ejection_time=whole["base_ejection_ms"] / 1000,
                max_ejection_time=whole["max_ejection_ms"] / 1000,
                max_ejection_share=float(stored["max_ejection_share"]),
                panic_threshold=float(stored["panic_threshold"]),
                slow_after=whole["slow_after_us"] / 1_000_000 if whole["slow_after_us"] else None,
                adaptive=whole["adaptive"] == 1,
                slow_start=whole["slow_start_ms"] / 1000 if whole["slow_start_ms"] else None,
                rate_burst=whole["rate_burst_ms"] / 1000,
                unhealthy_threshold=whole["unhealthy_threshold"],
                healthy_threshold=whole["healthy_threshold"],
            )
        except KeyError as missing:
            raise ValueError(f"no {missing} in {text!r}") from None


_WHOLE = (
    *("eject_after", "base_ejection_ms", "max_ejection_ms", "slow_after_us", "adaptive"),
    *("slow_start_ms", "rate_burst_ms", "unhealthy_threshold", "healthy_threshold"),
)
"""Stored settings that are whole numbers; the others are shares."""
DEFAULT_SETTINGS = PoolSettings()


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _share(value: float) -> str:
    """Round a share down to thousandths, since the scripts compare whole thousandths."""
    return f"{math.floor(value * 1000) / 1000:g}"
