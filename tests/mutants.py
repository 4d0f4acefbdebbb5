"""Scripts with one line changed: what proves that a check can fail."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from agentperf_redis.script import Script


def alter(patch: pytest.MonkeyPatch, script: str, line: str, instead: str) -> None:
    """For the rest of the test, run the scripts of that script's folder with `line` replaced, which must stand in it."""
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
