"""Scripts with one line changed, to prove that a check can fail."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from agentperf_redis.metrics import commands
from agentperf_redis.script import Script

_SEQUENCE_CHECK = "  if SEQ <= known then return {0, now, 0, 0} end\n"


def alter(patch: pytest.MonkeyPatch, script: str, line: str, instead: str) -> None:
    """Replace `line` in all scripts of the script's folder until the test ends. The script must contain `line`."""
    kind: Any = Script
    plain, folder, texts = kind.source.fget, script.partition("/")[0] + "/", dict[str, str]()
    assert line in Script(script).source, line

    def source(of: Script) -> str:
        if of.name not in texts:
            text: str = plain(of)
            texts[of.name] = text.replace(line, instead) if of.name.startswith(folder) else text
        return texts[of.name]

    patch.setattr(Script, "source", property(source))
    patch.setattr(Script, "sha", property(lambda of: hashlib.sha1(source(of).encode()).hexdigest()))


def without_sequence_check() -> Script:
    """Return a mutant of the flush script that counts every delivery, even a repeated one."""
    source = commands.FLUSH.source
    assert source.count(_SEQUENCE_CHECK) == 1
    return Script("metrics/flush", source.replace(_SEQUENCE_CHECK, ""))
