from __future__ import annotations

from agentperf_redis.export.families import DURATIONS, FAMILIES, STATUS, TOKEN_PARTS, TOKENS
from agentperf_redis.export.otel_names import NAMES


def test_every_family_has_a_name_of_its_own() -> None:
    assert set(NAMES) == set(FAMILIES) - set(STATUS)
    names = [name.name for each in NAMES.values() for name in each.by_type.values()]
    assert len(names) == len(set(names))
    assert all(name.startswith(("agentperf.", "gen_ai.")) for name in names)


def test_tokens_are_split_by_type() -> None:
    labels = TOKENS.labels
    name = NAMES[TOKENS].of(("planner", "gpt-x", "input"))
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
    found = NAMES[TOKENS].of(("planner", "", "output")).attributes(TOKENS.labels, ("planner", "", "output"))
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
