"""Context: a deadline counted from its creation, and a switch that stays on. No test sleeps."""

import math
import signal
import threading
from fractions import Fraction
from typing import Any

import pytest

from sqlspace import CanceledError, ClosedError, Context, DeadlineError, Local
from sqlspace.waiting import Vigil, Waiter

LIMIT_SECONDS = 30.0


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in ("space", "waiting", "local"):
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


def park_and(monkeypatch, act: Any) -> None:
    """Have waits do this when they are about to sleep."""

    def park(waiter: Waiter, seconds: float) -> None:
        act()
        assert waiter.park(LIMIT_SECONDS), "nobody woke it"

    monkeypatch.setitem(Vigil.__init__.__kwdefaults__, "park", park)


def test_the_deadline_is_counted_from_the_creation(clock, naps):
    """What passes before the wait is time used up; so it is for the waits after the first."""
    context = Context(10)
    assert context.deadline == 1010.0
    clock.now += 7
    with pytest.raises(DeadlineError):
        Local().in_("k", context=context)
    assert naps == [3.0]
    with pytest.raises(DeadlineError):
        Local().rd("k", 5, context=context)
    assert naps == [3.0]


@pytest.mark.parametrize(
    ("timeout", "of_context", "slept"), [(2, 3, 2), (3, 2, 2), (math.inf, 1, 1)]
)
def test_the_nearer_of_two_ends_counts(naps, timeout, of_context, slept):
    """A wait with a timeout and a context ends at the first of both."""
    with pytest.raises(DeadlineError):
        Local().in_("k", timeout, context=Context(of_context))
    assert sum(naps) == slept


def test_a_wait_without_end_looks_again_now_and_then(naps, monkeypatch):
    """No single sleep is for ever, so that whatever got lost is a delay and no hang."""
    context = Context()
    assert context.deadline is None
    nap = Vigil.__init__.__kwdefaults__["park"]

    def cancel_at_last(waiter: Waiter, seconds: float) -> None:
        nap(waiter, seconds)
        if len(naps) == 3:
            context.cancel()

    monkeypatch.setitem(Vigil.__init__.__kwdefaults__, "park", cancel_at_last)
    with pytest.raises(CanceledError):
        Local().in_("k", context=context)
    assert naps == [5.0] * 3


@pytest.mark.parametrize("timeout", [None, math.inf, 10**400])
def test_none_and_infinity_are_no_deadline(timeout):
    """They bound nothing."""
    assert Context(timeout).deadline is None


@pytest.mark.parametrize("timeout", [2, 2.0, Fraction(2)])
def test_any_real_number_is_a_timeout(clock, timeout):
    """Seconds may come as whatever number there is."""
    assert Context(timeout).deadline == 1002.0


@pytest.mark.parametrize(
    ("timeout", "kind"),
    [
        (-1, ValueError),
        (-math.inf, ValueError),
        (-(10**400), ValueError),
        (math.nan, ValueError),
        ("1", TypeError),
        (True, TypeError),
        (1j, TypeError),
    ],
)
def test_a_wrong_timeout_is_refused(timeout, kind):
    """Negative, NaN or no number: the error names the argument."""
    with pytest.raises(kind, match="timeout"):
        Context(timeout)


def test_a_context_whose_time_is_over_still_looks(clock):
    """An expired deadline looks once, and takes what is there."""
    space = Local()
    space.out("k", 1)
    context = Context(0)
    clock.now += 100
    assert space.in_("k", context=context) == 1
    with pytest.raises(DeadlineError):
        space.in_("k", context=context)
    assert not context.canceled


def test_cancel_is_sticky(clock):
    """Once canceled, always canceled; calling it again changes nothing."""
    space, context = Local(), Context(5)
    assert context.canceled is False
    for _ in range(3):
        context.cancel()
        assert context.canceled is True
    space.out("k", 1)
    clock.now += 100  # canceled comes before the time is over
    for verb in (space.in_, space.rd):
        for _ in range(2):
            with pytest.raises(CanceledError):
                verb("k", context=context)
    assert space.len("k") == 1


def test_a_wait_asks_closed_before_canceled_before_found_before_late(clock):
    """A wait asks in this order: closed? canceled? is there one? is the time over?"""
    space, late, canceled = Local(), Context(0), Context(0)
    canceled.cancel()
    for there in (False, True):
        if there:
            space.out("k", 1)
            assert space.rd("k", 0, context=late) == 1
        else:
            with pytest.raises(DeadlineError):
                space.rd("k", 0, context=late)
        with pytest.raises(CanceledError):
            space.rd("k", 0, context=canceled)
    space.close()
    for context in (canceled, late):
        with pytest.raises(ClosedError):
            space.rd("k", 0, context=context)


def test_canceled_cannot_be_taken_back():
    """There is no way to switch it on or off but cancel."""
    context = Context()
    with pytest.raises(AttributeError):
        context.canceled = False  # type: ignore[misc]
    assert context.canceled is False


def test_cancel_from_another_thread_ends_a_wait(monkeypatch):
    """Any thread may cancel; the wait that sleeps is woken."""
    space, context = Local(), Context()
    park_and(monkeypatch, lambda: threading.Thread(target=context.cancel).start())
    with pytest.raises(CanceledError):
        space.in_("k", context=context)
    assert (space._bags, context._waiting) == ({}, {})


def test_cancel_from_a_signal_handler_ends_the_wait_that_it_interrupts(monkeypatch):
    """The handler runs in the very thread that sleeps; there is no lock to deadlock on."""
    space, context = Local(), Context()
    before = signal.signal(signal.SIGUSR1, lambda *_: context.cancel())
    try:
        park_and(
            monkeypatch,
            lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1),
        )
        with pytest.raises(CanceledError):
            space.in_("k", context=context)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert context._waiting == {}


def test_cancel_between_the_look_and_the_sleep_is_not_lost(monkeypatch):
    """A wake-up that comes before the sleep ends it at once."""
    space, context = Local(), Context()
    park_and(monkeypatch, context.cancel)
    with pytest.raises(CanceledError):
        space.rd("k", context=context)
    assert context.canceled


def test_one_cancel_ends_many_waits_on_many_spaces_and_no_others(monkeypatch):
    """One context bounds waits in several threads and spaces; others go on waiting."""
    spaces = [Local(), Local()]
    context, other = Context(), Context()
    parked = threading.Semaphore(0)

    def park(waiter: Waiter, seconds: float) -> None:
        parked.release()
        waiter.park(LIMIT_SECONDS)

    monkeypatch.setitem(Vigil.__init__.__kwdefaults__, "park", park)
    ends: list[str] = []

    def begin(verb: Any, bound: Context) -> threading.Thread:
        def run() -> None:
            try:
                ends.append(str(verb("k", context=bound)))
            except CanceledError:
                ends.append("canceled")

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert parked.acquire(timeout=LIMIT_SECONDS)
        return thread

    waiting = [begin(verb, context) for space in spaces for verb in (space.in_, space.rd)]
    kept = begin(spaces[0].in_, other)
    assert len(context._waiting) == 4
    context.cancel()
    for thread in waiting:
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()
    assert ends == ["canceled"] * 4
    spaces[0].out("k", "kept")
    kept.join(LIMIT_SECONDS)
    assert ends[4:] == ["kept"]
    assert (context._waiting, other._waiting) == ({}, {})


ENDS: dict[str, tuple[str, type[Exception]]] = {
    "time over": ("empty", DeadlineError),
    "canceled": ("k", CanceledError),
    "closed": ("k", ClosedError),
    "misuse": ("", ValueError),
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_stays_registered_however_a_wait_ends(end, naps):
    """A context that lives long doesn't gather waits that are over."""
    space, context = Local(), Context(1)
    space.out("k", 1)
    assert space.rd("k", context=context) == 1
    assert context._waiting == {}
    if end == "canceled":
        context.cancel()
    if end == "closed":
        space.close()
    key, kind = ENDS[end]
    for verb in (space.in_, space.rd):
        with pytest.raises(kind):
            verb(key, context=context)
        assert context._waiting == {}


@pytest.mark.parametrize("context", [0, 1.5, "1", Context, object()])
def test_what_is_no_context_is_refused(context):
    """It is a TypeError that names the argument and its kind; nothing was taken."""
    space = Local()
    space.out("k", 1)
    with pytest.raises(TypeError, match=f"context must be .* not {type(context).__name__}"):
        space.in_("k", 0, context=context)
    assert space.len("k") == 1
