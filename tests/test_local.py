"""Local: memory, and the readable model of the semantics. Its clock is injected; nothing sleeps."""

import gc
import math
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from interrupts import every_step, interrupted

from sqlspace import CanceledError, ClosedError, Context, DeadlineError, Local
from sqlspace.waiting import MISSING, Vigil, Waiter, surely

LIMIT_SECONDS = 30.0  # for what must come; nothing waits so long unless it is broken


class Clock:
    """Stands in for the module `time` in `sqlspace.local`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("sqlspace.local.time", clock)
    return clock


class Parks:
    """Watches who parks and who is woken."""

    def __init__(self) -> None:
        self._entered = threading.Semaphore(0)
        self.woken: list[str] = []

    def park(self, waiter: Waiter, seconds: float) -> bool:
        self._entered.release()
        woken = waiter.park(seconds)
        if woken:
            self.woken.append(threading.current_thread().name)
        return woken

    def expect(self) -> None:
        """Return when one more call is enrolled and about to park."""
        assert self._entered.acquire(timeout=LIMIT_SECONDS)


class Call(threading.Thread):
    """A verb in a thread of its own."""

    def __init__(self, name: str, verb: Callable[..., Any], *args: Any, **bounds: Any) -> None:
        super().__init__(name=name, daemon=True)
        self._call = lambda: verb(*args, **bounds)
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(LIMIT_SECONDS)
        assert not self.is_alive(), f"{self.name} hangs"
        if self._error is not None:
            raise self._error
        return self._value


@pytest.fixture
def parks(monkeypatch) -> Parks:
    parks = Parks()
    monkeypatch.setitem(Vigil.__init__.__kwdefaults__, "park", parks.park)
    monkeypatch.setattr("sqlspace.waiting.LOOK_AGAIN_SECONDS", LIMIT_SECONDS)
    return parks


@pytest.fixture
def space() -> Iterator[Local]:
    with Local() as space:
        yield space


def block(
    parks: Parks, verb: Callable[..., Any], *args: Any, name: str = "", **bounds: Any
) -> Call:
    """Begin a call, and return when it waits."""
    call = Call(name or verb.__name__, verb, *args, **bounds)
    parks.expect()
    return call


def drain(space: Local, key: str) -> list[Any]:
    """Take all that is there."""
    return [space.inp(key) for _ in range(space.len(key))]


# -- adding and taking


def test_any_object_is_a_value_and_is_handed_out_itself(space):
    """Values are neither copied nor pickled: rd and in_ give the very object."""
    value = {"lock": threading.Lock()}
    space.out("k", value)
    assert space.rdp("k") is value
    assert space.rd("k") is value
    assert space.in_("k") is value


def test_put_replaces_all_entries_by_one(space):
    """Put makes its value the one entry of the key, and touches no other key."""
    for number in range(3):
        space.out("k", number)
    space.out("other", 0)
    space.put("k", "only")
    assert (space.len("k"), drain(space, "k"), space.len("other")) == (1, ["only"], 1)


def test_put_on_an_empty_key_adds(space):
    """Put needs no entry to replace."""
    space.put("k", None)
    assert space.len("k") == 1
    assert space.inp("k", "absent") is None


def test_what_put_replaced_no_longer_counts_when_its_ttl_ends(space, clock):
    """A replaced entry's end changes nothing under its key."""
    space.out("k", "old", ttl=1)
    space.put("k", "new", ttl=5)
    clock.now += 2
    assert (space.len("k"), space.rdp("k")) == (1, "new")
    clock.now += 4
    assert (space.len("k"), space._bags, space._expiries) == (0, {}, [])


@pytest.mark.parametrize(("before", "after"), [(None, 5), (5, None)])
def test_put_replaces_what_never_ends_by_what_does_and_the_reverse(space, clock, before, after):
    """Only the ttl of what was put last counts."""
    for number in range(3):
        space.out("k", number, ttl=before)
    space.put("k", "it", ttl=after)
    assert (space.len("k"), space.rdp("k")) == (1, "it")
    clock.now += 5
    assert space.len("k") == (0 if after else 1)
    assert drain(space, "k") == ([] if after else ["it"])
    assert space._bags == {}


def test_put_hands_its_value_to_a_waiting_taker(space, parks):
    """A taker that waits gets what is put, and the key is empty afterwards."""
    taker = block(parks, space.in_, "k")
    space.put("k", "it")
    assert taker.result() == "it"
    assert space._bags == {}


def test_readers_of_a_key_see_either_what_put_replaced_or_what_it_put(space):
    """Put is one step: nobody sees the key empty, or with two entries, in between."""
    space.out("k", -1)
    seen = []

    def look() -> None:
        seen.extend(space.len("k") for _ in range(2000))

    looking = Call("len", look)
    for number in range(2000):
        space.put("k", number)
    looking.result()
    assert set(seen) == {1}


def test_out_if_empty_adds_only_to_an_empty_key(space):
    """out_if_empty adds if the key holds no entry, and says whether it did."""
    assert space.out_if_empty("k", 1) is True
    assert space.out_if_empty("k", 2) is False
    assert drain(space, "k") == [1]
    assert space.out_if_empty("k", 3) is True


def test_of_many_out_if_empty_at_once_one_wins(space):
    """Looking and adding are one step."""
    barrier = threading.Barrier(8)

    def race() -> bool:
        barrier.wait(LIMIT_SECONDS)
        return space.out_if_empty("k", 1)

    calls = [Call("race", race) for _ in range(8)]
    assert sorted(call.result() for call in calls) == [False] * 7 + [True]


@pytest.mark.parametrize("ttl", [None, 60])
def test_a_key_stays_in_order_however_long_it_becomes(space, ttl):
    """FIFO and the count hold over hundreds of entries, and when one with a ttl comes between."""
    for number in range(300):
        space.out("k", number, ttl=ttl if number == 150 else None)
        assert space.len("k") == number + 1
    assert [space.inp("k") for _ in range(100)] == list(range(100))
    assert [space.in_any(["k"]) for _ in range(50)] == [("k", n) for n in range(100, 150)]
    for number in range(300, 400):
        space.out("k", number)
    assert (space.len("k"), space.rdp("k")) == (250, 150)
    assert drain(space, "k") == list(range(150, 400))
    assert space._bags == {}


def test_a_key_whose_takers_are_served_is_as_cheap_as_one_that_never_had_any(space, parks):
    """Between a taker's service and its waking, entries stand as bare values in a list."""
    gate = threading.Lock()
    park = Vigil.__init__.__kwdefaults__["park"]

    def slow_to_wake(waiter: Waiter, seconds: float) -> None:
        park(waiter, seconds)
        with gate:
            pass

    Vigil.__init__.__kwdefaults__["park"] = slow_to_wake
    with gate:
        taker = block(parks, space.in_, "k")
        space.out("k", 0)
        space.out("k", 1)
        assert space._bags == {"k": [1]}
    assert taker.result() == 0
    assert space._bags == {"k": [1]}


def test_in_any_takes_from_the_first_listed_key_that_has_an_entry(space):
    """The order of the keys decides, not the order in which the entries came."""
    space.out("b", "of b")
    space.out("a", "of a")
    assert space.in_any(["none", "a", "b"]) == ("a", "of a")
    assert space.in_any(iter(["a", "b"]), 0) == ("b", "of b")
    with pytest.raises(DeadlineError):
        space.in_any(["a", "b"], 0)
    assert space._bags == {}


@pytest.mark.parametrize("key", ["a", "b", "c"])
def test_in_any_is_woken_by_any_of_its_keys(space, parks, key):
    """A waiting in_any takes the first entry that comes under one of its keys, and just that."""
    taker = block(parks, space.in_any, ["a", "b", "c", "a"])
    space.out(key, 1)
    for other in "abc":
        space.out(other, 2)
    assert taker.result() == (key, 1)
    assert [drain(space, other) for other in "abc"] == [[2]] * 3
    assert space._bags == {}


def test_keys_lists_the_keys_with_entries_sorted(space, clock):
    """Keys has those with live entries only: not those waited for, emptied or expired."""
    for key in ("b", "a", "é", "gone", "taken"):
        space.out(key, 1, ttl=1 if key == "gone" else None)
    space.inp("taken")
    with pytest.raises(DeadlineError):
        space.in_("waited", 0)
    assert space.keys() == ["a", "b", "gone", "é"]
    clock.now += 1
    assert space.keys() == ["a", "b", "é"]


def test_keys_does_not_list_a_key_that_is_only_waited_for(space, parks):
    """A key with waiters and no entries isn't one of the keys."""
    taker = block(parks, space.in_, "k")
    assert space.keys() == []
    space.out("k", 1)
    assert taker.result() == 1


# -- ttl


@pytest.mark.parametrize("add", [Local.out, Local.put])
def test_an_entry_is_gone_when_its_ttl_is_over(space, clock, add):
    """An expired entry is neither counted nor delivered, by any verb."""
    add(space, "k", "short", ttl=2.5)
    clock.now += 2.4
    assert (space.len("k"), space.rdp("k"), space.rd("k", 0)) == (1, "short", "short")
    clock.now += 0.1
    assert (space.len("k"), space.keys()) == (0, [])
    assert (space.inp("k", "none"), space.rdp("k", "none")) == ("none", "none")
    for verb in (space.in_, space.rd):
        with pytest.raises(DeadlineError):
            verb("k", 0)
    assert space.nrd("k", 0) is None
    assert space.out_if_empty("k", 1) is True


@pytest.mark.parametrize(
    "verb",
    [
        lambda space: space.in_("k", 0),
        lambda space: space.in_any(["k"], 0)[1],
        lambda space: space.rd("k", 0),
        lambda space: space.inp("k"),
        lambda space: space.rdp("k"),
    ],
)
def test_every_verb_passes_over_what_has_expired(space, clock, verb):
    """Each verb by itself notices an expired head, with nobody else having looked."""
    space.out("k", "short", ttl=1)
    space.out("k", "long", ttl=9)
    clock.now += 1
    assert verb(space) == "long"


def test_entries_expire_out_of_order_and_the_others_keep_theirs(space, clock):
    """Entries in the middle expire too; the rest stays FIFO and is counted right."""
    for number in range(40):
        space.out("k", number, ttl=None if number % 4 == 0 else 40 - number)
    for seconds in range(41):
        left = [n for n in range(40) if n % 4 == 0 or 40 - n > seconds]
        assert (space.len("k"), space.rdp("k")) == (len(left), left[0])
        clock.now += 1
    assert drain(space, "k") == list(range(0, 40, 4))
    assert (space._bags, space._expiries) == ({}, [])


def test_an_infinite_ttl_is_none(space, clock):
    """ttl=inf and a ttl beyond every clock mean: never."""
    for ttl in (None, math.inf, 1e300, 10**400):
        space.out("k", ttl, ttl=ttl)
    clock.now += 1e9
    assert space.len("k") == 4


def test_the_ttl_of_a_handed_over_entry_no_longer_matters(space, parks, clock):
    """An entry that a taker got is the taker's, whatever its ttl was."""
    taker = block(parks, space.in_, "k")
    space.out("k", "it", ttl=1)
    clock.now += 5
    assert taker.result() == "it"
    assert (space._bags, space._expiries) == ({}, [])


def test_entries_taken_early_do_not_pile_up_in_the_heap(space, clock):
    """At most half of the heap of expiries are entries that were taken."""
    for number in range(10):
        space.out("stays", number, ttl=3600)
    for number in range(5000):
        space.out("k", number, ttl=3600)
        assert space.in_("k") == number
        assert len(space._expiries) <= 2 * 10 + 2
    space.put("stays", 1, ttl=3600)
    assert len(space._expiries) <= 2
    clock.now += 3600
    assert space.keys() == []
    assert (space._bags, space._expiries, space._taken_early) == ({}, [], 0)


def test_what_was_taken_early_and_then_expired_is_forgotten(space, clock):
    """The count of the entries in the heap that were taken goes down with them."""
    for number in range(9):
        space.out("k", number, ttl=1 + number)
    assert [space.inp("k") for _ in range(3)] == [0, 1, 2]
    assert (len(space._expiries), space._taken_early) == (9, 3)
    clock.now += 2
    assert (space.len("k"), len(space._expiries), space._taken_early) == (6, 7, 1)
    clock.now += 2
    assert (space.len("k"), len(space._expiries), space._taken_early) == (5, 5, 0)


def test_entries_that_expired_behind_a_live_head_do_not_pile_up(space, clock):
    """A bag holds at most as many expired entries as live ones."""
    space.out("k", "head")
    for number in range(1000):
        space.out("k", number, ttl=1)
        clock.now += 1
        assert space.len("k") == 1
        assert len(space._bags["k"].entries) <= 2
    assert drain(space, "k") == ["head"]


class Value:
    """Something that a weak reference can be had of."""


@pytest.mark.parametrize(
    "take",
    [
        lambda space: space.in_("k"),
        lambda space: space.in_any(["k"])[1],
        lambda space: space.inp("k"),
        lambda space: space.put("k", None),
    ],
)
def test_the_heap_keeps_no_value_alive(space, clock, take):
    """A value that was taken early is let go by its taker, not when its ttl ends."""
    for _ in range(9):
        space.out("others", 1, ttl=3600)
    value = Value()
    gone = weakref.ref(value)
    space.out("k", value, ttl=3600)
    del value
    take(space)
    assert gone() is None


# -- waiting


def test_out_wakes_one_taker_and_all_readers_of_its_key_and_nobody_else(space, parks):
    """One entry wakes the longest waiting taker, and every reader; others sleep on."""
    calls = {
        name: block(parks, verb, *args, name=name)
        for name, verb, *args in [
            ("first taker", space.in_, "k"),
            ("second taker", space.in_, "k"),
            ("taker of any", space.in_any, ["other", "k"]),
            ("taker elsewhere", space.in_, "other"),
            ("reader", space.rd, "k"),
            ("another reader", space.rd, "k"),
            ("reader elsewhere", space.rd, "other"),
        ]
    }
    space.out("k", "it")
    awake = {"first taker", "reader", "another reader"}
    assert {calls[name].result() for name in awake} == {"it"}
    assert sorted(parks.woken) == sorted(awake)
    assert all(calls[name].is_alive() for name in calls.keys() - awake)
    space.close()
    for name in calls.keys() - awake:
        with pytest.raises(ClosedError):
            calls[name].result()


def test_a_blocked_reader_and_a_blocked_taker_both_get_the_one_value(space, parks):
    """The taker doesn't take it away from the readers that waited."""
    for first, second in ((space.rd, space.in_), (space.in_, space.rd)):
        calls = [block(parks, verb, "k") for verb in (first, second)]
        space.out("k", "one")
        assert [call.result() for call in calls] == ["one", "one"]
        assert space._bags == {}


def test_takers_are_served_in_the_order_they_came(space, parks):
    """The n-th taker gets the n-th entry."""
    takers = [block(parks, space.in_, "k", name=str(number)) for number in range(6)]
    for number in range(6):
        space.out("k", number)
    assert [taker.result() for taker in takers] == list(range(6))


def test_nobody_who_comes_later_gets_in_before_a_waiting_taker(space, parks):
    """What came for a waiting taker is out of reach at once, though its thread still sleeps."""
    gate = threading.Lock()
    park = Vigil.__init__.__kwdefaults__["park"]

    def slow_to_wake(waiter: Waiter, seconds: float) -> None:
        park(waiter, seconds)
        with gate:
            pass

    Vigil.__init__.__kwdefaults__["park"] = slow_to_wake
    with gate:
        taker = block(parks, space.in_, "k")
        space.out("k", "its")
        assert (space.len("k"), space.inp("k"), space.rdp("k"), space.keys()) == (0, None, None, [])
        with pytest.raises(DeadlineError):
            space.in_("k", 0)
        assert space.out_if_empty("k", "next") is True
    assert taker.result() == "its"
    assert drain(space, "k") == ["next"]


def test_a_wait_that_ends_without_a_value_leaves_nothing_behind(space, parks):
    """Timed out or canceled, a wait is forgotten: no bag, no waiter, no turn."""
    for verb, keys in ((space.in_, "k"), (space.rd, "k"), (space.in_any, ["a", "b"])):
        with pytest.raises(DeadlineError):
            verb(keys, 0)
        with pytest.raises(DeadlineError):
            verb(keys, 1e-4)
        context = Context()
        call = block(parks, verb, keys, context=context)
        context.cancel()
        with pytest.raises(CanceledError):
            call.result()
        assert space._bags == {}
        assert context._waiting == {}


def test_a_wait_that_timed_out_for_an_empty_key_leaves_nothing_behind(space, parks):
    """So does nrd; the entry it waited on is untouched."""
    space.out("k", 1)
    context = Context()
    call = block(parks, space.nrd, "k", context=context)
    context.cancel()
    with pytest.raises(CanceledError):
        call.result()
    with pytest.raises(DeadlineError):
        space.nrd("k", 0)
    assert drain(space, "k") == [1]
    assert space._bags == {}


@pytest.mark.parametrize("verb", ["in_", "rd", "nrd"])
def test_a_wait_of_no_time_enrolls_nowhere(space, monkeypatch, verb):
    """Nothing is handed to a call that doesn't wait, so nothing has to come back from it."""
    if verb == "nrd":
        space.out("k", 1)
    monkeypatch.setattr(space, "_bag", lambda key: pytest.fail(f"it enrolls at {key}"))
    with pytest.raises(DeadlineError):
        getattr(space, verb)("k", 0)


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_entries_handed_to_waits_that_raise_go_back_to_their_places(space, parks, end):
    """Whichever of several such waits ends first, the key's order stays as it was."""
    gates = [threading.Lock() for _ in range(3)]
    park = Vigil.__init__.__kwdefaults__["park"]

    def slow_to_wake(waiter: Waiter, seconds: float) -> None:
        park(waiter, seconds)
        with gates[int(threading.current_thread().name)]:
            pass

    Vigil.__init__.__kwdefaults__["park"] = slow_to_wake
    context = Context()
    for gate in gates:
        gate.acquire()
    takers = [block(parks, space.in_, "k", context=context, name=str(n)) for n in range(3)]
    for number in range(5):
        space.out("k", number)
    context.cancel() if end == "cancel" else space.close()
    for number in (1, 0, 2):
        gates[number].release()
        with pytest.raises(CanceledError if end == "cancel" else ClosedError):
            takers[number].result()
    assert drain(space, "k") == [0, 1, 2, 3, 4]
    assert space._bags == {}


def test_what_goes_back_is_handed_to_the_next_taker(space, parks):
    """An entry whose taker was canceled goes to the one that waits behind it."""
    context = Context()

    def cancel_when_served(waiter: Waiter, seconds: float) -> None:
        parks.park(waiter, seconds)
        context.cancel()

    Vigil.__init__.__kwdefaults__["park"] = cancel_when_served
    canceled = block(parks, space.in_, "k", context=context)
    Vigil.__init__.__kwdefaults__["park"] = parks.park
    heir = block(parks, space.in_, "k")
    space.out("k", "it")
    with pytest.raises(CanceledError):
        canceled.result()
    assert heir.result() == "it"


def test_what_has_expired_meanwhile_does_not_go_back(space, parks, clock):
    """The ttl of an entry that is put back counts from its out."""
    context = Context()

    def late(waiter: Waiter, seconds: float) -> None:
        parks.park(waiter, seconds)
        clock.now += 10
        context.cancel()

    Vigil.__init__.__kwdefaults__["park"] = late
    taker = block(parks, space.in_, "k", context=context)
    space.out("k", "it", ttl=5)
    with pytest.raises(CanceledError):
        taker.result()
    assert (space.len("k"), space._bags) == (0, {})


def test_keys_that_are_empty_again_cost_nothing(space):
    """100,000 keys used and emptied, in every way there is, leave no state behind."""
    for number in range(100_000):
        key = f"key {number}"
        space.out(key, number)
        (space.inp if number % 2 else space.in_)(key)
    for number in range(100):
        key = f"key {number}"
        space.len(key), space.inp(key), space.rdp(key), space.nrd(key)
        with pytest.raises(DeadlineError):
            space.in_(key, 0)
    assert (space._bags, space._expiries) == ({}, [])


# -- nrd


def test_nrd_returns_at_once_for_an_empty_key(space):
    """There is nothing to wait for."""
    assert space.nrd("k") is None
    assert space._bags == {}


@pytest.mark.parametrize("take", [Local.in_, Local.inp])
def test_nrd_is_woken_when_the_last_entry_is_taken(space, parks, take):
    """It sleeps through all takes but the last one."""
    space.out("k", 1)
    space.out("k", 2)
    drainers = [block(parks, space.nrd, "k") for _ in range(2)]
    assert take(space, "k") == 1
    assert parks.woken == []
    assert take(space, "k") == 2
    assert [drainer.result() for drainer in drainers] == [None, None]
    assert space._bags == {}


def test_nrd_does_not_see_the_key_empty_while_put_replaces(space, parks):
    """Put never empties a key; a new entry is waited for like the old one."""
    space.out("k", 1)
    drainer = block(parks, space.nrd, "k")
    space.put("k", 2)
    assert drainer.is_alive()
    assert space.inp("k") == 2
    assert drainer.result() is None
    assert space._bags == {}


def test_nrd_sees_entries_expire_with_nobody_calling_in(space, clock, monkeypatch):
    """It sleeps until the next expiry, and sweeps by itself."""
    naps = []

    def nap(waiter: Waiter, seconds: float) -> None:
        naps.append(seconds)
        clock.now += seconds

    monkeypatch.setitem(Vigil.__init__.__kwdefaults__, "park", nap)
    space.out("k", 1, ttl=2)
    space.out("k", 2, ttl=3)
    assert space.nrd("k") is None
    assert naps == [2.0, 1.0]
    assert space._bags == {}


def test_nrd_sees_an_entry_expire_that_came_after_it_fell_asleep(space, clock, monkeypatch):
    """A new entry with a ttl wakes it, so that it sleeps until that one's end."""
    naps = []

    def nap(waiter: Waiter, seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 1:
            space.out("k", 2, ttl=1)
            space.inp("k")
            assert waiter.park(0), "it was not woken"
        else:
            clock.now += seconds

    monkeypatch.setitem(Vigil.__init__.__kwdefaults__, "park", nap)
    space.out("k", 1)
    assert space.nrd("k") is None
    assert naps == [5.0, 1.0]


# -- destructors


class Talkative:
    """A value whose destructor uses the space."""

    def __init__(self, space: Local) -> None:
        self.space = space

    def __del__(self) -> None:
        self.space.out("log", "gone")


@pytest.mark.parametrize("ttl", [5, None])
@pytest.mark.parametrize("elapsed", [0, 10], ids=["live", "expired"])
@pytest.mark.parametrize(
    "verb",
    [
        lambda space: space.in_any(["k", "end"]),
        lambda space: space.inp("k"),
        lambda space: space.rd("end"),
        lambda space: space.rdp("k"),
        lambda space: space.out("k", 1),
        lambda space: space.put("k", 1),
        lambda space: space.out_if_empty("k", 1),
        lambda space: space.nrd("end "),
        lambda space: space.len("k"),
        lambda space: space.keys(),
    ],
    ids=["in_any", "inp", "rd", "rdp", "out", "put", "out_if_empty", "nrd", "len", "keys"],
)
def test_destructors_of_values_may_call_in(clock, verb, elapsed, ttl):
    """Values are let go outside of the lock, so their destructors don't deadlock."""
    space = Local()
    space.out("end", 1)
    for _ in range(3):
        space.out("k", Talkative(space), ttl=ttl)
    clock.now += elapsed
    Call("verb", verb, space).result()
    space.put("k", 1)
    gc.collect()
    assert space.len("log") == 3


def test_the_destructor_of_a_value_that_could_not_go_back_may_call_in(space, parks, clock):
    """So it is for an entry that expired while its taker was canceled."""
    context = Context()

    def late(waiter: Waiter, seconds: float) -> None:
        parks.park(waiter, seconds)
        clock.now += 10
        context.cancel()

    Vigil.__init__.__kwdefaults__["park"] = late
    taker = block(parks, space.in_, "k", context=context)
    space.out("k", Talkative(space), ttl=5)
    with pytest.raises(CanceledError):
        taker.result()
    del taker
    gc.collect()
    assert space.len("log") == 1


# -- Ctrl-C


TAKES: dict[str, Callable[[Local, Context], Any]] = {
    "in_": lambda space, context: space.in_("k"),
    "in_ with a context": lambda space, context: space.in_("k", 5, context=context),
    "in_any": lambda space, context: space.in_any(["none", "k"], context=context)[1],
    "inp": lambda space, context: space.inp("k"),
}


@pytest.mark.parametrize(
    "gaps", [(), (7,), (20,), (60,)], ids=lambda gaps: f"{len(gaps) + 1} {gaps}"
)
@pytest.mark.parametrize(
    ("ttl", "standing"),
    [(None, 1), (None, 3), (None, 70), (60, 3)],
    ids=["one", "a few", "many", "with a ttl"],
)
@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES.keys())
def test_ctrl_c_anywhere_in_a_take_neither_loses_nor_doubles_an_entry(take, ttl, standing, gaps):
    """A take that is interrupted has taken nothing: its entry is returned, or is in its place."""
    take_struck(take, ttl, standing, gaps)


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES.keys())
def test_an_alarm_that_raises_anywhere_in_a_take_does_not_lose_an_entry_either(take):
    """Whatever a signal's handler raises is what Ctrl-C is."""
    take_struck(take, None, 3, (20,), raises=TimeoutError)


def take_struck(take, ttl, standing, gaps, **options):
    for steps in every_step(*gaps):
        space, context = Local(), Context()
        for number in range(standing):
            space.out("k", number, ttl=ttl)
        value, goes_on = interrupted(lambda s=space, c=context: take(s, c), *steps, **options)
        left = list(range(0 if value is MISSING else 1, standing))
        assert value in (MISSING, 0)
        assert (space.len("k"), drain(space, "k")) == (len(left), left), f"at {steps}"
        assert (space._bags, context._waiting) == ({}, {}), f"at {steps}"
        assert not space._lock.locked()
        if not goes_on:
            return


def test_what_ctrl_c_makes_inp_give_back_goes_behind_what_was_taken_before(monkeypatch, parks):
    """Takes that give back do so in the order in which they took, whichever does so first."""
    park = Vigil.__init__.__kwdefaults__["park"]
    given_back = 0
    for steps in every_step():
        space, context, gate = Local(), Context(), threading.Lock()

        def slow_to_wake(waiter: Waiter, seconds: float, gate=gate) -> None:
            park(waiter, seconds)
            with gate:
                pass

        Vigil.__init__.__kwdefaults__["park"] = slow_to_wake
        gate.acquire()
        taker = block(parks, space.in_, "k", context=context)
        for number in range(3):
            space.out("k", number)
        context.cancel()

        def after_the_taker(step: Callable[[], None], gate=gate, taker=taker) -> None:
            nonlocal given_back
            given_back += 1
            gate.release()
            with pytest.raises(CanceledError):
                taker.result()
            surely(step)

        with monkeypatch.context() as patch:
            patch.setattr("sqlspace.local.surely", after_the_taker)
            value, goes_on = interrupted(lambda space=space: space.inp("k"), *steps)
        if gate.locked():
            gate.release()
            with pytest.raises(CanceledError):
                taker.result()
        assert drain(space, "k") == ([0, 1, 2] if value is MISSING else [0, 2]), f"at {steps}"
        if not goes_on:
            break
    assert given_back


@pytest.mark.parametrize("canceled", [False, True])
@pytest.mark.parametrize("verb", ["in_", "in_any"])
def test_ctrl_c_anywhere_in_a_wait_that_was_served_loses_nothing(monkeypatch, verb, canceled):
    """An entry handed to a wait that ends by Ctrl-C, or is canceled as well, goes back."""
    for steps in every_step():
        space, context, paused = Local(), Context(), []

        def serve(waiter: Waiter, seconds: float, space=space, context=context, paused=paused):
            paused.append(1)
            space.out("k", 0)
            space.out("k", 1)
            if canceled:
                context.cancel()
            paused.clear()

        monkeypatch.setitem(Vigil.__init__.__kwdefaults__, "park", serve)
        keys = "k" if verb == "in_" else ["none", "k"]
        value, goes_on = interrupted(
            lambda s=space, c=context, k=keys: getattr(s, verb)(k, context=c), *steps, paused=paused
        )
        if verb == "in_any" and value is not MISSING:
            value = value[1]
        left = drain(space, "k")
        if value is MISSING:
            assert left in ([], [0, 1]), f"at {steps}"  # the former: cut off before the park
        else:
            assert not canceled
            assert (value, left) == (0, [1]), f"at {steps}"
        space.out("k", "later")
        assert drain(space, "k") == ["later"], f"at {steps}"
        assert (space._bags, context._waiting) == ({}, {}), f"at {steps}"
        if not goes_on:
            return


@pytest.mark.parametrize("verb", ["in_", "rd", "nrd"])
def test_ctrl_c_anywhere_in_a_wait_in_vain_leaves_nothing_behind(monkeypatch, verb):
    """Whatever ends a wait, no waiter stays that eats a later entry."""
    for steps in every_step():
        space, context = Local(), Context()
        if verb == "nrd":
            space.out("k", 0)
        monkeypatch.setitem(
            Vigil.__init__.__kwdefaults__,
            "park",
            lambda waiter, seconds, context=context: context.cancel(),
        )
        _, goes_on = interrupted(
            lambda s=space, c=context: getattr(s, verb)("k", context=c), *steps
        )
        space.out("k", "later")
        assert drain(space, "k")[-1:] == ["later"], f"at {steps}"
        assert (space._bags, context._waiting) == ({}, {}), f"at {steps}"
        if not goes_on:
            return


def test_ctrl_c_is_never_swallowed():
    """A wait that ends in vain anyway doesn't hide a Ctrl-C that comes while it ends."""
    for steps in every_step():
        space = Local()
        struck: list[int] = []
        ended: list[tuple[int, ...]] = []

        def call(space=space, struck=struck, ended=ended) -> None:
            try:
                space.in_("k", 0)
            except DeadlineError:
                ended.append(tuple(struck))
                raise

        _, goes_on = interrupted(call, *steps, struck=struck)
        assert ended in ([], [()]), f"at {steps}"
        assert space._bags == {}
        if not goes_on:
            return


@pytest.mark.parametrize(
    ("ttl", "ttl_standing"), [(None, None), (60, 60), (60, None), (None, 60)], ids=str
)
@pytest.mark.parametrize(
    ("verb", "standing"), [("out", 0), ("out", 2), ("out", 63), ("put", 0), ("put", 2)]
)
def test_ctrl_c_anywhere_in_an_out_adds_the_entry_once_or_not(verb, ttl, ttl_standing, standing):
    """An interrupted out or put has happened wholly or not at all, and the space goes on."""
    before = list(range(standing))
    for steps in every_step():
        space = Local()
        for number in before:
            space.out("k", number, ttl=ttl_standing)
        add = getattr(space, verb)
        _, goes_on = interrupted(lambda add=add: add("k", "it", ttl=ttl), *steps)
        space.out("k", "next")
        there = ["it"] if verb == "put" else [*before, "it"]
        assert drain(space, "k") in ([*before, "next"], [*there, "next"]), f"at {steps}"
        assert space._bags == {}, f"at {steps}"
        if not goes_on:
            return


def test_ctrl_c_anywhere_in_an_out_for_a_taker_loses_no_entry_and_no_taker(parks):
    """The taker gets the entry, or the next one; what it doesn't get stands in order."""
    for steps in every_step():
        space = Local()
        taker = block(parks, space.in_, "k")
        _, goes_on = interrupted(lambda space=space: space.out("k", 0), *steps)
        space.out("k", 1)
        got = taker.result()
        assert [got, *drain(space, "k")] in ([0, 1], [1]), f"at {steps}"
        assert space._bags == {}, f"at {steps}"
        if not goes_on:
            return


def test_ctrl_c_anywhere_in_a_sweep_keeps_the_count(clock):
    """Whoever sweeps out what has expired may be cut off; the next call goes on with it."""
    for steps in every_step():
        space = Local()
        for number in range(6):
            space.out("k", number, ttl=None if number % 3 == 2 else 1 + number)
        space.out("gone", 1, ttl=1)
        clock.now += 4
        _, goes_on = interrupted(lambda space=space: space.len("k"), *steps)
        assert (space.len("k"), space.len("gone")) == (3, 0), f"at {steps}"
        assert drain(space, "k") == [2, 4, 5], f"at {steps}"
        assert space.keys() == []
        if not goes_on:
            return


def test_ctrl_c_for_a_wait_that_was_served_and_canceled_does_not_double_its_entry(parks):
    """What goes back to the next taker while Ctrl-C strikes goes to it once."""
    for steps in every_step():
        space, context, paused = Local(), Context(), []
        heirs: list[Call] = []

        def serve(*_: object, space=space, context=context, heirs=heirs, paused=paused) -> None:
            Vigil.__init__.__kwdefaults__["park"] = parks.park
            paused.append(1)
            heirs.append(block(parks, space.in_, "k"))
            space.out("k", 0)
            context.cancel()
            paused.clear()

        Vigil.__init__.__kwdefaults__["park"] = serve
        _, goes_on = interrupted(
            lambda s=space, c=context: s.in_("k", context=c), *steps, paused=paused
        )
        if heirs:
            space.out("k", 1)
            got = [heirs[0].result(), *drain(space, "k")]
            assert got in ([0, 1], [1, 0]), f"at {steps}"
        assert (space._bags, context._waiting) == ({}, {}), f"at {steps}"
        if not goes_on:
            return


def test_ctrl_c_ends_a_wait_at_once_and_takes_nothing(space, parks):
    """SIGINT wakes a thread that is asleep in in_; its entry stays for others."""
    struck: list[int] = []
    ended = threading.Event()

    def once(number: int, _: object) -> None:
        struck.append(number)
        if len(struck) == 1:
            raise KeyboardInterrupt

    def strike() -> None:
        parks.expect()
        while True:  # CPython misses one that comes just before the system call that sleeps
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            if ended.wait(0.05):
                return

    before = signal.signal(signal.SIGINT, once)
    try:
        striking = Call("strike", strike)
        with pytest.raises(KeyboardInterrupt):
            space.in_("k")
        ended.set()
        striking.result()
    finally:
        signal.signal(signal.SIGINT, before)
    assert space._bags == {}
    space.out("k", "later")
    assert space.inp("k") == "later"


# -- closing


def test_close_ends_every_kind_of_wait(space, parks):
    """in_, in_any, rd and nrd end with ClosedError, on every key."""
    space.out("full", 1)
    calls = [
        block(parks, space.in_, "k"),
        block(parks, space.in_any, ["a", "b"]),
        block(parks, space.rd, "k"),
        block(parks, space.nrd, "full"),
    ]
    space.close()
    for call in calls:
        with pytest.raises(ClosedError):
            call.result()
    assert list(space._bags) == ["full"]


def test_a_closed_local_writes_nothing_answers_probes_and_raises_in_waits():
    """As the seed has it: out is ignored, inp, rdp and len go on, blocking verbs raise."""
    space = Local()
    space.out("k", 1)
    space.out("k", 2)
    space.close()
    space.close()
    assert space.out("k", 3) is None
    assert space.put("k", 3) is None
    assert space.out_if_empty("empty", 3) is False
    assert (space.len("k"), space.keys()) == (2, ["k"])
    for wait_ in (space.in_, space.rd, space.nrd):
        for key in ("k", "empty"):
            with pytest.raises(ClosedError):
                wait_(key)
    with pytest.raises(ClosedError):
        space.in_any(["k", "empty"])
    assert (space.rdp("k"), space.inp("k"), space.inp("k"), space.inp("k", "none")) == (
        1,
        1,
        2,
        "none",
    )
    assert space._bags == {}


# -- wrong arguments

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
WRONG: list[tuple[str, Callable[[Local, Any], object], list[tuple[Any, type]]]] = [
    ("out key", lambda space, it: space.out(it, 1), NO_KEYS),
    ("put key", lambda space, it: space.put(it, 1), NO_KEYS),
    ("out_if_empty key", lambda space, it: space.out_if_empty(it, 1), NO_KEYS),
    ("in_ key", lambda space, it: space.in_(it, 0), NO_KEYS),
    ("rd key", lambda space, it: space.rd(it, 0), NO_KEYS),
    ("nrd key", lambda space, it: space.nrd(it, 0), NO_KEYS),
    ("inp key", lambda space, it: space.inp(it), NO_KEYS),
    ("rdp key", lambda space, it: space.rdp(it), NO_KEYS),
    ("len key", lambda space, it: space.len(it), NO_KEYS),
    ("in_any keys", lambda space, it: space.in_any(["k", it], 0), NO_KEYS),
    (
        "in_any keys as a whole",
        lambda space, it: space.in_any(it, 0),
        [("k", TypeError), (b"k", TypeError), (None, TypeError), ([], ValueError)],
    ),
    *(
        (
            f"{name} timeout",
            lambda space, it, name=name: getattr(space, name)(
                ["k"] if name == "in_any" else "k", it
            ),
            NO_TIMES,
        )
        for name in ("in_", "in_any", "rd", "nrd")
    ),
    *(
        (
            f"{name} context",
            lambda space, it, name=name: getattr(space, name)(
                ["k"] if name == "in_any" else "k", 0, context=it
            ),
            [(1, TypeError), (0.5, TypeError), (Context, TypeError)],
        )
        for name in ("in_", "in_any", "rd", "nrd")
    ),
    ("out ttl", lambda space, it: space.out("k", 1, ttl=it), [(0, ValueError), *NO_TIMES]),
    ("put ttl", lambda space, it: space.put("k", 1, ttl=it), [(0, ValueError), *NO_TIMES]),
]


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
@pytest.mark.parametrize(("what", "verb", "table"), WRONG, ids=[what for what, _, _ in WRONG])
def test_misuse_is_refused_before_anything_is_touched(what, verb, table, closed):
    """Each wrong argument is named in a TypeError or ValueError; the space is as it was."""
    space = Local()
    space.out("k", "there")
    if closed:
        space.close()
    for wrong, kind in table:
        with pytest.raises(kind) as raised:
            verb(space, wrong)
        assert type(raised.value) is kind
        assert what.split()[1] in str(raised.value)
        assert (space.keys(), space.len("k"), space.rdp("k")) == (["k"], 1, "there")


def test_what_a_taker_is_handed_as_its_time_runs_out_is_not_overtaken(monkeypatch):
    """It has it: given back, it would stand behind what the next taker was handed meanwhile."""
    space = Local()
    leave = space._leave

    def late(keys, waiter):
        if waiter.found is MISSING:
            space.out("k", 1)  # between its last look and its leaving
        leave(keys, waiter)

    monkeypatch.setattr(space, "_leave", late)
    assert space.in_("k", timeout=0.001) == 1
    assert space.len("k") == 0
