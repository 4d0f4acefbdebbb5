"""Every call in a source has its own name. The name says where the result goes. It does not depend on line numbers."""

from __future__ import annotations

import pytest

from agentperf_redis.call_sites import call_sites


def names(source: str, *usual: str) -> list[str]:
    """Return the names of the calls of `new`, in the order of the source."""
    sites = call_sites(source, usual or ("new", "Sub"))
    return [sites[end].name for end in sorted(sites) if sites[end].callee.rpartition(".")[2] in ("new", "Sub")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("users = new()", ["users"]),
        ("users: Cache = library.new()", ["users"]),
        ("users = orders = new()", ["users"]),
        ("users, orders = new(), new()", ["users", "orders"]),
        ("(users, *others) = new(), new()", ["users-1of2", "users-2of2"]),
        ("[users, orders] = make(new())", ["users"]),
        ("users = given or new()", ["users"]),
        ("users = given if given else new()", ["users"]),
        ("if (users := new()): pass", ["users"]),
        ("users = service(new())", ["users"]),
        ("app = service(users=new(), orders=new())", ["app.users", "app.orders"]),
        ("app = service(new(), new())", ["app-1of2", "app-2of2"]),
        ("caches = {'users': new(), 'orders': new()}", ["caches.users", "caches.orders"]),
        ("caches = {1: new(), 'two words': new()}", ["caches-1of2", "caches-2of2"]),
        ("caches['users'] = new()", ["caches.users"]),
        ("caches[name] = new()", ["caches"]),
        ("f.users = new()", ["f.users"]),
        ("f().users = new()", ["users"]),
        ("register(new())", ["new()"]),
        ("register(users=new())", ["register().users"]),
        ("f()[0].register(users=new())", ["f()[0].register().users"]),
        ("def f(): register(users=new())", ["f.register().users"]),
        ("f()['users-register'] = new()", ["new()"]),
        ("new(); new()", ["new()-1of2", "new()-2of2"]),
        ("with new() as users: pass", ["users"]),
        ("users = field(default_factory=lambda: new())", ["users"]),
        ("users = [new() for _ in range(3)]", ["users"]),
        ("users = dict((k, new()) for k in names)", ["users"]),
        ("users = {k: new() for k in names if k}", ["users"]),
        ("@cached(new())\ndef f(): pass", ["f"]),
        ("def f(users=new(), *, orders=new()): pass", ["f-1of2", "f-2of2"]),
        ("class A(base(new())): pass", ["A"]),
        ("class A:\n    users = new()", ["A.users"]),
        ("class A:\n    class B:\n        users = new()", ["A.B.users"]),
        ("class A:\n    def __init__(self): self.users = new()", ["A.users"]),
        ("class A:\n    def __init__(self): users = new()", ["A.__init__.users"]),
        ("class A:\n    def f(me): me.users, me.orders = new(), new()", ["A.users", "A.orders"]),
        ("class A:\n    def f(self): other.users = new()", ["A.f.other.users"]),
        ("class A:\n    users = new()\n    def f(self): self.users = new()", ["A.users-1of2", "A.users-2of2"]),
        ("def f(): return new()", ["f"]),
        ("def f():\n    def g(): return new()\n    return g", ["f.g"]),
        ("async def f(): yield new()", ["f"]),
        ("def f():\n    users = new()", ["f.users"]),
        ("def f(self): self.users = new()", ["f.self.users"]),
        ("def f():\n    global users\n    users = new()\nusers = new()", ["f.users", "users"]),
        ("try: users = new()\nfinally: users = new()", ["users-1of2", "users-2of2"]),
        ("match x:\n    case 1: users = new()", ["users"]),
        ("users = Sub()", ["users"]),
    ],
)
def test_calls_are_named_after_their_targets(source: str, expected: list[str]) -> None:
    assert names(source) == expected


def test_unusual_functions_are_part_of_the_name() -> None:
    assert names("users = both(new(), Sub())", "new") == ["users", "users-Sub"]


@pytest.mark.parametrize(
    ("callee", "text"),
    [
        ("make", "make"),
        ("self.make", "self.make"),
        ("self.f(1).make", "self.f().make"),
        ("makers['users']", "makers['users']"),
        ("makers[0].make", "makers[0].make"),
        ("makers[key]", "makers[]"),
        ("(f or g)", "()"),
    ],
)
def test_names_contain_the_text_of_unusual_functions(callee: str, text: str) -> None:
    (last,) = [
        site for end, site in call_sites(f"users = {callee}()", ()).items() if end[1] == len(f"users = {callee}()")
    ]
    assert last.name == f"users-{text}"


@pytest.mark.parametrize(
    "line", ["make(1)", "make(1); make(2)", "register(make(1))", "make = make(1)", "users = users()", "new.users()"]
)
def test_other_calls_do_not_number_the_call_of_a_constructor(line: str) -> None:
    source = "def make(n): return new()\nusers = new()\n"
    assert names(f"{source}{line}") == names(source) == ["make", "users"]


def test_names_do_not_depend_on_other_lines() -> None:
    source = "users = new()\ndef f():\n    return new()\n"
    assert names(f"import os\n\nprint(os.name)\n{source}orders = new()") == [*names(source), "orders"]


def test_another_call_of_a_target_renames_the_first_one() -> None:
    one, two = names("register(new())"), names("register(new())\nregister(new())")
    assert not set(one) & set(two), "the new call must not get the entries of the other"


def test_calls_have_different_names() -> None:
    source = "f(g(), h(g(), [g() for _ in f(g())]), k=g(), g=lambda: g())(g)\nf = g(f())\nclass g:\n    f = g()\n"
    sites = call_sites(source, ("f", "g"))
    assert len(sites) == 13
    assert len({site.name for site in sites.values()}) == len(sites)


@pytest.mark.parametrize(
    ("source", "repeats"),
    [
        ("new()", False),
        ("for x in new(): pass", False),
        ("for x in y: new()", True),
        ("while new(): pass", True),
        ("while x: new()", True),
        ("[new() for x in y]", True),
        ("[x for x in new()]", False),
        ("[x for x in y for z in new()]", True),
        ("for x in y:\n    def f(): return new()", False),
        ("for x in y: f(lambda: new())", False),
    ],
)
def test_loops_are_noticed(source: str, repeats: bool) -> None:
    (site,) = (site for site in call_sites(source, ()).values() if site.callee == "new")
    assert site.repeats is repeats


def test_scope_is_the_code_that_performs_the_call() -> None:
    source = (
        "a()\n\n@b()\ndef f():\n    c()\n    [d() for _ in ()]\n    list(e() for _ in ())\n    return lambda: g()\n"
    )
    scopes = {site.callee: (site.scope, site.scope_line) for site in call_sites(source, ()).values()}
    assert scopes == {
        "a": ("<module>", 1),
        "b": ("<module>", 1),
        "c": ("f", 3),
        "d": ("f", 3),
        "e": ("<genexpr>", 7),
        "list": ("f", 3),
        "g": ("<lambda>", 8),
    }


def test_columns_count_bytes() -> None:
    assert list(call_sites("größe = new()", ())) == [(1, len("größe = new()".encode()))]
