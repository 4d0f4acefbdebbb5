"""JSON Schemas for the --json outputs of all commands, by the kind of output.

All fields are required and no others are allowed, so that a field cannot vanish or appear unnoticed.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
POSITIVE: Schema = {"type": "number", "minimum": 0}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {}
TIME: Schema = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?[+-]\d\d:\d\d$"}
"""A local time with its zone."""


def fields(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def rows(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def by_name(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def more(schema: Schema, **properties: Schema) -> Schema:
    """Add fields to an object."""
    return fields(**{**schema["properties"], **properties})


def document(kind: str, **properties: Schema) -> Schema:
    return fields(kind={"const": kind}, version={"const": 1}, **properties)


RANGE = {"window": maybe(TEXT), "as_of": maybe(TEXT)}
INTERVAL = fields(start=POSITIVE, end=POSITIVE)
_PLANNED = fields(memory_bytes=COUNT, core_share=POSITIVE, received_bytes_per_s=POSITIVE, sent_bytes_per_s=POSITIVE)
_COST = fields(server_us=POSITIVE, received_bytes=POSITIVE, sent_bytes=POSITIVE)
SCOPE = one_of("agents", "cache", "pool")
ALERT_STATE = one_of("ok", "pending", "firing", "no_data", "silenced")
ALERT_EVENT = {
    "id": TEXT,
    "rule": TEXT,
    "target": TEXT,
    "before": ALERT_STATE,
    "after": ALERT_STATE,
    "at": POSITIVE,
    "value": maybe(NUMBER),
    "low": maybe(NUMBER),
    "high": maybe(NUMBER),
    "interval": INTERVAL,
    "reason": TEXT,
}
AGENT = fields(
    agent=TEXT,
    tasks=COUNT,
    success_rate=SHARE,
    avg_s=POSITIVE,
    p50_s=POSITIVE,
    p95_s=POSITIVE,
    p99_s=POSITIVE,
    percentiles_exact=FLAG,
    throughput_per_s=POSITIVE,
    last_seen=maybe(TIME),
    errors=by_name(COUNT),
)
TOKENS = {
    "tokens_in": COUNT,
    "tokens_out": COUNT,
    "tokens_cached_in": COUNT,
    "tokens_cache_write": COUNT,
    "tokens_reasoning": COUNT,
    "cost": POSITIVE,
}
EXECUTION = fields(agent=TEXT, ended=TIME, seconds=POSITIVE, success=FLAG, cancelled=FLAG, error=maybe(TEXT))
INSTANCE = fields(
    instance=TEXT,
    load=COUNT,
    capacity=COUNT,
    weight=POSITIVE,
    healthy=FLAG,
    draining=FLAG,
    labels=rows(TEXT),
    response_time_ms=POSITIVE,
    peak_load=COUNT,
    served=COUNT,
    failed=COUNT,
    failed_in_a_row=COUNT,
    fence=COUNT,
    state=one_of(
        *("up", "draining", "unhealthy", "heartbeat_missed", "down", "ejected", "half_open"),
        *("rate_limited", "resting", "warming"),
    ),
    limit=COUNT,
    ejections=COUNT,
    ejected_s=POSITIVE,
    resting_s=POSITIVE,
    requests_per_minute=maybe(POSITIVE),
    tokens_per_minute=maybe(POSITIVE),
)
EVENT = {"at": POSITIVE, "event": TEXT, "instance": maybe(TEXT), "details": by_name(TEXT), "cursor": TEXT}
CACHE = {"cache": TEXT, "cache_kind": one_of("lru", "tiered")}
CACHE_COUNTS = {
    "entries": COUNT,
    "max_entries": COUNT,
    "bytes": COUNT,
    "max_bytes": maybe(COUNT),
    "hits": COUNT,
    "misses": COUNT,
    "hit_rate": SHARE,
    "evictions": COUNT,
}
CACHE_STATS = fields(
    **CACHE,
    policy=TEXT,
    shards=COUNT,
    **CACHE_COUNTS,
    expirations=COUNT,
    corrupt=COUNT,
    seconds_saved=POSITIVE,
    tiers=by_name(fields(entries=COUNT, max_entries=COUNT, default_ttl_s=maybe(POSITIVE), hits=COUNT, misses=COUNT)),
)
RANKED_ENTRIES = rows(
    fields(
        key=TEXT,
        size_bytes=COUNT,
        access_count=COUNT,
        compute_s=POSITIVE,
        seconds_saved=POSITIVE,
        created_at=TIME,
        tags=rows(TEXT),
    )
)

RUNNING = fields(agent=TEXT, host=TEXT, pid=COUNT, started=TIME, age_s=POSITIVE, alive=FLAG)
EXPORTED = rows(
    {
        "anyOf": [
            fields(
                agent=TEXT,
                ended=TIME,
                seconds=POSITIVE,
                outcome=one_of("success", "failure", "cancelled"),
                error=maybe(TEXT),
            ),
            fields(
                agent=TEXT,
                start=POSITIVE,
                end=POSITIVE,
                tasks=COUNT,
                successes=COUNT,
                failures=COUNT,
                cancelled=COUNT,
                success_rate=SHARE,
                throughput_per_s=POSITIVE,
                avg_s=POSITIVE,
                min_s=maybe(POSITIVE),
                p50_s=POSITIVE,
                p95_s=POSITIVE,
                p99_s=POSITIVE,
                max_s=POSITIVE,
                total_s=POSITIVE,
                percentiles_exact=FLAG,
                error_bound=SHARE,
                llm_calls=COUNT,
                tool_calls=COUNT,
                **TOKENS,
                last_execution=maybe(TIME),
                errors=by_name(COUNT),
            ),
        ]
    }
)

SCHEMAS: dict[str, Schema] = {
    "version": document("version", agentperf_redis=TEXT, python=TEXT, redis_py=TEXT),
    "demo": document(
        "demo",
        ok=FLAG,
        checks=rows(by_name(ANY)),
        root=TEXT,
        namespace=TEXT,
        files=COUNT,
        lines=COUNT,
        findings=COUNT,
        worst=rows(by_name(ANY)),
        seconds=POSITIVE,
        workers=COUNT,
        killed=maybe(by_name(ANY)),
        agents=by_name(
            fields(
                steps=COUNT,
                success_rate=SHARE,
                avg=POSITIVE,
                p50=POSITIVE,
                p95=POSITIVE,
                p99=POSITIVE,
                max=POSITIVE,
                exact=FLAG,
            )
        ),
        caches=by_name(
            fields(hits=COUNT, misses=COUNT, hit_rate=SHARE, size=COUNT, bytes=COUNT, seconds_saved=POSITIVE)
        ),
        instances=by_name(fields(steps=COUNT, capacity=COUNT, peak=COUNT)),
        model_calls=by_name(fields(model=TEXT, calls=COUNT, **TOKENS)),
        computed=COUNT,
        distinct=COUNT,
        served=COUNT,
    ),
    "up": document("up", url=TEXT, pid=COUNT, valkey_version=TEXT, folder=TEXT, was_running=FLAG),
    "down": document("down", stopped=FLAG, folder=TEXT),
    "exporter": document("exporter", namespace=TEXT, url=maybe(TEXT), otlp=maybe(TEXT)),
    "serve": document("serve", namespace=TEXT, url=TEXT, login=FLAG, actions=FLAG),
    "export grafana": document("export grafana", dashboard=by_name(ANY)),
    "export prometheus-rules": document(
        "export prometheus-rules", yaml=TEXT, left_out=rows(fields(rule=TEXT, reason=TEXT))
    ),
    "export csv": document("export csv", records=one_of("agents", "executions"), window=maybe(TEXT), rows=EXPORTED),
    "export ndjson": document(
        "export ndjson", records=one_of("agents", "executions"), window=maybe(TEXT), rows=EXPORTED
    ),
    "workers": document(
        "workers",
        workers=rows(
            fields(
                host=TEXT,
                pid=COUNT,
                state=one_of("ok", "lost", "flush fails"),
                since=TIME,
                last_seen=TIME,
                heartbeat_age_s=POSITIVE,
                alive=FLAG,
                leases_held=COUNT,
                pending=COUNT,
                dropped=COUNT,
                error=maybe(TEXT),
                running=rows(RUNNING),
                running_more=COUNT,
                python=TEXT,
                library=TEXT,
            )
        ),
    ),
    "running": document("running", agent=maybe(TEXT), executions=rows(RUNNING), more=COUNT),
    "top": document(
        "top",
        server=TEXT,
        namespace=TEXT,
        window=TEXT,
        start=POSITIVE,
        end=POSITIVE,
        tasks=COUNT,
        failures=COUNT,
        cancelled=COUNT,
        throughput_per_s=POSITIVE,
        p50_s=POSITIVE,
        p95_s=POSITIVE,
        p99_s=POSITIVE,
        percentiles_exact=FLAG,
        tokens_in=COUNT,
        tokens_out=COUNT,
        cost=POSITIVE,
        active_agents=COUNT,
        idle_agents=COUNT,
        workers=COUNT,
        workers_alive=COUNT,
        caches=COUNT,
        hit_rate=maybe(SHARE),
        pools=COUNT,
        load=COUNT,
        capacity=COUNT,
        waiters=COUNT,
        firing=COUNT,
        problems=rows(
            fields(level=one_of("bad", "note"), subject=one_of("alert", "agent", "cache", "pool"), name=TEXT, text=TEXT)
        ),
    ),
    "status": document(
        "status",
        server=TEXT,
        namespace=TEXT,
        **RANGE,
        problems=rows(
            fields(level=one_of("bad", "note"), subject=one_of("agent", "cache", "pool"), name=TEXT, text=TEXT)
        ),
        summary=fields(
            uptime_s=POSITIVE,
            tasks=COUNT,
            successes=COUNT,
            failures=COUNT,
            cancelled=COUNT,
            throughput_per_s=POSITIVE,
            active_agents=COUNT,
        ),
        agents=rows(AGENT),
        models=by_name(fields(calls=COUNT, **TOKENS)),
        idle=rows(fields(agent=TEXT, last_seen=TIME)),
        caches=rows(fields(cache=TEXT, **CACHE_COUNTS, seconds_saved=POSITIVE)),
        pools=by_name(
            fields(
                instances=COUNT,
                healthy=COUNT,
                total_capacity=COUNT,
                current_load=COUNT,
                load_percentage=TEXT,
                instances_detail=rows(fields(id=TEXT, load=TEXT, load_pct=TEXT, healthy=FLAG)),
            )
        ),
    ),
    "agents": document("agents", **RANGE, agents=rows(AGENT)),
    "show": document(
        "show",
        **AGENT["properties"],
        **RANGE,
        successes=COUNT,
        failures=COUNT,
        cancelled=COUNT,
        min_s=maybe(POSITIVE),
        max_s=POSITIVE,
        total_s=POSITIVE,
        error_bound=SHARE,
        **TOKENS,
        llm_calls=COUNT,
        tool_calls=COUNT,
        models=by_name(fields(calls=COUNT, **TOKENS)),
        interval=INTERVAL,
        streams=fields(count=COUNT, items=COUNT, first_item_p95_s=POSITIVE, between_items_p95_s=POSITIVE),
        latest=rows(EXECUTION),
    ),
    "series": document(
        "series",
        agent=TEXT,
        window=TEXT,
        step=TEXT,
        as_of=maybe(TEXT),
        error_bound=SHARE,
        rows=rows(
            fields(
                start=POSITIVE,
                end=POSITIVE,
                tasks=COUNT,
                errors=COUNT,
                cancelled=COUNT,
                failure_rate=SHARE,
                throughput_per_s=POSITIVE,
                avg_s=POSITIVE,
                p50_s=POSITIVE,
                p95_s=POSITIVE,
                p99_s=POSITIVE,
                max_s=POSITIVE,
                tokens_in=COUNT,
                tokens_out=COUNT,
                cost=POSITIVE,
            )
        ),
    ),
    "forget": document("forget", asked=rows(TEXT), agents=rows(TEXT), missing=rows(TEXT)),
    "errors": document("errors", **RANGE, errors=rows(fields(agent=TEXT, error=TEXT, count=COUNT, share=SHARE))),
    "slow": document("slow", executions=rows(EXECUTION)),
    "rank": document("rank", by=TEXT, **RANGE, agents=rows(more(AGENT, value=NUMBER))),
    "compare": document(
        "compare",
        **RANGE,
        first=fields(agent=TEXT, interval=INTERVAL),
        second=fields(agent=TEXT, interval=INTERVAL),
        changes=by_name(fields(first=maybe(NUMBER), second=maybe(NUMBER), ratio=maybe(NUMBER), certain=FLAG)),
    ),
    "spans": document(
        "spans",
        agent=TEXT,
        **RANGE,
        total_s=POSITIVE,
        bottleneck=maybe(rows(TEXT)),
        spans=rows(
            fields(
                path=rows(TEXT),
                self_s=POSITIVE,
                share=SHARE,
                count=COUNT,
                failures=COUNT,
                avg_s=POSITIVE,
                p95_s=POSITIVE,
                percentiles_exact=FLAG,
            )
        ),
    ),
    "doctor": document(
        "doctor",
        server=TEXT,
        healthy=FLAG,
        findings=rows(fields(node=TEXT, subject=TEXT, level=one_of("ok", "note", "bad"), found=TEXT, advice=TEXT)),
    ),
    "acl": document(
        "acl",
        user=TEXT,
        namespace=TEXT,
        read_only=FLAG,
        rules=rows(TEXT),
        command=TEXT,
        password_rule=TEXT,
        compared=FLAG,
        lacking=rows(TEXT),
    ),
    "doctor plan": document(
        "doctor plan",
        server=TEXT,
        plan=fields(
            agents=COUNT,
            rps=POSITIVE,
            entries=COUNT,
            value=COUNT,
            reads=POSITIVE,
            hits=SHARE,
            instances=COUNT,
            acquires=POSITIVE,
            held=POSITIVE,
            processes=COUNT,
            memory=maybe(COUNT),
        ),
        needs=fields(
            metrics=more(_PLANNED, shards=COUNT), cache=more(_PLANNED, shards=COUNT), pool=more(_PLANNED, shards=COUNT)
        ),
        all=_PLANNED,
        nodes=COUNT,
        node_bytes=COUNT,
        notes=rows(TEXT),
        costs=fields(
            flush=_COST,
            agent=_COST,
            execution=_COST,
            read=_COST,
            report=_COST,
            reported=_COST,
            put=_COST,
            acquire=_COST,
            release=_COST,
            entry_bytes=POSITIVE,
            instance_bytes=POSITIVE,
            lease_bytes=POSITIVE,
        ),
    ),
    "inspect": document(
        "inspect",
        key=TEXT,
        known=FLAG,
        namespace=maybe(TEXT),
        service=maybe(TEXT),
        resource=maybe(TEXT),
        holds=maybe(TEXT),
        type=TEXT,
        expected_type=maybe(TEXT),
        ttl_s=maybe(POSITIVE),
        size=maybe(COUNT),
        items=rows(fields(name=TEXT, value=TEXT, meaning=maybe(TEXT), value_in_words=maybe(TEXT))),
        complete=FLAG,
    ),
    "alerts list": document(
        "alerts list",
        deployment=COUNT,
        deployed_at=maybe(POSITIVE),
        alerts=rows(
            fields(
                rule=TEXT,
                target=TEXT,
                scope=SCOPE,
                severity=TEXT,
                state=ALERT_STATE,
                since=POSITIVE,
                value=maybe(NUMBER),
                low=maybe(NUMBER),
                high=maybe(NUMBER),
                judged_at=POSITIVE,
                when=TEXT,
                silenced_until=maybe(POSITIVE),
            )
        ),
        rules=rows(
            fields(
                name=TEXT,
                severity=TEXT,
                when=TEXT,
                scope=SCOPE,
                pattern=TEXT,
                window=POSITIVE,
                judged_at=maybe(POSITIVE),
                silenced_until=maybe(POSITIVE),
                targets=COUNT,
            )
        ),
        receivers=rows(
            fields(
                name=TEXT,
                address=TEXT,
                waiting=COUNT,
                attempts=COUNT,
                error=maybe(TEXT),
                failed_at=maybe(POSITIVE),
                dropped=COUNT,
            )
        ),
    ),
    "alerts log": document("alerts log", events=rows(fields(**ALERT_EVENT))),
    "alerts deploy": document("alerts deploy", number=COUNT, rules=rows(TEXT), receivers=rows(TEXT), removed=COUNT),
    "alerts test": document(
        "alerts test",
        firings=rows(
            fields(rule=TEXT, target=TEXT, severity=TEXT, start=POSITIVE, end=maybe(POSITIVE), value=maybe(NUMBER))
        ),
        interval=INTERVAL,
        coarse=rows(TEXT),
        judged=COUNT,
    ),
    "alerts run": document("alerts run", events=rows(fields(**ALERT_EVENT)), notifications=COUNT),
    "alerts event": document("alerts event", **ALERT_EVENT),
    "alerts silence": document("alerts silence", rule=TEXT, until=POSITIVE),
    "alerts unsilence": document("alerts unsilence", rule=TEXT),
    "check": document(
        "check",
        status=one_of("OK", "WARNING", "CRITICAL", "UNKNOWN"),
        text=TEXT,
        targets=rows(
            fields(
                target=TEXT,
                status=TEXT,
                value=maybe(NUMBER),
                low=maybe(NUMBER),
                high=maybe(NUMBER),
                events=maybe(COUNT),
            )
        ),
    ),
    "lb status": document(
        "lb status",
        pools=rows(
            fields(
                pool=TEXT,
                strategy=TEXT,
                shards=COUNT,
                load=COUNT,
                capacity=COUNT,
                waiting=COUNT,
                granted=COUNT,
                overdue=COUNT,
                panic_s=maybe(POSITIVE),
                settings=maybe(by_name(ANY)),
                instances=rows(more(INSTANCE, out_since=maybe(POSITIVE), out_reason=maybe(TEXT))),
            )
        ),
    ),
    "lb events": document("lb events", pool=TEXT, events=rows(fields(**EVENT))),
    "lb event": document("lb event", pool=TEXT, **EVENT),
    "lb leases": document(
        "lb leases",
        pool=TEXT,
        leases=rows(
            fields(token=TEXT, instance=TEXT, process=TEXT, fence=COUNT, held_s=NUMBER, ends_in_s=NUMBER, fetched=FLAG)
        ),
        waiters=rows(fields(token=TEXT, process=TEXT, waited_s=NUMBER, require=rows(TEXT))),
    ),
    "lb drain": document("lb drain", pool=TEXT, instance=TEXT, draining=FLAG, idle=FLAG),
    "lb undrain": document("lb undrain", pool=TEXT, instance=TEXT, draining=FLAG),
    "lb mark-healthy": document("lb mark-healthy", pool=TEXT, instance=TEXT, healthy=FLAG),
    "lb mark-unhealthy": document("lb mark-unhealthy", pool=TEXT, instance=TEXT, healthy=FLAG),
    "lb update": document("lb update", pool=TEXT, **INSTANCE["properties"]),
    "lb remove": document("lb remove", pool=TEXT, instance=TEXT, removed=FLAG),
    "lb release": document("lb release", pool=TEXT, token=TEXT, freed=FLAG),
    "lb rest": document("lb rest", pool=TEXT, instance=TEXT, resting_s=POSITIVE),
    "lb delete-pool": document("lb delete-pool", pool=TEXT, deleted=FLAG, instances=COUNT, leases=COUNT),
    "lb repair": document("lb repair", pool=TEXT, instances=COUNT, wrong=COUNT, orphans=COUNT),
    "cache list": document("cache list", caches=rows(more(CACHE_STATS, last_used=maybe(TIME)))),
    "cache stats": document(
        "cache stats",
        **CACHE_STATS["properties"],
        spread=rows(fields(node=TEXT, shards=COUNT, entries=COUNT, bytes=COUNT)),
        moving=maybe(fields(**{"from": COUNT, "to": COUNT, "left": COUNT})),
    ),
    "cache keys": document("cache keys", **CACHE, keys=rows(TEXT), complete=FLAG),
    "cache top": document("cache top", **CACHE, size=RANKED_ENTRIES, reads=RANKED_ENTRIES, cost=RANKED_ENTRIES),
    "cache get": document(
        "cache get",
        **CACHE,
        key=TEXT,
        redis_key=TEXT,
        value=ANY,
        created_at=TIME,
        expires_at=maybe(TIME),
        last_accessed=maybe(TIME),
        access_count=COUNT,
        tier=one_of("hot", "warm", "cold"),
        tags=rows(TEXT),
        size_bytes=COUNT,
        compute_s=POSITIVE,
        entry_version=COUNT,
        ttl_s=maybe(POSITIVE),
    ),
    "cache delete": document("cache delete", **CACHE, asked=COUNT, removed=COUNT),
    "cache clear": document("cache clear", **CACHE, entries=COUNT),
    "cache reshard": document("cache reshard", **CACHE, **{"from": COUNT, "to": COUNT}, entries=COUNT),
    "cache drop": document("cache drop", **CACHE, dropped=FLAG, entries=maybe(COUNT)),
    "cache invalidate-tag": document("cache invalidate-tag", **CACHE, tags=rows(TEXT)),
}
