"""What litellm's router does to pick its least busy deployment, with the counts of all processes in Redis.

litellm is no dependency: it is measured where it is installed.
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
    """Whether there is a litellm to measure."""
    return importlib.util.find_spec("litellm") is not None


def calls(url: str, deployments: int) -> Work:
    """Return what picks a deployment, counts a call on it as begun, and as ended: what its router does around a call.

    Made through its public face and the callbacks it makes itself, each call with an id, as it gives them.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it asks a server for prices
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
