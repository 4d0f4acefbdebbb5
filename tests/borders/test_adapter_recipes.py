"""The recipes for Django, dogpile.cache and litellm run as they stand."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import recipes
from tests.support.places import ROOT
from tests.support.servers import Server

pytestmark = [pytest.mark.thorough, pytest.mark.servers("valkey")]

DJANGO = """\
from django.conf import settings  # the dict is CACHES in settings.py

options = {"MAX_ENTRIES": 10_000, "on_unavailable": "miss"}
place = {"BACKEND": "agentperf_redis.integrations.django.AgentPerfCache", "LOCATION": "", "OPTIONS": options}
settings.configure(CACHES={"default": place})

from django.core.cache import cache

cache.get_or_set("answer", lambda: 42, timeout=300)  # computed once for all processes
print(cache.get("answer"), cache.add("visits", 1), cache.incr("visits"))
"""
DOGPILE = """\
from dogpile.cache import make_region

arguments = {"expiration_time": 3600, "max_size": 10_000}  # of agentperf_redis.integrations.dogpile
region = make_region().configure("agentperf", expiration_time=300, arguments=arguments)

@region.cache_on_arguments()
def answer(question):
    return f"{question} 42"

print(answer("why?"), answer("why?"))  # computed by one caller in all processes, every 5 min
"""
LITELLM = """\
from litellm import Router
from agentperf_redis import AgentPerf
from agentperf_redis.integrations.litellm import AgentPerfRoutingStrategy

params = {"model": "openai/gpt-x", "api_key": "...", "mock_response": "42", "max_parallel_requests": 4}
models = [{"model_name": "x", "litellm_params": params, "model_info": {"id": f"x-{n}"}} for n in range(3)]
with AgentPerf() as perf:
    router = Router(model_list=models)
    AgentPerfRoutingStrategy(router, perf, wait=30).install()
    print(router.completion("x", [{"role": "user", "content": "why?"}]).choices[0].message.content)
"""
RECIPES = {"django": DJANGO, "dogpile": DOGPILE, "litellm": LITELLM}
PRINTED = {"django": "42 True 2\n", "dogpile": "why? 42 why? 42\n", "litellm": "42\n"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_as_written(name: str, server: Server, namespace: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the extra {name}")
    recipe = RECIPES[name]
    assert len(list(filter(None, recipe.splitlines()))) <= 12
    environment = {"AGENTPERF_REDIS_URL": server.url, "AGENTPERF_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # without it, litellm waits for the network
    done = subprocess.run(
        [sys.executable, "-c", recipe],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, PRINTED[name]), done.stderr


def test_recipes_of_the_readme_are_tested() -> None:
    shown = [recipe for recipe in recipes.RECIPES if re.search(r"integrations\.(django|dogpile|litellm)", recipe)]
    assert set(shown) <= set(RECIPES.values())
