"""Local: a space in memory, and the readable model of the semantics.

The law: an entry goes to the taker that has waited longest, directly. So a key that has takers
has no entries, a key that has entries has no takers, and nobody who comes later can get in
between. Every state change happens under the one lock, and values are let go outside of it, for
their destructors may call in again.

A key exists as a `_Bag` for as long as something stands or waits under it, and not longer.
"""

import heapq
import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from .arguments import check_key, check_keys, check_ttl
from .errors import ClosedError
from .space import Context
from .waiting import MISSING, Waiter, wait

__all__ = ["Local"]


class _Entry:
    __slots__ = ("expires", "live", "value")

    def __init__(self, value: Any, expires: float | None) -> None:
        self.value = value
        self.expires = expires  # on the monotonic clock
        self.live = True  # neither taken nor expired


class _Bag:
    """What stands and who waits under one key."""

    __slots__ = ("drainers", "entries", "expired", "readers", "takers")

    def __init__(self) -> None:
        self.entries: deque[_Entry] = deque()
        self.expired = 0  # how many of them have expired; none of these is the first
        self.takers: OrderedDict[Waiter, None] = OrderedDict()
        self.readers: dict[Waiter, None] = {}
        self.drainers: dict[Waiter, None] = {}

    def __len__(self) -> int:
        return len(self.entries) - self.expired

    def is_idle(self) -> bool:
        return not (self.entries or self.takers or self.readers or self.drainers)


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
        self._expiries: list[tuple[float, int, str, _Entry]] = []  # a heap
        self._number = itertools.count()  # keeps the heap from comparing entries
        self._taken_early = 0  # entries in the heap that were taken before they expired

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
        entry = _Entry(value, _expiry(ttl))
        with self._lock:
            self._sweep()
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
        replaced: Iterable[_Entry] = ()
        with self._lock:
            self._sweep()
            if self._closed:
                return
            bag = self._bags.get(key)
            if bag is not None:
                replaced, bag.entries, bag.expired = bag.entries, deque(), 0
                for old in replaced:
                    self._retire(old)
            self._add(key, entry)
        del replaced  # the values go here, outside of the lock

    def out_if_empty(self, key: str, value: Any) -> bool:
        """Add `value` if `key` holds no entry, in one step; whether it was added."""
        key = check_key(key)
        with self._lock:
            self._sweep()
            bag = self._bags.get(key)
            if self._closed or (bag is not None and len(bag)):
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
        return self._in([check_key(key)], timeout, context)[1].value

    def in_any(
        self, keys: Iterable[str], timeout: float | None = None, *, context: Context | None = None
    ) -> tuple[str, Any]:
        """Take the head of the first listed key that has one, waiting for one; raises as `in_`.

        Returns:
            The key, and the value taken from it.
        """
        key, entry = self._in(check_keys(keys), timeout, context)
        return key, entry.value

    def rd(self, key: str, timeout: float | None = None, *, context: Context | None = None) -> Any:
        """Return the head of `key` and leave it there, waiting for one; raises as `in_`."""
        key = check_key(key)

        def look(waiter: Waiter, enroll: bool) -> None:
            with self._lock:
                self._ensure_open()
                if waiter.found is not MISSING:  # out() has put it there
                    return
                self._sweep()
                bag = self._bags.get(key)
                if bag is not None and bag.entries:
                    waiter.found = bag.entries[0]
                elif enroll:
                    self._bag(key).readers[waiter] = None

        def leave(waiter: Waiter) -> None:
            with self._lock:
                bag = self._bags.get(key)
                if bag is not None:
                    bag.readers.pop(waiter, None)
                    self._tidy(key, bag)

        return self._wait(look, leave, timeout, context).value

    def nrd(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> None:
        """Wait until `key` holds no entry, by takers or by expiry; raises as `in_`."""
        key = check_key(key)

        def look(waiter: Waiter, enroll: bool) -> None:
            with self._lock:
                self._ensure_open()
                self._sweep()
                bag = self._bags.get(key)
                if bag is None or not bag.entries:
                    waiter.found = None
                elif enroll:
                    bag.drainers[waiter] = None

        def leave(waiter: Waiter) -> None:
            with self._lock:
                bag = self._bags.get(key)
                if bag is not None:
                    bag.drainers.pop(waiter, None)
                    self._tidy(key, bag)

        def horizon() -> float | None:
            with self._lock:
                bag = self._bags.get(key)
                ends = [entry.expires for entry in bag.entries] if bag is not None else []
            times = [end for end in ends if end is not None]
            return max(times) - time.monotonic() if times and len(times) == len(ends) else None

        self._wait(look, leave, timeout, context, horizon=horizon)

    def inp(self, key: str, default: Any = None) -> Any:
        """Take the head of `key`, or return `default`; never waits."""
        if type(key) is not str or key not in self._bags:
            key = check_key(key)
        with self._lock:
            self._sweep()
            bag = self._bags.get(key)
            if bag is None or not bag.entries:
                return default
            return self._pop(key, bag).value

    def rdp(self, key: str, default: Any = None) -> Any:
        """Return the head of `key` and leave it there, or return `default`; never waits."""
        key = check_key(key)
        with self._lock:
            self._sweep()
            bag = self._bags.get(key)
            return bag.entries[0].value if bag is not None and bag.entries else default

    # -- looking

    def len(self, key: str) -> int:
        """How many entries `key` holds; the expired don't count."""
        key = check_key(key)
        with self._lock:
            self._sweep()
            bag = self._bags.get(key)
            return len(bag) if bag is not None else 0

    def keys(self) -> list[str]:
        """The keys that hold at least one entry, sorted."""
        with self._lock:
            self._sweep()
            return sorted(key for key, bag in self._bags.items() if len(bag))

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

    def _in(
        self, keys: list[str], timeout: float | None, context: Context | None
    ) -> tuple[str, _Entry]:
        """Take from the first of `keys` that has an entry."""

        def look(waiter: Waiter, enroll: bool) -> None:
            with self._lock:
                self._ensure_open()
                if waiter.found is not MISSING:  # out() has handed it over
                    return
                self._sweep()
                for key in keys:
                    bag = self._bags.get(key)
                    if bag is not None and bag.entries:
                        waiter.found = key, bag.entries[0]  # noted before it leaves the bag
                        self._pop(key, bag)
                        return
                if enroll:
                    for key in keys:
                        self._bag(key).takers[waiter] = None

        def leave(waiter: Waiter) -> None:
            with self._lock:
                for key in keys:
                    bag = self._bags.get(key)
                    if bag is not None:
                        bag.takers.pop(waiter, None)
                        self._tidy(key, bag)

        def restore(waiter: Waiter) -> None:
            with self._lock:
                if waiter.found is MISSING:
                    return
                key, entry = waiter.found
                bag = self._bags.get(key)
                if bag is None or not bag.entries or bag.entries[0] is not entry:
                    self._add(key, _Entry(entry.value, entry.expires), at_head=True)
                waiter.found = MISSING

        found: tuple[str, _Entry] = self._wait(look, leave, timeout, context, restore=restore)
        return found

    def _wait(
        self,
        look: Any,
        leave: Any,
        timeout: float | None,
        context: Context | None,
        *,
        restore: Any = lambda _waiter: None,
        horizon: Any = lambda: None,
    ) -> Any:
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
            bag = self._bags[key] = _Bag()
        return bag

    def _tidy(self, key: str, bag: _Bag) -> None:
        if bag.is_idle() and self._bags.get(key) is bag:
            del self._bags[key]

    def _add(self, key: str, entry: _Entry, *, at_head: bool = False) -> None:
        bag = self._bag(key)
        for reader in bag.readers:
            reader.found = entry
            reader.wake()
        bag.readers.clear()
        while bag.takers:
            taker, _ = bag.takers.popitem(last=False)
            if taker.found is MISSING:  # else another of its keys was faster
                taker.found = key, entry
                entry.live = False
                taker.wake()
                self._tidy(key, bag)
                return
        if at_head:
            bag.entries.appendleft(entry)
        else:
            bag.entries.append(entry)
        if entry.expires is not None:
            heapq.heappush(self._expiries, (entry.expires, next(self._number), key, entry))

    def _pop(self, key: str, bag: _Bag) -> _Entry:
        """Take the head of a bag that has one."""
        entry = bag.entries.popleft()
        self._retire(entry)
        self._settle(key, bag)
        return entry

    def _retire(self, entry: _Entry) -> None:
        """Note that a live entry has left; the heap is rebuilt when half of it has."""
        if entry.live and entry.expires is not None:
            self._taken_early += 1
            if self._taken_early * 2 > len(self._expiries):
                entry.live = False
                self._expiries = [item for item in self._expiries if item[3].live]
                heapq.heapify(self._expiries)
                self._taken_early = 0
        entry.live = False

    def _settle(self, key: str, bag: _Bag) -> None:
        """Let go the expired at the head, and tell those who wait for the key to be empty."""
        while bag.entries and not bag.entries[0].live:
            bag.entries.popleft()
            bag.expired -= 1
        if not bag.entries:
            for waiter in bag.drainers:
                waiter.wake()
            self._tidy(key, bag)

    def _sweep(self) -> None:
        """Take out what has expired."""
        if not self._expiries or self._expiries[0][0] > time.monotonic():
            return
        now = time.monotonic()
        swept: dict[str, None] = {}
        while self._expiries and self._expiries[0][0] <= now:
            _, _, key, entry = heapq.heappop(self._expiries)
            if entry.live:
                entry.live = False
                self._bags[key].expired += 1
                swept[key] = None
            else:
                self._taken_early -= 1
        for key in swept:
            bag = self._bags[key]
            if bag.expired * 2 > len(bag.entries):
                bag.entries = deque(entry for entry in bag.entries if entry.live)
                bag.expired = 0
            self._settle(key, bag)


def _expiry(ttl: float | None) -> float | None:
    """The end of a ttl on the monotonic clock."""
    if ttl is None:
        return None
    seconds = check_ttl(ttl)
    return None if seconds is None else time.monotonic() + seconds
