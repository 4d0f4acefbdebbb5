"""The README's recipes for Django, dogpile.cache and litellm work."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentperf_redis import AgentPerf
from tests.support.places import ROOT
from tests.support.recipes import recipe
from tests.support.servers import Server

pytestmark = [pytest.mark.thorough, pytest.mark.servers("valkey")]

CALLS = {
    "django": """
print(cache.get("answer"), cache.add("visits", 1), cache.incr("visits"))
""",
    "dogpile": """
print(region.get("answer"))
""",
    "litellm": """
answer = router.completion("x", [{"role": "user", "content": "why?"}], mock_response="42")
print(answer.choices[0].message.content)
""",
}
PRINTED = {"django": "42\n42 True 2\n", "dogpile": "42\n42\n", "litellm": "42\n"}


@pytest.mark.parametrize("name", CALLS)
def test_recipe_runs_as_written(name: str, perf: AgentPerf, server: Server, namespace: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the extra {name}")
    environment = {"AGENTPERF_REDIS_URL": server.url, "AGENTPERF_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # without it, litellm waits for the network
    done = subprocess.run(
        [sys.executable, "-c", recipe(name) + CALLS[name]],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, PRINTED[name]), done.stderr
    if name == "litellm":
        (pool,) = perf.balancer().status()
        assert [instance.served for instance in pool.instances] == [1]
    else:
        assert [cache.size > 0 for cache in perf.caches()] == [True]
