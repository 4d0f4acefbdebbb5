"""The settings of a pool, which the server stores with the pool, and the reason for each default."""

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
    """The health and capacity settings of a pool. The settings that were sent last apply to all processes.

    Args:
        eject_after: number of bad outcomes in a row after which an instance is ejected; None for never. The bad
            outcomes are error, timeout, rejected and slow (see `slow_after`). Default five, as in Envoy: one bad
            request with three retries ejects no instance.
        base_ejection_time: length of the first ejection, seconds; each further ejection in a row lasts twice as long.
            Default ten: long enough for a restart, and short enough to do little harm if the ejection was wrong.
        max_ejection_time: max length of an ejection, seconds. If more than this time passes between the end of
            one ejection and the next ejection, the next one counts as a first ejection. Default five minutes: a probe
            every five minutes costs nothing.
        max_ejection_share: an instance is ejected only if at most this share of all instances is then unhealthy. One
            instance may be ejected in any case, but never the last healthy one. Default one half: ejections alone never
            cause panic, and two of four instances may be ejected.
        panic_threshold: when more than this share of the instances is unhealthy (ejected or failing checks), the
            unhealthy instances get work too. In that case the health data is probably wrong, and the healthy instances
            could not carry the load alone. 1 for never. Default one half: if more than half of the instances fail, the
            cause is probably something that they share.
        slow_after: seconds; an ok outcome with a longer response time is slow and counts as bad. None for never.
            Default None: a model's response time depends on the length of its answer.
        adaptive: whether each instance has an adaptive concurrency limit, which follows its outcomes and is at most its
            max_capacity. Default False: max_capacity is the limit. A bad outcome lowers the limit by a fifth, at most
            once for all leases that were in flight together. A good outcome raises the limit by 1/limit if the load is
            at least half the limit: at a limit of 8, eight good outcomes raise it by about one. Timeouts, rejections
            and slow outcomes count towards ejection only at a limit of 1. `update_instance(max_capacity=)` resets the
            limit.
        slow_start: seconds in which the capacity of a new or recovered instance grows from a tenth to the full
            capacity, in ten steps; None for no slow start. A new instance warms up only if a healthy, warm instance has
            been registered for at least these seconds, so a fleet that starts together has its full capacity at once.
            No slow start begins during a panic, or while fewer than half of the instances are healthy and warm. Default
            None: most agents have nothing to warm up.
        rate_burst: a lease is granted while the instance is at most this many seconds ahead of its rate limits. Default
            six, a tenth of a minute: in any minute, all leases but the last one use at most 1.1 times the rate limit.
            This last lease may use any number of tokens. The next lease then waits longer.
        unhealthy_threshold: number of failed active checks in a row after which an instance is unhealthy. Default
            three: one lost packet is not enough.
        healthy_threshold: number of passed active checks in a row after which an unhealthy instance is healthy
            again. Default two: one lucky check is not enough.
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
            if max_ejection_time == _DEFAULT_MAX_EJECTION_S:  # most likely the caller did not set it
                allowed = f"seconds up to max_ejection_time, {max_ejection_time:g}; for a longer ejection raise both"
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
        """Return the settings as "name=value" words. The server stores this text as #settings; the scripts read it."""
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
        """Return the settings from the text that `packed` returned.

        Raises:
            ValueError: if a setting is missing or invalid.
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
