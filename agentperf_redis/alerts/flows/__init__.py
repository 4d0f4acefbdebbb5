"""The flows of alerts: deployment, evaluation, silences and reading. A flow is a generator that the backend runs."""

from agentperf_redis.alerts.flows.deployment import Deployment, checked_rules, deploy
from agentperf_redis.alerts.flows.evaluation import evaluate
from agentperf_redis.alerts.flows.reading import log, overview
from agentperf_redis.alerts.flows.service import AlertService
from agentperf_redis.alerts.flows.silences import silence, unsilence
from agentperf_redis.alerts.flows.targets import matching

__all__ = [
    "AlertService",
    "Deployment",
    "checked_rules",
    "deploy",
    "evaluate",
    "log",
    "matching",
    "overview",
    "silence",
    "unsilence",
]
