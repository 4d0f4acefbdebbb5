"""How a pool judges its instances: the settings that lie with the pool, and the reason of each default."""

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
    """How a pool judges its instances. Kept with the pool: the ones deployed last hold for all processes.

    Args:
        eject_after: bad outcomes in a row (error, timeout, rejected, slow) after which an instance is ejected; None
            never. Five, as in Envoy: one bad request that is tried again three times ejects nobody.
        base_ejection_time: seconds of the first ejection; each further one in a row is twice as long. Ten: long enough
            for a restart, short enough not to matter when the ejection was wrong.
        max_ejection_time: seconds of the longest ejection. When this time has passed after an ejection, the next one is
            a first one again. Five minutes.
        max_ejection_share: share of the instances that may be ejected; one instance always may. A half: ejection alone
            never leads to panic, and of four instances two may be unhealthy.
        panic_threshold: when more than this share of the instances is unhealthy (ejected or failing checks), all of
            them get work again: the health data is more likely wrong than the instances, and the others could not
            carry the load. 1: never.
        slow_after: seconds of response time from which an outcome is slow, which is a bad one; None never. None, for
            how long a model takes follows from the length of its answer.
        adaptive: whether the units that an instance may bear are learnt from outcomes, up to its max_capacity. False:
            max_capacity is what was asked for.
        slow_start: seconds over which a newcomer's capacity grows from a tenth to all of it, while others are there
            that are fit and warm, and no minority; None for at once. None, for most agents have nothing to warm up.
        rate_burst: seconds of an instance's rates that it may owe when it is granted a lease. Six: a tenth of a
            minute, so that in no minute the leases before its last one take more than 1.1 of its rate. That last one
            may take any number of tokens, and what follows waits the longer.
        unhealthy_threshold: failed active checks in a row after which an instance is unhealthy. Three: one lost packet
            is not enough.
        healthy_threshold: passed checks in a row after which it is healthy again. Two: one lucky check is not enough.
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
            if max_ejection_time == _DEFAULT_MAX_EJECTION_S:  # which nobody chose
                allowed = f"seconds up to those of max_ejection_time, {max_ejection_time:g}; give that as well for more"
                raise InvalidArgument("base_ejection_time", self.base_ejection_time, allowed)
            allowed = f"seconds from those of base_ejection_time, {self.base_ejection_time:g}, to {_MAX_S:g}"
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
        """Return the settings as they are stored in #settings, which the scripts read by name."""
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
            ValueError: for a text that is none of `packed`.
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
    """Show a share in thousandths, the next lower one; the scripts compare whole thousandths."""
    return f"{math.floor(value * 1000) / 1000:g}"
