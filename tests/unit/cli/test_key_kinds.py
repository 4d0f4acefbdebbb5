"""Tests of the descriptions of keys: every kind of key that `keys.py` lists has a description."""

from __future__ import annotations

import re

import pytest

from agentperf_redis import keys
from agentperf_redis.cli.key_kinds import KINDS, known


def legend() -> list[tuple[str, str]]:
    """Return an example of each key in the legend of keys.py, and its type."""
    found = re.findall(r"^    (agentperf:\S+) +(HASH|ZSET|STRING|STREAM|LIST)\b", keys.__doc__ or "", re.MULTILINE)
    examples = []
    for pattern, type_ in found:
        head, _, last = pattern.rpartition(":")
        for part in last.split("|"):
            key = f"{head}:{part}".replace("<UTC>", "2026-11-29T16")
            examples.append((re.sub(r"<\w+>", "some%20name", key), type_.lower()))
    return examples


def test_every_key_of_the_legend_is_known() -> None:
    examples = legend()
    assert len(examples) > 30
    for key, type_ in examples:
        found = known(key)
        assert found is not None, key
        assert found.kind.type == type_, key
        assert "{" not in found.holds


def test_every_kind_is_in_the_legend() -> None:
    seen = {found.kind for key, _ in legend() if (found := known(key)) is not None}
    # The legend also describes `absent` and `deferred:<version>`, but `legend()` does not parse these descriptions.
    # `scratch` is a key of `agentperf doctor`, and is not in the legend.
    elsewhere = {"absent", "scratch", "deferred:[0-9]+"}
    assert {kind.part for kind in KINDS if kind not in seen} == elsewhere


@pytest.mark.parametrize(
    ("key", "holds"),
    [
        ("agentperf:{lb:a%20b}:ready@gpu%2F1", "instances of the pool a b with free capacity and the label gpu/1"),
        ("n:{lb:a%20b#3/8.30}:due", "timers of the pool a b (shard 3 of 8)"),
        ("n.s-1:{cache:answers}:e:a:b|c\n", "the entry a:b|c\n of the cache answers"),
        ("n:{metrics:03}:10s:2026-11-29T16:45:10:research/a%2Fb", "the counts of research/a/b in the 10s from 2026-11-29T16:45:10 UTC on"),
        ("n:{metrics:03}:slices:1h:research/a%2Fb", "the counts of research/a/b in the past slices of 1h"),
        ("n:{metrics:03}:1d:2026-11-29:a", "the counts of a in the 1d from 2026-11-29 UTC on"),
        ("n:{tiered:docs}:deferred:123", "the entries that a clear of the cache docs removed"),
    ],
)  # fmt: skip
def test_holds_names_the_resource(key: str, holds: str) -> None:
    found = known(key)
    assert found is not None
    assert found.holds.startswith(holds)


@pytest.mark.parametrize(
    "key", ["", "x", "agentperf:", "agentperf:other", "a b:meta", "agentperf:{lb:coder}:other", "agentperf:{x:y}:meta", "agentperf:{lb:}:state"]
)  # fmt: skip
def test_other_keys_are_unknown(key: str) -> None:
    assert known(key) is None


@pytest.mark.parametrize(
    ("key", "name", "value", "meaning", "words"),
    [
        ("n:{lb:p}:state", "#born", "1795967996721349", "time when the pool was created", "2026-11-29"),
        ("n:{lb:p}:state", "#next", "4503599627370496", "time of the next maintenance; 0 while callers wait", "never"),
        ("n:{lb:p}:state", "a%20b", "load=1", "the instance a b", ""),
        ("n:{lb:p}:due", "E:i1", "1795967996721", "the ejection of the instance i1 ends", "2026-11-29"),
        ("n:{lb:p}:due", "E:i1", "x", "the ejection of the instance i1 ends", ""),
        ("n:{cache:c}:size", "k", "30000000022", "hits * 10^10 + bytes of this entry", "22 bytes, 3 hits"),
        ("n:{cache:c}:size", "k", "x", "hits * 10^10 + bytes of this entry", ""),
        ("n:{metrics:03}:settings", "10s", "900000ms", "TTL of such a slice after its end", ""),
        ("n:{cache:c}:hot", "k", "2873550192470000", "last access to this entry", ", frequency"),
        ("n:{cache:c}:meta", "removed", "0", "the cache's clock at the last removal", "never"),
        ("n:{metrics:03}:total:a", "h:16", "5", "executions that took more than 2 s and at most 2.08855 s", ""),
        ("n:{metrics:03}:total:a", "mdl:m%2F1:tok_in", "5", "tok_in of the model m/1", ""),
        ("n:{metrics:03}:total:a", "unheard_of", "5", "", ""),
        ("n:{metrics:03}:slow:a", "1|73us|err:KeyError|x", "73", "an execution of 73 us, outcome err:KeyError", ""),
    ],
)  # fmt: skip
def test_fields_are_explained(key: str, name: str, value: str, meaning: str, words: str) -> None:
    found = known(key)
    assert found is not None
    text, shown = found.meaning(name, value)
    assert text == meaning
    assert words in shown
    assert bool(shown) == bool(words)
