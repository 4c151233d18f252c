"""Misuse: what a caller gets wrong is a TypeError or a ValueError before anything is touched."""

import array
import fractions
import inspect
import math
import os
import pickle

import apsw
import pytest

import sqlspace
from sqlspace import arguments, schema

HUGE = 10**400  # beyond float
GIANT = 10**5000  # beyond what Python writes in digits
CUT = "…"  # how a message ends a value that is too long to be shown


def released():
    view = memoryview(b"gone")
    view.release()
    return view


class Name(str):
    """A str that lies about itself."""

    __slots__ = ()

    def encode(self, *_):
        return b"x"

    def __contains__(self, _):
        return False


class Loud:
    """An iterator that fails in the middle."""

    def __iter__(self):
        yield b"one"
        raise LookupError("the caller's own")


class BytesPath:
    def __fspath__(self):
        return b"/tmp/queue.db"


# What is wrong, the error, and what its message must hold beside the argument's name.
NO_STR = [
    (None, TypeError, "NoneType"),
    (7, TypeError, "int"),
    (True, TypeError, "bool"),
    (1.5, TypeError, "float"),
    (b"key", TypeError, "bytes"),
    (bytearray(b"key"), TypeError, "bytearray"),
    (["key"], TypeError, "list"),
    (("key",), TypeError, "tuple"),
]
KEY = [
    *NO_STR,
    ("", ValueError, "empty"),
    ("a\0b", ValueError, "NUL character: 'a\\x00b'"),
    ("\0", ValueError, "NUL"),
    ("\ud800", ValueError, "lone surrogate: '\\ud800'"),
    ("a\udcff" * 999, ValueError, CUT),
    ("k" * 1025, ValueError, "at most 1,024 bytes in UTF-8, not 1,025"),
    ("é" * 513, ValueError, "not 1,026"),
    ("☂" * 342, ValueError, "not 1,026"),
    ("𝄞" * 257, ValueError, "not 1,028"),
    ("k" * 5_000_000, ValueError, "not 5,000,000"),
    (Name("a\0b"), ValueError, "NUL"),
    (Name("k" * 1025), ValueError, "not 1,025"),
    (Name(""), ValueError, "empty"),
]
KEYS = [
    (None, TypeError, "NoneType"),
    (7, TypeError, "int"),
    ("mail", TypeError, "str"),
    (b"mail", TypeError, "bytes"),
    (bytearray(b"m"), TypeError, "keys[0] must be str, not int"),
    ([], ValueError, "at least one"),
    (iter(()), ValueError, "at least one"),
    *[
        (["kept", wrong], error, f"keys[1] {words}")
        for wrong, error, words in [
            (None, TypeError, "must be str, not NoneType"),
            (b"k", TypeError, "must be str, not bytes"),
            ("", ValueError, "must not be the empty str"),
            ("\0", ValueError, "must not hold a NUL"),
            ("\ud800", ValueError, "holds a lone surrogate"),
            ("k" * 1025, ValueError, "must be at most 1,024"),
            (["kept"], TypeError, "must be str, not list"),
        ]
    ],
]
PAYLOAD = [
    (None, TypeError, "NoneType"),
    ("text", TypeError, "str"),
    (7, TypeError, "int"),
    (True, TypeError, "bool"),
    (1.5, TypeError, "float"),
    ([1, 2], TypeError, "list"),
    ([b"x"], TypeError, "list"),
    (object(), TypeError, "object"),
    (released(), ValueError, "memoryview"),
]
PAYLOADS = [
    (None, TypeError, "NoneType"),
    (7, TypeError, "int"),
    ("text", TypeError, "str"),
    (b"bytes", TypeError, "bytes"),
    (bytearray(b"bytes"), TypeError, "bytearray"),
    (memoryview(b"bytes"), TypeError, "memoryview"),
    *[
        ([b"good", wrong], error, f"payloads[1] {words}")
        for wrong, error, words in [
            (None, TypeError, "must be bytes-like, not NoneType"),
            ("text", TypeError, "must be bytes-like, not str"),
            (7, TypeError, "must be bytes-like, not int"),
            (released(), ValueError, "can't be read, a memoryview"),
        ]
    ],
    (array.array("i", [1]), TypeError, "payloads[0] must be bytes-like, not int"),
]
HEADERS = [
    ("a=b", TypeError, "str"),
    (b"a", TypeError, "bytes"),
    ([("a", "b")], TypeError, "list"),
    (7, TypeError, "int"),
    ({1: "b"}, TypeError, "int"),
    ({b"a": "b"}, TypeError, "bytes"),
    ({None: "b"}, TypeError, "NoneType"),
    ({"a": 1}, TypeError, "headers['a'] must be str, not int"),
    ({"a": b"b"}, TypeError, "headers['a'] must be str, not bytes"),
    ({"a": None}, TypeError, "headers['a'] must be str, not NoneType"),
    ({"a": ["b"]}, TypeError, "list"),
    ({"a" * 9999: 1}, TypeError, CUT),
    ({"a": "\ud800"}, ValueError, "lone surrogate"),
    ({"\udfff": "b"}, ValueError, "lone surrogate"),
]
SECONDS = [
    ("1", TypeError, "str"),
    (b"1", TypeError, "bytes"),
    (True, TypeError, "bool"),
    (False, TypeError, "bool"),
    ([1], TypeError, "list"),
    (1j, TypeError, "complex"),
    (math.nan, ValueError, "nan"),
    (-math.nan, ValueError, "nan"),
    (-1, ValueError, "-1"),
    (-0.001, ValueError, "-0.001"),
    (-5e-324, ValueError, "-5e-324"),
    (-math.inf, ValueError, "-inf"),
    (-HUGE, ValueError, CUT),
    (-GIANT, ValueError, "int of more digits than can be shown"),
    (fractions.Fraction(-1, 3), ValueError, "Fraction(-1, 3)"),
]
CONTEXT = [
    (1, TypeError, "int"),
    (0.5, TypeError, "float"),
    ("ctx", TypeError, "str"),
    (True, TypeError, "bool"),
    (sqlspace.Context, TypeError, "type"),
]
NO_INT = [
    ("1", TypeError, "str"),
    (b"1", TypeError, "bytes"),
    (1.0, TypeError, "float"),
    (math.inf, TypeError, "float"),
    (True, TypeError, "bool"),
    ([1], TypeError, "list"),
]
AT_LEAST_1 = [
    *NO_INT,
    (None, TypeError, "NoneType"),
    (0, ValueError, "at least 1, not 0"),
    (-1, ValueError, "at least 1, not -1"),
    (-HUGE, ValueError, CUT),
    (-GIANT, ValueError, "int of more digits than can be shown"),
]
PATH = [
    (None, TypeError, "NoneType"),
    (7, TypeError, "int"),
    (True, TypeError, "bool"),
    (b"/tmp/queue.db", TypeError, "bytes"),
    (["queue.db"], TypeError, "list"),
    (BytesPath(), TypeError, "bytes"),
    ("", ValueError, "''"),
    (":memory:", ValueError, "sqlspace.Local"),
    ("a\0b", ValueError, "NUL"),
    ("\ud800", ValueError, "lone surrogate"),
]
BOOL = [
    (None, TypeError, "NoneType"),
    (1, TypeError, "int"),
    (0, TypeError, "int"),
    (b"", TypeError, "bytes"),
    ([], TypeError, "list"),
]

TTL = [*SECONDS, (0, ValueError, "more than 0"), (0.0, ValueError, "more than 0")]
DELAY = [*SECONDS, (math.inf, ValueError, "finite"), (HUGE, ValueError, "finite")]
LEASE = [
    *SECONDS,
    (None, TypeError, "NoneType"),
    (0, ValueError, "more than 0 seconds and finite, not 0"),
    (math.inf, ValueError, "finite, not inf"),
    (HUGE, ValueError, CUT),
]
AT_LEAST_1_OR_NONE = [wrong for wrong in AT_LEAST_1 if wrong[0] is not None]
DEDUPE = [wrong for wrong in KEY if wrong[0] is not None]
# One str is one key; all else is several.
KEY_OR_KEYS = [
    *[wrong for wrong in KEY if isinstance(wrong[0], str)],
    *[wrong for wrong in KEYS if not isinstance(wrong[0], str)],
]
DELIVERIES = [
    (None, TypeError, "NoneType"),
    (7, TypeError, "int"),
    ("text", TypeError, "deliveries[0] must be a sqlspace.Delivery, not str"),
    (b"x", TypeError, "deliveries[0] must be a sqlspace.Delivery, not int"),
    ([None], TypeError, "deliveries[0] must be a sqlspace.Delivery, not NoneType"),
    ([1], TypeError, "not int"),
]
CALLABLE = [
    (None, TypeError, "must be callable, not NoneType"),
    ("json", TypeError, "not str"),
    (7, TypeError, "not int"),
]

# (verb, argument) -> how to call it with the wrong value, and the wrong values.
VERBS = {
    ("push", "key"): (lambda store, wrong: store.push(wrong, b"x"), KEY),
    ("push", "payload"): (lambda store, wrong: store.push("kept", wrong), PAYLOAD),
    ("push", "headers"): (lambda store, wrong: store.push("kept", b"x", headers=wrong), HEADERS),
    **{
        ("push", argument): (
            lambda store, wrong, argument=argument, others=others: store.push(
                "kept", b"x", **{argument: wrong}, **others
            ),
            table,
        )
        for argument, table, others in [
            ("ttl", TTL, {}),
            ("delay", DELAY, {}),
            ("dedupe", DEDUPE, {}),
            ("max_len", AT_LEAST_1_OR_NONE, {}),
            ("timeout", SECONDS, {"max_len": 9}),
            ("context", CONTEXT, {"max_len": 9}),
        ]
    },
    ("push_many", "ttl"): (lambda store, wrong: store.push_many("kept", [b"x"], ttl=wrong), TTL),
    ("push_many", "delay"): (
        lambda store, wrong: store.push_many("kept", [b"x"], delay=wrong),
        DELAY,
    ),
    ("put", "ttl"): (lambda store, wrong: store.put("kept", b"x", ttl=wrong), TTL),
    **{
        (verb, argument): (
            lambda store, wrong, verb=verb, argument=argument, more=more: getattr(store, verb)(
                "kept", *more, **{argument: wrong}
            ),
            table,
        )
        for verb, more in [("claim", ()), ("claimp", ()), ("claim_many", (1,)), ("consume", ())]
        for argument, table in [
            ("lease", LEASE),
            ("max_attempts", AT_LEAST_1_OR_NONE),
            ("ordered", BOOL),
        ]
        if (verb, argument) != ("claim_many", "ordered")
    },
    **{
        (verb, "key_or_keys"): (
            lambda store, wrong, verb=verb, more=more: getattr(store, verb)(wrong, *more),
            KEY_OR_KEYS,
        )
        for verb, more in [("claim", (0,)), ("claimp", ()), ("claim_many", (1,)), ("consume", ())]
    },
    ("claim", "timeout"): (lambda store, wrong: store.claim("kept", wrong), SECONDS),
    ("claim", "context"): (lambda store, wrong: store.claim("kept", 0, context=wrong), CONTEXT),
    ("claim_many", "limit"): (lambda store, wrong: store.claim_many("kept", wrong), AT_LEAST_1),
    ("consume", "context"): (lambda store, wrong: store.consume("kept", context=wrong), CONTEXT),
    ("ack_many", "deliveries"): (lambda store, wrong: store.ack_many(wrong), DELIVERIES),
    ("requeue", "key"): (lambda store, wrong: store.requeue(wrong), KEY),
    ("space", "dumps"): (lambda store, wrong: store.space(dumps=wrong), CALLABLE),
    ("space", "loads"): (lambda store, wrong: store.space(loads=wrong), CALLABLE),
    ("push_many", "key"): (lambda store, wrong: store.push_many(wrong, [b"x"]), KEY),
    ("push_many", "payloads"): (lambda store, wrong: store.push_many("kept", wrong), PAYLOADS),
    ("pull", "key"): (lambda store, wrong: store.pull(wrong, 0), KEY),
    ("pull", "timeout"): (lambda store, wrong: store.pull("kept", wrong), SECONDS),
    ("pull", "context"): (lambda store, wrong: store.pull("kept", 0, context=wrong), CONTEXT),
    ("pullp", "key"): (lambda store, wrong: store.pullp(wrong), KEY),
    ("pull_many", "key"): (lambda store, wrong: store.pull_many(wrong, 1), KEY),
    ("pull_many", "limit"): (lambda store, wrong: store.pull_many("kept", wrong), AT_LEAST_1),
    ("pull_any", "keys"): (lambda store, wrong: store.pull_any(wrong, 0), KEYS),
    ("pull_any", "timeout"): (lambda store, wrong: store.pull_any(["kept"], wrong), SECONDS),
    ("pull_any", "context"): (
        lambda store, wrong: store.pull_any(["kept"], 0, context=wrong),
        CONTEXT,
    ),
    ("peek", "key"): (lambda store, wrong: store.peek(wrong), KEY),
    ("len", "key"): (lambda store, wrong: store.len(wrong), KEY),
    ("wait", "key"): (lambda store, wrong: store.wait(wrong, 0), KEY),
    ("wait", "timeout"): (lambda store, wrong: store.wait("kept", wrong), SECONDS),
    ("wait", "context"): (lambda store, wrong: store.wait("kept", 0, context=wrong), CONTEXT),
    ("wait_empty", "key"): (lambda store, wrong: store.wait_empty(wrong, 0), KEY),
    ("wait_empty", "timeout"): (lambda store, wrong: store.wait_empty("none", wrong), SECONDS),
    ("wait_empty", "context"): (
        lambda store, wrong: store.wait_empty("none", 0, context=wrong),
        CONTEXT,
    ),
    ("put", "key"): (lambda store, wrong: store.put(wrong, b"x"), KEY),
    ("put", "payload"): (lambda store, wrong: store.put("kept", wrong), PAYLOAD),
    ("clear", "key"): (lambda store, wrong: store.clear(wrong), KEY),
    ("get", "key"): (lambda store, wrong: store.get(wrong, 1), KEY),
    ("get", "seq"): (lambda store, wrong: store.get("kept", wrong), AT_LEAST_1),
    ("remove", "key"): (lambda store, wrong: store.remove(wrong, 1), KEY),
    ("remove", "seq"): (lambda store, wrong: store.remove("kept", wrong), AT_LEAST_1),
    ("entries", "key"): (lambda store, wrong: store.entries(wrong), KEY),
    ("history", "key"): (lambda store, wrong: store.history(wrong), KEY),
    ("backup", "path"): (lambda store, wrong: store.backup(wrong), PATH),
}
OPEN = {
    "path": PATH,
    "sync": BOOL,
    "embed": BOOL,
    "allow_network": BOOL,
    "history": [
        *NO_INT,
        (-1, ValueError, "at least 0, not -1"),
        (-HUGE, ValueError, CUT),
        (-GIANT, ValueError, "more digits"),
    ],
    "mode": [
        *NO_INT,
        (None, TypeError, "NoneType"),
        (-1, ValueError, "at least 0, not -1"),
        (-GIANT, ValueError, "more digits"),
        (0, ValueError, "0o0"),
        (0o400, ValueError, "0o400"),
        (0o200, ValueError, "0o200"),
        (0o177, ValueError, "0o177"),
        (0o1600, ValueError, "0o1600"),
        (0o100600, ValueError, "0o100600"),
        (HUGE, ValueError, "0o"),
    ],
    "busy_timeout": [*SECONDS, (None, TypeError, "None")],
    "vfs": [
        (7, TypeError, "int"),
        (b"unix", TypeError, "bytes"),
        (True, TypeError, "bool"),
        (["unix"], TypeError, "list"),
        ("", ValueError, "''"),
        ("nowhere", ValueError, "'nowhere'"),
        ("\0", ValueError, "'\\x00'"),
        ("\ud800", ValueError, "'\\ud800'"),
    ],
}
WITHOUT_ARGUMENTS = {"keys", "stats", "compact", "close", "transaction"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A store with entries and a tombstone, which no wrong call may change."""
    with sqlspace.open(tmp_path_factory.mktemp("kept") / "queue.db") as store:
        store.push_many("kept", [b"gone", b"one", b"two"])
        store.push("kept", b"three", headers={"a": "b"})
        store.pull("kept")
        yield store


def picture(store):
    """All that the store holds, and its files as the system sees them (never opened here)."""
    files, keys = {}, store.keys()
    for name in sorted(os.listdir(os.path.dirname(store.path))):
        found = os.stat(os.path.join(os.path.dirname(store.path), name))
        files[name] = found.st_size, found.st_mtime_ns
    return (
        files,
        {key: (store.len(key), list(store.entries(key))) for key in keys},
        list(store.history("kept")),
    )


def names(wrong):
    """A short name of a wrong value, for the test's own."""
    return f"{type(wrong).__name__} {arguments.shown(wrong)[:30]}"


@pytest.mark.parametrize(("verb", "argument"), VERBS)
def test_a_wrong_argument_of_a_verb_is_refused_by_its_name_and_nothing_is_touched(
    kept, verb, argument
):
    """TypeError for the kind, ValueError for the value; each says which argument it was."""
    call, table = VERBS[verb, argument]
    before = picture(kept)
    for wrong, error, words in table:
        with pytest.raises(error) as caught:
            call(kept, wrong)
        assert type(caught.value) is error, names(wrong)
        message = str(caught.value)
        assert message.startswith(argument), (names(wrong), message)
        assert words in message, (names(wrong), message)
        assert len(message) < 400
        assert message.isprintable()
    assert picture(kept) == before


@pytest.mark.parametrize("argument", OPEN)
def test_a_wrong_argument_of_open_is_refused_by_its_name_and_no_file_is_made(tmp_path, argument):
    """The same law, before there is anything to touch."""
    for wrong, error, words in OPEN[argument]:
        options = {"path": tmp_path / "queue.db", argument: wrong}
        with pytest.raises(error) as caught:
            sqlspace.open(options.pop("path"), **options)
        assert type(caught.value) is error, names(wrong)
        message = str(caught.value)
        assert message.startswith(argument), (names(wrong), message)
        assert words in message, (names(wrong), message)
        assert message.isprintable()
    assert list(tmp_path.iterdir()) == []


def test_every_argument_of_every_verb_stands_in_the_table():
    """A new verb or argument comes with what can be wrong about it: add it to VERBS or OPEN."""
    public = {
        name: inspect.signature(member).parameters
        for name, member in vars(sqlspace.Store).items()
        if not name.startswith("_") and callable(member)
    }
    arguments_of = {
        (verb, argument)
        for verb, parameters in public.items()
        for argument in parameters
        if argument != "self"
    }
    assert arguments_of == set(VERBS)
    assert {verb for verb, _ in VERBS} | WITHOUT_ARGUMENTS == set(public)
    assert set(inspect.signature(sqlspace.open).parameters) == set(OPEN)


@pytest.mark.parametrize(("wrong", "error", "words"), SECONDS, ids=names)
def test_a_context_refuses_a_wrong_timeout(wrong, error, words):
    """As every wait does."""
    with pytest.raises(error) as caught:
        sqlspace.Context(wrong)
    assert type(caught.value) is error
    assert str(caught.value).startswith("timeout")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "for_ever", [None, math.inf, HUGE, GIANT, fractions.Fraction(HUGE)], ids=names
)
def test_a_timeout_beyond_every_clock_waits_for_ever(kept, for_ever):
    """Infinity, and any number that is too large to count: there is no deadline."""
    assert sqlspace.Context(for_ever).deadline is None
    kept.wait("kept", for_ever)
    kept.wait_empty("none", for_ever)


@pytest.mark.parametrize("none", [0, 0.0, -0.0, fractions.Fraction(0), 5e-324])
def test_a_timeout_of_nothing_looks_exactly_once(kept, none):
    """It finds what is there, and raises DeadlineError if nothing is."""
    kept.wait("kept", none)
    with pytest.raises(sqlspace.DeadlineError):
        kept.wait("none", none)
    with pytest.raises(sqlspace.DeadlineError):
        kept.wait_empty("kept", none)


# -- what is just right


@pytest.mark.parametrize(
    "key",
    [
        "k",
        "k" * 1024,
        "é" * 512,
        "☂" * 341 + "k",
        "𝄞" * 256,
        " ",
        "\n",
        "'",
        "%",
        "\x7f",
        "\ufffe",
        "\u0301",
        "\ufeff",
        "KEPT",
        "kept ",
        "a/dead",
    ],
    ids=ascii,
)
def test_a_key_of_any_characters_up_to_the_limit_is_taken_as_it_is(kept, key):
    """1 to 1,024 bytes in UTF-8; no case is folded, nothing is stripped or normalised."""
    kept.push(key, key.encode())
    assert key in set(kept.keys())
    assert kept.len(key) == 1
    assert [entry.key for entry in kept.entries(key)] == [key]
    assert kept.pullp(key) == key.encode()
    assert [stone.key for stone in kept.history(key)] == [key]


def test_a_str_subclass_is_taken_for_its_characters(kept):
    """Its own methods aren't asked: it might answer anything."""
    assert type(arguments.check_key(Name("kept"))) is str
    kept.push(Name("named"), b"x")
    assert kept.pullp("named") == b"x"
    found = [entry.key for entry in kept.entries(Name("kept"))]
    assert set(map(type, found)) == {str}


class Liar(bytes):
    """Bytes that convert to other bytes."""

    def __bytes__(self):
        return b"a lie"


@pytest.mark.parametrize(
    ("payload", "content"),
    [
        (b"", b""),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"abcdef")[::2], b"ace"),
        (memoryview(b"abcdef")[::-1], b"fedcba"),
        (memoryview(b"abcdef").cast("B", (2, 3)), b"abcdef"),
        (memoryview(array.array("H", [1, 2])), array.array("H", [1, 2]).tobytes()),
        (array.array("d", [0.5]), array.array("d", [0.5]).tobytes()),
        (Liar(b"the truth"), b"the truth"),
        (pickle.PickleBuffer(b"ab"), b"ab"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_bytes_like_is_pushed_as_its_bytes(kept, payload, content):
    """Contiguous or not, of any item size; a subclass is taken for its content."""
    for push in (
        lambda: kept.push("bytes", payload),
        lambda: kept.push_many("bytes", [payload]),
        lambda: kept.put("bytes", payload),
    ):
        push()
        taken = kept.pullp("bytes")
        assert type(taken) is bytes
        assert taken == content


def test_a_payload_is_copied_at_the_call(kept):
    """What the caller does with its buffer afterwards changes nothing, and it isn't kept locked."""
    buffer = bytearray(b"before")
    kept.push("copied", buffer)
    buffer[:] = b"after, and longer"
    assert kept.pullp("copied") == b"before"


def test_headers_of_any_text_come_back_as_they_were(kept):
    """Empty names and values, quotes, NUL, and what JSON escapes."""
    headers = {"": "", "a\0b": '"\\', "☂": "\u2028\x7f", "k" * 2000: "v" * 2000}
    seq = kept.push("headed", b"x", headers=headers)
    assert kept.get("headed", seq).headers == headers
    seq = kept.push("headed", b"x", headers={})
    assert kept.get("headed", seq).headers == {}
    kept.clear("headed")


def test_what_the_callers_own_iterator_raises_comes_through_and_nothing_is_pushed(kept):
    """All payloads are read and checked before the first is added."""
    before = picture(kept)
    with pytest.raises(LookupError, match="the caller's own"):
        kept.push_many("kept", Loud())
    assert picture(kept) == before


@pytest.mark.parametrize("seq", [1 << 62, 1 << 63, 1 << 64, HUGE, GIANT], ids=names)
def test_a_seq_that_can_never_be_is_just_not_there(kept, seq):
    """No OverflowError out of SQLite's 64 bits."""
    assert kept.get("kept", seq) is None
    assert kept.remove("kept", seq) is False


@pytest.mark.parametrize("limit", [1 << 62, 1 << 63, HUGE, GIANT], ids=names)
def test_a_limit_of_any_size_takes_all(kept, limit):
    """`pull_many` takes up to `limit`."""
    kept.push_many("limit", [b"a", b"b"])
    assert kept.pull_many("limit", limit) == [b"a", b"b"]


@pytest.mark.parametrize("history", [0, 1, 1 << 53, 1 << 63, HUGE, GIANT, None], ids=names)
@pytest.mark.parametrize(
    "busy_timeout", [0, math.inf, HUGE, 1e300, fractions.Fraction(1, 3)], ids=names
)
def test_open_takes_every_number_in_its_range(tmp_path, history, busy_timeout):
    """However large: what is beyond every store and clock means all, and for ever."""
    path = tmp_path / "queue.db"
    with sqlspace.open(path, history=history, busy_timeout=busy_timeout) as store:
        store.push("mail", b"x")
        assert store.pullp("mail") == b"x"
        assert len(list(store.history("mail"))) == (history != 0)


def test_a_path_may_be_any_path_of_str(tmp_path):
    """A PathLike or a subclass of str; the attribute is a plain str."""

    class Path(str):
        __slots__ = ()

    for path in (tmp_path / "a.db", Path(tmp_path / "b.db"), os.fspath(tmp_path / "c.db")):
        with sqlspace.open(path) as store:
            assert type(store.path) is str
            assert store.path == os.path.realpath(path)


# -- the limit of a row


def test_a_payload_of_one_byte_more_than_the_limit_is_refused(tmp_path):
    """1,000,000,000 bytes less the row's own overhead, the key and the headers."""
    key, headers = "k" * 1024, {"name": "v" * 1000}
    room = arguments.ROW_BYTES - arguments.ROW_OVERHEAD - 1024
    text = arguments.check_headers(headers)
    payload = bytes(room + 1)  # calloc: its pages come into being when they are read
    with sqlspace.open(tmp_path / "queue.db") as store:
        for call, argument, at_most in (
            (lambda: store.push(key, payload), "payload", room),
            (lambda: store.push(key, payload, headers=headers), "payload", room - len(text)),
            (lambda: store.push_many(key, [b"x", payload]), "payloads[1]", room),
            (lambda: store.put(key, payload), "payload", room),
        ):
            with pytest.raises(ValueError, match="must be at most") as caught:
                call()
            assert str(caught.value) == (
                f"{argument} must be at most {at_most:,} bytes here, not {room + 1:,}"
            )
        assert store.keys() == []
    arguments.check_size(key, memoryview(payload)[:room], None)
    arguments.check_size(key, memoryview(payload)[: room - len(text)], text)


def test_sqlite_takes_a_row_of_just_the_size_that_is_promised(tmp_path):
    """In memory, where a GB takes a second; through a -wal it takes fifteen."""
    with sqlspace.open(tmp_path / "queue.db") as store:
        limit = store._database._session.connection.limit(apsw.SQLITE_LIMIT_LENGTH)
        assert limit == arguments.ROW_BYTES
    database = apsw.Connection(":memory:")
    for migration in schema.migrations():
        database.execute(migration.sql)
    room = arguments.ROW_BYTES - arguments.ROW_OVERHEAD - 1024
    database.execute(
        "INSERT INTO sqlspace_entries (key, payload, pushed_at) VALUES (?, ?, ?)",
        ("k" * 1024, bytes(room), 1 << 62),
    )
    assert database.execute("SELECT length(payload) FROM sqlspace_entries").get == room
    database.close()


def test_the_overhead_is_enough_for_the_longest_row_there_can_be(tmp_path):
    """Measured against a limit of SQLite's that is small, with every column at its longest."""
    with sqlspace.open(tmp_path / "queue.db"):
        pass
    database = apsw.Connection(str(tmp_path / "queue.db"))
    limit = 100_000
    database.limit(apsw.SQLITE_LIMIT_LENGTH, limit)
    columns = [
        row[1]
        for row in database.execute("PRAGMA table_info(sqlspace_entries)")
        if row[1] not in ("seq", "payload")
    ]
    longest = dict.fromkeys(columns, (1 << 62) - 1)
    longest |= {"key": "k" * 1024, "headers": "h" * 2000, "dedupe": "d" * 1024, "state": 2}
    longest |= {"token": bytes(64)}
    # A dead letter names its origin: the key, each character escaped by JSON, and some numbers.
    grown = longest | {"headers": "h" * (2000 + 6 * 1024 + 300)}
    sql = (
        f"INSERT INTO sqlspace_entries ({', '.join(columns)}, payload) "
        f"VALUES ({', '.join('?' * len(columns))}, ?)"
    )
    # The payload's length takes up to 5 bytes in the record's header, here 3.
    room = limit - (arguments.ROW_OVERHEAD - 2) - 1024 - 2000
    database.execute(sql, (*grown.values(), bytes(room)))
    with pytest.raises(apsw.TooBigError):
        database.execute(sql, (*(grown | {"dedupe": "e" * 1024}).values(), bytes(room + 1024)))
    database.close()


def test_headers_beyond_their_limit_are_refused(monkeypatch):
    """They count as JSON, in bytes; the payload gets what they leave."""
    monkeypatch.setattr(arguments, "ROW_BYTES", 20_000)
    assert arguments.check_headers({"a": "é" * 4_000}) is not None
    with pytest.raises(ValueError, match=r"headers must be at most 10,000 bytes as JSON, not 10,0"):
        arguments.check_headers({"a": "é" * 5_000})
    text = arguments.check_headers({"a": "b" * 9_000})
    room = 20_000 - arguments.ROW_OVERHEAD - 4 - len(text)
    arguments.check_size("kept", bytes(room), text)
    with pytest.raises(ValueError, match=f"payload must be at most {room:,} bytes here, not "):
        arguments.check_size("kept", bytes(room + 1), text)


# -- a closed store


CALLS = {
    "push": lambda store: store.push("kept", b"x"),
    "push_many": lambda store: store.push_many("kept", [b"x"]),
    "push_many of none": lambda store: store.push_many("kept", []),
    "pull": lambda store: store.pull("kept", 0),
    "pull for ever": lambda store: store.pull("kept"),
    "pullp": lambda store: store.pullp("kept"),
    "pull_many": lambda store: store.pull_many("kept", 1),
    "pull_any": lambda store: store.pull_any(["kept"], 0),
    "peek": lambda store: store.peek("kept"),
    "len": lambda store: store.len("kept"),
    "wait": lambda store: store.wait("kept", 0),
    "wait_empty": lambda store: store.wait_empty("none", 0),
    "put": lambda store: store.put("kept", b"x"),
    "clear": lambda store: store.clear("kept"),
    "push with options": lambda store: store.push("kept", b"x", dedupe="d", max_len=9, ttl=5),
    "claim": lambda store: store.claim("kept", 0),
    "claim for ever": lambda store: store.claim("kept", ordered=True),
    "claimp": lambda store: store.claimp("kept"),
    "claim_many": lambda store: store.claim_many("kept", 1),
    "ack_many": lambda store: store.ack_many([]),
    "requeue": lambda store: store.requeue("kept"),
    "transaction": lambda store: store.transaction().__enter__(),
    "space": lambda store: store.space().inp("kept"),
    "get": lambda store: store.get("kept", 1),
    "remove": lambda store: store.remove("kept", 1),
    "keys": lambda store: store.keys(),
    "entries": lambda store: store.entries("kept"),
    "history": lambda store: store.history("kept"),
    "stats": lambda store: store.stats(),
    "compact": lambda store: store.compact(),
    "backup": lambda store: store.backup(store.path + ".copy"),
}


def test_every_verb_of_a_closed_store_raises_closed_error_and_touches_nothing(tmp_path):
    """Even if entries remain; only close is idempotent. A wrong argument is misuse all the same."""
    assert {name.split(" ", maxsplit=1)[0] for name in CALLS} == (
        {verb for verb, _ in VERBS} | WITHOUT_ARGUMENTS
    ) - {"close", "consume"}  # these two end, and raise nothing
    store = sqlspace.open(tmp_path / "queue.db")
    store.push("kept", b"x")
    store.close()
    store.close()
    assert list(store.consume("kept")) == []
    whole = (tmp_path / "queue.db").read_bytes()
    for name, call in CALLS.items():
        with pytest.raises(sqlspace.ClosedError) as caught:
            call(store)
        assert str(tmp_path / "queue.db") in str(caught.value), name
    for call, table in VERBS.values():
        wrong, error, _ = table[0]
        with pytest.raises(error):
            call(store, wrong)
    store.close()
    assert (tmp_path / "queue.db").read_bytes() == whole
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"queue.db", "queue.db-reserve"}


@pytest.mark.parametrize("verb", ["get", "remove"])
def test_a_closed_store_raises_closed_error_for_a_seq_that_can_never_be_too(tmp_path, verb):
    """Closed is asked first."""
    store = sqlspace.open(tmp_path / "queue.db")
    store.close()
    with pytest.raises(sqlspace.ClosedError):
        getattr(store, verb)("kept", 1 << 62)


def test_an_iterator_of_a_store_that_was_closed_meanwhile_raises_closed_error(tmp_path):
    """What is handed out lazily ends with an error, never as if that were all."""
    with sqlspace.open(tmp_path / "queue.db") as store:
        store.push("kept", b"x")
        store.pull("kept")
        lazy = [store.entries("kept"), store.history("kept")]
    for iterator in lazy:
        with pytest.raises(sqlspace.ClosedError):
            next(iterator)


# -- backup


@pytest.mark.parametrize("kind", ["itself", "a file", "a directory", "nowhere", "a dangling link"])
def test_a_backup_goes_to_a_new_file_and_to_nothing_else(kept, tmp_path, kind):
    """What is there is not touched: a StoreError with the path and the system's error."""
    target = {
        "itself": kept.path,
        "a file": tmp_path / "file",
        "a directory": tmp_path,
        "nowhere": tmp_path / "no" / "copy.db",
        "a dangling link": tmp_path / "link",
    }[kind]
    (tmp_path / "file").write_bytes(b"precious")
    before = picture(kept)
    if kind == "a dangling link":
        (tmp_path / "link").symlink_to(tmp_path / "no" / "copy.db")
    with pytest.raises(sqlspace.StoreError) as caught:
        kept.backup(target)
    assert os.path.realpath(target) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert picture(kept) == before
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("end", ["-wal", "-shm", "-journal"])
def test_a_backup_refuses_what_is_left_of_another_file(kept, tmp_path, end):
    """Else SQLite would carry an old -wal over into what is restored there."""
    target = tmp_path / "copy.db"
    left = tmp_path / f"copy.db{end}"
    left.write_bytes(b"old")
    with pytest.raises(sqlspace.StoreError, match=f"copy.db{end}: .*remove it first"):
        kept.backup(target)
    assert not target.exists()
    assert left.read_bytes() == b"old"


# -- what lies


class Five(int):
    """Says that it is another."""

    def __lt__(self, _):
        return False

    def __int__(self):
        return -5


def test_what_a_subclass_says_of_itself_counts_for_nothing(kept):
    """A number, a path and a dict are taken for what they are."""

    class Other(dict):
        def items(self):
            return [("a", 1)]

    class Path(str):
        __slots__ = ()

        def __contains__(self, _):
            return False

    kept.push_many("a", [b"%d" % number for number in range(9)])
    assert len(kept.pull_many("a", Five(5))) == 5
    with pytest.raises(ValueError, match="limit must be at least 1, not -5"):
        kept.pull_many("a", Five(-5))
    seq = kept.push("b", b"x", headers=Other(name="value"))
    assert kept.get("b", seq).headers == {"name": "value"}
    with pytest.raises(ValueError, match="path must not hold a NUL"):
        sqlspace.open(Path("a\0b"))


def test_what_cannot_be_iterated_is_refused_by_its_name(kept):
    """A memoryview says that it can be, and then raises NotImplementedError."""
    view = memoryview(b"abcdef").cast("B", (2, 3))
    for call, argument in (
        (kept.pull_any, "keys"),
        (kept.claimp, "key_or_keys"),
        (kept.ack_many, "deliveries"),
    ):
        with pytest.raises(TypeError, match=f"{argument} must be .*, not memoryview"):
            call(view)


def test_a_path_is_never_shown_in_full_if_it_is_a_flood():
    """Nor is the name of a VFS."""
    for options in (
        {"path": "\0" * 9999},
        {"path": "\ud800" * 9999},
        {"path": "a", "vfs": "b" * 9999},
    ):
        with pytest.raises(ValueError, match="…") as caught:
            sqlspace.open(**options)
        assert len(str(caught.value)) < 200
