"""Hostile arguments: of every public callable, with values that lie, raise, mutate or never fit."""

import array
import collections
import contextlib
import ctypes
import decimal
import fractions
import inspect
import json
import numbers
import os
import random

import apsw
from hostile import NOW, base, lay_out

import sqlspace

__all__ = ["case"]


class OwnError(Exception):
    """What a hostile object raises; to come through is right."""


# -- values: each is made anew, by a function


def _raising(name, *bases):
    """An object of which one method raises."""

    def method(*_, **__):
        raise OwnError(name)

    return lambda: type(f"Raising{name.strip('_').title()}", bases, {name: method})(
        *(["kept"] if str in bases else [b"kept"] if bytes in bases else [])
    )


def _lying(base, *arguments, **methods):
    """An object of a class below `base`, of which some methods say something else."""
    made = {name: (lambda *_, told=told: told) for name, told in methods.items()}
    return lambda: type(f"Lying{base.__name__.title()}", (base,), made)(*arguments)


def _claiming(claimed):
    """Says that it is of a class of which it isn't."""
    return type(f"No{claimed.__name__.title()}", (), {"__class__": claimed})


def _real(told):
    def number():
        class Real:
            def __float__(self):
                if isinstance(told, Exception):
                    raise told
                return told

        numbers.Real.register(Real)
        return Real()

    return number


class Mutating(dict):
    """Holds something else each time it is read."""

    reads = 0

    def items(self):
        self.reads += 1
        return super().items() if self.reads == 1 else {"a": 1, 2: b"c"}.items()


def _growing():
    """A dict that changes when its values are asked what they are."""
    found = {}

    class Asked(str):
        __slots__ = ()

        @property
        def __class__(self):
            found[str(len(found))] = "more"
            return str

    found["a"] = Asked("b")
    found["c"] = "d"
    return found


def _half():
    yield b"one"
    raise OwnError("half way")


def _released():
    view = memoryview(b"gone")
    view.release()
    return view


def _recursive():
    found = []
    found.append(found)
    return found


def _deep():
    found = []
    for _ in range(20_000):
        found = [found]
    return found


def _self_dict():
    found = {}
    found["a"] = found
    return found


def _just(*values):
    return [lambda value=value: value for value in values]


NUMBERS = [
    *_just(True, False, 0, 1, -1, 1 << 31, 1 << 53, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63),
    *_just(1 << 64, -(1 << 63), 10**400, 10**5000, -(10**5000), 0.0, -0.0, float("nan")),
    *_just(float("inf"), -float("inf"), 1e300, 5e-324, -1e-300, 1e16, 1j, fractions.Fraction(1, 3)),
    *_just(fractions.Fraction(10**400), fractions.Fraction(-1, 10**400)),
    *_just(decimal.Decimal(1), decimal.Decimal("NaN")),
    _lying(int, -5, __lt__=False, __gt__=True, __le__=False),
    _lying(int, 5, __int__=-5, __index__=-5, __lt__=False),
    _lying(int, -5, __int__=7, __index__=7),
    _lying(int, 5, __str__="x", __repr__="y" * 10_000),
    _lying(float, 1.0, __float__=-1.0),
    _lying(float, -1.0, __lt__=False, __float__=2.0),
    _raising("__lt__", int), _raising("__int__", int), _raising("__repr__", int),
    _raising("__float__", float), _raising("__index__"), _raising("__float__"),
    _real(-1.0), _real(float("nan")), _real(2.0), _real(OwnError("no")),
]  # fmt: skip
TEXTS = [
    *_just("", "k" * 1024, "k" * 1025, "é" * 512, "é" * 512 + "k", "\0", "a\0b", "\ud800"),
    *_just("x" * (1 << 20), "\0" * (1 << 20), "\x1b[31m", "../..", "/dead", "a" * 1019 + "/dead"),
    *_just("kept/dead", "group", ":memory:", "unix", "nan", "-1"),
    _lying(str, "kept", encode=b"x", __contains__=False, __len__=0),
    _lying(str, "", __len__=5, encode=b"hello", __str__="hello"),
    _lying(str, "a\0b", __contains__=False, __repr__="fine"),
    *(_raising(name, str) for name in ("__eq__", "__hash__", "__len__", "__str__", "__repr__")),
    _raising("encode", str),
]  # fmt: skip
BYTES = [
    *_just(b"", b"x", b"x" * (1 << 20), bytearray(b"ab"), memoryview(b"abcdef")[::2]),
    *_just(memoryview(b"abcdef")[::-1], memoryview(b"abcdef").cast("B", (2, 3))),
    *_just(array.array("d", [1]), array.array("u")),
    *_just(memoryview((ctypes.c_int * 3)(1, 2, 3)), (ctypes.c_char * 4)(), array.array("u", "é")),
    _released, _lying(bytes, b"truth", __bytes__=b"lie", __len__=0),
    _raising("__len__", bytes), _raising("__iter__", bytes), _raising("__bytes__"),
]  # fmt: skip
OBJECTS = [
    *_just(object(), type, print, Ellipsis, json, [], (), {}, set(), frozenset("ab"), range(3)),
    *_just(["kept", None], ["kept", ""], [b"x", None], [b"x", "y"], ["kept", "kept"], {"kept": 1}),
    _recursive, _deep, _self_dict, _half,
    lambda: iter(["kept", 7]), lambda: {"a": _recursive()},
    _raising("__eq__", str), lambda: [_lying(str, "kept", encode=b"")()],
    *(_raising(name) for name in ("__iter__", "__len__", "__fspath__", "__bool__", "__call__",
                                  "__eq__", "__hash__", "__repr__", "__str__", "__getattr__",
                                  "__enter__", "__getitem__")),
    *(_raising(name, list) for name in ("__iter__", "__len__", "__getitem__", "__bool__")),
    _lying(list, ["kept"], __iter__=iter([1])), _lying(object, __fspath__=7),
    _lying(object, __fspath__=b"x"), _lying(object, __fspath__="a\0b"), _lying(object, __iter__=7),
    _lying(object, __call__=None), _lying(object, __call__=b"\xff"),
    *map(_claiming, (str, int, float, bool, dict, bytes, list)),
]  # fmt: skip
HEADERS = [
    *_just({"a": "b"}, {"a": 1}, {1: "a"}, {"\ud800": "a"}, {"a": "\udfff"}, {"": ""}, {"a": None}),
    *_just({}, {"a": {}}, {"a": True}, {b"a": "b"}, {"a": "b", None: "c"}),
    _growing, _self_dict, lambda: Mutating(a="b"),
    *(_raising(name, dict) for name in ("items", "__iter__", "__len__", "keys", "__bool__")),
]  # fmt: skip
POOLS = [NUMBERS, TEXTS, BYTES, OBJECTS, HEADERS]
# Where a value of some kind may well be right, and so gets further.
LIKELY = {
    "key": TEXTS, "dedupe": TEXTS, "payload": BYTES, "headers": HEADERS, "payloads": OBJECTS,
    "keys": OBJECTS, "key_or_keys": OBJECTS, "deliveries": OBJECTS, "value": OBJECTS,
    "path": TEXTS, "vfs": TEXTS,
}  # fmt: skip

GOOD = {
    "key": "plain", "payload": b"new", "payloads": [b"new"], "keys": ["plain", "none"],
    "key_or_keys": ["plain"], "ttl": 1e6, "delay": 1.0, "dedupe": "twice", "headers": {"a": "b"},
    "max_len": 10**6, "timeout": 0.0, "lease": 30.0, "max_attempts": 5, "ordered": True, "limit": 2,
    "seq": 3, "deliveries": (), "value": {"a": 1}, "default": None, "dumps": lambda value: b"1",
    "loads": lambda payload: payload, "sync": False, "history": 5, "embed": False, "mode": 0o600,
    "busy_timeout": 1.0, "allow_network": False, "vfs": None, "request": 1,
    "handler": lambda request: request, "path": "other.db",
}  # fmt: skip
TAKING = ("pull", "in_", "inp", "claim", "consume", "put", "clear", "remove", "requeue", "ack")


def _callables(store, connection):
    """All of them, by name."""
    space, local = store.space(), sqlspace.Local()
    for key in ("plain", "none"):
        local.out(key, 1)
    delivery = store.claimp("plain")
    found = {
        "open": sqlspace.open,
        "Context": sqlspace.Context,
        "push_on": lambda key, payload, *, ttl=None, delay=None, dedupe=None, headers=None: (
            sqlspace.push_on(
                *(connection, key, payload), ttl=ttl, delay=delay, dedupe=dedupe, headers=headers
            )
        ),
        "call": lambda key, request, timeout, *, context=None: sqlspace.call(
            local, key, request, timeout, context=context
        ),
        "serve": lambda key, handler, *, context=None: sqlspace.serve(
            local, key, handler, context=context
        ),
        "store.space": store.space,
        "delivery.nack": delivery.nack,
        "delivery.extend": delivery.extend,
    }
    for name, subject in (("store", store), ("local", local), ("space", space)):
        for verb, method in inspect.getmembers(subject, inspect.ismethod):
            if not verb.startswith("_") and verb not in ("close", "transaction"):
                found[f"{name}.{verb}"] = method
    for verb, method in inspect.getmembers(sqlspace.Transaction, inspect.isfunction):
        if not verb.startswith("_"):
            found[f"transaction.{verb}"] = _in_transaction(store, method)
    return found, delivery


def _in_transaction(store, method):
    def call(*arguments, **named):
        with store.transaction() as together:
            return method(together, *arguments, **named)

    call.__signature__ = inspect.signature(method.__get__(store))
    return call


def _arguments(rng, function, wanted, delivery, note):
    """For a call: what is hostile, and all of it."""
    parameters = inspect.signature(function).parameters
    names = [name for name in parameters if name not in ("context", "delivery")]
    wrong = dict.fromkeys([wanted, *rng.choice([[], [], [rng.choice(names)]])])
    if "context" in parameters and rng.random() < 0.1:
        wrong["context"] = None
    hostile, told = {}, {}
    for name, parameter in parameters.items():
        if name in wrong:
            pool = LIKELY.get(name, NUMBERS) if rng.random() < 0.5 else rng.choice(POOLS)
            number = rng.randrange(len(pool))
            hostile[name] = told[name] = pool[number]()
            note(f"{name} is value {number} of pool {POOLS.index(pool)}, a {type(told[name])}")
        elif name == "context":
            told[name] = sqlspace.Context(0.01)
        elif name == "delivery":
            told[name] = delivery
        elif parameter.default is parameter.empty or rng.random() < 0.2:
            told[name] = GOOD[name]
    if "max_len" in parameters and "context" in told:
        told.setdefault("max_len", GOOD["max_len"])
    if "context" in wrong and "timeout" in parameters:
        told["timeout"] = 0
    return hostile, told


def _rows(database):
    return database.execute("SELECT * FROM sqlspace_entries NOT INDEXED ORDER BY seq").fetchall()


def case(number, directory, note):
    """Call something with something hostile."""
    rng = random.Random(f"arguments {number}")
    path = os.path.join(directory, "queue.db")
    lay_out(base("plain"), path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink("other.db")
    own = apsw.Connection(path)
    try:
        with sqlspace.open(path, sync=False) as store:
            _try(rng, store, own, note)
            assert store.push("plain", b"still") and store.len("plain")
    finally:
        own.close()


def _try(rng, store, own, note):
    found, delivery = _callables(store, own)
    takers = collections.defaultdict(list)  # by argument, so that the rare ones have their share
    for name, function in found.items():
        for argument in inspect.signature(function).parameters:
            takers[argument].append(name)
    wanted = rng.choice([name for name in takers if name not in ("context", "delivery")])
    name = rng.choice(takers[wanted])
    note(name)
    function = found[name]
    hostile, told = _arguments(rng, function, wanted, delivery, note)
    before = _rows(own)
    expected = None
    with contextlib.suppress(Exception):
        expected = bytes(memoryview(told.get("payload", b"new")).tobytes())
    try:
        result = _call(function, told)
        note(f"returned a {type(result)}")
    except (TypeError, ValueError) as error:
        note(ascii(error)[:300])
        assert _rows(own) == before, "refused, and yet the store has changed"
        if not {"value", "request"} & set(hostile):  # the codec's own errors
            words = str(error)
            named = any(argument in words for argument in hostile)
            assert named or _lies(hostile), "which argument it is, isn't said"
            assert len(words) < 1000, "a flood"
        return
    except OwnError:
        assert _rows(own) == before, "it raised, and yet the store has changed"
        return
    except sqlspace.SpaceError as error:
        note(ascii(error)[:300])
        return
    after = {row[0]: row for row in _rows(own)}
    for row in {*after.values()} - {*before}:
        assert len(row[1].encode()) <= 1024 and "\0" not in row[1], "no key"
    if not any(verb in name for verb in TAKING):
        gone = collections.Counter(row[2] for row in before if row[4] < 3 and row[7] is None)
        gone.subtract(row[2] for row in after.values())
        assert not +gone, "an entry is gone"
    if name.rpartition(".")[2] in ("push", "put", "push_on") and name[:5] != "local":
        assert type(result) is int
        row = after[result]
        dedupe = told.get("dedupe")
        if row not in before:
            assert row[2] == expected, "another payload"
            assert row[1] == str.__str__(told["key"])
            assert dedupe is None or dedupe.__class__ is str or row[14] is not None
            _ensure_text(row[3])
            for at in (row[6], row[8]):
                assert at is None or at > NOW


def _ensure_text(headers):
    """They are what they must be: an object of strings."""
    for pair in json.loads(headers or "{}").items():
        assert all(type(text) is str for text in pair), "headers of wrong types"


def _lies(hostile):
    """Whether one says of its own class, or that it can be iterated, what isn't so."""
    for value in hostile.values():
        with contextlib.suppress(OwnError):
            if value.__class__ is not type(value):
                return True
            try:
                iter(value)
            except TypeError:
                if hasattr(type(value), "__iter__"):
                    return True
    return False


def _call(function, told):
    """With what its signature has by position, so; iterators are begun."""
    parameters = inspect.signature(function).parameters
    positional = [
        told.pop(name) for name, parameter in parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name in told
        and parameter.default is parameter.empty
    ]  # fmt: skip
    keyword = dict(told)
    told.update(zip(parameters, positional, strict=False))
    result = function(*positional, **keyword)
    if inspect.isgenerator(result):
        next(result, None)
    if isinstance(result, sqlspace.Store):
        result.close()
    return result
