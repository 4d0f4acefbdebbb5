"""Rules files: TOML, checked as a whole. Every fault names the line, the rule, the field and the allowed values.

The server holds each rule as JSON with the fields of the file, so that redis-cli shows the fields as they were written.
The same code checks fields that were read from a file and fields that were read from the server.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.alerts.expression import Scope, measure_of, parsed, resolving
from agentperf_redis.alerts.rules import (
    EVERY_S,
    EVERY_SHORT_S,
    SHORT_WINDOW_S,
    Address,
    Burn,
    Objective,
    Rule,
    RuleSet,
    masked,
)
from agentperf_redis.errors import InvalidArgument, InvalidRules
from agentperf_redis.metrics.histogram import bucket_bounds
from agentperf_redis.windows import window_seconds

MAX_RULES, MAX_RECEIVERS, MAX_ADDRESSES = 500, 50, 20
"""Maximum number of rules, of receivers, and of the addresses of one receiver."""


MAX_FILE_CHARACTERS = 1_000_000


_DAY_S = 86_400.0


_MAX_WINDOW_S = 90 * _DAY_S


_MIN_EVENTS = 20
"""Default of `min_events` for percentiles and rates. One failure among three executions is no reason to page."""


# Multi-window burn rates, from Google's SRE workbook, chapter 5, table 5-8. Each item holds a share of the 30-day error
# budget, a long window (s) and a short window (s). For example, the first item means that 2 % of the budget is spent in
# one hour. Since 30 days have 720 hours, this is a burn rate of 0.02 * 720 = 14.4.
_PAGE = ((0.02, 3600.0, 300.0), (0.05, 21_600.0, 1800.0))


_TICKET = ((0.10, _DAY_S, 7200.0), (0.10, 3 * _DAY_S, 21_600.0))


SEVERITIES_OF_SLO = {"page": _PAGE, "ticket": _TICKET}


_MIN_SLO_S = 28 * _DAY_S


NO_DATA = ("keep", "ok", "alert")


_OBJECTIVE = re.compile(r"\s*(\d{1,3}(?:\.\d{1,6})?)\s*%\s*(?:under\s+(\d+(?:\.\d+)?)\s*(us|ms|s|m|h))?\s*")


_UNDER = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")


def read_rules(text: str, source: str = "rules") -> RuleSet:
    """Check a rules file.

    Args:
        text: the TOML text.
        source: name of the file, for errors.

    Raises:
        InvalidRules: with all faults of the file.
    """
    if len(text) > MAX_FILE_CHARACTERS:
        size = InvalidArgument(source, f"{len(text)} characters", f"at most {MAX_FILE_CHARACTERS} characters")
        raise InvalidRules((size,))
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        where = f"{source}, line {line[1] if line else text.count(chr(10)) + 1}"
        raise InvalidRules((InvalidArgument(where, str(error), "a valid TOML document"),)) from None
    return _Reader(source, _lines_of(text)).read(document)


def stored_rules(fields: Mapping[str, str]) -> RuleSet:
    """Read the rules from the fields of the hash that holds them.

    Raises:
        ValueError: a field has a value that this library does not write. InvalidRules is a ValueError.
    """
    document: dict[str, Any] = {"alert": [], "slo": [], "notify": {}}
    for field in sorted(fields):
        kind, colon, name = field.partition(":")
        if not colon:
            continue
        found = json.loads(fields[field])
        if kind not in document or not isinstance(found, dict):
            raise ValueError(field)
        if kind == "notify":
            document["notify"][name] = found
        else:
            document[kind].append({**found, "name": name})
    return _Reader("the stored rules", {}).read(document)


_FIELDS = {
    "alert": {
        *("name", "agents", "cache", "pool", "when", "window", "for", "resolve", "keep_firing_for", "min_events"),
        *("no_data", "severity", "notify", "renotify"),
    },
    "slo": {"name", "agents", "objective", "window", "keep_firing_for", "min_events", "no_data", "notify", "renotify"},
    "notify": {"urls", "command"},
}


class _Reader:
    """Checks one document and collects its faults."""

    def __init__(self, source: str, lines: Mapping[tuple[str, object, str], int]) -> None:
        self._source = source
        self._lines = lines
        self._faults: list[InvalidArgument] = []

    def read(self, document: Mapping[str, Any]) -> RuleSet:
        for key in document:
            if key not in _FIELDS:
                self._fault((key, 0, ""), key, "", key, "the tables [[alert]], [[slo]] and [notify.NAME]")
        addresses, stored = self._receivers(document.get("notify", {}))
        known = set(addresses)
        rules: list[Rule] = []
        for kind, make in (("alert", self._alert), ("slo", self._slo)):
            tables = document.get(kind, [])
            if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
                self._fault((kind, 0, ""), kind, "", tables, f"tables [[{kind}]]")
                continue
            for index, table in enumerate(tables):
                rules += make(index, table, known)
                name = table.get("name")
                if isinstance(name, str):
                    fields = {field: value for field, value in table.items() if field != "name"}
                    stored[f"{kind}:{name}"] = json.dumps(fields, ensure_ascii=False, default=str)
        self._check_names(document)
        if len(rules) > MAX_RULES:
            self._fault(("", 0, ""), "rules", "", len(rules), f"at most {MAX_RULES} rules; an SLO counts as two")
        if self._faults:
            raise InvalidRules(tuple(self._faults))
        return RuleSet(tuple(rules), addresses, stored)

    def _fault(self, place: tuple[str, object, str], subject: str, field: str, value: object, allowed: str) -> None:
        kind, index, _ = place
        places = (place, (kind, index, ""), (kind, 0, str(index)))
        line = next((self._lines[each] for each in places if each in self._lines), None)
        where = f"{self._source}{f', line {line}' if line else ''}, {subject}{f', {field}' if field else ''}"
        self._faults.append(InvalidArgument(where, value, allowed))

    def _check_names(self, document: Mapping[str, Any]) -> None:
        """Report names that two rules share. An SLO takes three names: its own, and one for each of its two rules."""
        seen = set[str]()
        for kind in ("alert", "slo"):
            tables = document.get(kind, [])
            for index, table in enumerate(tables if isinstance(tables, list) else []):
                name = table.get("name") if isinstance(table, dict) else None
                if not isinstance(name, str):
                    continue
                own = [name] if kind == "alert" else [name, *(f"{name} ({each})" for each in SEVERITIES_OF_SLO)]
                if not seen.isdisjoint(own):
                    self._fault(
                        (kind, index, "name"), f"{kind} {name!r}", "name", name, "a name that no other rule has"
                    )
                seen.update(own)

    def _receivers(self, tables: object) -> tuple[dict[str, tuple[Address, ...]], dict[str, str]]:
        found: dict[str, tuple[Address, ...]] = {}
        stored: dict[str, str] = {}
        if not isinstance(tables, dict):
            self._fault(("notify", 0, ""), "notify", "", "…", "tables [notify.NAME]")
            return found, stored
        if len(tables) > MAX_RECEIVERS:
            self._fault(("notify", 0, ""), "notify", "", len(tables), f"at most {MAX_RECEIVERS} receivers")
        for name, table in tables.items():
            check = _Table(self, "notify", name, f"notify.{name}", table)
            check.name("", name)
            addresses = []
            for index, url in enumerate(check.texts("urls")):
                if not _URL.fullmatch(url):
                    check.fault("urls", masked(url), "URLs such as mailto://… or json://host/path")
                addresses.append(Address(f"{name}/{index}", url=url))
            command = check.texts("command")
            if command:
                addresses.append(Address(f"{name}/command", command=tuple(command)))
            if isinstance(table, dict) and not addresses and not check.has_faults:
                check.fault("", "an empty receiver", "urls, a command, or both")
            found[name] = tuple(addresses)
            stored[f"notify:{name}"] = json.dumps(table, ensure_ascii=False, default=str)
        return found, stored

    def _alert(self, index: int, table: Mapping[str, Any], receivers: set[str]) -> Iterator[Rule]:
        check = _Table(self, "alert", index, f"alert {table.get('name', index + 1)!r}", table)
        name = check.name("name", table.get("name"))
        scopes = [scope for scope in Scope if scope.value in table]
        if len(scopes) != 1:
            check.fault("agents", [scope.value for scope in scopes], "exactly one of agents, cache and pool")
            return
        scope = scopes[0]
        pattern = check.name(scope.value, table[scope.value])
        when = check.checked("when", lambda: parsed("when", table.get("when"), scope))
        resolve = None
        if when is not None and "resolve" in table:
            resolve = check.checked("resolve", lambda: resolving("resolve", table["resolve"], when, scope))
        if scope is Scope.POOL and "window" in table:
            check.fault("window", table["window"], "no window: the figures of a pool are those of the moment")
        window = float(EVERY_SHORT_S) if scope is Scope.POOL else check.window("window", "5m")
        measure = measure_of(when.measure) if when is not None else None
        few = 0 if measure is not None and measure.is_count else _MIN_EVENTS
        common = self._common(check, receivers, few)
        hold = check.duration("for", 0.0)
        severity = check.name("severity", table.get("severity", "page"))
        if check.has_faults or when is None:
            return
        yield Rule(
            name=name,
            scope=scope,
            pattern=pattern,
            when=when,
            resolve=resolve,
            window=window,
            hold=hold,
            severity=severity,
            objective=None,
            burns=(),
            text=when.text,
            **common,
        )

    def _common(self, check: _Table, receivers: set[str], min_events: int) -> dict[str, Any]:
        """Check the fields that alerts and SLOs share."""
        table = check.table
        few = check.checked(
            "min_events", lambda: arguments.count("min_events", table.get("min_events", min_events), minimum=0)
        )
        no_data = table.get("no_data", "keep")
        if no_data not in NO_DATA:
            check.fault("no_data", no_data, "one of " + ", ".join(map(repr, NO_DATA)))
        notify = check.texts("notify")
        for each in notify:
            if each not in receivers:
                allowed = f"a receiver of this file: {', '.join(sorted(receivers)) or 'it has no [notify.NAME]'}"
                check.fault("notify", each, allowed)
        renotify = check.duration("renotify", 0.0, minimum=60.0) if "renotify" in table else None
        return {
            "keep_firing": check.duration("keep_firing_for", 0.0),
            "min_events": few or 0,
            "no_data": no_data,
            "notify": tuple(dict.fromkeys(notify)),
            "renotify": renotify,
        }

    def _slo(self, index: int, table: Mapping[str, Any], receivers: set[str]) -> Iterator[Rule]:
        check = _Table(self, "slo", index, f"slo {table.get('name', index + 1)!r}", table)
        name = check.name("name", table.get("name"))
        pattern = check.name("agents", table.get("agents"))
        window = check.window("window", "30d", minimum=_MIN_SLO_S)
        objective = self._objective(check, window)
        common = self._common(check, receivers, _MIN_EVENTS)
        if check.has_faults or objective is None:
            return
        for severity, pairs in SEVERITIES_OF_SLO.items():
            burns = tuple(Burn(factor_of(share, window, long_s), long_s, short_s) for share, long_s, short_s in pairs)
            factors = " or ".join(f"{burn.factor:.3g}" for burn in burns)
            yield Rule(
                name=f"{name} ({severity})",
                scope=Scope.AGENTS,
                pattern=pattern,
                when=None,
                resolve=None,
                window=max(burn.long_s for burn in burns),
                hold=0.0,
                severity=severity,
                objective=objective,
                burns=burns,
                text=f"burn rate of {' '.join(table['objective'].split())} > {factors}",
                **common,
            )

    def _objective(self, check: _Table, window: float) -> Objective | None:
        text = check.table.get("objective")
        found = _OBJECTIVE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            check.fault(
                "objective", text, "a share of the executions that succeed, '99%', or of fast ones, '95% under 2s'"
            )
            return None
        share = float(found[1]) / 100
        under = float(found[2]) * _UNDER[found[3]] if found[2] else None
        fastest = max(factor_of(budget, window, long_s) for budget, long_s, _ in _PAGE)
        least = 1 - 1 / fastest
        if not least < share < 1.0:
            check.fault(
                "objective",
                text,
                f"more than {least:.4%} and less than 100%: at {least:.4%}, even traffic that only fails burns the "
                f"error budget no faster than {fastest:.3g} times, and at 100% there is no budget",
            )
            return None
        if under is not None and not bucket_bounds(-320)[0] < under <= _DAY_S:
            check.fault("objective", text, "a duration from 1us to 24h")
            return None
        return Objective(share, under)


def factor_of(share: float, window_s: float, long_s: float) -> float:
    """Return the burn rate that spends `share` of the error budget of `window_s` within `long_s`; at least 1."""
    return max(1.0, share * window_s / long_s)


class _Table:
    """Checks the fields of one table."""

    def __init__(self, reader: _Reader, kind: str, index: object, subject: str, table: object) -> None:
        self._reader = reader
        self._place = (kind, index)
        self._subject = subject
        self.has_faults = False
        self.table: Mapping[str, Any] = table if isinstance(table, dict) else {}
        if not isinstance(table, dict):
            self.fault("", "…" if kind == "notify" else table, "a table")  # a `notify` table may hold secrets
        for field in self.table:
            if field not in _FIELDS[kind]:
                self.fault(field, field, f"the fields {', '.join(sorted(_FIELDS[kind]))}")

    def fault(self, field: str, value: object, allowed: str) -> None:
        self.has_faults = True
        self._reader._fault((*self._place, field), self._subject, field, value, allowed)  # noqa: SLF001  its own reader

    def checked(self, field: str, check: Any) -> Any:
        """Return what `check` returns, or None after a fault."""
        try:
            return check()
        except InvalidArgument as error:
            self.fault(field, error.value, error.allowed)
            return None

    def name(self, field: str, value: object) -> str:
        return self.checked(field, lambda: arguments.name(field, value)) or ""

    def texts(self, field: str) -> list[str]:
        value = self.table.get(field, [])
        if (
            isinstance(value, list)
            and len(value) <= MAX_ADDRESSES
            and all(isinstance(each, str) and each for each in value)
        ):
            return value
        secret = field in ("urls", "command")  # a single URL instead of a list is invalid, but still secret
        self.fault(field, "…" if secret else value, f"a list of at most {MAX_ADDRESSES} texts that are not empty")
        return []

    def duration(self, field: str, default: float, *, minimum: float = 0.0) -> float:
        value = self.table.get(field)
        if value is None:
            return default
        if minimum == 0.0 and isinstance(value, str) and re.fullmatch(r"0[smhd]", value):
            return 0.0
        allowed = f"a duration such as '30s', '5m' or '2h', {'at least 1m, ' if minimum else ''}at most '30d'"
        found = self._seconds(value)
        if found is None or not minimum <= found <= 30 * _DAY_S:
            self.fault(field, value, allowed)
            return default
        return found

    def window(self, field: str, default: str, *, minimum: float = 10.0) -> float:
        value = self.table.get(field, default)
        found = self._seconds(value)
        if minimum > 10.0:  # noqa: PLR2004  only the window of an SLO has a larger minimum
            allowed = "days from '28d' to '90d'"
            valid = found is not None and minimum <= found <= _MAX_WINDOW_S and found % _DAY_S == 0
        else:
            allowed = "'10s' to '90d': below five minutes a multiple of 10s, from five minutes on one of 1m"
            step = EVERY_S if found is not None and found >= SHORT_WINDOW_S else EVERY_SHORT_S
            valid = found is not None and minimum <= found <= _MAX_WINDOW_S and found % step == 0
        if not valid or found is None:
            self.fault(field, value, allowed)
            return minimum
        return found

    @staticmethod
    def _seconds(value: object) -> float | None:
        try:
            return window_seconds(value, "window")  # type: ignore[arg-type]  # `window_seconds` checks the type
        except InvalidArgument:
            return None


_HEADER = re.compile(r"\s*(\[\[?)\s*([A-Za-z0-9_-]+)\s*(?:\.\s*(\"[^\"]*\"|'[^']*'|[A-Za-z0-9_-]+)\s*)?\]")


_KEY = re.compile(r"\s*(?:([A-Za-z0-9_-]+)|\"([^\"]*)\"|'([^']*)')\s*[=.]")


def _lines_of(text: str) -> dict[tuple[str, object, str], int]:
    """Return the line of each table and field. A key holds the table's kind, its number or name, and the field or "".

    The TOML parser reports no positions, so this function finds the headers and keys of the usual layout. A fault in
    another layout, such as an inline table, names the rule and the field, but may name no line.
    """
    found: dict[tuple[str, object, str], int] = {}
    counts: dict[str, int] = {}
    table: tuple[str, object] = ("", 0)
    inside = ""
    for number, line in enumerate(text.splitlines(), 1):
        if inside:
            inside = "" if inside in line else inside
            continue
        if header := _HEADER.match(line):
            kind, name = header[2], (header[3] or "").strip("\"'")
            if header[1] == "[[":
                counts[kind] = counts.get(kind, -1) + 1
                table = (kind, counts[kind])
            else:
                table = (kind, name or 0)
            found.setdefault((*table, ""), number)
        elif key := _KEY.match(line):
            name = key[1] or key[2] or key[3] or ""
            found.setdefault((*table, name) if table[0] else (name, 0, ""), number)
        inside = next((quote for quote in ('"""', "'''") if line.count(quote) % 2), "")
    return found
