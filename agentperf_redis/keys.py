"""Builds the names of all keys.

Every key is ``<namespace>:{<service>:<resource>}:<part>``. The part in braces is the hash tag: all keys of a resource
lie in one slot of a Cluster. User-supplied names are percent-encoded. In the legend, which has the default namespace,
PX means that the key has a TTL::

    agentperf:meta                            HASH  schema, epoch (new when the server came back empty), created_ms
    agentperf:resources                       ZSET  <service>:<resource> -> when a process last opened it, ms
    agentperf:{...}:absent                    never exists: see `absent`
    agentperf:{workers}:seen                  ZSET  <host>:<pid>:<id> -> when its last heartbeat arrived, ms
    agentperf:{workers}:w:<worker>            HASH  host pid since_ms leases pending running ...; expires

    agentperf:{lb:planner}:state              HASH  <id>, +<id> instance, @<token> lease|grant|waiting|tombstone, #fact
    agentperf:{lb:planner}:ready              ZSET  <id> -> score by the pool's strategy; instances with free capacity
    agentperf:{lb:planner}:due                ZSET  timer -> ms: @<token> lease, W@<token> waiter, X@<token> tombstone,
                                              H:<id> heartbeat, E:<id> ejection, R:<id> rate limit, V:<id> warm-up,
                                              C:<id> rest
    agentperf:{lb:planner}:waitq              ZSET  @<token> -> arrival, us, minus priority; also the channel of grants
    agentperf:{lb:planner}:ids                ZSET  <id> -> when it was registered, us: all instances, in order
    agentperf:{lb:planner}:ring               ZSET  <id>#<n> -> 48-bit point; pools under CONSISTENT_HASH only
    agentperf:{lb:planner}:ready@gpu          ZSET  like ready, for the instances with that label
    agentperf:{lb:planner}:away               ZSET  <id> -> end of the pause, ms: unhealthy, resting or rate-limited
    agentperf:{lb:planner}:checks             ZSET  <id> -> when its next active check is due, ms
    agentperf:{lb:planner}:events             STREAM kind, id, ...: about the last thousand
    agentperf:{lb:planner}:history            HASH  10s|1m|1h:<slot> -> at= samples= load= ...: rings of slices; PX

    agentperf:{lb:coder#3/8.30}:...           the same, for shard 3 of a pool with 8 shards (30: see `_shard_tag`)
    agentperf:{lb:coder}:state                HASH  #pool (number of shards) and #settings of the same pool

    agentperf:{lock:invoices}:held            ZSET  @<token> -> when the lease or grant expires, ms; PX on all of these
    agentperf:{lock:invoices}:state           HASH  @<token> -> held|grant|waiting, #fence
    agentperf:{lock:invoices}:queue           ZSET  @<token> -> arrival, us; also the channel of grants
    agentperf:{lock:invoices}:spent:@<token>  STRING  why a late copy of the request with this token is refused
    agentperf:{semaphore:gpus}:...            the same, for a semaphore

    agentperf:{cache:answers}:e:<key>         STRING  version, request, facts, value: see cache/entry_format.py; PX
    agentperf:{cache:answers}:hot|warm|cold|new  ZSET  key -> clock of last access * 16 + frequency
    agentperf:{cache:answers}:ghost           ZSET  evicted key -> clock of its eviction * 16 + its frequency, + 8
                                              if it was evicted from the window
    agentperf:{cache:answers}:size            HASH  key -> hits * 10^10 + bytes; the cache has exactly these keys
    agentperf:{cache:answers}:epochs          STRING  "<cleared> <tagged> <merged>": versions of invalidations; kept
                                              for a day after `cache drop`
    agentperf:{cache:answers}:tags            ZSET  tag -> version of its last invalidation
    agentperf:{cache:answers}:meta            HASH  settings, clock, bytes, counters, w:<process>: last report
    agentperf:{cache:answers}:l:<key>         HASH  token, version, waited, failed, failed_ms, error; PX: lease TTL
    agentperf:{cache:answers}:r:<request>     STRING  reply of an add, incr, ..., or the entry that a pop removed; PX
    agentperf:{cache:answers}:resent          ZSET  resent request -> when its last copy may arrive, ms
    agentperf:{cache:answers}:deferred        LIST  versions of clears whose values are freed later; the HASH
                                              :deferred:<version> has the keys of one clear
    agentperf:{cache:answers}:marks           HASH  key -> clock: keys whose entries are being moved here; PX
    agentperf:{cache:answers}:history         HASH  10s|1m|1h:<slot> -> at= samples= hits= ...: rings of slices; PX
    agentperf:{cache:answers}:bus             channel of invalidations
    agentperf:{tiered:docs}:...               the same, for a TieredCache
    agentperf:{cache:answers#3/16.68}:...      the same, for shard 3 of a cache with shards=16. A key's shard is
                                              crc16(<key>) % 16, where crc16 is that of CLUSTER KEYSLOT. In such a
                                              cache, only the key meta (the settings) has the tag {cache:answers}
    agentperf:{cache:answers#3/16~1.68}:...    the same, after the number of shards was changed once

    agentperf:{metrics:03}:agents             ZSET  agent -> last seen, ms (03 = crc32 of the agent, modulo 16)
    agentperf:{metrics:03}:parts:research     ZSET  /<span> or #<measure> of that agent -> last seen, ms
    agentperf:{metrics:03}:total:research     HASH  n ok err sum_us min_us max_us err:<type> h:<bucket> ...; all time
    agentperf:{metrics:03}:10s:<UTC>:research HASH  the same for an open slice of 10 s; also 1m, 1h, 1d; expires
    agentperf:{metrics:03}:slices:1h:research   LIST  "<UTC> n=60 ... | <bucket>:<counts>": closed slices; expires
    agentperf:{metrics:03}:latest:research    LIST  <end ms>|734210us|err:TimeoutError: latest samples; bounded
    agentperf:{metrics:03}:slow:research      ZSET  <end ms>|734210us|ok|<id> -> duration, us; the slowest samples
    agentperf:{metrics:03}:settings           HASH  schema, 10s 1m 1h 1d: TTL of slices after their end, <n>ms
    agentperf:{metrics:03}:w:<writer>         STRING  number of the last flush of that process; expires

    agentperf:{alerts}:rules                  HASH  version, deployed_ms, alert:<name>, slo:<name>, notify:<name>: JSON
    agentperf:{alerts}:schedule               HASH  <rule> -> every=<ms> next=<ms> token=<claim>
    agentperf:{alerts}:state:<rule>           HASH  <agent, cache or pool> -> state=firing since=<ms> ...
    agentperf:{alerts}:silences               HASH  <rule> -> its end, ms
    agentperf:{alerts}:events                 STREAM  transitions and silences: about the last five thousand
    agentperf:{alerts}:receivers              HASH  <address> -> attempts=<n> failed=<ms> dropped=<n> error=<text>
    agentperf:{alerts}:outbox:<address>       ZSET  notification -> when it is due, ms; at most 200
    agentperf:{alerts}:notices                HASH  <address>|<notification> -> attempts=<n> made=<ms> <JSON>
"""

from __future__ import annotations

import hashlib
import re
from binascii import crc_hqx
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote
from zlib import crc32

from agentperf_redis.errors import InvalidArgument

SLOTS = 16384
"""Number of hash slots of a Cluster. The slot of a tag is its CRC16 (XMODEM) modulo this number."""
METRICS_SHARDS = 16
"""Number of shards of the metrics. It must not change, because the keys of stored data contain the shard's number."""

_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LONG_KEY_BYTES = 120
_PREFIX_CHARACTERS = 40
_SHORTENED = re.compile(r".{31,40}…[0-9a-f]{64}:[0-9]{20}", re.DOTALL)
"""Matches a name that `stored_name` has shortened. Any key longer than 120 bytes has at least 31 characters."""


def check_namespace(argument: str, value: object) -> str:
    """Check a namespace, the prefix of all keys of an installation. It also appears in an ACL pattern."""
    if not isinstance(value, str) or not _NAMESPACE.fullmatch(value):
        raise InvalidArgument(argument, value, "1 to 64 characters of A-Z a-z 0-9 _ . -")
    return value


@lru_cache(maxsize=4096)
def encoded(name: str) -> str:
    """Percent-encode a user's name: ``a b{1}`` becomes ``a%20b%7B1%7D``."""
    return quote(name, safe="")


def decoded(text: str) -> str:
    """Return the name that `encoded` encoded."""
    return unquote(text)


def stored_name(key: str) -> str:
    """Return the name under which a cache entry is stored: the key itself if it has at most 120 bytes.

    A longer key is stored under its first 40 characters, an ellipsis, its SHA-256 and its length. Such a name has at
    least 40 + 3 + 64 + 1 + 20 = 128 bytes, more than any unshortened name. So two different keys never share a name.
    The command line shows such names, and `keys()` may return them. Therefore callers may use such a name as a key. It
    refers to the entry of the long key.
    """
    data = key.encode()
    if len(data) <= _LONG_KEY_BYTES or _SHORTENED.fullmatch(key):
        return key
    return f"{key[:_PREFIX_CHARACTERS]}…{hashlib.sha256(data).hexdigest()}:{len(data):020d}"


def is_shortened(name: str) -> bool:
    """Whether a stored name stands for a key of more than 120 bytes."""
    return len(name.encode()) > _LONG_KEY_BYTES


def meta(namespace: str) -> str:
    """``agentperf:meta``."""
    return f"{namespace}:meta"


def resources(namespace: str) -> str:
    """``agentperf:resources``."""
    return f"{namespace}:resources"


def workers_seen(namespace: str) -> str:
    """``agentperf:{workers}:seen``."""
    return f"{namespace}:{{workers}}:seen"


def worker_name(process: str) -> str:
    """Return the name of a worker, such as ``host:4711:9f86d081``: its process, percent-encoded except for colons."""
    return quote(process, safe=":")


def worker(namespace: str, name: str) -> str:
    """``agentperf:{workers}:w:<worker>``."""
    return f"{namespace}:{{workers}}:w:{name}"


def absent(key: str) -> str:
    """Return a key that no program writes, in the slot of the given key: ``agentperf:{lb:planner}:absent``.

    On a Cluster, a call of a script declares this key after its other keys. This key exists on no node. Therefore,
    while the keys of a slot are moved one by one, the server refuses any call that declares this key and another key
    (with TRYAGAIN or ASK). So a script runs only where all keys of its slot are.
    """
    head, _, rest = key.partition("{")
    tag, closed, _ = rest.partition("}")
    return f"{head}{{{tag}}}:absent" if closed and tag else f"{key}:{{{key}}}:absent"


class PoolKeys(NamedTuple):
    """Keys of one balancer pool, ``agentperf:{lb:planner}:...``."""

    tag: str
    """The beginning of all keys, such as ``agentperf:{lb:planner}``."""
    state: str
    ready: str
    due: str
    waitq: str
    ids: str
    ring: str
    checks: str
    events: str
    away: str
    history: str

    @property
    def core(self) -> tuple[str, ...]:
        """The keys that every lease operation uses: state, ready, due, waitq."""
        return (self.state, self.ready, self.due, self.waitq)

    @property
    def all(self) -> tuple[str, ...]:
        """The core keys, ids and ring."""
        return (self.state, self.ready, self.due, self.waitq, self.ids, self.ring)

    def ready_with(self, label: str) -> str:
        """``agentperf:{lb:planner}:ready@gpu``."""
        return f"{self.ready}@{encoded(label)}"


_POOL_PARTS = ("state", "ready", "due", "waitq", "ids", "ring", "checks", "events", "away", "history")


def pool(namespace: str, agent_type: str, shard: int = 0, shards: int = 1) -> PoolKeys:
    """Return the keys of the pool of an agent type, or of one of its shards."""
    resource = f"lb:{encoded(agent_type)}"
    tag = f"{namespace}:{{{_shard_tag(resource, shard, shards)}}}"
    return PoolKeys(tag, *(f"{tag}:{part}" for part in _POOL_PARTS))


def key_slot(key: str) -> int:
    """Return the Cluster slot of a key: CRC16 (XMODEM) of its hash tag, modulo 16384 (Redis Cluster specification)."""
    data = key.encode()
    start = data.find(b"{")
    if start >= 0:
        end = data.find(b"}", start + 1)
        if end > start + 1:
            data = data[start + 1 : end]
    return crc_hqx(data, 0) % SLOTS


def _shard_tag(resource: str, shard: int, shards: int, layout: int = 0) -> str:
    """Return the hash tag of a shard of a pool or cache: ``lb:coder#3/8.30``. With one shard, the tag is `resource`.

    The slots of a Cluster are divided into as many equal ranges as there are shards, one range for each shard. The last
    number of the tag is the lowest one with which the tag lies near the middle of the shard's range: in the middle
    quarter of the range, or at most 128 slots from its middle. So if all nodes hold ranges of equal size, as in a new
    Cluster, the shards are spread evenly over the nodes. If the slots were arbitrary, one of three nodes would often
    have half of 16 shards.

    The number of shards is part of the tag. So processes that assume different numbers never use the same keys. A cache
    whose number was changed online also has the number of the layout in its tags: ``cache:answers#3/16~1.68``. So no
    two layouts of a cache ever share keys.
    """
    if shards == 1 and not layout:
        return resource
    middle = (2 * shard + 1) * SLOTS // (2 * shards)
    # In a narrow range, the middle quarter has few slots, so finding a tag there would take many attempts. Therefore, a
    # tag in a narrow range may lie up to 128 slots from the middle.
    off = max(SLOTS // (8 * shards), min(SLOTS // (2 * shards) - 1, 128))
    attempt, change = 0, f"~{layout}" if layout else ""
    while True:
        tag = f"{resource}#{shard}/{shards}{change}.{attempt}"
        if abs(crc_hqx(tag.encode(), 0) % SLOTS - middle) <= off:
            return tag
        attempt += 1


def whole_resource(resource: str) -> str:
    """Return the name of a resource without its shard: ``coder#3/8.30`` becomes ``coder``."""
    return resource.partition("#")[0]


class LockKeys(NamedTuple):
    """Keys of one lock or semaphore, ``agentperf:{lock:invoices}:...``."""

    tag: str
    """The beginning of all keys, such as ``agentperf:{lock:invoices}``."""
    state: str
    held: str
    queue: str

    @property
    def all(self) -> tuple[str, ...]:
        """The keys in the order of the scripts."""
        return (self.state, self.held, self.queue)


def lock(namespace: str, service: str, name: str) -> LockKeys:
    """Return the keys of a lock or semaphore; service is "lock" or "semaphore"."""
    tag = f"{namespace}:{{{service}:{encoded(name)}}}"
    return LockKeys(tag, *(f"{tag}:{part}" for part in ("state", "held", "queue")))


class CacheKeys(NamedTuple):
    """Keys of one cache, ``agentperf:{cache:answers}:...`` or ``agentperf:{tiered:docs}:...``."""

    tag: str
    """The beginning of all keys, such as ``agentperf:{cache:answers}``."""
    meta: str
    size: str
    new: str
    hot: str
    warm: str
    cold: str
    ghost: str
    deferred: str
    epochs: str
    tags: str
    resent: str
    marks: str
    history: str
    bus: str
    entry_prefix: str
    lease_prefix: str
    reply_prefix: str

    def entry(self, key: str) -> str:
        """``agentperf:{cache:answers}:e:<key>``."""
        return self.entry_prefix + stored_name(key)

    def lease(self, key: str) -> str:
        """``agentperf:{cache:answers}:l:<key>``."""
        return self.lease_prefix + stored_name(key)


def cache(namespace: str, service: str, name: str) -> CacheKeys:
    """Return the keys of a cache; service is "cache" (LRUCache) or "tiered" (TieredCache).

    A cache with several shards uses only one of these keys: `meta`, for its settings.
    """
    return _cache_keys(f"{namespace}:{{{service}:{encoded(name)}}}")


def _cache_keys(tag: str) -> CacheKeys:
    parts = "meta size new hot warm cold ghost deferred epochs tags resent marks history bus e: l: r:"
    return CacheKeys(tag, *(f"{tag}:{part}" for part in parts.split()))


@lru_cache(maxsize=256)
def cache_shards(namespace: str, service: str, name: str, shards: int, layout: int = 0) -> tuple[CacheKeys, ...]:
    """Return the keys of each shard of a cache. If there is only one shard, its keys are those of the cache.

    Args:
        namespace: namespace of the cache.
        service: "cache" or "tiered".
        name: name of the cache.
        shards: number of shards.
        layout: how often the number of shards was changed online. After a change, even an only shard has its own keys.
    """
    resource = f"{service}:{encoded(name)}"
    tags = (_shard_tag(resource, shard, shards, layout) for shard in range(shards))
    return tuple(_cache_keys(f"{namespace}:{{{tag}}}") for tag in tags)


def cache_shard(name: str, shards: int) -> int:
    """Return the number of the shard of a cache entry.

    For a name without braces, this equals the result of ``CLUSTER KEYSLOT <name>`` modulo `shards`, since `shards` is a
    power of two.

    Args:
        name: stored name of the key; see `stored_name`.
        shards: number of shards of the cache.
    """
    return crc_hqx(name.encode(), 0) % shards


@lru_cache(maxsize=4096)
def metrics_shard(agent: str) -> int:
    """Return the shard of an agent, 0 to 15. An agent has the same shard in every process."""
    return crc32(agent.encode()) % METRICS_SHARDS


def metrics_series(agent: str, path: tuple[str, ...] = (), measure: str = "") -> str:
    """Return the name of a metrics series within its shard.

    Examples: ``research`` is an agent, ``research/plan/tool%3Asearch`` is a span of this agent, and ``research#ttft``
    is a further measure of this agent.
    """
    name = "/".join((encoded(agent), *(encoded(step) for step in path)))
    return f"{name}#{measure}" if measure else name


def metrics_tag(namespace: str, shard: int) -> str:
    """``agentperf:{metrics:03}``."""
    return f"{namespace}:{{metrics:{shard:02d}}}"


def metrics_agents(namespace: str, shard: int) -> str:
    """``agentperf:{metrics:03}:agents``."""
    return f"{metrics_tag(namespace, shard)}:agents"


def metrics_parts(namespace: str, shard: int, agent: str) -> str:
    """``agentperf:{metrics:03}:parts:research``."""
    return f"{metrics_tag(namespace, shard)}:parts:{encoded(agent)}"


def metrics_settings(namespace: str, shard: int) -> str:
    """``agentperf:{metrics:03}:settings``."""
    return f"{metrics_tag(namespace, shard)}:settings"


def metrics_writer(namespace: str, shard: int, writer: str) -> str:
    """``agentperf:{metrics:03}:w:<writer>``."""
    return f"{metrics_tag(namespace, shard)}:w:{writer}"


def metrics_total(namespace: str, shard: int, series: str) -> str:
    """``agentperf:{metrics:03}:total:research``."""
    return f"{metrics_tag(namespace, shard)}:total:{series}"


def metrics_latest(namespace: str, shard: int, series: str) -> str:
    """``agentperf:{metrics:03}:latest:research``."""
    return f"{metrics_tag(namespace, shard)}:latest:{series}"


def metrics_slow(namespace: str, shard: int, series: str) -> str:
    """``agentperf:{metrics:03}:slow:research``."""
    return f"{metrics_tag(namespace, shard)}:slow:{series}"


class AlertKeys(NamedTuple):
    """Keys of the alerts of a namespace, ``agentperf:{alerts}:...``."""

    tag: str
    """The beginning of all keys, such as ``agentperf:{alerts}``."""
    rules: str
    schedule: str
    silences: str
    events: str
    receivers: str
    notices: str

    def state(self, rule: str) -> str:
        """``agentperf:{alerts}:state:<rule>``."""
        return f"{self.tag}:state:{encoded(rule)}"

    def outbox(self, address: str) -> str:
        """``agentperf:{alerts}:outbox:<address>``."""
        return f"{self.tag}:outbox:{encoded(address)}"


def alerts(namespace: str) -> AlertKeys:
    """Return the keys of the alerts of a namespace."""
    tag = f"{namespace}:{{alerts}}"
    parts = ("rules", "schedule", "silences", "events", "receivers", "notices")
    return AlertKeys(tag, *(f"{tag}:{part}" for part in parts))
