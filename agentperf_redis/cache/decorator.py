"""`cached`: caches the results of a function for all processes.

The key of a result is the function's name with a digest of its bound arguments. If another function could have the same
name, a digest of the function follows the name (see `function_identity`). The canonical form of the arguments does
not depend on the process, on positional or keyword passing, or on the hash seed. An object cannot be part of a key
unless a value identifies it. Give its class a method ``__cache_key__()`` that returns such a value, or exclude the
argument with ``ignore=``. This also applies to the ``self`` of a method.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import re
import warnings
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from string import Formatter
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

from agentperf_redis import arguments
from agentperf_redis.cache.client import Cache
from agentperf_redis.cache.compute import UNSTORABLE, Wanted, compute, compute_async
from agentperf_redis.cache.flows.reads import MISSING
from agentperf_redis.cache.freshness import UNTIL_EXPIRY, Freshness, FreshnessOptions
from agentperf_redis.cache.function_identity import code_digest, digest, function_name
from agentperf_redis.cache.function_keys import DIGEST_BYTES, function_key
from agentperf_redis.cache.model import ttl_ms
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.cache.warm_up import DEFAULT_CONCURRENCY, OnProgress, WarmUpStatus, checked, warm, warm_async
from agentperf_redis.command import running_loop
from agentperf_redis.errors import InvalidArgument, shown

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_TAG = "function:"
_MAX_TAG_CHARACTERS = arguments.MAX_NAME_CHARACTERS - len(_TAG)
_ROOT = re.compile(r"[.\[]")
"""Separates the name of an argument from the rest of a template field."""
_PLAIN = frozenset({type(None), bool, int, str, bytes})
"""Types for which equal values have equal keys. Float is excluded: 0.0 equals -0.0, but their keys differ."""
_MAX_KEYS = 1024
"""Maximum number of keys remembered for each function. Computing a key takes ten times as long as a look-up."""


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """The result of `cache_info`: the counters of one decorated function in this process.

    Attributes:
        calls: calls of the decorated function.
        computed: calls of the original function.
        hits: calls answered without calling the original function.
        uncacheable: results that could not be stored.
    """

    calls: int
    computed: int
    uncacheable: int

    @property
    def hits(self) -> int:
        """Calls answered by the cache, or by another caller's computation."""
        return self.calls - self.computed


class CachedFunction(Protocol[P, R_co]):
    """A blocking function with a cache. For a method, pass the instance first to `key`, `invalidate` and `refresh`."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Return the value for these arguments."""
        ...

    @overload
    def __get__(self, instance: None, owner: type) -> CachedFunction[P, R_co]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., R_co]: ...

    @property
    def cache(self) -> Cache:
        """The cache."""
        ...

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key of these arguments."""
        ...

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Remove the value for these arguments. Returns whether there was one."""
        ...

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Compute the value for these arguments again, and return it."""
        ...

    def warm(
        self, items: Iterable[Any], *, concurrency: int = DEFAULT_CONCURRENCY, progress: OnProgress | None = None
    ) -> WarmUpStatus:
        """Compute the values that are missing, several at a time; see `LRUCache.warm_up`.

        Args:
            items: one item for each call: a tuple of the call's arguments, or its only argument.
            concurrency: maximum number of calls of the function at a time.
            progress: called after each value with a `WarmUpStatus`.
        """
        ...

    def cache_clear(self) -> None:
        """Invalidate all values of this function."""
        ...

    def cache_info(self) -> CacheInfo:
        """Return the counters of this process for this function."""
        ...


class AsyncCachedFunction(Protocol[P, R_co]):
    """A coroutine function with a cache."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:
        """Return the value for these arguments."""
        ...

    @overload
    def __get__(self, instance: None, owner: type) -> AsyncCachedFunction[P, R_co]: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., Coroutine[Any, Any, R_co]]: ...

    @property
    def cache(self) -> Cache:
        """The cache."""
        ...

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key of these arguments."""
        ...

    async def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Remove the value for these arguments. Returns whether there was one."""
        ...

    async def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Compute the value for these arguments again, and return it."""
        ...

    async def warm(
        self, items: Iterable[Any], *, concurrency: int = DEFAULT_CONCURRENCY, progress: OnProgress | None = None
    ) -> WarmUpStatus:
        """Compute the values that are missing, several at a time; see `CachedFunction.warm`."""
        ...

    async def cache_clear(self) -> None:
        """Invalidate all values of this function."""
        ...

    def cache_info(self) -> CacheInfo:
        """Return the counters of this process for this function."""
        ...


class Decorator(Protocol):
    """The return type of `cached`."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # the first matching overload applies
        self, function: Callable[P, Coroutine[Any, Any, R]]
    ) -> AsyncCachedFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R]) -> CachedFunction[P, R]: ...


def cached(
    cache: Cache,
    ttl: float | None = None,
    *,
    tags: Iterable[str] = (),
    key: str | Callable[..., str] | None = None,
    ignore: Iterable[str] = (),
    version: str | int = "",
    name: str | None = None,
    **freshness: Unpack[FreshnessOptions],
) -> Decorator:
    """Cache the results of a blocking or coroutine function, a method, a static method or a class method.

    One caller computes a missing value while all others, in any process, wait for it. Results that cannot be stored are
    returned uncached, with one warning. A function that returns an awaitable must be declared with ``async def``, or
    must wrap a coroutine function with `functools.wraps`, as functions of vendors' clients often do.

    The decorated function has the methods ``.invalidate(*args)``, ``.refresh(*args)``, ``.warm(items)`` and
    ``.cache_clear()``. If the decorated function is a coroutine function, these methods are also coroutine functions.
    Every decorated function also has ``.key(*args)``, ``.cache_info()`` and ``.cache``.

    Args:
        cache: an LRUCache or TieredCache.
        ttl: TTL of a result, seconds; None is the cache's default, `math.inf` is no expiry.
        tags: names by which results can be invalidated.
        key: a template over the arguments, such as ``"user:{user_id}"``, or a function of the arguments. By default,
            the key includes each argument: its whole state, or the result of its method ``__cache_key__()``. The order
            of ``**kwargs`` counts, but not that of a dict or set. The key always begins with the function's name.
        ignore: names of arguments to exclude from the key, such as ``("self",)``.
        version: part of the key; change it to abandon old results, for example when the function's body changes.
        name: identifies the function in keys, 1 to 200 characters; functions with the same name share results. The
            default is the function's module and qualified name. A digest of the code and closure is added if another
            function could have this name: for a lambda, and for a function that was made by a factory, decorated, or
            typed into a notebook. In a script, a digest of the file is also added, so an edited script begins with an
            empty cache.
        freshness: when results are refreshed in the background; see `FreshnessOptions`.

    Raises:
        InvalidArgument: the function cannot be cached, or cannot be distinguished from another function. Calls of the
            decorated function raise this error for an argument that cannot be part of a key.
    """
    if not isinstance(cache, Cache):
        raise InvalidArgument("cache", cache, "an LRUCache or TieredCache")
    if callable(ttl):
        raise InvalidArgument("ttl", ttl, "seconds; to decorate without options, write @cache.cached()")

    ttl_ms("ttl", ttl)
    own_tags, ignored = arguments.names("tags", tags), frozenset(arguments.names("ignore", ignore))
    if not (key is None or isinstance(key, str)):
        arguments.callback("key", key, "a template such as 'user:{user_id}', or a function of the arguments")
    if isinstance(version, bool) or not isinstance(version, (str, int)):
        raise InvalidArgument("version", version, "a string or a whole number")
    if name is not None:
        arguments.name("name", name)
    fresh = Freshness.of(freshness, ttl)

    def decorate(function: Any) -> Any:
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(decorate(function.__func__))
        generates = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        if not callable(function) or generates or not (name or hasattr(function, "__qualname__")):
            allowed = "a function or coroutine function, not a generator; a partial or an object needs name='...'"
            raise InvalidArgument("function", function, allowed)
        return _Wrapped(cache, function, ttl, own_tags, key, ignored, str(version), name, fresh).wrapper()

    return cast("Decorator", decorate)


class DecoratingCache(Cache):
    """A cache with the decorator as a method."""

    def cached(
        self,
        ttl: float | None = None,
        *,
        tags: Iterable[str] = (),
        key: str | Callable[..., str] | None = None,
        ignore: Iterable[str] = (),
        version: str | int = "",
        name: str | None = None,
        **freshness: Unpack[FreshnessOptions],
    ) -> Decorator:
        """Cache a function's results; see `agentperf_redis.cached`."""
        return cached(self, ttl, tags=tags, key=key, ignore=ignore, version=version, name=name, **freshness)

    def _make_key(self, func_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return a key that is made from the function's name and from the types and values of the arguments."""
        return function_key(func_name, (args, kwargs))


_decorated: weakref.WeakKeyDictionary[SharedState, dict[str, weakref.ref[Any]]] = weakref.WeakKeyDictionary()
"""Functions that are cached without a ``name=``, by cache and function name."""


def _refuse_another_of_this_name(cache: Cache, function: Any, name: str) -> None:
    """Refuse a function if this process already caches another function under the same name in this cache.

    This is the case when a module defines two functions of the same name.
    """

    def code(of: Any) -> tuple[str, str]:
        return code_digest(of), code_digest(inspect.unwrap(of))

    known = _decorated.setdefault(cache._shared_state, {})  # noqa: SLF001  same package
    other = known.get(name, lambda: None)()
    if other is not None and code(other) != code(function):
        del other
        gc.collect()  # after a reload, reference cycles keep the old functions of a module alive
        if known[name]() is not None:
            allowed = (
                f"a function of another name: this cache already has a function {name}; give one of them name='...'"
            )
            raise InvalidArgument("function", function, allowed)
    with contextlib.suppress(TypeError):  # raised if the function object allows no weak references
        known[name] = weakref.ref(function)


def _wraps_coroutine_function(function: Any) -> bool:
    """Whether a plain function wraps a coroutine function. Vendors' clients do this to check arguments."""
    inner = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    return arguments.is_coroutine_function(inner)


class _Wrapped(Generic[R]):
    """One decorated function."""

    def __init__(
        self,
        cache: Cache,
        function: Callable[..., Any],
        ttl: float | None,
        tags: tuple[str, ...],
        key: str | Callable[..., str] | None,
        ignore: frozenset[str],
        version: str,
        name: str | None,
        freshness: Freshness,
    ) -> None:
        self.cache = cache
        self.function = function
        self.ttl = ttl
        self.freshness = freshness
        own_name = function_name(function, cache._flows.reader.codec.registry) if name is None else name  # noqa: SLF001
        self.name = own_name + (f"@{version}" if version else "")
        if name is None:
            _refuse_another_of_this_name(cache, function, self.name)
        # `cache_clear` invalidates this tag. If the name is too long for a tag, its digest is used.
        tag = self.name if len(self.name) <= _MAX_TAG_CHARACTERS else digest(self.name.encode(), DIGEST_BYTES)
        self.tag = _TAG + tag
        self.tags = (*tags, self.tag)
        self.key_rule = key
        self._is_async: bool | None = arguments.is_coroutine_function(function)
        """Whether the function returns awaitables; None until its first call if it wraps a coroutine function."""
        if not self._is_async and _wraps_coroutine_function(function):
            self._is_async = None
        self.signature = inspect.signature(function)
        kinds = {each.kind: each.name for each in self.signature.parameters.values()}
        self._keywords = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        """The name of the parameter ``**kwargs``, empty if there is none."""
        unknown = ignore - set(self.signature.parameters)
        if unknown:
            raise InvalidArgument("ignore", sorted(unknown), f"names of arguments of {own_name}")
        self.ignore = ignore
        if isinstance(key, str):
            self._check_template(key)
        self.calls = self.computed = self.uncacheable = 0
        self._where = (cache._backend, cache._flows, cache._maintenance)  # noqa: SLF001  same package
        self._reader = cache._flows.reader  # noqa: SLF001  as above
        self._may_be_copied = self._reader.local is not None and freshness == UNTIL_EXPIRY
        self._keys: dict[object, str] = {}

    def key(self, *args: Any, **kwargs: Any) -> str:
        """Return the key of a call. The key is remembered if the types of all arguments are in `_PLAIN`."""
        kinds = (*map(type, args), *map(type, kwargs.values()))
        if not _PLAIN.issuperset(kinds):
            return self._make_key(args, kwargs)
        call = (args, tuple(kwargs.items()), kinds) if kwargs else (args, kinds)
        key = self._keys.get(call)
        if key is None:
            key = self._make_key(args, kwargs)
            if len(self._keys) >= _MAX_KEYS:
                self._keys.clear()
            self._keys[call] = key
        return key

    def _check_template(self, template: str) -> None:
        parameters = self.signature.parameters
        try:
            names = {
                _ROOT.split(field, maxsplit=1)[0] for _, field, _, _ in Formatter().parse(template) if field is not None
            }
        except ValueError as error:
            raise InvalidArgument("key", template, f"a template such as 'user:{{user_id}}' ({error})") from None
        if not names <= set(parameters):
            allowed = f"a template over the arguments of {self.name}: {', '.join(parameters)}"
            raise InvalidArgument("key", template, allowed)

    def _make_key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        rule = self.key_rule
        if callable(rule):
            made: object = rule(*args, **kwargs)
            if not isinstance(made, str):
                arguments.close_coroutine(made)
                raise InvalidArgument("key", made, "a function that returns a string")
            return f"{self.name}:{arguments.plain_text(made)}"
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if rule is not None:
            try:
                return f"{self.name}:{rule.format(**bound.arguments)}"
            except Exception as error:
                allowed = f"a template that fits the arguments; this raised {type(error).__name__}: {shown(str(error))}"
                raise InvalidArgument("key", rule, allowed) from error
        counted = {name: value for name, value in bound.arguments.items() if name not in self.ignore}
        registry = self.cache._flows.reader.codec.registry  # noqa: SLF001  same package
        return function_key(self.name, counted, registry, ordered=self._keywords)

    def wrapper(self) -> Any:
        if self._is_async is None:
            return self._either_wrapper()
        return self._async_wrapper() if self._is_async else self._blocking_wrapper()

    def _either_wrapper(self) -> Any:
        """Return the wrapper for a plain function that wraps a coroutine function. Calls may block or be awaited."""
        blocking, awaited = self._blocking_wrapper(), self._async_wrapper()

        @functools.wraps(self.function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._is_async is None:
                return self._call_to_decide(args, kwargs)
            return (awaited if self._is_async else blocking)(*args, **kwargs)

        def either(name: str) -> Callable[..., Any]:
            @functools.wraps(getattr(awaited, name))
            def method(*args: Any, **kwargs: Any) -> Any:
                is_async = running_loop() is not None if self._is_async is None else self._is_async
                return getattr(awaited if is_async else blocking, name)(*args, **kwargs)

            return method

        return self._finish(call, *map(either, ("invalidate", "refresh", "cache_clear", "warm")))

    def _call_to_decide(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function whose kind is unknown. Only its result tells whether the caller must get an awaitable."""
        begun = self.function(*args, **kwargs)
        self._is_async = inspect.isawaitable(begun)
        if self._is_async:
            return self.call_async(args, kwargs, begun=[begun])
        return compute(*self._where, self._wanted(args, kwargs, [begun]), look=False)

    def _async_wrapper(self) -> Any:
        @functools.wraps(self.function)
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self.call_async(args, kwargs)

        async def invalidate(*args: Any, **kwargs: Any) -> bool:
            """Remove the value for these arguments. Returns whether there was one."""
            return bool(await self.cache.aio.delete(self.key(*args, **kwargs)))

        async def refresh(*args: Any, **kwargs: Any) -> Any:
            """Compute the value for these arguments again, and return it."""
            return await self.call_async(args, kwargs, look=False)

        async def clear() -> None:
            """Invalidate all values of this function."""
            await self.cache.aio.invalidate_tags(self.tag)

        async def warm_up(
            items: Iterable[Any], *, concurrency: int = DEFAULT_CONCURRENCY, progress: OnProgress | None = None
        ) -> WarmUpStatus:
            """Compute the missing values; each item is the argument of a call, or a tuple of arguments."""
            request = self._each_wanted(items, concurrency, progress)
            return await warm_async(*self._where, *request, progress)

        return self._finish(call, invalidate, refresh, clear, warm_up)

    def _blocking_wrapper(self) -> Any:
        @functools.wraps(self.function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.call(args, kwargs)

        def invalidate(*args: Any, **kwargs: Any) -> bool:
            """Remove the value for these arguments. Returns whether there was one."""
            return self.cache.delete(self.key(*args, **kwargs))

        def refresh(*args: Any, **kwargs: Any) -> Any:
            """Compute the value for these arguments again, and return it."""
            return self.call(args, kwargs, look=False)

        def clear() -> None:
            """Invalidate all values of this function."""
            self.cache.invalidate_tags(self.tag)

        def warm_up(
            items: Iterable[Any], *, concurrency: int = DEFAULT_CONCURRENCY, progress: OnProgress | None = None
        ) -> WarmUpStatus:
            """Compute the missing values; each item is the argument of a call, or a tuple of arguments."""
            request = self._each_wanted(items, concurrency, progress)
            return warm(*self._where, *request, progress)

        return self._finish(call, invalidate, refresh, clear, warm_up)

    def _wanted(self, args: tuple[Any, ...], kwargs: dict[str, Any], begun: list[Any] | None = None) -> Wanted[Any]:
        """Return the request for one call. If the function has already been called, `begun` holds its result."""

        def function() -> Any:
            self.computed += 1
            return begun.pop() if begun else self.function(*args, **kwargs)

        self.calls += 1
        key = self.key(*args, **kwargs)
        return Wanted(key, function, self.ttl, self.tags, self.freshness, self.function, self._note_unstorable)

    def _each_wanted(
        self, items: Iterable[Any], concurrency: int, progress: OnProgress | None
    ) -> tuple[Iterator[Wanted[Any]], int | None, int]:
        items, total, concurrency = checked(items, concurrency, progress)
        each = (self._wanted(item if isinstance(item, tuple) else (item,), {}) for item in items)
        return each, total, concurrency

    def _copied(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of a local copy that stays fresh until it expires, or MISSING. Most calls take this path."""
        value = self._reader.ageless_copy(self.key(*args, **kwargs))
        self.calls += value is not MISSING
        return value

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, look: bool = True) -> Any:
        if look and self._may_be_copied:
            value = self._copied(args, kwargs)
            if value is not MISSING:
                return value
        return compute(*self._where, self._wanted(args, kwargs), look=look)

    async def call_async(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, look: bool = True, begun: list[Any] | None = None
    ) -> Any:
        """Return the value for these arguments. `_wanted` explains `begun`; it is used only if no value is cached."""
        try:
            if look and self._may_be_copied:
                value = self._copied(args, kwargs)
                if value is not MISSING:
                    return value
            return await compute_async(*self._where, self._wanted(args, kwargs, begun), look=look)
        finally:
            while begun:
                arguments.close_coroutine(begun.pop())

    def _finish(
        self,
        wrapper: Callable[..., Any],
        invalidate: Callable[..., Any],
        refresh: Callable[..., Any],
        clear: Callable[..., Any],
        warm_up: Callable[..., Any],
    ) -> Callable[..., Any]:
        def key(*args: Any, **kwargs: Any) -> str:
            """Return the key of these arguments."""
            return self.key(*args, **kwargs)

        def cache_info() -> CacheInfo:
            """Return the counters of this process for this function."""
            return CacheInfo(self.calls, self.computed, self.uncacheable)

        given: dict[str, Any] = {
            "cache": self.cache,
            "key": key,
            "invalidate": invalidate,
            "refresh": refresh,
            "warm": warm_up,
            "cache_clear": clear,
            "cache_info": cache_info,
        }
        for name, made in given.items():
            if name != "cache":  # `help` shows the names set here; "cache" is an object, not a function
                made.__name__, made.__qualname__ = name, f"{wrapper.__qualname__}.{name}"
        vars(wrapper).update(given)
        return wrapper

    def _note_unstorable(self, reason: str) -> None:
        """Count a result that cannot be stored. Only the first such result causes a warning."""
        self.uncacheable += 1
        if self.uncacheable == 1:
            warnings.warn(f"{self.name} {UNSTORABLE}: {reason}", RuntimeWarning, stacklevel=5)
