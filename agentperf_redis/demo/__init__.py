"""`agentperf demo`: code-review agents in several worker processes that share metrics, caches and instances."""

from agentperf_redis.demo.progress import PlainProgress, Progress, Snapshot, Start, WorkerProgress
from agentperf_redis.demo.report import Casualty, Check, Report
from agentperf_redis.demo.run import DemoOptions, run_demo

__all__ = [
    "Casualty",
    "Check",
    "DemoOptions",
    "PlainProgress",
    "Progress",
    "Report",
    "Snapshot",
    "Start",
    "WorkerProgress",
    "run_demo",
]
