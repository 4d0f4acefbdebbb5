"""The tests of each service pass as the ACL user of `agentperf doctor --acl`. The servers refuse nothing to this user.

`pytest --as-acl-user` runs any other tests as this user.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

SERVICES = (
    "alerts/test_evaluation.py",
    "balancer/test_leases.py",
    "cache/test_primitives.py",
    "locks/test_locks.py",
    "metrics/test_recording.py",
)


@pytest.mark.thorough
@pytest.mark.parametrize("tests", SERVICES)
def test_suite_passes_as_a_worker(tests: str) -> None:
    words = ["-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-q", "-m", "not thorough", "--as-acl-user"]
    done = subprocess.run(
        [sys.executable, *words, f"tests/integration/{tests}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 10


_REFUSED = """
import contextlib
from agentperf_redis.command import Command

def test_forbidden_command_is_survived(backend):
    with contextlib.suppress(Exception):
        backend.run(Command("FLUSHALL", (), (), lambda _: None))
"""


@pytest.mark.thorough
def test_refused_command_fails_its_test(tmp_path: Path) -> None:
    (tmp_path / "test_refused.py").write_text(_REFUSED)
    words = ["-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-p", "no:cacheprovider"]
    words += ["-n", "0", "--as-acl-user", str(tmp_path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "1 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "command flushall" in done.stdout
