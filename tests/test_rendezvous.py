"""Requests and replies: each caller gets its own, at most once, and nothing stays behind."""

import collections
import gc
import itertools
import json
import logging
import math
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from children import eventually

import sqlspace
from sqlspace import (
    BackendError,
    BusyError,
    CanceledError,
    ClosedError,
    Context,
    DeadlineError,
    DecodeError,
    Local,
    SpaceError,
    StoreError,
    call,
    serve,
)
from sqlspace.waiting import Vigil, Waiter

LIMIT_SECONDS = 60.0  # for what must come; nothing waits so long unless it is broken
REPLY = "reply/1"


class Clock:
    """Stands in for the module `time`: two clocks that have nothing in common but their pace."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1_000_000.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in ("space", "waiting", "local", "rendezvous"):
        monkeypatch.setattr(f"sqlspace.{module}.time", clock)
    return clock


@pytest.fixture
def naps(monkeypatch, clock) -> list[float]:
    """How long waits mean to sleep; instead of sleeping, the clock goes on."""
    naps: list[float] = []

    def nap(waiter: Waiter, seconds: float) -> None:
        naps.append(seconds)
        clock.now += seconds

    monkeypatch.setitem(Vigil.__init__.__kwdefaults__, "park", nap)
    return naps


class Call(threading.Thread):
    """A function in a thread of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any, **bounds: Any) -> None:
        super().__init__(daemon=True)
        self._function = lambda: function(*args, **bounds)
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(LIMIT_SECONDS)
        assert not self.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._value


class Spied(Local):
    """A space that remembers what was sent: key, value, ttl."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, Any, float | None]] = []

    def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        self.sent.append((key, value, ttl))
        super().out(key, value, ttl=ttl)


class Json(Local):
    """A space of what JSON in UTF-8 can hold."""

    def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        super().out(key, json.dumps(value, ensure_ascii=False).encode(), ttl=ttl)

    def in_(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        payload = super().in_(key, timeout, context=context)
        try:
            return json.loads(payload)
        except ValueError as error:
            raise DecodeError("no JSON", key, 1, payload) from error


class Bare:
    """The protocol's verbs and nothing more: its `out` knows no ttl."""

    def __init__(self) -> None:
        self.local = Local()

    def out(self, key: str, value: Any) -> None:
        self.local.out(key, value)

    def in_(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        return self.local.in_(key, timeout, context=context)

    def rd(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        return self.local.rd(key, timeout, context=context)

    def inp(self, key: str, default: Any = None) -> Any:
        return self.local.inp(key, default)

    def rdp(self, key: str, default: Any = None) -> Any:
        return self.local.rdp(key, default)

    def len(self, key: str) -> int:
        return self.local.len(key)

    def close(self) -> None:
        self.local.close()


class Failing(Local):
    """A space whose verbs can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.in_fails: list[Exception] = []
        self.out_fails: list[Exception] = []

    def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        if self.out_fails:
            raise self.out_fails.pop(0)
        super().out(key, value, ttl=ttl)

    def in_(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        if self.in_fails:
            raise self.in_fails.pop(0)
        return super().in_(key, timeout, context=context)


def ask(space: Any, request: Any, deadline: float | None = None, reply: str = REPLY) -> None:
    """Put a request there, as a caller does."""
    space.out("k", {"reply": reply, "deadline": deadline, "request": request})


def serve_all(space: Any, handler: Callable[[Any], Any]) -> None:
    """Serve what is there; a wait whose time is over still looks once, so this ends after that."""
    assert serve(space, "k", handler, context=Context(0)) is None


def same(request: Any) -> Any:
    """The handler of a server that answers with what it was asked."""
    return request


def waiting_for(space: Local, prefix: str) -> list[str]:
    """The keys with this prefix under which somebody waits."""
    return [key for key, bag in list(space._bags.items()) if key.startswith(prefix) and bag.takers]


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "queue.db")


@pytest.fixture
def space() -> Any:
    with Local() as space:
        yield space


# -- who gets what


def test_a_call_gives_what_the_handler_returns_and_memory_copies_neither(space):
    """In a Local the handler gets the very request, and the caller the very reply."""
    request, reply, got = object(), object(), []

    def handler(it: object) -> object:
        got.append(it)
        return reply

    server = Call(serve, space, "k", handler)
    assert call(space, "k", request, LIMIT_SECONDS) is reply
    assert call(space, "k", request, None, context=Context(LIMIT_SECONDS)) is reply
    assert got == [request, request]
    assert space.keys() == []
    space.close()
    assert server.result() is None


@pytest.mark.parametrize("reply", [None, False, 0, "", [], {}, {"error": "text"}])
def test_any_value_is_a_reply(reply):
    """Falsy replies, and those that look like an error, come as they are."""
    with Json() as space:
        Call(serve, space, "k", lambda _: reply)
        assert call(space, "k", None, LIMIT_SECONDS) == reply


@pytest.mark.parametrize("make", [Local, Json, Bare])
def test_each_of_many_callers_gets_its_own_reply_and_each_request_one_server(make):
    """8 callers, 4 servers, one key: replies are never mixed up, and nothing is handled twice."""
    space, handled = make(), []
    numbers = itertools.count()

    def handler(request: Any) -> Any:
        handled.append(request)
        return [request, "replied"]

    def caller() -> None:
        for _ in range(50):
            request = next(numbers)
            assert call(space, "k", request, LIMIT_SECONDS) == [request, "replied"]

    servers = [Call(serve, space, "k", handler) for _ in range(4)]
    for each in [Call(caller) for _ in range(8)]:
        each.result()
    assert sorted(handled) == list(range(400))
    assert space.len("k") == 0
    space.close()
    assert [server.result() for server in servers] == [None] * 4


def test_each_request_has_a_reply_key_of_its_own_that_fits_every_key(naps):
    """No two calls share a reply key, not even of one caller, and the longest key has room."""
    space, key = Spied(), "é" * 512
    for _ in range(100):
        with pytest.raises(DeadlineError):
            call(space, key, 1, 1)
    replies = [value["reply"] for _, value, _ in space.sent]
    assert len(set(replies)) == len(naps) == 100
    assert all(reply.startswith("reply/") for reply in replies)


def test_what_another_call_was_late_for_is_not_taken_for_the_reply(space):
    """A late reply goes to nobody: the next call of the same caller gets its own."""
    begun, gone = threading.Event(), threading.Event()

    def handler(request: int) -> int:
        if request == 1:
            begun.set()
            assert gone.wait(LIMIT_SECONDS)
        return request

    server = Call(serve, space, "k", handler)
    context = Context()
    first = Call(call, space, "k", 1, None, context=context)
    assert begun.wait(LIMIT_SECONDS)
    context.cancel()
    with pytest.raises(CanceledError):
        first.result()
    gone.set()  # its reply is sent, for there is no deadline
    assert call(space, "k", 2, LIMIT_SECONDS) == 2
    space.close()
    assert server.result() is None


# -- the envelope and the deadline


@pytest.mark.parametrize(
    ("timeout", "of_context", "seconds"),
    [(5, None, 5), (None, 7, 7), (5, 7, 5), (7, 5, 5), (math.inf, 5, 5)],
)
def test_a_request_expires_with_its_call(clock, naps, timeout, of_context, seconds):
    """The request's deadline and its ttl are the earlier of timeout and context; then it is gone.

    The deadline in the envelope is on the wall clock, the context's on the monotonic one.
    """
    space, context = Spied(), Context(of_context)
    ends = clock.time() + seconds
    with pytest.raises(DeadlineError):
        call(space, "k", "it", timeout, context=context)
    assert len(space.sent) == 1
    key, envelope, ttl = space.sent[0]
    assert (key, ttl) == ("k", seconds)
    assert sorted(envelope) == ["deadline", "reply", "request"]
    assert (envelope["deadline"], envelope["request"]) == (ends, "it")
    assert (sum(naps), clock.time()) == (seconds, ends)
    assert space.keys() == []


def test_what_sending_takes_is_time_used_up(clock, naps):
    """The wait for the reply ends at the deadline that was sent, however long the sending took."""

    class Slow(Local):
        def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
            super().out(key, value, ttl=ttl)
            clock.now += 4

    with pytest.raises(DeadlineError):
        call(Slow(), "k", "it", 5)
    assert naps == [1]


@pytest.mark.parametrize("timeout", [None, math.inf])
def test_a_call_without_end_has_no_deadline_and_its_reply_is_still_not_for_ever(timeout):
    """The request waits as long as its caller; the reply goes after an hour if that one died."""
    space, context = Spied(), Context()
    caller = Call(call, space, "k", "it", timeout, context=context)
    eventually(lambda: space.len("k"), "the request")
    serve_all(space, same)
    assert caller.result() == "it"
    (_, request, of_request), (_, reply, of_reply) = space.sent
    assert (request["deadline"], of_request) == (None, None)
    assert (reply, of_reply) == ({"reply": "it"}, 3600.0)


@pytest.mark.parametrize(("timeout", "of_context"), [(0, None), (0, 5), (5, 0), (None, 0)])
def test_a_call_whose_time_is_over_sends_nothing(timeout, of_context):
    """Nobody can reply in no time: it raises DeadlineError, and no request is left behind."""
    space = Spied()
    with pytest.raises(DeadlineError):
        call(space, "k", "it", timeout, context=Context(of_context))
    assert (space.sent, space._bags) == ([], {})


@pytest.mark.parametrize("of_context", [None, 5, 0])
@pytest.mark.parametrize("timeout", [None, 5, 0])
def test_a_call_that_is_canceled_before_sends_nothing(timeout, of_context):
    """It raises what every wait does, in the same order: closed, then canceled, then the time."""
    space, context = Spied(), Context(of_context)
    context.cancel()
    with pytest.raises(CanceledError):
        call(space, "k", "it", timeout, context=context)
    space.close()
    with pytest.raises(ClosedError):
        call(space, "k", "it", timeout, context=context)
    assert space.sent == []


def test_a_late_request_is_dropped(clock):
    """A request whose deadline has come is not handled and not answered; the next one is."""
    space, handled = Spied(), []
    ask(space, "late", clock.time())
    ask(space, "in time", clock.time() + 0.5, "reply/2")
    serve_all(space, handled.append)
    assert handled == ["in time"]
    assert space.keys() == ["reply/2"]


def test_a_reply_that_would_be_late_is_not_sent(space, clock):
    """If the handler took longer than there was time, nobody waits: no reply is left behind."""

    def handler(seconds: float) -> None:
        clock.now += seconds

    ask(space, 10, clock.time() + 10)
    serve_all(space, handler)
    assert space.keys() == []
    ask(space, 9, clock.time() + 10)
    serve_all(space, handler)
    assert space.keys() == [REPLY]


def test_a_reply_lives_for_what_is_left_of_the_requests_time(clock):
    """Its ttl is counted from when it is sent: a caller that died leaves nothing."""
    space = Spied()

    def handler(_: object) -> None:
        clock.now += 4

    ask(space, "it", clock.time() + 10)
    serve_all(space, handler)
    assert space.sent[-1] == (REPLY, {"reply": None}, 6)
    clock.now += 5
    assert space.keys() == [REPLY]
    clock.now += 1
    assert space.keys() == []


def test_a_ttl_is_never_too_short_to_be_one(naps):
    """What is left of the time may be less than a backend can count; 0 would be misuse."""
    space = Spied()
    with pytest.raises(DeadlineError):
        call(space, "k", "it", 1e-9)
    assert [ttl for _, _, ttl in space.sent] == [0.001]


def test_what_nobody_serves_or_waits_for_is_gone_in_time(space):
    """With the true clocks: neither a lone request nor a late reply stays."""
    with pytest.raises(DeadlineError):
        call(space, "k", "it", 0.01)
    eventually(lambda: space.keys() == [], "the request's end")
    ask(space, "it", time.time() + 0.05)
    serve_all(space, same)
    eventually(lambda: space.keys() == [], "the end of the request, and of its reply if any")


# -- what the handler raises


class Mute(Exception):
    def __str__(self) -> str:
        raise LookupError("no words")


class NoText(Exception):
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]  # noqa: PLE0307


class Endless(Exception):
    def __str__(self) -> str:
        return str(self)


class Words(str):
    __slots__ = ()

    def __format__(self, spec: str) -> str:
        raise LookupError("no format")


class Sly(Exception):
    def __str__(self) -> str:
        return Words("plain")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such thing"), "ValueError: no such thing"),
        (KeyError("k"), "KeyError: 'k'"),
        (AssertionError(), "AssertionError"),
        (ClosedError("another space"), "ClosedError: another space"),
        (CanceledError("another context"), "CanceledError: another context"),
        (DeadlineError("another wait"), "DeadlineError: another wait"),
        (StoreError("another disk"), "StoreError: another disk"),
        (DecodeError("another payload"), "DecodeError: another payload"),
        (StopIteration(), "StopIteration"),
        (Mute(), "Mute: its message can't be shown"),
        (NoText(), "NoText: its message can't be shown"),
        (Endless(), "Endless: its message can't be shown"),
        (Sly(), "Sly: plain"),
        (OSError("\ud800 and \udcff"), r"OSError: \ud800 and \udcff"),
        (OSError("naïve \N{FOX FACE}\0"), "OSError: naïve \N{FOX FACE}\0"),
        (ValueError("x" * 100_000), f"ValueError: {'x' * 9988}"),
        (ValueError("\ud800" * 100_000), "ValueError: " + r"\ud800" * 1664 + r"\ud8"),
    ],
    ids=lambda it: type(it).__name__,
)
def test_what_a_handler_raises_is_raised_by_call_and_the_server_goes_on(error, text):
    """As SpaceError itself, with type and message: bounded, and such that JSON can carry it."""

    def handler(request: str) -> str:
        if request == "bad":
            raise error
        return request

    with Json() as space:
        Call(serve, space, "k", handler)
        with pytest.raises(SpaceError) as raised:
            call(space, "k", "bad", LIMIT_SECONDS)
        assert type(raised.value) is SpaceError
        assert raised.value.args == (text,)
        assert call(space, "k", "good", LIMIT_SECONDS) == "good"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_ends_the_server(space, kind):
    """Ctrl-C and SystemExit in a handler are not the caller's: they leave serve as they are."""

    def handler(_: object) -> None:
        raise kind("now")

    ask(space, "it")
    with pytest.raises(kind, match="now"):
        serve(space, "k", handler)
    assert space.keys() == []


def test_a_server_that_dies_with_a_request_leaves_its_caller_to_the_deadline(space):
    """At most once: no other server gets that request, and the caller doesn't hang."""

    def dies(_: object) -> None:
        raise SystemExit

    def given_up() -> bool:
        with pytest.raises(DeadlineError):
            call(space, "k", "lost", 0.05)
        return not server.is_alive()

    handled: list[object] = []
    server = Call(serve, space, "k", dies)
    eventually(given_up, "the server's death")
    ask(space, "next")
    serve_all(space, handled.append)
    assert handled == ["next"]


# -- what a space can't hold


def nested() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: {1, 2}, "TypeError"),
        (lambda: "\ud800", "UnicodeEncodeError"),
        (circular, "ValueError"),
        (nested, "RecursionError"),
    ],
    ids=["set", "surrogate", "circular", "nested"],
)
def test_a_reply_that_the_space_cannot_hold_is_an_error_to_the_caller(make, kind):
    """The caller learns at once why there is no reply, and the server goes on."""
    with Json() as space:
        Call(serve, space, "k", lambda request: make() if request == "bad" else request)
        with pytest.raises(SpaceError, match=f"^{kind}: the reply can't be sent: ") as raised:
            call(space, "k", "bad", LIMIT_SECONDS)
        assert type(raised.value) is SpaceError
        assert call(space, "k", "good", LIMIT_SECONDS) == "good"


def test_a_codec_of_the_users_own_may_refuse_with_any_exception(clock):
    """pickle, msgpack and others have their own errors: the caller gets them as any other."""

    class RefusedError(Exception):
        pass

    space = Failing()
    ask(space, "it", clock.time() + 5)
    space.out_fails = [RefusedError("not this")]
    serve_all(space, same)
    assert space.rdp(REPLY) == {"error": "RefusedError: the reply can't be sent: not this"}
    clock.now += 5
    assert space.keys() == []


def test_a_request_that_the_space_cannot_hold_is_misuse():
    """The codec's refusal reaches the caller as it is, and nothing is sent."""
    space = Json()
    with pytest.raises(TypeError, match="set"):
        call(space, "k", {1, 2}, LIMIT_SECONDS)
    assert space.keys() == []


# -- what is no request, and no reply

GOOD = {"reply": REPLY, "deadline": None, "request": "it"}
NO_REQUESTS: list[Any] = [
    None,
    7,
    "it",
    b"it",
    [],
    list(GOOD),
    collections.UserDict(GOOD),
    {},
    {"reply": "it"},
    {"error": "text"},
    *({name: GOOD[name] for name in GOOD if name != missing} for missing in GOOD),
    *({**GOOD, "reply": wrong} for wrong in (None, 7, b"k", "", "a\0", "\ud800", "x" * 1025)),
    *({**GOOD, "deadline": wrong} for wrong in ("soon", True, math.nan, -1, [], {})),
]


@pytest.mark.parametrize("wrong", NO_REQUESTS, ids=lambda it: ascii(it)[:60])
def test_what_is_no_request_is_dropped_with_a_warning_and_the_server_goes_on(space, caplog, wrong):
    """Anybody may put anything under a key: it is not handled, and it harms no other request."""
    handled: list[object] = []
    space.out("k", wrong)
    ask(space, "next")
    serve_all(space, handled.append)
    assert handled == ["next"]
    assert space.keys() == [REPLY]
    record = told_once(caplog)
    assert "'k'" in record
    assert len(record) < 300


def told_once(caplog) -> str:
    """The one message that was logged."""
    assert [(name, level) for name, level, _ in caplog.record_tuples] == [
        ("sqlspace", logging.WARNING)
    ]
    return caplog.messages[0]


def test_a_request_with_more_in_it_than_needed_is_one(space, caplog):
    """What a later version may add to the envelope doesn't make it unreadable to this one."""
    space.out("k", {**GOOD, "trace": 1})
    serve_all(space, same)
    assert space.inp(REPLY) == {"reply": "it"}
    assert caplog.messages == []


@pytest.mark.parametrize("deadline", [10**400, math.inf, 2**62])
def test_a_deadline_beyond_all_clocks_is_one(space, deadline):
    """Whole numbers of any size are deadlines, and infinity is none."""
    ask(space, "it", deadline)
    serve_all(space, same)
    assert space.inp(REPLY) == {"reply": "it"}


def test_an_entry_that_the_codec_cannot_read_is_told_of_and_the_server_goes_on(caplog):
    """A DecodeError is one entry's, and that is out of the way: the next request is served."""
    space, handled = Json(), []
    Local.out(space, "k", b"\xff")
    ask(space, "next")
    serve_all(space, handled.append)
    assert handled == ["next"]
    assert "'k'" in told_once(caplog)


@pytest.mark.parametrize(
    "wrong", [None, 7, "it", [], {}, {"request": 1}, {"error": 7}, {"error": None}]
)
def test_a_reply_that_is_none_is_an_error(space, wrong):
    """What another program puts under the reply key is never returned as if it were a reply."""
    caller = Call(call, space, "k", "it", LIMIT_SECONDS)
    space.out(space.in_("k", LIMIT_SECONDS)["reply"], wrong)
    with pytest.raises(SpaceError, match=r"^a reply must be a dict with ") as raised:
        caller.result()
    assert type(raised.value) is SpaceError


# -- the end


def test_closing_ends_both_sides(space):
    """A caller that waits gets ClosedError; a server that waits returns None."""
    caller = Call(call, space, "other", "it", LIMIT_SECONDS)
    server = Call(serve, space, "k", same)
    eventually(lambda: waiting_for(space, "reply/") and waiting_for(space, "k"), "both waits")
    space.close()
    with pytest.raises(ClosedError):
        caller.result()
    assert server.result() is None


def test_a_closed_space_is_not_served(space):
    """Serve returns at once, and handles nothing of what remains."""
    ask(space, "remains")
    space.close()
    assert serve(space, "k", pytest.fail) is None


def test_a_space_that_is_closed_before_the_reply_ends_the_server_quietly():
    """A durable backend refuses the reply with ClosedError: that is the end, not a failure."""
    space = Failing()
    ask(space, "it")
    space.out_fails = [ClosedError("closed")]
    assert serve(space, "k", same) is None


def test_canceling_ends_both_sides(space):
    """A caller that waits gets CanceledError; a server that waits returns None."""
    contexts = Context(), Context()
    caller = Call(call, space, "other", "it", LIMIT_SECONDS, context=contexts[0])
    server = Call(serve, space, "k", same, context=contexts[1])
    eventually(lambda: waiting_for(space, "reply/") and waiting_for(space, "k"), "both waits")
    for context in contexts:
        context.cancel()
    with pytest.raises(CanceledError):
        caller.result()
    assert server.result() is None


def test_a_request_that_is_being_handled_when_the_context_ends_is_answered(space):
    """Whatever was taken is done; what still stands there is left to others."""
    context = Context()

    def handler(request: object) -> object:
        context.cancel()
        return request

    ask(space, "first")
    ask(space, "second")
    assert serve(space, "k", handler, context=context) is None
    assert space.inp(REPLY) == {"reply": "first"}
    assert space.len("k") == 1


def test_a_servers_deadline_ends_it(space, naps):
    """Serve returns None when its context's time is over."""
    assert serve(space, "k", same, context=Context(7)) is None
    assert sum(naps) == 7


@pytest.mark.parametrize("error", [StoreError("disk"), BusyError("busy"), BackendError("server")])
@pytest.mark.parametrize("side", ["in_", "out"])
def test_a_space_that_fails_ends_the_server_with_its_error(error, side):
    """It is not for a server to go on without its disk; and no second try hides the failure."""
    space = Failing()
    ask(space, "it")
    ask(space, "next")
    fails = space.in_fails if side == "in_" else space.out_fails
    fails.append(error)
    with pytest.raises(type(error)) as raised:
        serve(space, "k", same)
    assert raised.value is error
    assert space.len(REPLY) == 0


def test_a_space_that_fails_ends_the_call_with_its_error():
    """What sending or waiting raises is the caller's."""
    for side in ("in_", "out"):
        space, error = Failing(), StoreError("disk")
        (space.in_fails if side == "in_" else space.out_fails).append(error)
        with pytest.raises(StoreError) as raised:
            call(space, "k", "it", LIMIT_SECONDS)
        assert raised.value is error


def test_a_server_that_waits_holds_nothing_of_what_it_has_served(space):
    """Requests and replies may be large: they are let go when they are answered."""

    class Thing:
        pass

    server = Call(serve, space, "k", lambda _: Thing())
    request = Thing()
    reply = call(space, "k", request, LIMIT_SECONDS)
    references = [weakref.ref(request), weakref.ref(reply)]
    eventually(lambda: waiting_for(space, "k"), "the server's next wait")
    del request, reply

    def gone() -> bool:
        gc.collect()
        return all(reference() is None for reference in references)

    eventually(gone, "the end of the objects")
    space.close()
    assert server.result() is None


# -- spaces that differ


def test_a_space_whose_out_has_no_ttl_does_without(naps):
    """The deadline still holds: late requests are dropped, late replies are not sent."""
    space, handled = Bare(), []
    with pytest.raises(DeadlineError):
        call(space, "k", "late", 5)
    assert (space.len("k"), naps) == (1, [5])
    ask(space, "in time")
    serve_all(space, handled.append)
    assert (handled, space.local.keys()) == (["in time"], [REPLY])


def test_an_out_that_does_not_tell_its_signature_is_called_without_a_ttl(naps):
    """Only a parameter that is named ttl is taken for one."""

    class Untold:
        @property
        def __signature__(self) -> Any:
            raise ValueError("unknown")

        def __call__(self, key: str, value: Any) -> None:
            sent.append((key, value))

    sent: list[Any] = []
    space = Bare()
    space.out = Untold()  # type: ignore[method-assign]
    with pytest.raises(DeadlineError):
        call(space, "k", "it", 5)
    assert [key for key, _ in sent] == ["k"]


# -- wrong arguments


class Untouched(Bare):
    """A space whose verbs must not be called."""

    def out(self, *_: Any, **__: Any) -> Any:
        pytest.fail("it was touched")

    in_ = rd = inp = rdp = len = close = out


class Async(Bare):
    """What a space for asyncio looks like."""

    async def in_(self, *_: Any, **__: Any) -> Any:
        return None


NO_SPACES = [None, 7, Local, object(), {}, Async()]
NO_KEYS = [
    (None, TypeError),
    (7, TypeError),
    (b"k", TypeError),
    ("", ValueError),
    ("a\0", ValueError),
    ("\udcff", ValueError),
    ("é" * 513, ValueError),
]
NO_TIMES = [(-1, ValueError), (math.nan, ValueError), ("1", TypeError), (True, TypeError)]
NO_CONTEXTS = [(1, TypeError), (0.5, TypeError), (Context, TypeError)]
WRONG: list[tuple[str, Callable[[Any, Any], object], list[tuple[Any, type]]]] = [
    ("call space", lambda _, it: call(it, "k", 1, 0), [(it, TypeError) for it in NO_SPACES]),
    ("call key", lambda space, it: call(space, it, 1, 1), NO_KEYS),
    ("call timeout", lambda space, it: call(space, "k", 1, it), NO_TIMES),
    ("call context", lambda space, it: call(space, "k", 1, 1, context=it), NO_CONTEXTS),
    ("serve space", lambda _, it: serve(it, "k", same), [(it, TypeError) for it in NO_SPACES]),
    ("serve key", lambda space, it: serve(space, it, same), NO_KEYS),
    (
        "serve handler",
        lambda space, it: serve(space, "k", it),
        [(it, TypeError) for it in (None, 7, "handler", [same])],
    ),
    ("serve context", lambda space, it: serve(space, "k", same, context=it), NO_CONTEXTS),
]


@pytest.mark.parametrize(("what", "verb", "table"), WRONG, ids=[what for what, _, _ in WRONG])
def test_misuse_is_refused_before_anything_is_touched(what, verb, table):
    """Each wrong argument is named in a TypeError or ValueError; no verb of the space is called."""
    for wrong, kind in table:
        with pytest.raises(kind) as raised:
            verb(Untouched(), wrong)
        assert type(raised.value) is kind
        assert what.split()[1] in str(raised.value)


def test_a_store_is_no_space_and_the_error_says_where_its_space_is(path):
    """A Store has other verbs; what the caller means is store.space()."""
    with sqlspace.open(path) as store:
        for verb in (lambda: call(store, "k", 1, 0), lambda: serve(store, "k", same)):
            with pytest.raises(TypeError, match=r"store\.space\(\)\), not Store"):
                verb()


# -- over a file, between processes


SERVER = """
    space = sqlspace.open(argv[0]).space()

    def end_when_told():
        hear()
        space.close()

    threading.Thread(target=end_when_told, daemon=True).start()
    handled = []

    def handler(request):
        if request == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if request == "fail":
            raise LookupError("no \\N{SNOWMAN} \\ud800")
        if request == "set":
            return {1, 2}
        handled.append(request)
        return {"to": request, "all": handled}

    tell("serving")
    sqlspace.serve(space, "k", handler)
    tell("ended")
"""


def test_callers_and_servers_may_be_processes(path, child):
    """Two servers, four callers: each gets its own reply, each request goes to one server."""
    servers = [child(SERVER, path) for _ in range(2)]
    for server in servers:
        server.expect("serving")
    with sqlspace.open(path) as store, store.space() as space:

        def caller(start: int) -> list[list[int]]:
            replies = []
            for number in range(start, start + 25):
                replies.append(call(space, "k", number, LIMIT_SECONDS))
                assert replies[-1]["to"] == number
            return [reply["all"] for reply in replies]

        callers = [Call(caller, start) for start in range(0, 100, 25)]
        handled: dict[int, list[int]] = {}  # by each server, named by the first
        for so_far in sorted(itertools.chain(*(each.result() for each in callers)), key=len):
            handled[so_far[0]] = so_far
        assert sorted(itertools.chain(*handled.values())) == list(range(100))
        assert store.keys() == []
    for server in servers:
        server.tell("end")
        server.expect("ended")
        server.finish()


def test_what_a_handler_in_another_process_raises_or_cannot_send_is_raised_by_call(path, child):
    """Through JSON in a file too, and the server goes on."""
    server = child(SERVER, path)
    with sqlspace.open(path) as store, store.space() as space:
        for request, text in (
            ("fail", r"LookupError: no \N{SNOWMAN} \\ud800"),
            ("set", "TypeError: the reply can't be sent: "),
        ):
            with pytest.raises(SpaceError, match=f"^{text}") as raised:
                call(space, "k", request, LIMIT_SECONDS)
            assert type(raised.value) is SpaceError
        assert call(space, "k", "on", LIMIT_SECONDS) == {"to": "on", "all": ["on"]}
    server.tell("end")
    server.expect("serving", "ended")
    server.finish()


def test_a_server_that_is_killed_in_its_handler_leaves_its_caller_to_the_deadline(path, child):
    """The caller doesn't hang, no other server gets the request, and nothing of it stays."""
    killed = child(SERVER, path)
    with sqlspace.open(path) as store, store.space() as space:

        def given_up() -> bool:
            with pytest.raises(DeadlineError):
                call(space, "k", "die", 0.5)
            return killed._process.poll() is not None

        killed.expect("serving")
        eventually(given_up, "the server's death")
        killed.finish(-signal.SIGKILL)
        child(SERVER, path).expect("serving")
        assert call(space, "k", "on", LIMIT_SECONDS)["all"] == ["on"]
        assert store.keys() == []


def test_a_call_that_nobody_serves_leaves_nothing_in_the_file(path):
    """The request in the file has its deadline as ttl."""
    with sqlspace.open(path) as store, store.space() as space:
        with pytest.raises(DeadlineError):
            call(space, "k", "it", 0.01)
        eventually(lambda: store.keys() == [], "the request's end")


def test_bytes_that_are_no_request_go_to_the_dead_letters_and_the_server_goes_on(path, caplog):
    """What any program may have pushed to the key is kept aside, and told of."""
    with sqlspace.open(path) as store, store.space() as space:
        store.push("k", b"\xff")
        server = Call(serve, space, "k", same)
        assert call(space, "k", "on", LIMIT_SECONDS) == "on"
        assert (store.keys(), store.peek("k/dead")) == (["k/dead"], b"\xff")
        assert any("'k'" in message for message in caplog.messages)
    assert server.result() is None


def test_closing_the_store_underneath_ends_both_sides(path):
    """The space of a store ends with it, and so do call and serve."""
    with sqlspace.open(path) as store:
        space = store.space()
        server = Call(serve, space, "k", same)
        assert call(space, "k", "on", LIMIT_SECONDS) == "on"
        caller = Call(call, space, "other", "it", LIMIT_SECONDS)
        eventually(lambda: store.len("other"), "the request")
    with pytest.raises(ClosedError):
        caller.result()
    assert server.result() is None
