"""The pick of the least busy deployment by litellm's router, which counts the calls of all processes in Redis.

litellm is not a dependency: it is measured if it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import warnings
from typing import Any

from tests.benchmarks.measure import Work

GROUP = "group"


def installed() -> bool:
    """Return whether litellm is installed."""
    return importlib.util.find_spec("litellm") is not None


def calls(url: str, deployments: int) -> Work:
    """Return the router's work around a call: pick a deployment, count the call's start, count its end.

    It uses the router's public API and its own callbacks, with a call id in each, as the router does.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise the import fetches prices from a server
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        router_class = importlib.import_module("litellm").Router
    models = [
        {"model_name": GROUP, "litellm_params": {"model": "openai/any", "api_key": "-"}, "model_info": {"id": f"d{n}"}}
        for n in range(deployments)
    ]
    router = router_class(model_list=models, routing_strategy="least-busy", redis_url=url)
    counting = router.leastbusy_logger
    ids = itertools.count()

    def work(times: int) -> None:
        for _ in range(times):
            picked = router.get_available_deployment(GROUP)
            info = picked["model_info"]
            metadata = {"model_group": GROUP, "model_info": info}
            call: dict[str, Any] = {
                "litellm_call_id": f"call-{next(ids)}",
                "litellm_params": {"metadata": metadata, "model_info": info},
            }
            counting.log_pre_api_call("any", [], call)
            counting.log_success_event(call, None, None, None)

    return work
