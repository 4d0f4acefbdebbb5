"""`agentperf cache` on caches that programs use."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any

import pytest

from agentperf_redis import AgentPerf, keys
from agentperf_redis.cache.operator import ExistingCache
from agentperf_redis.cli import console
from tests.support.commandline import FAILURE, NOT_FOUND, OK, USAGE, Run, document, has_line, shown
from tests.support.places import ROOT
from tests.support.servers import Raw, Server, wait_until


@pytest.fixture
def cache(agentperf: Run, perf: AgentPerf) -> Run:
    """Run `agentperf cache` on a namespace with the cache "answers" (keys a and b) and the tiered cache "docs"."""
    answers = perf.cache("answers", max_size=7, default_ttl=60, max_bytes=10_000)
    answers.put("a", {"n": 1}, tags=["new", "odd"])
    answers.put("b", (1, Decimal("2.5")))
    answers.get("a")
    answers.flush()
    perf.tiered_cache("docs", hot_size=1, warm_size=2, cold_size=3).put("page", "text", "hot")

    return partial(agentperf, "cache")


@pytest.fixture(autouse=True)
def _settings_stay(no_sampling: None, cache: Run, raw: Raw, namespace: str) -> Any:
    """Check that no command changes the settings of a cache."""
    metas = [keys.cache(namespace, *which).meta for which in (("cache", "answers"), ("tiered", "docs"))]
    before = [raw.hget(meta, "settings") for meta in metas]
    resources = set(raw.zrange(keys.resources(namespace), 0, -1))
    assert all(before)
    yield
    assert [raw.hget(meta, "settings") for meta in metas] == before
    assert {each for each in raw.zrange(keys.resources(namespace), 0, -1) if "both" not in each} == resources


def test_list_shows_caches_with_their_limits(cache: Run) -> None:
    found = {each["cache"]: each for each in document(cache("list", "--json"), "cache list")["caches"]}
    assert (found["answers"]["cache_kind"], found["docs"]["cache_kind"]) == ("lru", "tiered")
    assert (found["answers"]["entries"], found["answers"]["max_entries"], found["answers"]["max_bytes"]) == (
        2,
        7,
        10_000,
    )
    assert (found["docs"]["entries"], found["docs"]["max_entries"], found["docs"]["max_bytes"]) == (1, 6, None)
    text = shown(cache("list"))
    for words in (("answers", "lru", "7", "100.0%"), ("docs", "tiered", "tinylfu", "6")):
        assert has_line(text, *words), text


def test_list_shows_the_last_use(cache: Run, perf: AgentPerf) -> None:
    found = {each["cache"]: each["last_used"] for each in document(cache("list", "--json"), "cache list")["caches"]}
    assert abs(time.time() - datetime.fromisoformat(found["answers"]).timestamp()) < 120
    assert has_line(shown(cache("list")), "last use")
    perf.tiered_cache("docs").clear()
    found = {each["cache"]: each["last_used"] for each in document(cache("list", "--json"), "cache list")["caches"]}
    assert found["docs"] is None


def test_drop_deletes_a_confirmed_cache(cache: Run, perf: AgentPerf) -> None:
    perf.cache("both").put("a", 1)
    refused = cache("drop", "both")
    assert (refused.returncode, refused.stdout) == (USAGE, "")
    assert "Delete cache both with its settings and counters?" in refused.stderr
    assert shown(cache("drop", "both", "--yes")) == "Dropped cache both, which held 1 entry.\n"
    assert cache("drop", "both", "--yes").returncode == NOT_FOUND
    assert perf.cache("both").get("a") is None


def test_cache_in_use_is_only_cleared(cache: Run, perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> None:
    perf.cache("both").put("a", 1)

    def in_use(self: ExistingCache) -> Any:
        return None
        yield

    monkeypatch.setattr(ExistingCache, "drop", in_use)
    done = cache("drop", "both", "--yes")
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert done.stderr == "agentperf: cache both was only cleared: programs keep storing entries\n"


def test_narrow_terminal_shows_whole_names(cache: Run, perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "both.module.function.variable-1of2#0123456789abcdef"
    perf.cache(name).put("a", 1)
    monkeypatch.setattr(console.out, "width", 80)
    lines = shown(cache("list")).splitlines()
    width = next(line for line in lines if line.lstrip().startswith("cache ")).index("kind")
    assert name in "".join(line[:width].strip() for line in lines)


def test_stats_show_one_cache_by_tier(cache: Run) -> None:
    found = document(cache("stats", "docs", "--json"), "cache stats")
    assert {tier: each["entries"] for tier, each in found["tiers"].items()} == {"hot": 1, "warm": 0, "cold": 0}
    assert [each["default_ttl_s"] for each in found["tiers"].values()] == [300, 1800, 3600]
    text = shown(cache("stats", "answers"))
    for words in ("answers (lru, policy lru)", "2 of 7 entries", "1 hit, 0 misses", "cold"):
        assert words in text
    assert "warm" not in text


@pytest.mark.parametrize("key", ["x" * 121, "Summarize:\n\t" + "text " * 50, "a\nb\x00 \u2028"])
def test_printed_keys_are_accepted_by_get_and_delete(cache: Run, perf: AgentPerf, key: str) -> None:
    answers = perf.cache("answers")
    answers.clear()
    answers.put(key, "here")
    printed = cache("keys", "answers").stdout.removesuffix("\n")
    assert printed[-10:] in cache("top", "answers").stdout, "long names are folded, not cut"

    for name in (printed, key.replace("\x00", "\\x00")):  # an argument cannot contain a NUL, so both names escape it
        assert cache("get", "answers", name).stdout.startswith("'here'\n")
        assert cache("delete", "answers", name, "--yes").returncode == OK
        assert answers.get(key) is None
        answers.put(key, "here")


def test_keys_print_least_recently_used_first(cache: Run, perf: AgentPerf) -> None:
    odd = "a\nb\x1b[31m é"
    perf.cache("answers").put(odd, 1)
    done = cache("keys", "answers")
    assert (done.returncode, done.stdout) == (OK, "b\na\na\\nb\\x1b[31m é\n")
    assert document(cache("keys", "answers", "--json"), "cache keys")["keys"] == ["b", "a", odd]
    cut = cache("keys", "answers", "--limit", "2")
    assert (cut.stdout, cut.stderr) == ("b\na\n", "There are more than 2; --limit shows more.\n")
    assert document(cache("keys", "answers", "--limit", "2", "--json"), "cache keys")["complete"] is False


def test_top_ranks_by_size_reads_and_cost(cache: Run, perf: AgentPerf) -> None:
    docs = perf.tiered_cache("both", hot_size=100, warm_size=500, cold_size=2000)
    docs.put_many({f"small{number}": 1 for number in range(1200)})  # more entries than `top` reads at a time
    docs.put("large", "x" * 3000)
    docs.put("hidden", "y" * 4000, tags=["gone"])
    docs.invalidate_tags("gone")
    begin = time.monotonic()
    docs.get_or_compute("slow", lambda: time.sleep(0.05))
    took = time.monotonic() - begin
    docs.get_or_compute("slower" + "r" * 200, lambda: time.sleep(took + 0.05))
    for _ in range(5):
        docs.get("small7")
    docs.get("slow")
    docs.flush()

    found = document(cache("top", "both", "--limit", "2", "--json"), "cache top")

    assert found["size"][0]["key"] == "large"
    assert 3000 < found["size"][0]["size_bytes"] < 3100
    assert [(each["key"], each["access_count"]) for each in found["reads"]] == [("small7", 5), ("slow", 1)]
    assert [each["key"][:6] for each in found["cost"]] == ["slower", "slow"]
    assert found["cost"][1]["compute_s"] == found["cost"][1]["seconds_saved"] >= 0.05
    text = shown(cache("top", "both", "--by", "reads"))
    assert has_line(text, "small7", "5"), text
    assert "large" not in text
    assert docs.stats().hits == 6, "inspection does not count as reads"
    assert cache("top", "nothing").returncode == NOT_FOUND
    done = cache("top", "answers", "--by", "cost")
    assert (done.returncode, done.stdout, done.stderr) == (OK, "", "most expensive to compute: none\n")


def test_every_command_counts_expired_entries_as_expired(cache: Run, perf: AgentPerf) -> None:
    brief = perf.cache("both", max_size=1000)
    brief.put_many({f"k{number}": 1 for number in range(600)}, 0.05)  # more entries than one sweep removes
    brief.put("stays", 1)
    wait_until(lambda: brief.get("k599") is None, "the entries to expire")

    assert document(cache("keys", "both", "--json"), "cache keys")["keys"] == ["stays"]
    found = document(cache("stats", "both", "--json"), "cache stats")
    assert (found["entries"], found["expirations"], found["evictions"]) == (1, 600, 0)
    brief.put("goes", 1, 0.05)
    wait_until(lambda: brief.get("goes") is None, "the entry to expire")
    listed = {each["cache"]: each["entries"] for each in document(cache("list", "--json"), "cache list")["caches"]}
    assert listed["both"] == 1
    assert [each["key"] for each in document(cache("top", "both", "--json"), "cache top")["size"]] == ["stays"]


def test_get_shows_an_entry_and_counts_no_read(cache: Run, perf: AgentPerf, raw: Raw, namespace: str) -> None:
    found = document(cache("get", "answers", "a", "--json"), "cache get")
    assert (found["value"], found["tags"], found["access_count"], found["tier"]) == (
        {"n": 1},
        ["new", "odd"],
        1,
        "cold",
    )
    text = shown(cache("get", "answers", "a"))
    assert text.startswith("{'n': 1}\n")
    assert "new, odd" in text
    unlike_json = document(cache("get", "answers", "b", "--json"), "cache get")
    assert (unlike_json["value_repr"], unlike_json["value_type"]) == ("(1, Decimal('2.5'))", "tuple")
    raw.append(_entry(namespace, "b"), "??")
    assert "unreadable here" in cache("get", "answers", "b").stdout
    assert document(cache("get", "answers", "b", "--json"), "cache get")["value_unreadable"]
    assert perf.cache("answers").stats().hits == 1
    assert perf.cache("answers").stats().misses == 0


def _entry(namespace: str, key: str) -> str:
    return keys.cache(namespace, "cache", "answers").entry(key)


def test_delete_removes_confirmed_keys(cache: Run, perf: AgentPerf) -> None:
    assert cache("delete", "answers", "a", "z").returncode == USAGE
    assert perf.cache("answers").get("a") == {"n": 1}
    done = cache("delete", "answers", "a", "z", "--yes")
    assert (done.returncode, done.stdout) == (OK, "Removed 1 key of 2 from cache answers.\n")
    assert perf.cache("answers").keys() == ["b"]
    again = cache("delete", "answers", "a", "--yes")
    assert (again.returncode, again.stdout) == (NOT_FOUND, "")
    assert document(cache("delete", "answers", "b", "--yes", "--json"), "cache delete")["removed"] == 1


def test_clear_makes_every_key_a_miss(cache: Run, perf: AgentPerf) -> None:
    assert cache("clear", "answers").returncode == USAGE
    assert perf.cache("answers").size() == 2
    done = cache("clear", "answers", "--yes")
    assert (done.returncode, done.stdout) == (OK, "Cleared cache answers, which held 2 entries.\n")
    assert perf.cache("answers").get_many(["a", "b"]) == {}
    assert perf.tiered_cache("docs").get("page") == "text"
    assert document(cache("clear", "docs", "--yes", "--json"), "cache clear")["entries"] == 1


def test_invalidate_tag_makes_its_entries_misses(cache: Run, perf: AgentPerf) -> None:
    assert cache("invalidate-tag", "answers", "odd").returncode == USAGE
    assert perf.cache("answers").get("a") == {"n": 1}
    done = cache("invalidate-tag", "answers", "odd", "even", "--yes")
    assert (done.returncode, done.stderr) == (OK, "")
    assert "even, odd" in done.stdout
    assert perf.cache("answers").get_many(["a", "b"]) == {"b": (1, Decimal("2.5"))}


def test_delete_invalidates_local_copies_of_programs(cache: Run, server: Server, namespace: str) -> None:
    with AgentPerf(server.url, namespace=namespace) as program:
        copies = program.cache("answers", max_size=7, default_ttl=60, max_bytes=10_000, local_size=10)
        assert copies.get("a") == copies.get("a") == {"n": 1}
        assert cache("delete", "answers", "a", "--yes").returncode == OK
        wait_until(lambda: copies.get("a") is None, "the program to drop its copy", timeout=0.3)


def test_kind_selects_between_caches_of_one_name(cache: Run, perf: AgentPerf) -> None:
    perf.cache("both").put("a", 1)
    perf.tiered_cache("both").put("a", 2)
    unclear = cache("get", "both", "a")
    assert (unclear.returncode, unclear.stdout) == (USAGE, "")
    assert unclear.stderr == "agentperf: give --kind lru or --kind tiered: there is one of each kind named 'both'\n"
    assert document(cache("get", "both", "a", "--kind", "lru", "--json"), "cache get")["value"] == 1
    assert document(cache("get", "both", "a", "--kind", "tiered", "--json"), "cache get")["value"] == 2


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (("stats", "nothing"), "cache 'nothing'"),
        (("stats", "answers", "--kind", "tiered"), "tiered cache 'answers'; there is an lru one"),
        (("stats", "nothing", "--kind", "lru"), "lru cache 'nothing'"),
        (("keys", "nothing"), "cache 'nothing'"),
        (("get", "nothing", "a"), "cache 'nothing'"),
        (("get", "answers", "z"), "key 'z' in cache 'answers'"),
        (("delete", "nothing", "a", "--yes"), "cache 'nothing'"),
        (("delete", "answers", "z", "--yes"), "key 'z' in cache 'answers'"),
        (("delete", "answers", "y", "z", "--yes"), "keys 'y', 'z' in cache 'answers'"),
        (("clear", "nothing", "--yes"), "cache 'nothing'"),
        (("invalidate-tag", "nothing", "odd", "--yes"), "cache 'nothing'"),
    ],
)
def test_missing_objects_exit_4_and_change_nothing(
    cache: Run, raw: Raw, namespace: str, words: tuple[str, ...], missing: str
) -> None:
    before = set(raw.scan_iter(f"{namespace}:*"))
    done = cache(*words)
    assert (done.returncode, done.stdout) == (NOT_FOUND, "")
    assert done.stderr == f"agentperf: not found: {missing}\n"
    assert set(raw.scan_iter(f"{namespace}:*")) == before


def test_newer_cache_is_left_unchanged(cache: Run, raw: Raw, namespace: str) -> None:
    meta = keys.cache(namespace, "cache", "answers").meta
    raw.hset(meta, "schema", 7)
    done = cache("clear", "answers", "--yes")
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert "version 7" in done.stderr
    assert raw.exists(_entry(namespace, "a"))


@pytest.mark.parametrize(
    ("answer", "code"),
    [("y", OK), ("", FAILURE), pytest.param("n", FAILURE, marks=pytest.mark.thorough)],
)
def test_clear_asks_for_confirmation_on_a_terminal(
    cache: Run, server: Server, namespace: str, perf: AgentPerf, answer: str, code: int
) -> None:
    words = ("cache", "clear", "answers", "--url", server.url, "--namespace", namespace)
    terminal, end = pty.openpty()
    try:
        os.write(terminal, f"{answer}\n".encode())
        done = subprocess.run(
            [sys.executable, "-c", "from agentperf_redis.cli import main; main()", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=end,
            stderr=end,
            stdout=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        prompt = os.read(terminal, 10_000).decode()
    finally:
        os.close(terminal)
        os.close(end)
    assert done.returncode == code
    assert "Make every key of cache answers a miss? [y/N]" in prompt
    assert perf.cache("answers").size() == (0 if code == OK else 2)
