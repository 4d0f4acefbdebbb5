"""Two different functions never share a name; one function has the same name in every process."""

from __future__ import annotations

import functools
import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from agentperf_redis import AgentInstance, PoolSettings
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache
from agentperf_redis.cache.function_identity import function_name
from agentperf_redis.errors import InvalidArgument

ROOT = Path(__file__).resolve().parents[3]
NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture
def cache() -> Iterator[LRUCache]:
    with_no_server = Backend(NOWHERE)
    yield LRUCache(backend=with_no_server)
    with_no_server.close()


def plain(x: int) -> int:
    return x


class Thing:
    def method(self) -> int:
        return 1

    def calls_its_base(self) -> str:
        return super().__repr__()


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def retried(times: object) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            assert times
            return function(*args)

        return wrapper

    return decorate


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return 2 * function(*args)

    return wrapper


def tripled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return 3 * function(*args)

    return wrapper


class Keyed:
    def __init__(self, name: str) -> None:
        self.name = name

    def __cache_key__(self) -> str:
        return self.name

    def search(self, query: str) -> str:
        return self.name + query

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__


class KeyedToo(Keyed):
    pass


def of(value: object) -> Callable[[], object]:
    def closing() -> object:
        return value

    return closing


def test_module_level_functions_are_identified_by_name() -> None:
    assert function_name(plain) == f"{__name__}.plain"
    assert function_name(Thing.method) == f"{__name__}.Thing.method"
    assert function_name(Thing.calls_its_base) == f"{__name__}.Thing.calls_its_base", "super() closes over the class"


def nothing() -> None:
    """A function to which closures in the tests refer."""


def with_attribute(value: object) -> Callable[[], object]:
    def reading() -> object:
        return reading.value  # type: ignore[attr-defined]

    reading.value = value  # type: ignore[attr-defined]
    reading.unread = object()  # type: ignore[attr-defined]
    return reading


def other() -> None:
    """Another function."""


@pytest.mark.parametrize(
    ("one", "another"),
    [
        (of("small"), of("large")),
        (of(1), of(1.0)),
        (of(1), of(True)),
        (of(["a"]), of(["b"])),
        (of(nothing), of(other)),
        (of(len), of(max)),
        (of([].append), of([1].append)),
        (of(dict), of(list)),
        (of(os), of(sys)),
        (of(logging.getLogger("a")), of(logging.getLogger("b"))),
        (of(functools.partial(plain, 1)), of(functools.partial(plain, 2))),
        (of(of(1)), of(of(2))),
        (with_attribute(1), with_attribute(2)),
        (lambda x: x * x, lambda x: x**3),
        (lambda x: {"a", "b", x}, lambda x: {"a", "c", x}),
        (lambda x: lambda: x + 1, lambda x: lambda: x + 2),
        (logged(lambda x: "a"), logged(lambda x: "b")),
        (logged(nothing), logged(other)),
        (retried(2)(plain), retried(3)(plain)),
        (retried(2)(plain), plain),
        (retried(2)(plain), doubled(plain)),
        (doubled(plain), tripled(plain)),
        (Keyed("a").search, Keyed("b").search),
        (Keyed.of_class, KeyedToo.of_class),
        (of(AgentInstance("a", "t")), of(AgentInstance("b", "t"))),
        (of(PoolSettings()), of(PoolSettings(eject_after=99))),
        (lambda x: x[..., 0], lambda x: x[..., 1]),
        (lambda x: x in {1, ...}, lambda x: x in {2, ...}),
    ],
)
def test_different_functions_have_different_names(one: Any, another: Any) -> None:
    assert function_name(one) != function_name(another)
    assert function_name(one) == function_name(one)


def test_attributes_leave_the_name_of_a_module_level_function_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = function_name(plain)
    monkeypatch.setitem(vars(plain), "calls", object())
    assert function_name(plain) == before


def test_functions_made_alike_have_one_name() -> None:
    assert function_name(of("small")) == function_name(of("small"))
    assert function_name(logged(nothing)) == function_name(logged(nothing))
    assert function_name(with_attribute(1)) == function_name(with_attribute(1))


def test_recursive_function_has_a_stable_name() -> None:
    def fall(n: int) -> int:
        return fall(n - 1) if n else 0

    assert function_name(fall) == function_name(fall)


@pytest.mark.parametrize(
    "value", [threading.Lock(), object(), [object()], threading.Event()], ids=lambda v: type(v).__name__
)
def test_closures_without_identity_are_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"name='\.\.\.'"):
        function_name(of(value))
    with pytest.raises(InvalidArgument, match=r"name='\.\.\.'"):
        function_name(retried(value)(plain))
    with pytest.raises(InvalidArgument, match=r"name='\.\.\.'"):
        function_name(with_attribute(value))


def test_cache_key_method_gives_an_identity() -> None:
    class Client:
        def __init__(self, url: str) -> None:
            self.url = url

        def __cache_key__(self) -> str:
            return self.url

    assert function_name(of(Client("a"))) != function_name(of(Client("b")))
    assert function_name(of(Client("a"))) == function_name(of(Client("a")))


def test_closures_over_library_objects_are_allowed(cache: LRUCache) -> None:
    assert function_name(of(cache)) == function_name(of(cache))


def test_explicit_name_allows_any_closure(cache: LRUCache) -> None:
    lock = threading.Lock()

    def ask() -> object:
        return lock

    with pytest.raises(InvalidArgument, match=r"_thread\.lock"):
        cache.cached()(ask)
    assert cache.cached(name="ask", version=2)(ask).key().startswith("ask@2:")
    assert cache.cached(name="part")(functools.partial(plain, 1)).key().startswith("part:")


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", 3])
def test_invalid_names_are_refused(cache: LRUCache, name: Any) -> None:
    with pytest.raises(InvalidArgument, match="name is"):
        cache.cached(name=name)


def module_with(body: str) -> ModuleType:
    module = ModuleType("a_module")
    exec(body, vars(module))
    return module


def test_name_is_refused_while_another_function_has_it(cache: LRUCache) -> None:
    first = cache.cached()(module_with("def work(x): return 1").work)
    with pytest.raises(InvalidArgument, match=r"already has a function a_module\.work"):
        cache.cached()(module_with("def work(x): return 2").work)
    assert cache.cached()(module_with("def work(x): return 1").work).key(1) == first.key(1), "the same function again"
    del first
    gc.collect()
    cache.cached()(module_with("def work(x): return 2").work)  # imitates a reload after an edit


PROGRAM = """
import sys
from agentperf_redis.cache.function_identity import function_name
model = {model!r}
def of(value):
    def ask(x): return value, x in {{"a", "b", "c", "d"}}
    return ask
def top(x): return model
print(function_name(of(("a", 1))), function_name(lambda x: x), function_name(top))
"""


def names_from(*words: str, text: str | None = None, seed: str = "0") -> list[str]:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], input=text, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.thorough
def test_scripts_are_distinguished_by_content_not_folder(tmp_path: Path) -> None:
    for folder, model in (("a", "small"), ("b", "small"), ("c", "large")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "main.py").write_text(PROGRAM.format(model=model))
    here, there, else_where = (
        names_from(str(tmp_path / folder / "main.py"), seed=seed)
        for folder, seed in (("a", "1"), ("b", "2"), ("c", "1"))
    )
    assert here == there
    assert not set(here) & set(else_where)


@pytest.mark.thorough
def test_typed_functions_are_distinguished_by_used_globals() -> None:
    small, again, large = (
        names_from("-", text=PROGRAM.format(model=m), seed=s) for m, s in (("s", "1"), ("s", "2"), ("l", "1"))
    )
    assert small == again
    assert small[2] != large[2], "it uses a different global"


def test_methods_of_objects_without_identity_are_refused(cache: LRUCache) -> None:
    with pytest.raises(InvalidArgument, match="Thing without an identity"):
        cache.cached()(Thing().method)
    one, other = cache.cached()(Keyed("a").search), cache.cached()(Keyed("b").search)
    assert one.key("q") != other.key("q")


def test_variables_bound_after_decoration_are_refused() -> None:
    def make(model: str) -> str:
        def ask(query: str) -> str:
            return prefix + query

        name = function_name(ask)
        prefix = model
        return name

    with pytest.raises(InvalidArgument, match="_Unbound without an identity"):
        make("small")
