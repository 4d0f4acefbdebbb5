"""Each adapter loads its framework only when it is imported, and says how to install a framework that is absent."""

from __future__ import annotations

import subprocess
import sys
import tomllib

from tests.support.places import ROOT

ADAPTERS = sorted(path.stem for path in (ROOT / "agentperf_redis" / "integrations").glob("[!_]*.py"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

# A program that imports the adapters. All installed packages except the core packages are hidden from this program.
WITHOUT_FRAMEWORKS = """
import importlib.abc, sys
from importlib.metadata import packages_distributions

allowed = set(sys.stdlib_module_names) | {"agentperf_redis", "redis", "hiredis", "msgpack"}
allowed |= {name.partition(".")[0] for name in sys.modules}  # loaded at the start of Python, by .pth files

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed and name.partition(".")[0] in installed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

installed = set(packages_distributions())
sys.meta_path.insert(0, Absent())
before = set(sys.modules)  # a .pth file may have imported a package, as setuptools' does
import agentperf_redis
agentperf_redis.AgentPerf
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} & (installed - allowed)
assert not loaded, loaded
for adapter in sys.argv[1:]:
    try:
        __import__("agentperf_redis.integrations." + adapter)
    except ModuleNotFoundError as error:
        print(error)
    else:
        print("imported")
"""


def test_absent_framework_is_named_with_its_extra() -> None:
    names = [adapter.replace("_", "-") for adapter in ADAPTERS]
    assert set(names) <= EXTRAS.keys(), "each adapter has an extra of its name"
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{WITHOUT_FRAMEWORKS}"
    words = [sys.executable, "-I", "-c", program, *ADAPTERS]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    printed = ended.stdout.splitlines()
    assert len(printed) == len(names)
    for name, line in zip(names, printed, strict=True):
        assert line.startswith("this needs the package "), name
        assert line.endswith(f': pip install "agentperf-redis[{name}]"')
