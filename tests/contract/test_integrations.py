"""Each adapter loads its framework only when it is imported, and says how to install a framework that is absent."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from tests.support.places import ROOT

ADAPTERS = sorted(
    path.stem for path in (ROOT / "agentperf_redis" / "integrations").glob("[!_]*.py") if path.stem != "shared"
)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# The packages that an adapter may import, so that the whole environment looks as if it had only the core ones.
WITHOUT_FRAMEWORKS = """
import importlib.abc, sys
from importlib.metadata import packages_distributions

allowed = set(sys.stdlib_module_names) | {"agentperf_redis", "redis", "hiredis", "msgpack"}
allowed |= {name.partition(".")[0] for name in sys.modules}  # loaded at the start of Python, by .pth files

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed and name.partition(".")[0] in installed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

installed = set(packages_distributions()) | set(sys.argv[2:])
sys.meta_path.insert(0, Absent())
before = set(sys.modules)  # a .pth file may have imported a package, as setuptools' does
import agentperf_redis
agentperf_redis.AgentPerf
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} & (installed - allowed)
assert not loaded, loaded
try:
    __import__("agentperf_redis.integrations." + sys.argv[1])
except ModuleNotFoundError as error:
    print(error)
else:
    print("imported")
"""


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_absent_framework_is_named_with_its_extra(adapter: str) -> None:
    assert adapter.replace("_", "-") in EXTRAS, "each adapter has an extra of its name"
    ended = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{WITHOUT_FRAMEWORKS}", adapter],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith(f'pip install "agentperf-redis[{adapter.replace("_", "-")}]"\n')
