"""The laws of the `Space` protocol, each a function of a bench with a new, empty space.

Its docstring is the law. They use only the verbs of the protocol and values that JSON has, and hold
for memory, files and servers alike. What differs between those is accepted in every form that the
contract has, and nothing else is. No law needs a pause to hold.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from sqlspace.errors import CanceledError, ClosedError, DeadlineError
from sqlspace.space import Context, Space

from .calls import Bench

__all__ = ["LAWS", "Law", "ensure", "same"]

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


Law = Callable[[Bench], None]


# -- the laws


def is_a_space(bench: Bench) -> None:
    """A backend is an instance of `sqlspace.Space` and a context manager."""
    space = bench.space
    ensure(isinstance(space, Space), f"{type(space).__name__} lacks a verb of the protocol")
    ensure(isinstance(space, AbstractContextManager), "it has no __enter__ and __exit__")


def a_new_space_is_empty(bench: Bench) -> None:
    """A key that was never used has no entries, and its probes answer the default."""
    space = bench.space
    default = object()
    same("len of a new key", space.len("k"), 0)
    for name, probe in (("inp", space.inp), ("rdp", space.rdp)):
        same(f"{name} without a default", probe("k"), None)
        ensure(probe("k", default) is default, f"{name} doesn't return the default")
        ensure(probe("k", default=default) is default, f"{name} doesn't know default=")
    same("len after the probes", space.len("k"), 0)


def entries_are_taken_in_order(bench: Bench) -> None:
    """The entries of a key are taken in the order in which they were added."""
    space = bench.space
    for number in range(6):
        space.out("k", number)
    same("inp and in_ in turn", [space.inp("k"), space.in_("k", 0), space.inp("k")], [0, 1, 2])
    space.out("k", 6)
    same("the rest", [space.in_("k", 0) for _ in range(4)], [3, 4, 5, 6])
    same("inp afterwards", space.inp("k"), None)


def keys_are_independent(bench: Bench) -> None:
    """What happens under one key changes nothing under another."""
    space = bench.space
    space.out("a", 1)
    space.out("b", 2)
    space.out("a", 3)
    same("inp of another key", space.inp("c"), None)
    same("len of both", [space.len("a"), space.len("b")], [2, 1])
    same("b", space.in_("b", 0), 2)
    same("len of both", [space.len("a"), space.len("b")], [2, 0])
    same("a", [space.in_("a", 0), space.in_("a", 0)], [1, 3])


def every_key_within_the_limits_is_one(bench: Bench) -> None:
    """Any str of 1 to 1,024 bytes in UTF-8 without NUL is a key, different from all others."""
    space = bench.space
    for number, key in enumerate(_KEYS):
        space.out(key, number)
    for number, key in enumerate(_KEYS):
        same(f"len of {key[:9]!a}", space.len(key), 1)
        same(f"rdp of {key[:9]!a}", space.rdp(key), number)
        same(f"in_ of {key[:9]!a}", space.in_(key, 0), number)


def wrong_keys_are_refused(bench: Bench) -> None:
    """What is no key is refused by every verb, with TypeError or ValueError."""
    space = bench.space
    for key, kind in _WRONG_KEYS:
        for verb, *args in _verbs(space):
            bench.raises(kind, verb, key, *args)


def values_come_back(bench: Bench) -> None:
    """A value comes back as it was added."""
    space = bench.space
    for value in _VALUES:
        space.out("k", value)
    for value in _VALUES:
        for name, verb in (("rd", space.rd), ("rdp", space.rdp), ("in_", space.in_)):
            got = verb("k")
            same(name, json.dumps(got, sort_keys=True), json.dumps(value, sort_keys=True))


def falsy_values_are_values(bench: Bench) -> None:
    """None and every falsy value is a value like any other; only the default tells of none."""
    space = bench.space
    absent = object()
    for value in _FALSY:
        for _ in range(2):
            space.out("k", value)
        same(f"len with {value!r}", space.len("k"), 2)
        same("rdp", space.rdp("k", absent), value)
        same("rd", space.rd("k", 0), value)
        same("inp", space.inp("k", absent), value)
        same("in_", space.in_("k", 0), value)
        ensure(space.inp("k", absent) is absent, f"{value!r} is there once more")


def reading_takes_nothing(bench: Bench) -> None:
    """`rd` and `rdp` return the head and leave it there, for every reader and for a taker."""
    space = bench.space
    space.out("k", "head")
    space.out("k", "next")
    for _ in range(3):
        same("rd", space.rd("k", 0), "head")
        same("rdp", space.rdp("k"), "head")
    same("len after reading", space.len("k"), 2)
    readers = [bench.begin(space.rd, "k") for _ in range(4)]
    same("four readers", [reader.result() for reader in readers], ["head"] * 4)
    same("in_ after reading", [space.in_("k", 0), space.in_("k", 0)], ["head", "next"])


def len_counts_the_entries(bench: Bench) -> None:
    """`len` is the number of entries that stand under the key."""
    space = bench.space
    for number in range(5):
        same("len while adding", space.len("k"), number)
        space.out("k", number)
    for number in range(5, 0, -1):
        same("len while taking", space.len("k"), number)
        space.inp("k")
    same("len at the end", space.len("k"), 0)


def a_wait_always_looks_once(bench: Bench) -> None:
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
        same("rd", bench.begin(space.rd, "k", **bound).result(), "there")
        same("in_", bench.begin(space.in_, "k", **bound).result(), "there")


def a_wait_ends_in_time(bench: Bench) -> None:
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
            ensure(seconds >= _SHORT_SECONDS, f"it gave up after {seconds:.4f} s")
    bench.raises(TimeoutError, space.in_, "k", _SHORT_SECONDS)


def a_wait_without_end_waits(bench: Bench) -> None:
    """A timeout of None or infinity waits for ever; a large one is a number like any other."""
    space = bench.space
    for timeout in (None, math.inf, 1e300, 10**400, 2**63):
        taker = bench.blocked(space.in_, "k", timeout)
        space.out("k", "came")
        same(f"in_ with timeout {timeout!r:.9}", taker.result(), "came")


def wrong_bounds_are_refused(bench: Bench) -> None:
    """A timeout that is negative, NaN or no number is refused, as is what is no Context."""
    space = bench.space
    for there in (0, 1):
        for verb in _waits(space):
            for timeout, kind in _WRONG_TIMEOUTS:
                bench.raises(kind, verb, "k", timeout)
            bench.raises(TypeError, verb, "k", 0, context=1)
        same("len after the refusals", space.len("k"), there)
        space.out("k", "there")


def out_wakes_a_taker(bench: Bench) -> None:
    """A blocked `in_` gets the entry that another thread adds, and it is gone from the space."""
    space = bench.space
    for value in ("first", None):
        taker = bench.blocked(space.in_, "k")
        space.out("k", value)
        same("in_", taker.result(), value)
        same("len afterwards", space.len("k"), 0)


def out_wakes_readers(bench: Bench) -> None:
    """All blocked `rd` get the entry that another thread adds, and it stays for a taker."""
    space = bench.space
    readers = [bench.blocked(space.rd, "k") for _ in range(3)]
    space.out("k", "read")
    same("rd", [reader.result() for reader in readers], ["read"] * 3)
    same("in_ afterwards", space.in_("k", 0), "read")


def each_taker_waits_for_its_own_key(bench: Bench) -> None:
    """A waiting taker gets entries of its own key only, and its turn is not used up by others'."""
    space = bench.space
    takers = {key: bench.blocked(space.in_, key) for key in ("a", "b")}
    space.out("c", "of c")
    space.out("b", "of b")
    same("in_ of b", takers["b"].result(), "of b")
    same("len of c", space.len("c"), 1)
    space.out("a", "of a")
    same("in_ of a", takers["a"].result(), "of a")


def every_taker_is_woken(bench: Bench) -> None:
    """As many blocked takers as entries are added get one each."""
    space = bench.space
    takers = [bench.blocked(space.in_, "k") for _ in range(4)]
    for number in range(4):
        space.out("k", number)
    same("what they got", sorted(taker.result() for taker in takers), [0, 1, 2, 3])
    same("len afterwards", space.len("k"), 0)


def each_entry_is_taken_once(bench: Bench) -> None:
    """However many take at once, each entry is taken once, and each taker sees them in order."""
    space = bench.space

    def take_several() -> list[int]:
        return [space.in_("k") for _ in range(_ENTRIES_EACH)]

    takers = [bench.begin(take_several) for _ in range(_TAKERS)]
    for number in range(_TAKERS * _ENTRIES_EACH):
        space.out("k", number)
    shares = [taker.result() for taker in takers]
    taken = sorted(number for share in shares for number in share)
    same("all that were taken", taken, list(range(_TAKERS * _ENTRIES_EACH)))
    for share in shares:
        same("one taker's share", share, sorted(share))
    same("len afterwards", space.len("k"), 0)


def a_wait_whose_time_is_over_takes_nothing(bench: Bench) -> None:
    """A wait whose time ran out leaves nothing behind that eats an entry added later."""
    space = bench.space
    for _ in range(3):
        waits = [bench.begin(verb, "k", _SHORT_SECONDS) for verb in _waits(space) * 2]
        for wait in waits:
            wait.raises(DeadlineError)
        space.out("k", "later")
        same("inp after waits that timed out", space.inp("k"), "later")
        same("len afterwards", space.len("k"), 0)


def a_canceled_wait_takes_nothing(bench: Bench) -> None:
    """A wait that was canceled leaves nothing behind that eats an entry added later."""
    space = bench.space
    context = Context()
    waits = [bench.blocked(verb, "k", context=context) for verb in _waits(space) * 2]
    context.cancel()
    for wait in waits:
        wait.raises(CanceledError)
    space.out("k", "later")
    same("inp after waits that were canceled", space.inp("k"), "later")


def cancel_ends_waits(bench: Bench) -> None:
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
    same("a wait under another context", waiting.result(), "on")


def cancel_is_sticky(bench: Bench) -> None:
    """Under a canceled context every later wait raises CanceledError, entry or not."""
    space = bench.space
    context = Context()
    context.cancel()
    for there in (0, 1):
        for verb in _waits(space) * 2:
            for timeout in (0, None):
                bench.raises(CanceledError, verb, "k", timeout, context=context)
        same("len afterwards", space.len("k"), there)
        space.out("k", "there")


def one_context_bounds_many_waits(bench: Bench) -> None:
    """One context may bound many waits; those that found something don't use it up."""
    space = bench.space
    context = Context(3600)
    for number in range(3):
        taker = bench.blocked(space.in_, "k", context=context)
        space.out("k", number)
        same("in_", taker.result(), number)
    space.out("k", 3)
    same("rd", space.rd("k", context=context), 3)
    same("in_", space.in_("k", context=context), 3)
    last = bench.blocked(space.in_, "k", context=context)
    context.cancel()
    last.raises(CanceledError)


def a_wait_asks_in_order(bench: Bench) -> None:
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
    same("rd under a context that is over", space.rd("k", 0, context=over), "there")
    same("in_ under a context that is over", space.in_("k", 0, context=over), "there")
    space.out("k", "there")
    space.close()
    for verb in _waits(space):
        for context in (canceled, over, None):
            bench.raises(ClosedError, verb, "k", 0, context=context)


def close_ends_waits(bench: Bench) -> None:
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


def close_is_idempotent(bench: Bench) -> None:
    """`close` may be called again, by several threads at once too."""
    space = bench.space
    for closing in [bench.begin(space.close) for _ in range(4)]:
        same("close", closing.result(), None)
    same("close", bench.begin(space.close).result(), None)


def a_closed_space_waits_for_nothing(bench: Bench) -> None:
    """After close the blocking verbs raise ClosedError, even if entries remain."""
    space = bench.space
    space.out("k", "remains")
    space.close()
    for verb in _waits(space):
        for key in ("k", "empty"):
            for timeout in (None, 0, 3600):
                bench.raises(ClosedError, verb, key, timeout)


def a_closed_space_takes_in_nothing(bench: Bench) -> None:
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

    ensure(answer(space.out, "k", "late") in (None, closed), "out returned something")
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
            same(f"{_name(verb)} after close", got, right)


def misuse_comes_before_close(bench: Bench) -> None:
    """A closed space still refuses what is no key with TypeError or ValueError."""
    space = bench.space
    space.close()
    for key, kind in _WRONG_KEYS:
        for verb, *args in _verbs(space):
            bench.raises(kind, verb, key, *args)


def leaving_the_block_closes(bench: Bench) -> None:
    """As a context manager a space gives itself, closes at the end, and hides no exception."""
    space = bench.space
    manager: Any = space
    error = LookupError("of the block")
    try:
        with manager as same:
            ensure(same is space, "__enter__ doesn't return the space")
            waiting = bench.blocked(space.in_, "k")
            raise error
    except LookupError as caught:
        ensure(caught is error, "another exception came out of the block")
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


def ensure(holds: bool, how: str) -> None:
    """Raise AssertionError unless it holds."""
    if not holds:
        raise AssertionError(how)


def same(what: str, got: object, right: object) -> None:
    """Raise AssertionError unless both are equal and of one type."""
    if type(got) is not type(right) or got != right:
        raise AssertionError(f"{what}: {got!r:.200}, not {right!r:.200}")
