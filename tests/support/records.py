"""Records of a pool's state, read and changed by field name. pool.lua documents the fields."""

from __future__ import annotations

from typing import Any

from agentperf_redis.balancer.commands.records import fields_of

HELD = ("lease", "grant")
"""Kinds of a token's record that hold capacity."""
PICKS = 2**40
"""Factor of the relative load in a score. The load is counted in steps of 1/8192; see `pack_load` in pool.lua."""


def kind_of(record: str) -> str:
    """Return the kind of a token's record: lease, grant, waiting or tombstone."""
    return record.partition(" ")[0]


def fields(record: str | None) -> dict[str, str]:
    """Return the fields of a record by name; an empty dict for None."""
    return fields_of(record) if record else {}


def flags(record: str) -> set[str]:
    """Return the flags of an instance's record."""
    return set(fields_of(record)["flags"].split(",")) - {"-"}


def number(record: str | None, name: str) -> float:
    """Return a field as a number; 0 if it is missing, because an extra record omits zeros."""
    return float(fields(record).get(name, 0))


def changed(record: str | None, **values: object) -> str:
    """Return an instance's record, or its extra record, with some fields changed."""
    return " ".join(f"{name}={value}" for name, value in {**fields(record), **values}.items())


def change(raw: Any, state: str, name: str, **values: object) -> None:
    """Change some fields of a stored record."""
    raw.hset(state, name, changed(raw.hget(state, name), **values))


def held(state: dict[str, str]) -> list[str]:
    """Return the tokens that hold capacity."""
    return [name for name, record in state.items() if name[0] == "@" and kind_of(record) in HELD]


def instances(state: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return the records of all instances, by id."""
    return {name: fields(record) for name, record in state.items() if name[0] not in "@#+"}


def load_score(load: int, limit: int, seq: int) -> int:
    """Return the score of an instance under LEAST_LOADED: its relative load, then the number of its last pick."""
    return load * 8192 // limit * PICKS + seq


def load_and_pick(score: float) -> tuple[float, int]:
    """Return both parts of a `load_score`: the relative load, in steps of 1/8192, and the number of the last pick."""
    load, seq = divmod(int(score), PICKS)
    return load / 8192, seq
