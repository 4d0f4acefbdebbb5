"""Changes the texts of scripts. Some changes log actions. Others remove a check, which a test must then detect."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from agentperf_redis.metrics import commands
from agentperf_redis.script import Script

Change = tuple[str, str]
"""A text of a script, and the text that replaces it."""

SEQUENCE_CHECK = "  if SEQ <= known_seq then return {0, now, 0, 0} end\n"
"""The line of the flush script that recognizes a repeated delivery."""


def alter(patch: pytest.MonkeyPatch, script: str, line: str, instead: str) -> None:
    """Replace `line` in all scripts of the script's folder until the test ends. The script must contain `line`."""
    assert line in Script(script).source, line
    folder = script.partition("/")[0] + "/"
    _patch_sources(patch, lambda of, text: text.replace(line, instead) if of.name.startswith(folder) else text)


@contextmanager
def changed(scripts: Iterable[Script], *groups: Iterable[Change]) -> Iterator[None]:
    """Apply groups of changes, in order, to scripts in this process until the block ends.

    Each text that is replaced must occur in at least one of the scripts.
    """
    changes = [change for group in groups for change in group]
    found = Counter[str]()
    texts: dict[str, str] = {}
    for script in scripts:
        text = script.source
        for sound, instead in changes:
            found[sound] += text.count(sound)
            text = text.replace(sound, instead)
        texts[script.name] = text
    missing = [sound for sound, _ in changes if not found[sound]]
    assert not missing, f"texts missing from the scripts: {missing}"
    with pytest.MonkeyPatch.context() as patch:
        _patch_sources(patch, lambda of, text: texts.get(of.name, text))
        yield


def _patch_sources(patch: pytest.MonkeyPatch, change: Callable[[Script, str], str]) -> None:
    """Replace the source of each script by the text that `change` returns for the script and its original source."""
    kind: Any = Script
    plain, known = kind.source.fget, dict[str, str]()

    def source(of: Script) -> str:
        if of.name not in known:
            known[of.name] = change(of, plain(of))
        return known[of.name]

    patch.setattr(Script, "source", property(source))
    patch.setattr(Script, "sha", property(lambda of: hashlib.sha1(source(of).encode()).hexdigest()))


def without_sequence_check() -> Script:
    """Return a mutant of the flush script that counts every delivery, even a repeated one."""
    source = commands.FLUSH.source
    assert source.count(SEQUENCE_CHECK) == 1
    return Script("metrics/flush", source.replace(SEQUENCE_CHECK, ""))
