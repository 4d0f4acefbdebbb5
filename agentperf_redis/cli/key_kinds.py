"""The kinds of keys of this library in words, for `agentperf inspect`. `keys.py` lists the same kinds."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from agentperf_redis.cache.entry_format import CLOCK_PER_S, unpack_score, unpack_size
from agentperf_redis.keys import decoded, whole_resource
from agentperf_redis.metrics.histogram import bucket_bounds

_MAX_S = 253_402_300_799
"""The end of the year 9999, s since 1970. A later time stands for "never"."""


def _time(seconds: float) -> str:
    if not 0 < seconds <= _MAX_S:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(sep=" ", timespec="milliseconds")


def plain(value: float) -> str:
    """Return the text for a number that has no unit."""
    return f"{value:.17g}"


def at_ms(value: float) -> str:
    """Return the text for a time that is stored in ms since 1970."""
    return _time(value / 1e3)


def at_ms_or_unknown(value: float) -> str:
    """Return the text for a time that is stored in ms since 1970; 0 stands for an unknown time."""
    return at_ms(value) if value else "at an unknown time"


def at_us(value: float) -> str:
    """Return the text for a time that is stored in us since 1970."""
    return _time(value / 1e6)


def at_clock(value: float) -> str:
    """Return the text for a time that is stored as a reading of a cache's clock."""
    return _time(value / CLOCK_PER_S)


def access(value: float) -> str:
    """Return the text for an entry's score, a number that packs the last access and the frequency of the entry."""
    clock, frequency = unpack_score(value)
    return f"{at_clock(clock)}, frequency {frequency}"


def held(value: float) -> str:
    """Return the text for a number that packs the hits and the bytes of an entry."""
    hits, size_bytes = unpack_size(str(int(value)))
    return f"{size_bytes} bytes, {hits} hits"


def length_ms(value: float) -> str:
    """Return the text for a length of time that is stored in ms."""
    return f"{value / 1e3:g} s"


Shown = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Meaning:
    """The meaning of some fields or members of a key.

    Attributes:
        pattern: a regular expression that matches the whole name of such a field or member.
        text: the meaning; ``{0}`` is the first group of the pattern, percent-decoded.
        shown: returns the text for a value that is a number; None shows each value as it is.
        is_secret: whether the value is hidden.
    """

    pattern: str
    text: str
    shown: Shown | None = None
    is_secret: bool = False

    def of(self, name: str) -> str | None:
        """Return the meaning of a name; None if the pattern does not match."""
        found = re.fullmatch(self.pattern, name, re.DOTALL)
        return None if found is None else self.text.format(*(decoded(group or "") for group in found.groups()))


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of keys.

    Attributes:
        service: a pattern for the service in the hash tag; empty for keys without a hash tag.
        part: a pattern for the rest of the key.
        type: the type of the value, as the command TYPE reports it.
        holds: the content in words; ``{0}`` is the resource, ``{1}`` and so on are the groups of `part`.
        meanings: the meanings of fields and members; the first one whose pattern matches applies.
    """

    service: str
    part: str
    type: str
    holds: str
    meanings: tuple[Meaning, ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """The facts that the name of a key contains.

    Attributes:
        kind: kind of the key.
        namespace: namespace of the key.
        service: service of the key; empty for keys of the whole namespace.
        resource: the pool, the cache or the shard of the metrics; empty for keys of the whole namespace.
        holds: the content in words.
    """

    kind: Kind
    namespace: str
    service: str
    resource: str
    holds: str

    def hides(self, name: str) -> bool:
        """Return whether to hide the value of a field, because the value may contain a secret."""
        found = next((each for each in self.kind.meanings if each.of(name) is not None), None)
        return found is not None and found.is_secret

    def meaning(self, name: str, value: str) -> tuple[str, str]:
        """Return the meaning of a field or member, and its value in words. Each is empty if it is unknown."""
        for each in self.kind.meanings:
            text = each.of(name)
            if text is not None:
                return text, "" if each.shown is None else _in_words(each.shown, value)
        return "", ""


def known(key: str) -> Known | None:
    """Read the name of a key; return None if it is no key of this library."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    namespace, service, resource, part = (
        found["namespace"],
        found["service"] or "",
        found["resource"] or "",
        found["part"],
    )
    for kind in KINDS:
        groups = re.fullmatch(kind.part, part, re.DOTALL)
        if groups is not None and re.fullmatch(kind.service, service):
            name = decoded(whole_resource(resource))
            shard = _SHARD.search(resource)
            where = name if shard is None else f"{name} (shard {shard[1]} of {shard[2]})"
            return Known(kind, namespace, service, name, kind.holds.format(where, *map(_named, groups.groups())))
    return None


_KEY = re.compile(
    r"(?P<namespace>[A-Za-z0-9_.-]{1,64}):(?:\{(?P<service>[a-z]+)(?::(?P<resource>[^{}]+))?\}:)?(?P<part>.+)",
    re.DOTALL,
)


_SHARD = re.compile(r"#(\d+)/(\d+)(?:~\d+)?\.\d+$")


def _named(group: str | None) -> str:
    return decoded(group or "")


def _in_words(shown: Shown, value: str) -> str:
    try:
        return shown(int(value) if value.isdecimal() else float(value))  # an int keeps all digits; a float may not
    except (ValueError, OverflowError):  # another program has changed the value
        return ""


def _bucket(name: str) -> str:
    low, high = bucket_bounds(int(name))
    return f"executions that took more than {low:.6g} s and at most {high:.6g} s"


class _Bucket(Meaning):
    def of(self, name: str) -> str | None:
        found = re.fullmatch(self.pattern, name)
        return None if found is None else _bucket(found[1])


_HISTORY = (
    Meaning("claimed", "the last slice of 10 s that was sampled began", at_ms),
    Meaning("totals", "the totals of the last sample, from which the next one counts"),
    Meaning("(10s|1m|1h):[0-9]+", "a slice of {0}: its start in ms, the number of samples, and their figures"),
)
_COUNTERS = (
    Meaning("n", "executions"),
    Meaning("ok", "executions that succeeded"),
    Meaning("err", "executions that failed"),
    Meaning("cancelled", "executions that were cancelled"),
    Meaning("err:(.+)", "failures of the type {0}"),
    Meaning("types", "different types of failures"),
    Meaning("models", "different models"),
    Meaning("sum_us", "sum of the durations, us"),
    Meaning("self_us", "sum of the time outside inner spans, us"),
    Meaning("min_us", "shortest duration, us"),
    Meaning("max_us", "longest duration, us"),
    Meaning("first_ms", "time of the first execution", at_ms),
    Meaning("last_ms", "time of the last execution", at_ms),
    Meaning("items", "items of streams"),
    Meaning("llm_calls", "calls of models"),
    Meaning("tool_calls", "calls of tools"),
    Meaning("tok_in", "tokens sent to models"),
    Meaning("tok_out", "tokens received from models"),
    Meaning("tok_cached_in", "tokens sent that were read from the provider's cache"),
    Meaning("tok_cache_write", "tokens sent that were written to the provider's cache"),
    Meaning("tok_reasoning", "tokens received that were reasoning"),
    Meaning("cost_nano", "cost, in 10^-9 of the caller's unit"),
    Meaning("h:zero", "executions that took less than 1 us"),
    _Bucket(r"h:(-?\d{1,4})", ""),
    Meaning("mdl:(.+):n", "calls of the model {0}"),
    Meaning("mdl:(.+):([a-z_]+)", "{1} of the model {0}"),
)
_SAMPLE = r"(?:\d+)\|(\d+)us\|(.*?)(?:\|[^|]*)?"
_ACCESSED = (Meaning(".*", "last access to this entry", access),)

KINDS = (
    Kind(
        "",
        "meta",
        "hash",
        "facts of the namespace",
        (
            Meaning("schema", "major version of the data model"),
            Meaning("epoch", "random; another one when the server came back without its data"),
            Meaning("created_ms", "time of the first use of the namespace", at_ms),
        ),
    ),
    Kind(
        "",
        "resources",
        "zset",
        "pools, caches and metrics that programs use, by the time when a process last opened them",
        (
            Meaning("lb:(.+)", "the pool {0}, last opened", at_ms),
            Meaning("cache:(.+)", "the LRU cache {0}, last opened", at_ms),
            Meaning("tiered:(.+)", "the tiered cache {0}, last opened", at_ms),
            Meaning("metrics:all", "the metrics, last opened", at_ms),
        ),
    ),
    Kind("[a-z]*", "absent", "none", "nothing: the library never writes this key; scripts name it while slots move"),
    Kind("doctor", "scratch", "string", "a value with which `agentperf doctor` tries commands; it expires in 10 s"),
    # Processes
    Kind(
        "workers",
        "seen",
        "zset",
        "the processes that record or hold leases (`agentperf workers`)",
        (Meaning("(.+)", "the last heartbeat of the process {0}", at_ms),),
    ),
    Kind(
        "workers",
        "w:(.+)",
        "hash",
        "the state of the process {1} at its last heartbeat; it expires",
        (
            Meaning("host", "where the process runs"),
            Meaning("pid", "id of the process"),
            Meaning("since_ms", "time when the process began to record or lease", at_ms),
            Meaning("python", "version of Python"),
            Meaning("version", "version of this library"),
            Meaning("leases", "leases that the process holds"),
            Meaning("pending", "executions that wait since the last flush failed"),
            Meaning("dropped", "executions that were dropped and never counted"),
            Meaning("error", "error of the last flush, empty if it succeeded"),
            Meaning("running", "agents and begins, ms, of the executions that run, the oldest first"),
            Meaning("more", "further executions that run"),
        ),
    ),
    # Pools
    Kind(
        "lb",
        "state",
        "hash",
        "instances, leases, queue entries and facts of the pool {0}",
        (
            Meaning("#pool", "strategy of the pool, or of a pool with several shards their number"),
            Meaning("#settings", "settings of the pool"),
            Meaning("#born", "time when the pool was created", at_us),
            Meaning("#picks", "leases granted so far"),
            Meaning("#load", "leases on all instances"),
            Meaning("#cap", "capacity of the instances that take work"),
            Meaning("#usable", "instances that are not disabled"),
            Meaning("#unhealthy", "usable instances that are unhealthy"),
            Meaning("#warming", "healthy instances that warm up"),
            Meaning("#panic", "start of the panic", at_ms),
            Meaning("#calm", "end of the last panic", at_ms),
            Meaning("#arrived", "arrival of the last waiter", at_us),
            Meaning("#claimed", "time when active checks were last claimed", at_ms),
            Meaning("#next", "time of the next maintenance; 0 while callers wait", at_ms_or_unknown),
            Meaning("#watched", "time until which waiters of other shards watch this one", at_ms),
            Meaning("#expires", "time after which the keys of the pool expire, since it has no instance", length_ms),
            Meaning("#configured", "1 if the settings were configured"),
            Meaning("#clock", "the server's time at the last maintenance, ms"),
            Meaning("@.+", "a request for a lease: a lease, a grant, a waiter, or a tombstone of an ended one"),
            Meaning(r"\+(.+)", "ejections, checks and limits of the instance {0}"),
            Meaning("([^#].*)", "the instance {0}"),
        ),
    ),
    Kind(
        "lb",
        "ready",
        "zset",
        "instances of the pool {0} with free capacity, by the score of the strategy",
        (Meaning("(.+)", "the instance {0}, score", plain),),
    ),
    Kind(
        "lb",
        "ready@(.+)",
        "zset",
        "instances of the pool {0} with free capacity and the label {1}, by the score of the strategy",
        (Meaning("(.+)", "the instance {0}, score", plain),),
    ),
    Kind(
        "lb",
        "due",
        "zset",
        "timers of the pool {0}",
        (
            Meaning("@.+", "a lease or a grant expires", at_ms),
            Meaning("W@.+", "a waiter counts as gone unless it polls again", at_ms),
            Meaning("X@.+", "a tombstone is deleted", at_ms),
            Meaning("H:(.+)", "the heartbeat of the instance {0} is due", at_ms),
            Meaning("E:(.+)", "the ejection of the instance {0} ends", at_ms),
            Meaning("R:(.+)", "a rate limit of the instance {0} recovers", at_ms),
            Meaning("C:(.+)", "the rest of the instance {0} ends", at_ms),
            Meaning("V:(.+)", "the next step of the warm-up of the instance {0}", at_ms),
            Meaning("P:.+", "the next batch of instances after a panic began or ended", at_ms),
        ),
    ),
    Kind(
        "lb",
        "waitq",
        "zset",
        "callers that wait for an instance of the pool {0}, in their order",
        (Meaning("@.+", "arrival minus priority", at_us),),
    ),
    Kind(
        "lb",
        "ids",
        "zset",
        "all instances of the pool {0}, in the order of their registration",
        (Meaning("(.+)", "the instance {0}, registered", at_us),),
    ),
    Kind(
        "lb",
        "ring",
        "zset",
        "the hash ring of the pool {0}: points of its instances",
        (Meaning(r"(.+)#\d+", "a point of the instance {0}", plain),),
    ),
    Kind(
        "lb",
        "away",
        "zset",
        "instances of the pool {0} that are unhealthy, resting or rate-limited, by the end of that",
        (Meaning("(.+)", "the instance {0} comes back", at_ms_or_unknown),),
    ),
    Kind(
        "lb",
        "checks",
        "zset",
        "active checks of the pool {0}",
        (Meaning("(.+)", "the next check of the instance {0}", at_ms),),
    ),
    Kind("lb", "history", "hash", "the pool {0} over time (`agentperf series --pool`)", _HISTORY),
    Kind("cache|tiered", "history", "hash", "the cache {0} over time (`agentperf series --cache`)", _HISTORY),
    Kind("lb", "events", "stream", "the last events of the pool {0}, about a thousand (`agentperf lb events`)"),
    # Locks and semaphores
    Kind(
        "lock|semaphore",
        "state",
        "hash",
        "holders and waiters of the lock or semaphore {0}; it expires with the last of them",
        (
            Meaning("@.+", "a request: held, granted to a waiter that has not fetched it, or waiting"),
            Meaning("#fence", "the last fencing token", at_us),
        ),
    ),
    Kind(
        "lock|semaphore",
        "held",
        "zset",
        "leases and grants of the lock or semaphore {0}",
        (Meaning("@.+", "a lease or a grant expires", at_ms),),
    ),
    Kind(
        "lock|semaphore",
        "queue",
        "zset",
        "callers that wait for the lock or semaphore {0}, in their order",
        (Meaning("@.+", "arrival", at_us),),
    ),
    Kind(
        "lock|semaphore",
        "spent:(@.+)",
        "string",
        "why a late copy of the request {1} for the lock or semaphore {0} is refused; it expires",
    ),
    # Caches
    Kind(
        "cache|tiered",
        "e:(.+)",
        "string",
        "the entry {1} of the cache {0}: version, request, perhaps expiry, cost, freshness and tags, then the value "
        "(`agentperf cache get`)",
    ),
    Kind(
        "cache|tiered",
        "l:(.+)",
        "hash",
        "the computation of the entry {1} of the cache {0}; its TTL is that of the lease",
        (
            Meaning("token", "identifies the process that computes the value"),
            Meaning("version", "the cache's clock when the computation began", at_clock),
            Meaning("lease_ms", "length of the lease", length_ms),
            Meaning("waited", "1 if other callers wait for the value"),
            Meaning("failed", "token of the computation that failed last"),
            Meaning("failed_ms", "time of that failure", at_ms),
            Meaning("error", "type and text of that failure"),
        ),
    ),
    Kind(
        "cache|tiered",
        "r:.+",
        "string",
        "the reply of a request to the cache {0}, or the entry that it removed, in case the request is sent again; "
        "it expires",
    ),
    Kind("cache|tiered", "hot", "zset", "entries of the hot tier of the cache {0}, by last access", _ACCESSED),
    Kind("cache|tiered", "warm", "zset", "entries of the warm tier of the cache {0}, by last access", _ACCESSED),
    Kind("cache|tiered", "cold", "zset", "entries of the cold tier of the cache {0}, by last access", _ACCESSED),
    Kind(
        "cache|tiered",
        "new",
        "zset",
        "entries of the cache {0} that are new, by last access (policy tinylfu)",
        _ACCESSED,
    ),
    Kind(
        "cache|tiered",
        "ghost",
        "zset",
        "evicted keys of the cache {0}, whose frequencies are remembered",
        (Meaning(".*", "eviction of this key; 8 is added to the frequency if it was new", access),),
    ),
    Kind(
        "cache|tiered",
        "size",
        "hash",
        "the entries of the cache {0} with their bytes and hits",
        (Meaning(".*", "hits * 10^10 + bytes of this entry", held),),
    ),
    Kind(
        "cache|tiered",
        "deferred:[0-9]+",
        "hash",
        "the entries that a clear of the cache {0} removed and whose values are freed later",
        (Meaning(".*", "hits * 10^10 + bytes of this entry", held),),
    ),
    Kind(
        "cache|tiered",
        "epochs",
        "string",
        "invalidations of the cache {0}: version of the last clear, of the newest mark of a tag, of the tags whose "
        "marks were merged",
    ),
    Kind(
        "cache|tiered",
        "tags",
        "zset",
        "invalidated tags of the cache {0}",
        (Meaning("(.*)", "the tag {0}, last invalidated", at_clock),),
    ),
    Kind(
        "cache|tiered",
        "resent",
        "zset",
        "puts of the cache {0} that were sent again: a copy of one of them may still arrive",
        (Meaning(".*", "the last copy of this request may arrive until", at_ms),),
    ),
    Kind(
        "cache|tiered",
        "marks",
        "hash",
        "keys of the cache {0} whose entries are just moved here from the previous layout; it expires",
        (Meaning("(.*)", "the cache's clock when this key was marked", at_clock),),
    ),
    Kind("cache|tiered", "deferred", "list", "clears of the cache {0} whose values are freed later"),
    Kind(
        "cache|tiered",
        "meta",
        "hash",
        "settings and counters of the cache {0} (`agentperf cache stats`)",
        (
            Meaning("schema", "major version of the data model"),
            Meaning("settings", "policy, capacities, bytes and TTLs in ms; 0 is no limit; shards, if several; layout"),
            Meaning("clock", "the cache's clock at the last write", at_clock),
            Meaning("removed", "the cache's clock at the last removal", at_clock),
            Meaning("bytes", "bytes of all entries"),
            Meaning("next", "no entry expires before this time", at_ms),
            Meaning("scan", "HSCAN cursor of the search for expired entries; +: it has just found some"),
            Meaning("deferred", "clears whose values are freed later"),
            Meaning("resent", "a copy of a put may arrive until this time", at_ms),
            Meaning("evicted", "entries evicted so far"),
            Meaning("expired", "entries expired so far"),
            Meaning("hot|warm|cold", "hits in this tier"),
            Meaning("misses", "misses so far"),
            Meaning("saved_ms", "time of computing that hits have saved", length_ms),
            Meaning("corrupt", "reads of damaged entries"),
            Meaning("accesses", "hits * 10^8 + accesses of the current period (policy tinylfu)"),
            Meaning("grow", "entries by which the window of new entries has grown (policy tinylfu)"),
            Meaning("climb", "trend of the window, periods to rest, last hit ratio, window, age (policy tinylfu)"),
            Meaning("halvings", "the cache's clock at the last four halvings of the frequencies (policy tinylfu)"),
            Meaning("moving", "entries and bytes of its limits that the previous layout still uses, or done"),
            Meaning("frozen", "the epochs of this shard of a layout that was left; see `epochs`"),
            Meaning("layout", "the layout of the cache before it was dropped"),
            Meaning("w:(.+)", "number and time, ms, of the last report of reads of the process {0}"),
        ),
    ),
    # Metrics
    Kind(
        "metrics",
        "agents",
        "zset",
        "agents of the shard {0} of the metrics, by the time when they were last seen",
        (Meaning("(.+)", "the agent {0}, last seen", at_ms),),
    ),
    Kind(
        "metrics",
        "parts:(.+)",
        "zset",
        "spans and measures of the agent {1}, by the time when they were last seen",
        (
            Meaning("/(.+)", "the span {0}, last seen", at_ms),
            Meaning("#(.+)", "the measure {0}, last seen", at_ms),
        ),
    ),
    Kind("metrics", "total:(.+)", "hash", "the counts of {1} over all time (`agentperf show`)", _COUNTERS),
    Kind(
        "metrics",
        "(10s|1m|1h|1d):([0-9T:.-]+):(.+)",
        "hash",
        "the counts of {3} in the {1} from {2} UTC on; it expires",
        _COUNTERS,
    ),
    Kind(
        "metrics",
        "slices:(1m|1h|1d):(.+)",
        "list",
        "the counts of {2} in the past slices of {1}: start in UTC, counters, and after the bar the buckets of the "
        "durations, as the first bucket of a run and the counts from it on; it expires",
    ),
    Kind(
        "metrics",
        "latest:(.+)",
        "list",
        "the latest executions of {1}, at most 1000: end in ms, duration and outcome",
    ),
    Kind(
        "metrics",
        "slow:(.+)",
        "zset",
        "the slowest executions of {1}, at most 50, by their duration in us",
        (Meaning(_SAMPLE, "an execution of {0} us, outcome {1}"),),
    ),
    Kind(
        "metrics",
        "settings",
        "hash",
        "TTLs of the time slices in the shard {0} of the metrics",
        (
            Meaning("schema", "major version of the data model"),
            Meaning("10s|1m|1h|1d", "TTL of such a slice after its end"),
        ),
    ),
    Kind(
        "metrics",
        "w:(.+)",
        "string",
        "the number of the last flush of the process {1}, so that no flush is counted twice; it expires",
    ),
    # Alerts
    Kind(
        "alerts",
        "rules",
        "hash",
        "the deployed alert rules and receivers (`agentperf alerts list`)",
        (
            Meaning("version", "number of the deployment"),
            Meaning("deployed_ms", "time of the deployment", at_ms),
            Meaning("alert:(.+)", "the alert {0}"),
            Meaning("slo:(.+)", "the objective {0}"),
            Meaning(
                "notify:(.+)", "the addresses of the receiver {0}; hidden, since they may hold secrets", None, True
            ),
        ),
    ),
    Kind(
        "alerts",
        "schedule",
        "hash",
        "when the alert rules are judged next",
        (Meaning("(.+)", "interval, next judgement and claim of the rule {0}, ms"),),
    ),
    Kind(
        "alerts",
        "state:(.+)",
        "hash",
        "the states of the alert rule {1}",
        (Meaning("(.+)", "the state for {0}; times in ms"),),
    ),
    Kind(
        "alerts",
        "silences",
        "hash",
        "silenced alert rules",
        (Meaning("(.+)", "end of the silence of the rule {0}", at_ms),),
    ),
    Kind("alerts", "events", "stream", "transitions of alerts and silences (`agentperf alerts log`)"),
    Kind(
        "alerts",
        "receivers",
        "hash",
        "the addresses of receivers, with their last failures",
        (Meaning("(.+)", "failed attempts at {0}, time of the last one, dropped notifications"),),
    ),
    Kind(
        "alerts",
        "outbox:(.+)",
        "zset",
        "notifications that wait for the address {1}",
        (Meaning("(.+)", "the notification {0} is due", at_ms_or_unknown),),
    ),
    Kind(
        "alerts",
        "notices",
        "hash",
        "the notifications that wait",
        (Meaning(r"(.+)\|(.+)", "attempts, time and text of the notification {1} for {0}"),),
    ),
)
"""All kinds, in this order. The kind of a key is the first one that has a matching pattern."""
