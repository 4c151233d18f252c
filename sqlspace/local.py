"""Local: a space in memory, and the readable model of the semantics.

The law: an entry goes to the taker that has waited longest, directly. So a key that has takers
has no entries, a key that has entries has no takers, and nobody who comes later can get in
between. Every state change happens under the one lock, and values are let go outside of it, for
their destructors may call in again.

An entry is there while it is `live`, and the bag's `count` says how many are. Both change in plain
stores beside the one that hands the entry on, with no call between them, so that Ctrl-C finds
either all of it done or nothing. All else (dead entries in the deques and in the heap, empty bags)
is swept up afterwards, by the same call or, if that was cut off, by a later one.

A key exists as a `_Bag` for as long as something stands or waits under it, and not longer.
"""

import heapq
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from .arguments import check_key, check_keys, check_ttl
from .errors import ClosedError
from .space import Context
from .waiting import MISSING, Waiter, surely, wait

__all__ = ["Local"]


class _Entry:
    __slots__ = ("bag", "expires", "live", "number", "returned", "value")

    def __init__(self, value: Any, expires: float | None) -> None:
        self.value = value
        self.expires = expires  # on the monotonic clock
        self.live = False  # it stands in its bag, neither taken nor expired
        self.returned = False  # taken, but by a call that raised: another stands in its place
        self.number = 0  # its place: entries of a key stand in this order
        self.bag: _Bag


class _Bag:
    """What stands and who waits under one key."""

    __slots__ = ("count", "drainers", "entries", "key", "readers", "takers")

    def __init__(self, key: str) -> None:
        self.key = key
        self.entries: deque[_Entry] = deque()  # the first of them is live
        self.count = 0  # of the live ones
        self.takers: OrderedDict[Waiter, None] = OrderedDict()
        self.readers: dict[Waiter, None] = {}
        self.drainers: dict[Waiter, None] = {}

    def head(self) -> _Entry:
        """The first live entry of a bag that has one."""
        while not self.entries[0].live:  # left by a call that was cut off
            self.entries.popleft()
        return self.entries[0]

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
        self._bags: dict[str, _Bag] = {}
        self._closed = False
        self._number = 0  # the last that was given
        # A heap of (when, a number that keeps it from comparing entries, entry).
        self._expiries: list[tuple[float, int, _Entry]] = []
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
        if type(key) is not str or key not in self._bags:
            key = check_key(key)
        entry = _Entry(value, None if ttl is None else _expiry(ttl))
        with self._lock:
            _expired = self._sweep() if self._expiries else None
            if not self._closed:
                self._add(key, entry)

    def put(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Make `value` the one entry of `key`, in place of all that it held, in one step.

        Args:
            key: As in `out`.
            value: Any object.
            ttl: As in `out`.
        """
        key = check_key(key)
        entry = _Entry(value, _expiry(ttl))
        with self._lock:
            _expired = self._sweep()
            if self._closed:
                return
            old = self._bags.get(key)
            if old is None or not old.count:
                self._add(key, entry)
                return
            new = _Bag(key)
            new.readers, new.drainers = old.readers, old.drainers
            self._add(key, entry, bag=new)
            self._bags[key] = new
            _replaced = self._bury_all(old)

    def out_if_empty(self, key: str, value: Any) -> bool:
        """Add `value` if `key` holds no entry, in one step; whether it was added."""
        key = check_key(key)
        with self._lock:
            _expired = self._sweep()
            bag = self._bags.get(key)
            if self._closed or (bag is not None and bag.count):
                return False
            self._add(key, _Entry(value, None))
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
        entry = self._in([check_key(key)], timeout, context)
        # The heap may hold the entry on. No call from here, so that no Ctrl-C loses the value.
        value, entry.value = entry.value, None
        return value

    def in_any(
        self, keys: Iterable[str], timeout: float | None = None, *, context: Context | None = None
    ) -> tuple[str, Any]:
        """Take the head of the first listed key that has one, waiting for one; raises as `in_`.

        Returns:
            The key, and the value taken from it.
        """
        entry = self._in(check_keys(keys), timeout, context)
        value, entry.value = entry.value, None
        return entry.bag.key, value

    def rd(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Return the head of `key` and leave it there, waiting for one; raises as `in_`."""
        key = check_key(key)

        def look(waiter: Waiter, enroll: bool) -> None:
            with self._lock:
                self._ensure_open()
                if waiter.found is not MISSING:  # out() has put it there
                    return
                _expired = self._sweep()
                bag = self._bags.get(key)
                if bag is not None and bag.count:
                    waiter.found = bag.head().value
                elif enroll:
                    self._bag(key).readers[waiter] = None

        return self._wait(look, [key], timeout, context)

    def nrd(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> None:
        """Wait until `key` holds no entry, by takers or by expiry; raises as `in_`."""
        key = check_key(key)

        def look(waiter: Waiter, enroll: bool) -> None:
            with self._lock:
                self._ensure_open()
                _expired = self._sweep()
                bag = self._bags.get(key)
                if bag is None or not bag.count:
                    waiter.found = None
                elif enroll:
                    bag.drainers[waiter] = None

        def horizon() -> float | None:
            with self._lock:  # no later than the first entry of this key that expires
                return self._expiries[0][0] - time.monotonic() if self._expiries else None

        self._wait(look, [key], timeout, context, horizon=horizon)

    def inp(self, key: str, default: Any = None) -> Any:
        """Take the head of `key`, or return `default`; never waits."""
        if type(key) is not str or key not in self._bags:
            key = check_key(key)
        taken = None
        try:
            with self._lock:
                _expired = self._sweep() if self._expiries else None
                bag = self._bags.get(key)
                if bag is None or not bag.count:
                    return default
                entry = bag.head()
                entry.live, taken = False, entry
                bag.count -= 1
                self._let_go(bag, entry)
        except BaseException:  # Ctrl-C
            if taken is not None:
                try:
                    surely(lambda: self._give_back(entry))
                except (KeyboardInterrupt, SystemExit):  # on the way into it
                    surely(lambda: self._give_back(entry))
            raise
        value, taken.value = taken.value, None
        return value

    def rdp(self, key: str, default: Any = None) -> Any:
        """Return the head of `key` and leave it there, or return `default`; never waits."""
        key = check_key(key)
        with self._lock:
            _expired = self._sweep()
            bag = self._bags.get(key)
            return bag.head().value if bag is not None and bag.count else default

    # -- looking

    def len(self, key: str) -> int:
        """How many entries `key` holds; the expired don't count."""
        key = check_key(key)
        with self._lock:
            _expired = self._sweep()
            bag = self._bags.get(key)
            return bag.count if bag is not None else 0

    def keys(self) -> list[str]:
        """The keys that hold at least one entry, sorted."""
        with self._lock:
            _expired = self._sweep()
            return sorted(key for key, bag in self._bags.items() if bag.count)

    # -- closing

    def close(self) -> None:
        """End every wait with `ClosedError`; idempotent. What stands here can still be probed."""
        with self._lock:
            self._closed = True
            for bag in self._bags.values():
                for waiter in (*bag.takers, *bag.readers, *bag.drainers):
                    waiter.wake()

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

    def _in(self, keys: list[str], timeout: float | None, context: Context | None) -> _Entry:
        """Take from the first of `keys` that has an entry."""

        def take(waiter: Waiter) -> None:
            for key in keys:
                bag = self._bags.get(key)
                if bag is not None and bag.count:
                    entry = bag.head()
                    entry.live, waiter.found = False, entry
                    bag.count -= 1
                    self._let_go(bag, entry)
                    return

        def queue(waiter: Waiter) -> None:
            for key in keys:
                self._bag(key).takers[waiter] = None

        def look(waiter: Waiter, enroll: bool) -> None:
            with self._lock:
                self._ensure_open()
                if waiter.found is not MISSING:  # out() has handed it over
                    return
                _expired = self._sweep() if self._expiries else None
                take(waiter)
                if enroll and waiter.found is MISSING:
                    queue(waiter)

        def restore(waiter: Waiter) -> None:
            self._give_back(waiter.found)

        found: _Entry = self._wait(look, keys, timeout, context, restore=restore)
        return found

    def _give_back(self, taken: _Entry) -> None:
        """Put what a call took, and will not return, back in its place. Idempotent."""
        with self._lock:
            if taken.returned:
                return
            back = _Entry(taken.value, taken.expires)
            back.number = taken.number
            if back.expires is None or back.expires > time.monotonic():
                self._add(taken.bag.key, back, origin=taken)
            taken.value = None

    def _wait(
        self,
        look: Callable[[Waiter, bool], None],
        keys: list[str],
        timeout: float | None,
        context: Context | None,
        *,
        restore: Callable[[Waiter], None] = lambda _waiter: None,
        horizon: Callable[[], float | None] = lambda: None,
    ) -> Any:
        def forget(waiter: Waiter) -> None:
            for key in keys:
                bag = self._bags.get(key)
                if bag is not None:
                    bag.takers.pop(waiter, None)
                    bag.readers.pop(waiter, None)
                    bag.drainers.pop(waiter, None)
                    self._tidy(bag)

        def leave(waiter: Waiter) -> None:
            with self._lock:
                forget(waiter)

        return wait(
            look,
            leave=leave,
            restore=restore,
            ensure_open=self._ensure_open,
            timeout=timeout,
            context=context,
            horizon=horizon,
        )

    # -- what is done under the lock

    def _ensure_open(self) -> None:
        if self._closed:
            raise ClosedError("the Local is closed")

    def _bag(self, key: str) -> _Bag:
        bag = self._bags.get(key)
        if bag is None:
            bag = self._bags[key] = _Bag(key)
        return bag

    def _tidy(self, bag: _Bag) -> None:
        """Forget the bag if nothing stands and nobody waits in it."""
        if not (bag.entries or bag.takers or bag.readers or bag.drainers) and (
            self._bags.get(bag.key) is bag
        ):
            del self._bags[bag.key]

    def _add(
        self, key: str, entry: _Entry, *, bag: _Bag | None = None, origin: _Entry | None = None
    ) -> None:
        """Hand the entry to a taker, or have it stand in its place; show it to the readers.

        Args:
            key: Of the entry.
            entry: New, or with the number of its origin.
            bag: Where to; if None, the key's.
            origin: The entry in whose place it comes back.
        """
        if bag is None:
            bag = self._bag(key)
        entry.bag = bag
        value = entry.value
        if origin is None:
            self._number += 1
            entry.number = self._number
        taker = bag.longest_waiting() if bag.takers else None
        if taker is not None:
            taker.found = entry
            if origin is not None:
                origin.returned = True
            taker.wake()
            del bag.takers[taker]
        else:
            if entry.expires is not None:
                self._number += 1
                heapq.heappush(self._expiries, (entry.expires, self._number, entry))
                for drainer in bag.drainers:  # their horizon may have come nearer
                    drainer.wake()
            if origin is None:
                bag.entries.append(entry)
            else:
                before = sum(other.number < entry.number for other in bag.entries)
                bag.entries.insert(before, entry)
            entry.live = True
            bag.count += 1
            if origin is not None:
                origin.returned = True
        if bag.readers:
            bag.show(value)

    def _let_go(self, bag: _Bag, entry: _Entry) -> None:
        """Clean up behind an entry that was taken."""
        if entry.expires is not None:
            self._taken_early += 1
            self._trim()
        self._settle(bag)

    def _bury_all(self, bag: _Bag) -> list[Any]:
        """Bury all that is live in a bag; what must be let go outside of the lock."""
        return [self._bury(gone) for gone in bag.entries if gone.live]

    def _bury(self, entry: _Entry) -> Any:
        """The value of an entry that was replaced."""
        value, entry.value = entry.value, None
        entry.live = False
        if entry.expires is not None:
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
        entries = bag.entries
        while entries and not entries[0].live:
            entries.popleft()
        if not entries:
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
            entry = self._expiries[0][2]
            bag = entry.bag
            if entry.live:
                values.append(entry.value)
                entry.live, entry.value = False, None
                bag.count -= 1
            elif self._taken_early:
                self._taken_early -= 1
            if len(bag.entries) > 2 * bag.count:
                bag.entries = deque(other for other in bag.entries if other.live)
            self._settle(bag)
            heapq.heappop(self._expiries)
        return values


def _expiry(ttl: float | None) -> float | None:
    """The end of a ttl on the monotonic clock."""
    if ttl is None:
        return None
    seconds = check_ttl(ttl)
    return None if seconds is None else time.monotonic() + seconds
