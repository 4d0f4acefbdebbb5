"""Objects without a name are named after the place where they are made. The name is the same in every process."""

from __future__ import annotations

import asyncio
import compileall
import functools
import os
import subprocess
import sys
import threading
import traceback
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import pytest

import agentperf_redis
from agentperf_redis import AgentPerf, InvalidArgument, LRUCache, TieredCache
from agentperf_redis.arguments import MAX_NAME_CHARACTERS
from agentperf_redis.backend import Backend
from tests.support.places import ROOT

NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture(autouse=True)
def default_backend() -> Iterator[Backend]:
    """The default backend, whose server does not exist; no cache here does I/O."""
    backend = agentperf_redis.configure(NOWHERE)
    yield backend
    backend.close()


def here(name: str) -> str:
    return f"{__name__}.{name}"


class Agent:
    def __init__(self) -> None:
        self.answers = LRUCache()
        self.drafts, self.notes = LRUCache(), LRUCache(max_size=5)

    @property
    def lazy(self) -> LRUCache:
        return LRUCache()

    @classmethod
    def make(cls) -> TieredCache:
        return TieredCache()


def made_here(size: int | None = None) -> LRUCache:
    return LRUCache(max_size=10 if size is None else size)


def test_names_say_what_the_cache_is_assigned_to() -> None:
    users = LRUCache()
    orders, tiers = LRUCache(), TieredCache(hot_size=5)
    caches = {"first": LRUCache(), "second": LRUCache()}
    scope = here("test_names_say_what_the_cache_is_assigned_to")
    assert [users.name, orders.name, tiers.name] == [f"{scope}.{name}" for name in ("users", "orders", "tiers")]
    assert [cache.name for cache in caches.values()] == [f"{scope}.caches.first", f"{scope}.caches.second"]
    assert repr(users).startswith(f"LRUCache({users.name!r}, max_size=1000")


def test_instances_of_a_class_share_the_caches_of_its_code() -> None:
    one, other = Agent(), Agent()
    assert [one.answers.name, one.drafts.name, one.notes.name] == [
        here("Agent.answers"),
        here("Agent.drafts"),
        here("Agent.notes"),
    ]
    assert one.answers.name == other.answers.name
    assert (one.lazy.name, Agent.make().name) == (here("Agent.lazy"), here("Agent.make"))


def test_function_called_often_makes_one_cache() -> None:
    assert {made_here().name for _ in range(500)} == {here("made_here")}


def test_same_place_with_other_limits_is_refused_while_in_use() -> None:
    first = made_here(20)
    with pytest.raises(InvalidArgument) as refused:
        made_here(30)
    assert str(refused.value) == (
        f"max_size is 30; allowed: 20, since cache {first.name!r} is open in this process with max_size=20; "
        "name='...' makes a cache of its own"
    )
    assert "During handling" not in "".join(traceback.format_exception(refused.value))
    del first
    assert made_here(30).max_size == 30


def test_unused_cache_in_a_cycle_does_not_refuse_other_limits() -> None:
    def tiers(size: int) -> TieredCache:
        return TieredCache(hot_size=size)

    assert [tiers(size).hot.max_size for size in (1, 2, 3)] == [1, 2, 3], "a TieredCache is in a reference cycle"


def test_calls_on_one_line_are_two_places() -> None:
    one, other = made_here(), LRUCache()
    first, second = (LRUCache(), LRUCache()), (LRUCache(), LRUCache())
    names = {cache.name for cache in (one, other, *first, *second)}
    assert len(names) == 6


class OfUser(LRUCache):
    def __init__(self, size: int = 7) -> None:
        self._open(size)

    def _open(self, size: int) -> None:
        super().__init__(max_size=size)


class Deeper(OfUser):
    def __init__(self) -> None:
        super().__init__(8)


class Calling(type(LRUCache)):  # type: ignore[misc]
    def __call__(cls, *args: Any) -> Any:
        return super().__call__(*args)


class Called(LRUCache, metaclass=Calling):
    """Its metaclass makes its objects."""


def test_subclass_is_named_where_it_is_made() -> None:
    scope = here("test_subclass_is_named_where_it_is_made")
    one, other, deeper, called = OfUser(), OfUser(), Deeper(), Called()
    assert [one.name, other.name] == [f"{scope}.one-OfUser", f"{scope}.other-OfUser"]
    assert [deeper.name, called.name] == [f"{scope}.deeper-Deeper", f"{scope}.called-Called"]


@dataclass
class Plain:
    users: LRUCache = field(default_factory=LRUCache)
    orders: LRUCache = field(default_factory=LRUCache)
    small: LRUCache = field(default_factory=lambda: LRUCache(max_size=2))
    large: LRUCache = field(default_factory=functools.partial(LRUCache, 7))


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    users: LRUCache = field(default_factory=LRUCache)
    orders: LRUCache = field(default_factory=LRUCache)


@pytest.mark.parametrize("kind", [Plain, Frozen])
def test_fields_of_a_dataclass_are_places(kind: type[Plain | Frozen]) -> None:
    one, other = kind(), kind()
    for name in kind.__dataclass_fields__:
        assert getattr(one, name).name == getattr(other, name).name == here(f"{kind.__name__}.{name}")


def default(cache: LRUCache = LRUCache(backend=Backend(NOWHERE))) -> LRUCache:  # noqa: B008
    return cache


def test_other_ways_to_make_a_cache_have_places() -> None:
    scope = here("test_other_ways_to_make_a_cache_have_places")
    partial = functools.partial(LRUCache, 8)
    users = partial()
    lazily = defaultdict[str, LRUCache](lambda: LRUCache())  # noqa: PLW0108  the lambda is the place of the cache

    async def task() -> LRUCache:
        tasks = LRUCache()
        return tasks  # noqa: RET504  the variable names the cache

    found: list[LRUCache] = []
    thread = threading.Thread(target=lambda: found.append(LRUCache()))
    thread.start()
    thread.join()
    assert default().name == here("default")
    assert (users.name, lazily["a"].name) == (f"{scope}.users-partial", f"{scope}.lazily")
    assert (asyncio.run(task()).name, found[0].name) == (f"{scope}.task.tasks", f"{scope}.thread.target")


def test_factories_of_agentperf_name_by_place_too() -> None:
    class Own(AgentPerf):
        def cache(self, name: str | None = None, **options: Any) -> LRUCache:
            return super().cache(name, **options)

    scope = here("test_factories_of_agentperf_name_by_place_too")
    with AgentPerf(NOWHERE) as perf, Own(NOWHERE) as own:
        one, other = perf.cache(max_size=3), perf.cache()
        tiers, named = perf.tiered_cache(), perf.cache("docs")
        mine = own.cache()
        assert len({perf.cache() for _ in range(3)}) == 1, "one place is one object"
    assert [one.name, other.name, tiers.name, mine.name] == [
        f"{scope}.{name}"
        for name in ("one-perf.cache", "other-perf.cache", "tiers-perf.tiered_cache", "mine-own.cache")
    ]
    assert named.name == "docs"


def test_given_name_is_kept() -> None:
    assert (LRUCache(name="mine").name, TieredCache(name="mine").name) == ("mine", "mine")
    with pytest.raises(InvalidArgument, match="name is ''"):
        LRUCache(name="")


def test_loop_with_several_live_caches_warns_once() -> None:
    with pytest.warns(RuntimeWarning, match=r"in a loop makes one cache, '.*\.caches', .* name='\.\.\.'") as seen:
        caches = [LRUCache() for _ in range(3)]
    assert len(seen) == 1
    assert len({cache.name for cache in caches}) == 1
    for _ in range(3):
        LRUCache()  # no other cache of this line is alive, so there is no warning


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    users: LRUCache = pydantic.Field(default_factory=LRUCache)


@pytest.mark.parametrize(
    "make",
    [
        lambda: list(map(LRUCache, [3]))[0],  # noqa: RUF015
        lambda: defaultdict[str, LRUCache](LRUCache)["a"],
        lambda: Model().users,
    ],
    ids=["map", "defaultdict", "pydantic"],
)
def test_class_called_by_other_code_warns_and_stays_in_the_process(make: Callable[[], LRUCache]) -> None:
    with pytest.warns(RuntimeWarning, match="could give it one. It becomes 'unnamed-.*no other process shares") as seen:
        cache, again = make(), make()
    assert (cache.name, len(seen)) == (again.name, 1)
    assert cache.name.startswith("unnamed-")
    assert cache.name.endswith(f"@{agentperf_redis.configure(NOWHERE).process}")
    assert "and is called by " in str(seen[0].message)
    assert str(seen[0].message).endswith("Call it in your own code, for example lambda size: LRUCache(size, name=...)")


def test_executed_code_warns_once_and_stays_in_the_process() -> None:
    variables: dict[str, Any] = {"__name__": __name__, "LRUCache": LRUCache}
    program = "for _ in range(2): a = LRUCache(); b = LRUCache(); c = LRUCache(name='c')"
    with pytest.warns(RuntimeWarning, match=r"its code is in no file.*name='\.\.\.'") as seen:
        exec(program, variables)
    assert len(seen) == 2, "one warning for each of a and b"
    assert variables["a"].name != variables["b"].name
    assert variables["c"].name == "c"


FACTORY = """
from agentperf_redis import AgentPerf, LRUCache
perf = AgentPerf("redis://127.0.0.1:1")
def get_cache(n):
    return get_cache(n - 1) if n else LRUCache(10)
def owned():
    return perf.cache()
def users_of(key):
    users = LRUCache()
    users = keep(users)
    return users
def keep(thing, **_):
    return thing
cache = LRUCache()
class Owner:
    def __init__(self):
        self.users = LRUCache()
    def found(self):
        return LRUCache()
    def cache(self, thing=None):
        return thing
owner = Owner()
def names():
    caches = [get_cache(1), owned(), users_of(1), cache, owner.users, owner.found()]
    return [each.name for each in caches]
"""


@pytest.mark.parametrize(
    "line",
    [
        "x = get_cache(1)",
        "get_cache(1)",
        "[].append(get_cache(1))",
        "keep(get_cache(1)); keep(get_cache(2)); get_cache(3)",
        "get_cache = keep(get_cache)",
        "users_of(users=get_cache(1)) if False else keep(1, users=users_of(1))",
        "owned(); owner.cache(); owner.found(); owner.users",
        "owner.cache(cache); cache = keep(cache)",
        "class get_cache_: keep(get_cache(1)); get_cache = get_cache",
        "keep(LRUCache())",
        "keep(LRUCache()); users_of(users=LRUCache()) if False else LRUCache()",
    ],
)
def test_calls_of_a_factory_rename_no_cache(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "factories.py").write_text(f"{FACTORY}\n{line}\n")
    monkeypatch.delitem(sys.modules, "factories", raising=False)  # the module of an earlier test
    module = __import__("factories")
    expected = ("get_cache", "owned-perf.cache", "users_of.users", "cache", "Owner.users", "Owner.found")
    assert module.names() == [f"factories.{name}" for name in expected]
    module.perf.close()


def test_calls_of_other_functions_in_a_factory_do_not_rename_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    lines = (
        "",
        "store.cache(size)",
        "users = store.cache(size)",
        "make(size); make(size)",
        "dict(users=store.cache(1))",
    )
    for number, line in enumerate(lines):
        (tmp_path / f"factory{number}.py").write_text(
            "from unittest.mock import Mock\n"
            "from agentperf_redis import LRUCache\n"
            "store = Mock()\n"
            f"def make(size):\n    if size: {line or 'pass'}\n    return LRUCache()\n"
        )
        assert __import__(f"factory{number}").make(0).name == f"factory{number}.make"


def test_modules_that_cannot_be_imported_are_told_apart_by_contents(tmp_path: Path) -> None:
    names = []
    for folder, text in (("a", "users = LRUCache()"), ("b", "users = LRUCache()"), ("c", "users = LRUCache(7)")):
        path = tmp_path / folder / "plugin.py"
        path.parent.mkdir()
        path.write_text(text)
        module = types.ModuleType("plugin")
        module.__file__ = str(path)
        vars(module)["LRUCache"] = LRUCache
        exec(compile(text, path, "exec"), vars(module))
        names.append(module.users.name)
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("plugin.users#") for name in names)


def test_changed_source_is_not_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "edited.py"
    functions = "".join(f"def {name}():\n    users = LRUCache()\n    return users\n" for name in ("first", "second"))
    path.write_text(f"from agentperf_redis import LRUCache\n{functions}")
    module = __import__("edited")
    assert module.first().name == "edited.first.users"
    path.write_text(f"from agentperf_redis import LRUCache\n\n\n{functions.replace('users', 'names')}")
    assert module.first().name == "edited.first.users", "a place keeps its name while the program runs"
    assert module.second().name.startswith("edited.second:6."), "the line, since the source is that of other code"


def test_executed_methods_are_no_generated_constructors() -> None:
    variables: dict[str, Any] = {"__name__": __name__, "LRUCache": LRUCache}
    exec("class A:\n    def __init__(self): self.a, self.b = LRUCache(), LRUCache()", variables)
    with pytest.warns(RuntimeWarning, match="its code is in no file"):
        made = variables["A"]()
    assert made.a.name != made.b.name


def once(kind: Any) -> Callable[[], Any]:
    def make() -> Any:
        return kind()

    return make


@once
class Users(LRUCache):
    """A singleton that a decorator makes."""


@once
class Orders(LRUCache):
    """Another singleton, which the decorator makes at the same place."""


def test_classes_made_at_one_place_are_different_caches() -> None:
    assert (Users().name, Orders().name) == (here("once.make-kind-Users"), here("once.make-kind-Orders"))
    assert Users().name == Users().name


def test_long_names_are_cut_and_stay_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    long = "x" * 300
    source = f"from agentperf_redis import LRUCache\n{long}1, {long}2 = LRUCache(), LRUCache()\n"
    (tmp_path / "with_long_names.py").write_text(source)
    module = __import__("with_long_names")
    names = [getattr(module, f"{long}{number}").name for number in (1, 2)]
    assert all(len(name) == MAX_NAME_CHARACTERS and name.startswith("with_long_names.xxx") for name in names)
    assert names[0] != names[1]


SCRIPT = """
import multiprocessing
from agentperf_redis import LRUCache, TieredCache, configure
configure("redis://127.0.0.1:1")
users, tiers = LRUCache(), TieredCache()
def make():
    return LRUCache()
def show():
    print(users.name, tiers.name, make().name)
if __name__ == "__main__":
    show()
"""
CHILD = """
    child = multiprocessing.get_context("spawn").Process(target=show)
    child.start()
    child.join()
"""


def run(*arguments: str | Path, folder: Path, stdin: str = "", warned: bool = False, **environment: str) -> list[str]:
    """Run Python and return the lines it prints. Warnings are errors, unless some are expected."""
    command = [sys.executable, *([] if warned else ["-W", "error"]), *map(str, arguments)]
    done = subprocess.run(
        command,
        input=stdin,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert bool(done.stderr) is warned
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


@pytest.mark.thorough
def test_script_has_one_name_in_any_folder_and_process(tmp_path: Path) -> None:
    lines = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "job.py").write_text(SCRIPT + CHILD)
        lines += run("job.py", folder=folder)
    assert len(lines) == 4
    (line,) = set(lines)
    users, tiers, made = line.split()
    program = users.removeprefix("job.users#")
    assert (len(program), tiers, made) == (16, f"job.tiers#{program}", f"job.make#{program}")


@pytest.mark.thorough
def test_two_scripts_of_one_name_never_collide(tmp_path: Path) -> None:
    names = set()
    for folder, text in (("a", SCRIPT), ("b", SCRIPT + "\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "job.py").write_text(text)
        names |= set(run(tmp_path / folder / "job.py", folder=tmp_path)[0].split())
    assert len(names) == 6


@pytest.mark.thorough
def test_modules_are_named_alike_in_any_folder(tmp_path: Path) -> None:
    expected = ["pkg.job.users pkg.job.tiers pkg.job.make"]
    for name, command in (("site-packages", ("-m", "pkg.job")), ("here", ("-c", "import pkg.job; pkg.job.show()"))):
        folder = tmp_path / name / "pkg"
        folder.mkdir(parents=True)
        (folder / "job.py").write_text(SCRIPT)
        assert run(*command, folder=folder.parent) == expected
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("pkg/__init__.py", "")
        archive.writestr("pkg/job.py", SCRIPT)
    assert run("-c", "import pkg.job; pkg.job.show()", folder=tmp_path, PYTHONPATH=f"{ROOT}:app.zip") == expected


def test_code_without_source_is_named_after_its_lines(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(SCRIPT)
    assert compileall.compile_dir(tmp_path, legacy=True, quiet=1)
    (tmp_path / "job.py").unlink()
    (line,) = run("-c", "import job; job.show()", folder=tmp_path)
    users, tiers, made = line.split()
    assert users.startswith("job:5.")
    assert tiers.startswith("job:5.")
    assert users != tiers
    assert made.startswith("job.make:7.")


def test_command_text_is_a_program(tmp_path: Path) -> None:
    (line,) = set(run("-c", SCRIPT, "argument", folder=tmp_path) + run("-Xutf8", "-c", SCRIPT, folder=tmp_path))
    users, tiers, made = line.split()
    program = users.removeprefix("__main__.users")
    assert program.startswith("#")
    assert (tiers, made) == (f"__main__.tiers{program}", f"__main__.make{program}")
    assert "is in no file" in run("-c", f"exec({SCRIPT!r})", folder=tmp_path, warned=True)[1]


def test_typed_and_piped_code_says_that_it_has_no_place(tmp_path: Path) -> None:
    lines = run("-", folder=tmp_path, stdin=SCRIPT, warned=True)
    assert len(set(lines[0].split())) == 3
    warned = [line for line in lines[1:] if "RuntimeWarning" in line]
    assert len(warned) == 3
    assert all("its code is in no file" in line and "name='...'" in line for line in warned)
