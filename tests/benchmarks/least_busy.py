"""The reference for the balancer: litellm's router with its least-busy strategy.

The router counts the calls of all processes in Redis, and picks the least busy deployment. litellm is not a dependency.
It is measured only if it is installed.
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
    """Return the work that the router does for a call: pick a deployment, and count the start and end of the call.

    To pick, the work calls the public API of the router. To count, it calls the router's callbacks, and passes them the
    id of the call, as the router does.
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
