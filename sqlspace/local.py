"""Local: a space in memory, and the readable model of the semantics.

The law: an entry goes to the taker that has waited longest, directly. So a key that has takers
has no entries, a key that has entries has no takers, and nobody who comes later can get in
between. Every state change happens under the one lock, and values are let go outside of it, for
their destructors may call in again.

A key exists for as long as something stands or waits under it, and not longer. Under most keys
nobody waits, nothing has a ttl, and nothing came back from a taker: such a key is a plain list of
its values, and `out` and `inp` do no more than append and take the first. All others are a `_Bag`.

What stands in a bag is there while it is `live`, or a bare value, and the bag's `count` says how
many are. Whoever takes from a list or a bag does so in plain stores and deletions beside the one
that hands the value on, with no call between them (so `del line[0]`, never `popleft`), and Ctrl-C
finds either all of it done or nothing. All else (dead entries in the bags and in the heap, empty
bags) is swept up afterwards, by the same call or, if that was cut off, by a later one.
"""

import heapq
import threading
import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self, final

from .arguments import check_key, check_keys, check_timeout, check_ttl, good_keys
from .errors import ClosedError
from .space import Context, check_context
from .waiting import MISSING, Vigil, Waiter, surely, wait

__all__ = ["Local"]

# A line of values is a list at first, which is made without a call, in 88 bytes; a deque takes
# 0.1 µs and 760 bytes. Taking the head of a list moves the others, so a long one becomes a deque.
_Line = list[Any] | deque[Any]
_LONG = 64

# What was taken: its value, key, number and end; emptied when it is put back. A list is made
# without a call.
_Taken = list[Any]


@final
class _Entry:
    __slots__ = ("expires", "live", "number", "value")

    def __init__(self, value: Any, expires: float | None = None, number: int = 0) -> None:
        self.value = value
        self.expires = expires  # on the monotonic clock
        self.number = number  # its place among those that were ever taken, 0 if it was not
        self.live = False  # it stands in its bag, neither taken nor expired


@final
class _Bag:
    """What stands and who waits under one key; its length is the number of live entries."""

    __slots__ = ("count", "drainers", "entries", "key", "readers", "takers")

    def __init__(self, key: str, entries: _Line) -> None:
        self.key = key
        self.entries = entries  # entries and bare values; the first of them is live
        self.count = len(entries)  # of the live ones
        # In the order they came. The first of 1,000 is found in 0.4 µs; an OrderedDict finds it in
        # 0.1, but costs every wait 0.1 more.
        self.takers: dict[Waiter, None] = {}
        self.readers: dict[Waiter, None] = {}
        self.drainers: dict[Waiter, None] = {}

    def __len__(self) -> int:
        return self.count

    def head(self) -> _Entry:
        """The first live entry of a bag that has one."""
        head = self.entries[0]
        if type(head) is not _Entry:
            entry = _Entry(head)
            entry.live = True
            self.entries[0] = entry
            return entry
        if head.live:
            return head
        self.skip_dead()  # left by a call that was cut off
        return self.head()

    def skip_dead(self) -> None:
        """Let go the dead at the head."""
        entries = self.entries
        while entries and type(entries[0]) is _Entry and not entries[0].live:
            del entries[0]

    def append(self, entry: _Entry) -> None:
        if len(self.entries) >= _LONG and type(self.entries) is list:
            self.entries = deque(self.entries)
        self.entries.append(entry)

    def insert(self, entry: _Entry) -> None:
        """Have an entry that was taken stand in its place: before all that never were."""
        place = 0
        for other in self.entries:
            if type(other) is not _Entry or not 0 < other.number < entry.number:
                break
            place += 1
        self.entries.insert(place, entry)

    def show(self, value: Any) -> None:
        """Give all readers what they wait for."""
        for reader in self.readers:
            reader.found = value
            reader.wake()
        self.readers.clear()

    def longest_waiting(self) -> Waiter | None:
        """The taker whose turn it is."""
        while self.takers:
            taker = next(iter(self.takers))
            if taker.found is MISSING:
                return taker
            taker.wake()  # another of its keys was faster, or its out() was cut off
            del self.takers[taker]
        return None


class Local:
    """A keyed tuple space in memory, for the threads of one process. Any object is a value.

    Values are neither copied nor pickled: who reads with `rd` gets the very object. After close,
    `out` and `put` write nothing, `inp`, `rdp` and `len` still answer, and blocking verbs raise
    `ClosedError`, as the seed of this package has it.

    Example:
        >>> space = Local()
        >>> space.out("jobs", {"n": 1})
        >>> space.in_("jobs")
        {'n': 1}
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bags: dict[str, _Bag | _Line] = {}  # the last are never empty
        self._closed = False
        self._number = 0  # of the entry that was taken last
        # A heap of (when, a number that keeps it from comparing entries, entry, its bag).
        self._expiries: list[tuple[float, int, _Entry, _Bag]] = []
        self._pushed = 0  # the last such number
        self._taken_early = 0  # how many in it were taken before they expired

    # -- adding

    def out(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Add `value` behind all entries of `key`, or hand it to the longest waiting taker.

        Wakes that one taker and all readers of the key, and nobody else.

        Args:
            key: 1 to 1,024 bytes in UTF-8, no NUL.
            value: Any object, None and falsy ones included.
            ttl: Seconds until the entry is gone if nobody takes it; None or infinity: never.
        """
        if type(key) is not str or key not in good_keys:
            key = check_key(key)
        expires = None if ttl is None else _expiry(ttl)
        with self._lock:
            _expired = self._sweep() if self._expiries else None
            if self._closed:
                return
            bag = self._bags.get(key)
            if type(bag) is _Bag:  # with a bag for every key, out and inp took 2.0 µs, not 0.8
                self._add(bag, value, expires)
            elif expires is not None:
                self._add(self._bag(key), value, expires)
            elif bag is None:
                self._bags[key] = [value]
            else:
                bag.append(value)
                if len(bag) == _LONG:
                    self._bags[key] = deque(bag)

    def put(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Make `value` the one entry of `key`, in place of all that it held, in one step.

        Args:
            key: As in `out`.
            value: Any object.
            ttl: As in `out`.
        """
        key = check_key(key)
        expires = _expiry(ttl)
        with self._lock:
            _expired = self._sweep()
            if self._closed:
                return
            old = self._bags.get(key)
            if expires is None and type(old) is not _Bag:
                self._bags[key] = [value]
                return
            if not old:
                self._add(self._bag(key), value, expires)
                return
            new = _Bag(key, [])
            if type(old) is _Bag:
                new.readers, new.drainers = old.readers, old.drainers
            self._add(new, value, expires)
            self._bags[key] = new
            _replaced = self._bury_all(old) if type(old) is _Bag else old

    def out_if_empty(self, key: str, value: Any) -> bool:
        """Add `value` if `key` holds no entry, in one step; whether it was added."""
        key = check_key(key)
        with self._lock:
            _expired = self._sweep()
            bag = self._bags.get(key)
            if self._closed or bag:
                return False
            if type(bag) is _Bag:
                self._add(bag, value, None)
            else:
                self._bags[key] = [value]
            return True

    # -- taking and reading

    def in_(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Take the head of `key`, waiting for one; takers are served in the order they came.

        Args:
            key: Of the entry.
            timeout: Seconds; None or infinity waits for ever, 0 looks exactly once.
            context: Another bound on the wait.

        Raises:
            ClosedError, CanceledError, DeadlineError: asked for in this order; nothing was taken.
        """
        if type(key) is not str or key not in good_keys:
            key = check_key(key)
        if key in self._bags and self._may_take(timeout, context):
            value = Local.inp(self, key, MISSING)  # with out 1.0 µs; by a wait it took 3.9
            if value is not MISSING:
                return value
        taken = self._in([key], timeout, context, looked=timeout != 0)
        return taken[0]  # no call from here, so that no Ctrl-C loses it

    def in_any(
        self, keys: Iterable[str], timeout: float | None = None, *, context: Context | None = None
    ) -> tuple[str, Any]:
        """Take the head of the first listed key that has one, waiting for one; raises as `in_`.

        Returns:
            The key, and the value taken from it.
        """
        taken = self._in(check_keys(keys), timeout, context)
        return taken[1], taken[0]

    def rd(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Return the head of `key` and leave it there, waiting for one; raises as `in_`."""
        return wait(self._reading(check_key(key)), timeout, context)

    def _reading(self, key: str) -> Vigil:
        def look(waiter: Waiter, enroll: bool) -> None:
            with self._lock:
                self._ensure_open()
                if waiter.found is not MISSING:  # out() has put it there
                    return
                _expired = self._sweep()
                waiter.found = self._peek(key)
                if enroll and waiter.found is MISSING:
                    self._bag(key).readers[waiter] = None

        return Vigil(look, leave=partial(self._leave, [key]), ensure_open=self._ensure_open)

    def nrd(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> None:
        """Wait until `key` holds no entry, by takers or by expiry; raises as `in_`."""
        wait(self._draining(check_key(key)), timeout, context)

    def _draining(self, key: str) -> Vigil:
        def look(waiter: Waiter, enroll: bool) -> None:
            with self._lock:
                self._ensure_open()
                _expired = self._sweep()
                if not self._bags.get(key):
                    waiter.found = None
                elif enroll:
                    self._bag(key).drainers[waiter] = None

        def horizon() -> float | None:
            with self._lock:  # no later than the first entry of this key that expires
                return self._expiries[0][0] - time.monotonic() if self._expiries else None

        leave = partial(self._leave, [key])
        return Vigil(look, leave=leave, ensure_open=self._ensure_open, horizon=horizon)

    def inp(self, key: str, default: Any = None) -> Any:
        """Take the head of `key`, or return `default`; never waits."""
        if type(key) is not str or key not in good_keys:
            key = check_key(key)
        number, expires = 0, None  # of what was taken
        try:
            with self._lock:
                _expired = self._sweep() if self._expiries else None
                bag = self._bags.get(key)
                if type(bag) is not _Bag:
                    if bag is None:
                        return default
                    number = self._number = self._number + 1
                    value = bag[0]
                    del bag[0]
                    if not bag:
                        del self._bags[key]
                elif bag.count:
                    head = self._head(bag)
                    value, number, expires = head.value, head.number, head.expires
                    head.value, head.live = None, False
                    bag.count -= 1
                    self._let_go(bag, head)
                else:
                    return default
        except BaseException:  # Ctrl-C
            if number:
                taken = [value, key, number, expires]
                try:
                    surely(partial(self._give_back, taken))
                except BaseException:  # noqa: BLE001  # on the way into it
                    surely(partial(self._give_back, taken))
            raise
        return value

    def rdp(self, key: str, default: Any = None) -> Any:
        """Return the head of `key` and leave it there, or return `default`; never waits."""
        key = check_key(key)
        with self._lock:
            _expired = self._sweep()
            value = self._peek(key)
        return default if value is MISSING else value

    # -- looking

    def len(self, key: str) -> int:
        """How many entries `key` holds; the expired don't count."""
        key = check_key(key)
        with self._lock:
            _expired = self._sweep()
            bag = self._bags.get(key)
            return 0 if bag is None else len(bag)

    def keys(self) -> list[str]:
        """The keys that hold at least one entry, sorted."""
        with self._lock:
            _expired = self._sweep()
            return sorted(key for key, bag in self._bags.items() if bag)

    # -- closing

    def close(self) -> None:
        """End every wait with `ClosedError`; idempotent. What stands here can still be probed."""
        with self._lock:
            self._closed = True
            self._wake_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- waits

    def _may_take(self, timeout: float | None, context: Context | None) -> bool:
        """Check the bounds of a wait; whether it may take what it finds at once."""
        check_timeout(timeout)
        check_context(context)
        return not self._closed and (context is None or not context.canceled)

    def _in(
        self,
        keys: list[str],
        timeout: float | None,
        context: Context | None,
        *,
        looked: bool = False,
    ) -> _Taken:
        """Take from the first of `keys` that has an entry."""
        taken: _Taken = wait(self._taking(keys), timeout, context, looked=looked)
        return taken

    def _taking(self, keys: list[str]) -> Vigil:
        def look(waiter: Waiter, enroll: bool) -> None:
            if waiter.found is not MISSING:  # out() has handed it over
                return
            with self._lock:
                self._ensure_open()
                if waiter.found is MISSING:
                    _expired = self._sweep() if self._expiries else None
                    self._take(keys, waiter, enroll)

        return Vigil(
            look,
            leave=partial(self._leave, keys),
            restore=self._restore,
            ensure_open=self._ensure_open,
        )

    def _restore(self, waiter: Waiter) -> None:
        self._give_back(waiter.found)

    def _give_back(self, taken: _Taken) -> None:
        """Put what a call took, and will not return, back in its place. Idempotent."""
        with self._lock:
            if not taken:
                return
            value, key, _, expires = taken
            if expires is None or expires > time.monotonic():
                self._add(self._bag(key), value, expires, back=taken)
            else:
                del taken[:]

    def _leave(self, keys: list[str], waiter: Waiter) -> None:
        for key in keys:
            if key in self._bags:  # mostly it is gone with the waiter that was served
                with self._lock:
                    self._forget(key, waiter)

    # -- what is done under the lock

    def _wake_all(self) -> None:
        for bag in self._bags.values():
            if type(bag) is _Bag:
                for waiter in (*bag.takers, *bag.readers, *bag.drainers):
                    waiter.wake()

    def _ensure_open(self) -> None:
        if self._closed:
            raise ClosedError("the Local is closed")

    def _peek(self, key: str) -> Any:
        bag = self._bags.get(key)
        if type(bag) is _Bag:
            return bag.head().value if bag.count else MISSING
        return MISSING if bag is None else bag[0]

    def _bag(self, key: str) -> _Bag:
        """The key's bag, made from its list if it has none."""
        bag = self._bags.get(key)
        if type(bag) is not _Bag:
            bag = self._bags[key] = _Bag(key, bag or [])
        return bag

    def _head(self, bag: _Bag) -> _Entry:
        """The head of a bag that has one, numbered, to be taken."""
        head = bag.head()
        if not head.number:
            self._number = head.number = self._number + 1
        return head

    def _tidy(self, bag: _Bag) -> None:
        """Forget the bag if nothing stands and nobody waits in it."""
        if not (bag.entries or bag.takers or bag.readers or bag.drainers) and (
            self._bags.get(bag.key) is bag
        ):
            del self._bags[bag.key]

    def _add(
        self, bag: _Bag, value: Any, expires: float | None, *, back: _Taken | None = None
    ) -> None:
        """Hand a value to a taker, or have it stand in its place; show it to the readers.

        Args:
            bag: Where to.
            value: Of a new entry, or of one that comes back.
            expires: Its end.
            back: How it was taken, if it comes back.
        """
        taker = bag.longest_waiting() if bag.takers else None
        if taker is not None:
            if back is None:
                number = self._number = self._number + 1
                taker.found = [value, bag.key, number, expires]
            else:
                taker.found = back[:]
                del back[:]
            taker.wake()
            del bag.takers[taker]
        else:
            entry = _Entry(value, expires)
            if expires is not None:
                self._pushed += 1
                heapq.heappush(self._expiries, (expires, self._pushed, entry, bag))
                for drainer in bag.drainers:  # their horizon may have come nearer
                    drainer.wake()
            if back is None:
                bag.append(entry)
            else:
                entry.number = back[2]
                bag.insert(entry)
            entry.live = True
            bag.count += 1
            if back is not None:
                del back[:]
        if bag.readers:
            bag.show(value)
        if taker is not None:
            self._tidy(bag)  # so that what comes before the taker wakes stands in a plain list

    def _take(self, keys: list[str], waiter: Waiter, enroll: bool) -> None:
        """Give the waiter the head of the first key that has one; else enroll it, if asked to."""
        for key in keys:
            bag = self._bags.get(key)
            if type(bag) is not _Bag:
                if bag is None:
                    continue
                number = self._number = self._number + 1
                waiter.found = [bag[0], key, number, None]
                del bag[0]
                if not bag:
                    del self._bags[key]
                return
            if bag.count:
                head = self._head(bag)
                waiter.found = [head.value, key, head.number, head.expires]
                head.value, head.live = None, False
                bag.count -= 1
                self._let_go(bag, head)
                return
        if enroll:
            for key in keys:
                self._bag(key).takers[waiter] = None

    def _forget(self, key: str, waiter: Waiter) -> None:
        bag = self._bags.get(key)
        if type(bag) is _Bag:
            bag.takers.pop(waiter, None)
            bag.readers.pop(waiter, None)
            bag.drainers.pop(waiter, None)
            self._tidy(bag)

    def _let_go(self, bag: _Bag, entry: _Entry) -> None:
        """Clean up behind an entry that was taken."""
        if entry.expires is not None:
            self._taken_early += 1
            self._trim()
        self._settle(bag)

    def _bury_all(self, bag: _Bag) -> list[Any]:
        """Bury all that is live in a bag; what must be let go outside of the lock."""
        return [self._bury(one) if type(one) is _Entry else one for one in bag.entries]

    def _bury(self, entry: _Entry) -> Any:
        """The value of an entry that was replaced."""
        value, entry.value = entry.value, None
        live, entry.live = entry.live, False
        if live and entry.expires is not None:
            self._taken_early += 1
            self._trim()
        return value

    def _trim(self) -> None:
        """Rebuild the heap when half of it was taken early."""
        if self._taken_early * 2 > len(self._expiries):
            kept = [item for item in self._expiries if item[2].live]
            heapq.heapify(kept)
            self._expiries, self._taken_early = kept, 0

    def _settle(self, bag: _Bag) -> None:
        """Let go the dead at the head, and tell those who wait for the key to be empty."""
        bag.skip_dead()
        if not bag.entries:
            for drainer in bag.drainers:
                drainer.wake()
            self._tidy(bag)

    def _sweep(self) -> list[Any] | None:
        """Take out what has expired; the caller holds the values until it has let go the lock."""
        if not self._expiries or self._expiries[0][0] > time.monotonic():
            return None
        now = time.monotonic()
        values = []
        while self._expiries and self._expiries[0][0] <= now:
            _, _, entry, bag = self._expiries[0]
            if entry.live:
                values.append(entry.value)
                entry.live, entry.value = False, None
                bag.count -= 1
            elif self._taken_early:
                self._taken_early -= 1
            if len(bag.entries) > 2 * bag.count:
                bag.entries = deque(
                    one for one in bag.entries if type(one) is not _Entry or one.live
                )
            self._settle(bag)
            heapq.heappop(self._expiries)
        return values


def _expiry(ttl: float | None) -> float | None:
    """The end of a ttl on the monotonic clock."""
    if ttl is None:
        return None
    seconds = check_ttl(ttl)
    return None if seconds is None else time.monotonic() + seconds
