from __future__ import annotations

from agentperf_redis.export import families
from agentperf_redis.export.families import DURATIONS, FAMILIES, STATUS, TOKEN_PARTS
from agentperf_redis.export.otel_names import NAMES, OPERATIONS, SPAN_KINDS, SPAN_TOKENS, TOKENS
from agentperf_redis.metrics.llm_usage import Usage, read_usage
from agentperf_redis.metrics.traces import Kind


def test_every_family_has_a_name_of_its_own() -> None:
    assert set(NAMES) == set(FAMILIES) - set(STATUS)
    names = [name.name for each in NAMES.values() for name in each.by_type.values()]
    assert len(names) == len(set(names))
    assert all(name.startswith(("agentperf.", "gen_ai.")) for name in names)


def test_tokens_are_split_by_type() -> None:
    labels = families.TOKENS.labels
    name = NAMES[families.TOKENS].of(("planner", "gpt-x", "input"))
    assert name.name == "gen_ai.client.inference.usage.input_tokens"
    assert name.attributes(labels, ("planner", "gpt-x", "input")) == {
        "gen_ai.agent.name": "planner",
        "gen_ai.request.model": "gpt-x",
        "gen_ai.token.modality": "unknown",
    }
    assert (
        NAMES[TOKEN_PARTS].of(("a", "m", "reasoning")).name == "gen_ai.client.inference.usage.reasoning.output_tokens"
    )


def test_unknown_model_is_no_attribute() -> None:
    found = (
        NAMES[families.TOKENS]
        .of(("planner", "", "output"))
        .attributes(families.TOKENS.labels, ("planner", "", "output"))
    )
    assert "gen_ai.request.model" not in found


def test_durations_have_the_name_of_the_conventions() -> None:
    name = NAMES[DURATIONS].of(("planner",))
    assert (name.name, name.unit) == ("gen_ai.invoke_agent.duration", "s")
    assert name.attributes(("agent",), ("planner",)) == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "planner",
    }


def test_other_families_keep_their_names() -> None:
    names = {family.name: each.by_type[""] for family, each in NAMES.items() if "" in each.by_type}
    assert (names["agentperf_cache_bytes"].name, names["agentperf_cache_bytes"].unit) == ("agentperf.cache.bytes", "By")
    assert names["agentperf_cache_saved_seconds"].unit == "s"


def test_attributes_of_spans_are_those_of_the_metrics() -> None:
    assert [names[0] for names in SPAN_TOKENS.values()] == [
        "gen_ai.usage.input_tokens",
        "gen_ai.usage.output_tokens",
        "gen_ai.usage.total_tokens",
        "gen_ai.usage.cache_read.input_tokens",
        "gen_ai.usage.cache_write.input_tokens",
        "gen_ai.usage.reasoning.output_tokens",
    ]
    assert set(TOKENS) == {"input", "output", "cache_read", "cache_write", "reasoning"}
    names = [name for each in SPAN_TOKENS.values() for name in each]
    assert len(names) == len(set(names))


def test_fields_of_a_span_usage_are_read_as_a_usage() -> None:
    usage = dict(zip(SPAN_TOKENS, (100, 20, 120, 64, 5, 12), strict=True))
    assert read_usage(usage) == Usage(100, 20, tokens_cached_in=64, tokens_cache_write=5, tokens_reasoning=12)


def test_operations_have_a_kind() -> None:
    assert {Kind(kind) for kind in OPERATIONS.values()} == set(Kind) - {Kind.STEP}
    assert {operation for each in SPAN_KINDS.values() for operation in each.values()} == set(OPERATIONS)
