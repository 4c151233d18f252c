"""The conformance suite: puts any backend of the `Space` protocol through its law.

    from sqlspace.testing import check_space
    check_space(MySpace)  # raises AssertionError with the law that was broken

Each law is a function of a new, empty space; its docstring is the law. The laws use only the verbs
of the protocol and values that JSON has, and hold for memory, files and servers alike. What differs
between those is accepted in every form that the contract has, and nothing else is.

No law can hang: each runs in a thread of its own, and whatever blocks is waited for with a limit.
No law needs a pause to hold. The one in `_Bench.blocked` gives a blocking call time to block, so
that more broken backends are caught.

It raises by itself and has no `assert`, so `python -O` leaves it whole; and it needs no pytest.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from .errors import CanceledError, ClosedError, DeadlineError
from .space import Context, Space

__all__ = ["LAWS", "check_space"]

_PATIENCE_SECONDS: Final = 30.0
_TIME_TO_BLOCK_SECONDS: Final = 0.02
_SHORT_SECONDS: Final = 0.02
_TAKERS: Final = 8
_ENTRIES_EACH: Final = 25

_FALSY: Final[tuple[Any, ...]] = (None, False, 0, 0.0, "", [], {})
_VALUES: Final[tuple[Any, ...]] = (
    True,
    -1,
    2**53,
    0.1,
    "text",
    "naïve \N{SNOWMAN} \N{FOX FACE} \0 \n",
    ["a", ["nested", [None, {}]]],
    {"key": {"deep": [1, 2.5, None, True]}, "": "empty name"},
)
_KEYS: Final = (
    "k",
    " ",
    "a b",
    "a.b",
    "a/b",
    "../a",
    "*",
    ">",
    "$",
    "%s",
    "'; --",
    "\n",
    "\x7f",
    "K",
    "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "e\N{COMBINING ACUTE ACCENT}",
    "a" * 1024,
    "\N{LATIN SMALL LETTER E WITH ACUTE}" * 512,
    "\N{FOX FACE}" * 256,
    "a" * 1023 + "b",
)
_WRONG_KEYS: Final[tuple[tuple[Any, type[Exception]], ...]] = (
    (None, TypeError),
    (1, TypeError),
    (b"k", TypeError),
    (("k",), TypeError),
    ("", ValueError),
    ("a" * 1025, ValueError),
    ("\N{FOX FACE}" * 257, ValueError),
    ("a\0b", ValueError),
    ("\ud800", ValueError),
)
_WRONG_TIMEOUTS: Final[tuple[tuple[Any, type[Exception]], ...]] = (
    (-1, ValueError),
    (-0.001, ValueError),
    (-math.inf, ValueError),
    (math.nan, ValueError),
    ("1", TypeError),
    ([], TypeError),
)


class _Call:
    """A call in a thread of its own, whose end is waited for with a limit."""

    def __init__(
        self, patience: float, verb: Callable[..., Any], *args: Any, **bounds: Any
    ) -> None:
        shown = [f"{arg!a:.20}" for arg in args]
        shown += [f"{name}={bound!a:.20}" for name, bound in bounds.items()]
        self._what = f"{_name(verb)}({', '.join(shown)})"
        self._patience = patience
        self._began = threading.Event()
        self._ended = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            self._began.set()
            try:
                self._value = verb(*args, **bounds)
            except BaseException as error:  # noqa: BLE001  # result() raises it
                self._error = error
            finally:
                self._ended.set()

        threading.Thread(target=run, name=self._what, daemon=True).start()

    def give_it_time_to_block(self) -> None:
        self._began.wait(self._patience)
        self._ended.wait(_TIME_TO_BLOCK_SECONDS)

    def result(self) -> Any:
        """What it returned; or raise what it raised."""
        if not self._ended.wait(self._patience):
            raise AssertionError(f"{self._what} has not ended after {self._patience:g} s")
        if self._error is not None:
            raise self._error
        return self._value

    def raises(self, kind: type[Exception]) -> None:
        """Ensure that it raised this."""
        try:
            got = self.result()
        except kind:
            return
        except Exception as error:
            if type(error) is AssertionError:
                raise
            raise AssertionError(f"{self._what} raised {error!r}, not {kind.__name__}") from error
        raise AssertionError(f"{self._what} returned {got!r:.200} and raised no {kind.__name__}")


class _Bench:
    """What a law works with: a space, and calls that can't hang."""

    def __init__(self, space: Space, patience: float) -> None:
        self.space = space
        self._patience = patience

    def begin(self, verb: Callable[..., Any], *args: Any, **bounds: Any) -> _Call:
        return _Call(self._patience, verb, *args, **bounds)

    def blocked(self, verb: Callable[..., Any], *args: Any, **bounds: Any) -> _Call:
        """Begin a call that will most likely have blocked when this returns."""
        begun = self.begin(verb, *args, **bounds)
        begun.give_it_time_to_block()
        return begun

    def raises(
        self, kind: type[Exception], verb: Callable[..., Any], *args: Any, **bounds: Any
    ) -> None:
        self.begin(verb, *args, **bounds).raises(kind)


Law = Callable[[_Bench], None]


def check_space(
    make_space: Callable[[], Space], *, patience_seconds: float = _PATIENCE_SECONDS
) -> None:
    """Put a backend through the law of the `Space` protocol, one law after the other.

    Args:
        make_space: Gives a new, empty space each time; the check closes it. `Local` is one.
        patience_seconds: How long a call may take that must not wait; twice that, a law.

    Raises:
        AssertionError: says which law the backend breaks, and how. What the backend raised, if it
            did, is its cause.

    Example:
        >>> from sqlspace import Local
        >>> check_space(Local)
    """
    for law in LAWS:
        sentence = " ".join((law.__doc__ or "").split())
        space = make_space()
        try:
            _Call(2 * patience_seconds, law, _Bench(space, patience_seconds)).result()
        except Exception as error:
            how = str(error) if type(error) is AssertionError else f"it raised {error!r}"
            raise AssertionError(f"{sentence} ({law.__name__}): {how}") from error
        finally:
            closing = _Call(patience_seconds, space.close)
            with contextlib.suppress(Exception):  # there is a law of its own for this
                closing.result()


# -- the laws


def is_a_space(bench: _Bench) -> None:
    """A backend is an instance of `sqlspace.Space` and a context manager."""
    space = bench.space
    _ensure(isinstance(space, Space), f"{type(space).__name__} lacks a verb of the protocol")
    _ensure(isinstance(space, AbstractContextManager), "it has no __enter__ and __exit__")


def a_new_space_is_empty(bench: _Bench) -> None:
    """A key that was never used has no entries, and its probes answer the default."""
    space = bench.space
    default = object()
    _same("len of a new key", space.len("k"), 0)
    for name, probe in (("inp", space.inp), ("rdp", space.rdp)):
        _same(f"{name} without a default", probe("k"), None)
        _ensure(probe("k", default) is default, f"{name} doesn't return the default")
        _ensure(probe("k", default=default) is default, f"{name} doesn't know default=")
    _same("len after the probes", space.len("k"), 0)


def entries_are_taken_in_order(bench: _Bench) -> None:
    """The entries of a key are taken in the order in which they were added."""
    space = bench.space
    for number in range(6):
        space.out("k", number)
    _same("inp and in_ in turn", [space.inp("k"), space.in_("k", 0), space.inp("k")], [0, 1, 2])
    space.out("k", 6)
    _same("the rest", [space.in_("k", 0) for _ in range(4)], [3, 4, 5, 6])
    _same("inp afterwards", space.inp("k"), None)


def keys_are_independent(bench: _Bench) -> None:
    """What happens under one key changes nothing under another."""
    space = bench.space
    space.out("a", 1)
    space.out("b", 2)
    space.out("a", 3)
    _same("inp of another key", space.inp("c"), None)
    _same("len of both", [space.len("a"), space.len("b")], [2, 1])
    _same("b", space.in_("b", 0), 2)
    _same("len of both", [space.len("a"), space.len("b")], [2, 0])
    _same("a", [space.in_("a", 0), space.in_("a", 0)], [1, 3])


def every_key_within_the_limits_is_one(bench: _Bench) -> None:
    """Any str of 1 to 1,024 bytes in UTF-8 without NUL is a key, different from all others."""
    space = bench.space
    for number, key in enumerate(_KEYS):
        space.out(key, number)
    for number, key in enumerate(_KEYS):
        _same(f"len of {key[:9]!a}", space.len(key), 1)
        _same(f"rdp of {key[:9]!a}", space.rdp(key), number)
        _same(f"in_ of {key[:9]!a}", space.in_(key, 0), number)


def wrong_keys_are_refused(bench: _Bench) -> None:
    """What is no key is refused by every verb, with TypeError or ValueError."""
    space = bench.space
    for key, kind in _WRONG_KEYS:
        for verb, *args in _verbs(space):
            bench.raises(kind, verb, key, *args)


def values_come_back(bench: _Bench) -> None:
    """A value comes back as it was added."""
    space = bench.space
    for value in _VALUES:
        space.out("k", value)
    for value in _VALUES:
        for name, verb in (("rd", space.rd), ("rdp", space.rdp), ("in_", space.in_)):
            got = verb("k")
            _same(name, json.dumps(got, sort_keys=True), json.dumps(value, sort_keys=True))


def falsy_values_are_values(bench: _Bench) -> None:
    """None and every falsy value is a value like any other; only the default tells of none."""
    space = bench.space
    absent = object()
    for value in _FALSY:
        for _ in range(2):
            space.out("k", value)
        _same(f"len with {value!r}", space.len("k"), 2)
        _same("rdp", space.rdp("k", absent), value)
        _same("rd", space.rd("k", 0), value)
        _same("inp", space.inp("k", absent), value)
        _same("in_", space.in_("k", 0), value)
        _ensure(space.inp("k", absent) is absent, f"{value!r} is there once more")


def reading_takes_nothing(bench: _Bench) -> None:
    """`rd` and `rdp` return the head and leave it there, for every reader and for a taker."""
    space = bench.space
    space.out("k", "head")
    space.out("k", "next")
    for _ in range(3):
        _same("rd", space.rd("k", 0), "head")
        _same("rdp", space.rdp("k"), "head")
    _same("len after reading", space.len("k"), 2)
    readers = [bench.begin(space.rd, "k") for _ in range(4)]
    _same("four readers", [reader.result() for reader in readers], ["head"] * 4)
    _same("in_ after reading", [space.in_("k", 0), space.in_("k", 0)], ["head", "next"])


def len_counts_the_entries(bench: _Bench) -> None:
    """`len` is the number of entries that stand under the key."""
    space = bench.space
    for number in range(5):
        _same("len while adding", space.len("k"), number)
        space.out("k", number)
    for number in range(5, 0, -1):
        _same("len while taking", space.len("k"), number)
        space.inp("k")
    _same("len at the end", space.len("k"), 0)


def a_wait_always_looks_once(bench: _Bench) -> None:
    """With a timeout of 0, or a deadline that is over, a wait still looks, exactly once."""
    space = bench.space
    bounds: tuple[dict[str, Any], ...] = (
        {"timeout": 0},
        {"timeout": 0.0},
        {"context": Context(0)},
        {"timeout": 3600, "context": Context(0)},
        {"timeout": 0, "context": Context(3600)},
    )
    for bound in bounds:
        for verb in _waits(space):
            bench.raises(DeadlineError, verb, "k", **bound)
        space.out("k", "there")
        _same("rd", bench.begin(space.rd, "k", **bound).result(), "there")
        _same("in_", bench.begin(space.in_, "k", **bound).result(), "there")


def a_wait_ends_in_time(bench: _Bench) -> None:
    """A wait for what doesn't come raises DeadlineError, a TimeoutError, and not too early."""
    space = bench.space
    for timeout, context_timeout in (
        (_SHORT_SECONDS, None),
        (_SHORT_SECONDS, 3600),
        (None, _SHORT_SECONDS),
        (3600, _SHORT_SECONDS),
        (math.inf, _SHORT_SECONDS),
    ):
        for verb in _waits(space):
            begun = time.monotonic()
            bench.raises(DeadlineError, verb, "k", timeout, context=Context(context_timeout))
            seconds = time.monotonic() - begun
            _ensure(seconds >= _SHORT_SECONDS, f"it gave up after {seconds:.4f} s")
    bench.raises(TimeoutError, space.in_, "k", _SHORT_SECONDS)


def a_wait_without_end_waits(bench: _Bench) -> None:
    """A timeout of None or infinity waits for ever; a large one is a number like any other."""
    space = bench.space
    for timeout in (None, math.inf, 1e300, 10**400, 2**63):
        taker = bench.blocked(space.in_, "k", timeout)
        space.out("k", "came")
        _same(f"in_ with timeout {timeout!r:.9}", taker.result(), "came")


def wrong_bounds_are_refused(bench: _Bench) -> None:
    """A timeout that is negative, NaN or no number is refused, as is what is no Context."""
    space = bench.space
    for there in (0, 1):
        for verb in _waits(space):
            for timeout, kind in _WRONG_TIMEOUTS:
                bench.raises(kind, verb, "k", timeout)
            bench.raises(TypeError, verb, "k", 0, context=1)
        _same("len after the refusals", space.len("k"), there)
        space.out("k", "there")


def out_wakes_a_taker(bench: _Bench) -> None:
    """A blocked `in_` gets the entry that another thread adds, and it is gone from the space."""
    space = bench.space
    for value in ("first", None):
        taker = bench.blocked(space.in_, "k")
        space.out("k", value)
        _same("in_", taker.result(), value)
        _same("len afterwards", space.len("k"), 0)


def out_wakes_readers(bench: _Bench) -> None:
    """All blocked `rd` get the entry that another thread adds, and it stays for a taker."""
    space = bench.space
    readers = [bench.blocked(space.rd, "k") for _ in range(3)]
    space.out("k", "read")
    _same("rd", [reader.result() for reader in readers], ["read"] * 3)
    _same("in_ afterwards", space.in_("k", 0), "read")


def each_taker_waits_for_its_own_key(bench: _Bench) -> None:
    """A waiting taker gets entries of its own key only, and its turn is not used up by others'."""
    space = bench.space
    takers = {key: bench.blocked(space.in_, key) for key in ("a", "b")}
    space.out("c", "of c")
    space.out("b", "of b")
    _same("in_ of b", takers["b"].result(), "of b")
    _same("len of c", space.len("c"), 1)
    space.out("a", "of a")
    _same("in_ of a", takers["a"].result(), "of a")


def every_taker_is_woken(bench: _Bench) -> None:
    """As many blocked takers as entries are added get one each."""
    space = bench.space
    takers = [bench.blocked(space.in_, "k") for _ in range(4)]
    for number in range(4):
        space.out("k", number)
    _same("what they got", sorted(taker.result() for taker in takers), [0, 1, 2, 3])
    _same("len afterwards", space.len("k"), 0)


def each_entry_is_taken_once(bench: _Bench) -> None:
    """However many take at once, each entry is taken once, and each taker sees them in order."""
    space = bench.space

    def take_several() -> list[int]:
        return [space.in_("k") for _ in range(_ENTRIES_EACH)]

    takers = [bench.begin(take_several) for _ in range(_TAKERS)]
    for number in range(_TAKERS * _ENTRIES_EACH):
        space.out("k", number)
    shares = [taker.result() for taker in takers]
    taken = sorted(number for share in shares for number in share)
    _same("all that were taken", taken, list(range(_TAKERS * _ENTRIES_EACH)))
    for share in shares:
        _same("one taker's share", share, sorted(share))
    _same("len afterwards", space.len("k"), 0)


def a_wait_whose_time_is_over_takes_nothing(bench: _Bench) -> None:
    """A wait whose time ran out leaves nothing behind that eats an entry added later."""
    space = bench.space
    for _ in range(3):
        waits = [bench.begin(verb, "k", _SHORT_SECONDS) for verb in _waits(space) * 2]
        for wait in waits:
            wait.raises(DeadlineError)
        space.out("k", "later")
        _same("inp after waits that timed out", space.inp("k"), "later")
        _same("len afterwards", space.len("k"), 0)


def a_canceled_wait_takes_nothing(bench: _Bench) -> None:
    """A wait that was canceled leaves nothing behind that eats an entry added later."""
    space = bench.space
    context = Context()
    waits = [bench.blocked(verb, "k", context=context) for verb in _waits(space) * 2]
    context.cancel()
    for wait in waits:
        wait.raises(CanceledError)
    space.out("k", "later")
    _same("inp after waits that were canceled", space.inp("k"), "later")


def cancel_ends_waits(bench: _Bench) -> None:
    """`Context.cancel` ends every wait under it, on any key, with CanceledError, and no other."""
    space = bench.space
    context, other = Context(), Context()
    canceled = [
        bench.blocked(verb, key, context=context) for verb in _waits(space) for key in ("a", "b")
    ]
    waiting = bench.blocked(space.in_, "a", context=other)
    context.cancel()
    for wait in canceled:
        wait.raises(CanceledError)
    space.out("a", "on")
    _same("a wait under another context", waiting.result(), "on")


def cancel_is_sticky(bench: _Bench) -> None:
    """Under a canceled context every later wait raises CanceledError, entry or not."""
    space = bench.space
    context = Context()
    context.cancel()
    for there in (0, 1):
        for verb in _waits(space) * 2:
            for timeout in (0, None):
                bench.raises(CanceledError, verb, "k", timeout, context=context)
        _same("len afterwards", space.len("k"), there)
        space.out("k", "there")


def one_context_bounds_many_waits(bench: _Bench) -> None:
    """One context may bound many waits; those that found something don't use it up."""
    space = bench.space
    context = Context(3600)
    for number in range(3):
        taker = bench.blocked(space.in_, "k", context=context)
        space.out("k", number)
        _same("in_", taker.result(), number)
    space.out("k", 3)
    _same("rd", space.rd("k", context=context), 3)
    _same("in_", space.in_("k", context=context), 3)
    last = bench.blocked(space.in_, "k", context=context)
    context.cancel()
    last.raises(CanceledError)


def a_wait_asks_in_order(bench: _Bench) -> None:
    """A wait asks in this order: closed? canceled? is there one? is the time over?"""
    space = bench.space
    over, canceled = Context(0), Context(0)
    canceled.cancel()
    for verb in _waits(space):
        bench.raises(CanceledError, verb, "k", 0, context=canceled)
        bench.raises(DeadlineError, verb, "k", 0, context=over)
    space.out("k", "there")
    for verb in _waits(space):
        bench.raises(CanceledError, verb, "k", 0, context=canceled)
    _same("rd under a context that is over", space.rd("k", 0, context=over), "there")
    _same("in_ under a context that is over", space.in_("k", 0, context=over), "there")
    space.out("k", "there")
    space.close()
    for verb in _waits(space):
        for context in (canceled, over, None):
            bench.raises(ClosedError, verb, "k", 0, context=context)


def close_ends_waits(bench: _Bench) -> None:
    """`close` ends every wait, on any key, with ClosedError."""
    space = bench.space
    waits = [
        bench.blocked(verb, key, timeout, context=context)
        for verb in _waits(space)
        for key in ("a", "b")
        for timeout, context in ((None, None), (3600, Context()))
    ]
    bench.begin(space.close).result()
    for wait in waits:
        wait.raises(ClosedError)


def close_is_idempotent(bench: _Bench) -> None:
    """`close` may be called again, by several threads at once too."""
    space = bench.space
    for closing in [bench.begin(space.close) for _ in range(4)]:
        _same("close", closing.result(), None)
    _same("close", bench.begin(space.close).result(), None)


def a_closed_space_waits_for_nothing(bench: _Bench) -> None:
    """After close the blocking verbs raise ClosedError, even if entries remain."""
    space = bench.space
    space.out("k", "remains")
    space.close()
    for verb in _waits(space):
        for key in ("k", "empty"):
            for timeout in (None, 0, 3600):
                bench.raises(ClosedError, verb, key, timeout)


def a_closed_space_takes_in_nothing(bench: _Bench) -> None:
    """After close `out` writes nothing, or raises ClosedError; the probes answer, or raise it."""
    space = bench.space
    space.out("k", "remains")
    space.close()
    closed = object()

    def answer(verb: Callable[..., Any], *args: Any) -> Any:
        try:
            return bench.begin(verb, *args).result()
        except ClosedError:
            return closed

    _ensure(answer(space.out, "k", "late") in (None, closed), "out returned something")
    for verb, key, right in (
        (space.len, "k", 1),
        (space.rdp, "k", "remains"),
        (space.inp, "k", "remains"),
        (space.inp, "k", None),
        (space.rdp, "k", None),
        (space.len, "k", 0),
    ):
        got = answer(verb, key)
        if got is not closed:
            _same(f"{_name(verb)} after close", got, right)


def misuse_comes_before_close(bench: _Bench) -> None:
    """A closed space still refuses what is no key with TypeError or ValueError."""
    space = bench.space
    space.close()
    for key, kind in _WRONG_KEYS:
        for verb, *args in _verbs(space):
            bench.raises(kind, verb, key, *args)


def leaving_the_block_closes(bench: _Bench) -> None:
    """As a context manager a space gives itself, closes at the end, and hides no exception."""
    space = bench.space
    manager: Any = space
    error = LookupError("of the block")
    try:
        with manager as same:
            _ensure(same is space, "__enter__ doesn't return the space")
            waiting = bench.blocked(space.in_, "k")
            raise error
    except LookupError as caught:
        _ensure(caught is error, "another exception came out of the block")
    else:
        raise AssertionError("the block's exception was swallowed")
    waiting.raises(ClosedError)
    bench.raises(ClosedError, space.in_, "k", 0)


LAWS: Final[tuple[Law, ...]] = (
    is_a_space,
    a_new_space_is_empty,
    entries_are_taken_in_order,
    keys_are_independent,
    every_key_within_the_limits_is_one,
    wrong_keys_are_refused,
    values_come_back,
    falsy_values_are_values,
    reading_takes_nothing,
    len_counts_the_entries,
    a_wait_always_looks_once,
    a_wait_ends_in_time,
    a_wait_without_end_waits,
    wrong_bounds_are_refused,
    out_wakes_a_taker,
    out_wakes_readers,
    each_taker_waits_for_its_own_key,
    every_taker_is_woken,
    each_entry_is_taken_once,
    a_wait_whose_time_is_over_takes_nothing,
    a_canceled_wait_takes_nothing,
    cancel_ends_waits,
    cancel_is_sticky,
    one_context_bounds_many_waits,
    a_wait_asks_in_order,
    close_ends_waits,
    close_is_idempotent,
    a_closed_space_waits_for_nothing,
    a_closed_space_takes_in_nothing,
    misuse_comes_before_close,
    leaving_the_block_closes,
)


# -- what the laws are written with


def _verbs(space: Space) -> tuple[tuple[Any, ...], ...]:
    """Every verb that has a key, with what must follow the key so that it doesn't wait."""
    return (
        (space.out, "value"),
        (space.in_, 0),
        (space.rd, 0),
        (space.inp,),
        (space.rdp,),
        (space.len,),
    )


def _waits(space: Space) -> tuple[Callable[..., Any], ...]:
    return space.in_, space.rd


def _name(verb: Callable[..., Any]) -> str:
    return getattr(verb, "__name__", repr(verb))


def _ensure(holds: bool, how: str) -> None:
    if not holds:
        raise AssertionError(how)


def _same(what: str, got: object, right: object) -> None:
    if type(got) is not type(right) or got != right:
        raise AssertionError(f"{what}: {got!r:.200}, not {right!r:.200}")
