"""The conformance suite: a right backend passes, and each planted bug is told by its law's name."""

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest

from sqlspace import ClosedError, Context, Local, Space, aio, testing
from sqlspace.testing import check_async_space, check_space, laws
from sqlspace.waiting import Waiter

PATIENCE_SECONDS = 1.0  # only a broken backend uses it up


class LastInFirstOut(Local):
    def inp(self, key, default=None):
        taken = [super(LastInFirstOut, self).inp(key) for _ in range(self.len(key))]
        for value in taken[:-1]:
            self.out(key, value)
        return taken[-1] if taken else default


class OneBagForAllKeys(Local):
    def out(self, key, value, **ttl):
        super().out(key and "same", value, **ttl)

    def len(self, key):
        return super().len(key and "same")

    def inp(self, key, default=None):
        return super().inp(key and "same", default)


class KeysWithoutCase(Local):
    def out(self, key, value, **ttl):
        super().out(key if type(key) is not str else key.lower(), value, **ttl)


class ShortKeys(Local):
    def out(self, key, value, **ttl):
        if isinstance(key, str) and len(key) > 200:
            raise ValueError("too long")
        super().out(key, value, **ttl)


class AnyKey(Local):
    def len(self, key):
        return super().len(key) if key else 0


class ReadThatTakes(Local):
    def rd(self, key, timeout=None, *, context=None):
        return self.in_(key, timeout, context=context)


class ProbeThatTakes(Local):
    def rdp(self, key, default=None):
        return self.inp(key, default)


class NoneIsAbsent(Local):
    def inp(self, key, default=None):
        value = super().inp(key)
        return default if value is None else value


class FalsyIsAbsent(Local):
    def rdp(self, key, default=None):
        return super().rdp(key) or default


class TextOnly(Local):
    def out(self, key, value, **ttl):
        super().out(key, str(value), **ttl)


class StaleCount(Local):
    def len(self, key):
        return min(super().len(key), 3)


class NoDefault(Local):
    def inp(self, key):
        return super().inp(key)


class ZeroDoesNotLook(Local):
    def in_(self, key, timeout=None, *, context=None):
        if timeout == 0:
            raise TimeoutError
        return super().in_(key, timeout, context=context)


class ExpiredContextDoesNotLook(Local):
    def rd(self, key, timeout=None, *, context=None):
        if context is not None and context.deadline == context.deadline:
            super().rd("\N{SNOWMAN}", 0)
        return super().rd(key, timeout, context=context)


class NeverTooLate(Local):
    def in_(self, key, timeout=None, *, context=None):
        return super().in_(key, timeout if timeout in (0, None) else None, context=context)


class GivesUpEarly(Local):
    def in_(self, key, timeout=None, *, context=None):
        return super().in_(key, 0 if timeout == 0.02 else timeout, context=context)


class ForeignTimeout(Local):
    def in_(self, key, timeout=None, *, context=None):
        try:
            return super().in_(key, timeout, context=context)
        except TimeoutError as error:
            raise LookupError("queue.Empty") from error


class NegativeTimeoutLooks(Local):
    def in_(self, key, timeout=None, *, context=None):
        if type(timeout) in (int, float) and timeout < 0:
            timeout = 0
        return super().in_(key, timeout, context=context)


class NanWaits(Local):
    def rd(self, key, timeout=None, *, context=None):
        return super().rd(key, None if timeout != timeout else timeout, context=context)


class NoInfinity(Local):
    def in_(self, key, timeout=None, *, context=None):
        if timeout is not None and timeout > 2**40:
            raise OverflowError("timeout is too large")
        return super().in_(key, timeout, context=context)


class OutWakesNobody(Local):
    def out(self, key, value, **ttl):
        if type(key) is str:
            self._bags.pop(key, None)
        super().out(key, value, **ttl)


class OneReaderOnly(Local):
    def out(self, key, value, **ttl):
        if key in self._bags:
            for reader in list(self._bags[key].readers)[1:]:
                del self._bags[key].readers[reader]
        super().out(key, value, **ttl)


class WakesAcrossKeys(Local):
    def out(self, key, value, **ttl):
        with self._lock:
            for bag in list(self._bags.values()):
                if bag.takers and bag.key != key:
                    bag.takers.popitem()[0].found = bag  # it wakes with what isn't its own
        super().out(key, value, **ttl)


class DeliversTwice(Local):
    def in_(self, key, timeout=None, *, context=None):
        value = super().in_(key, timeout, context=context)
        if value == 77:
            self.out(key, value)
        return value


class LosesOne(Local):
    def out(self, key, value, **ttl):
        if value != 77:
            super().out(key, value, **ttl)


class EatsAfterTimeout(Local):
    def in_(self, key, timeout=None, *, context=None):
        try:
            return super().in_(key, timeout, context=context)
        except TimeoutError:
            if timeout:
                with self._lock:
                    self._bag(key).takers[Waiter()] = None
            raise


class EatsAfterCancel(Local):
    def in_(self, key, timeout=None, *, context=None):
        try:
            return super().in_(key, timeout, context=context)
        except Exception:
            if context is not None and context.canceled and timeout is None:
                with self._lock:
                    self._bag(key).takers[Waiter()] = None
            raise


class CancelWakesNobody(Local):
    def in_(self, key, timeout=None, *, context=None):
        if context is not None and not context.canceled:
            context = Context()
        return super().in_(key, timeout, context=context)


class CancelTakesAllWithIt(Local):
    def in_(self, key, timeout=None, *, context=None):
        try:
            return super().in_(key, timeout, context=context)
        except Exception:
            if context is not None and context.canceled:
                self.close()
            raise


class EntryBeforeCancel(Local):
    def in_(self, key, timeout=None, *, context=None):
        try:
            return super().in_(key, 0)
        except TimeoutError:
            return super().in_(key, timeout, context=context)


class TimeBeforeCancel(Local):
    def in_(self, key, timeout=None, *, context=None):
        over = context is not None and context.canceled and context.deadline is not None
        return super().in_(key, timeout, context=Context(0) if over else context)


class ContextForOne(Local):
    def in_(self, key, timeout=None, *, context=None):
        value = super().in_(key, timeout, context=context)
        if context is not None and context.deadline is not None:
            context.cancel()
        return value


class CloseWakesNobody(Local):
    def close(self):
        self._closed = True


class CloseWakesReadersOnly(Local):
    def close(self):
        with self._lock:
            self._closed = True
            for bag in self._bags.values():
                for waiter in bag.readers:
                    waiter.wake()


class CloseOnce(Local):
    def close(self):
        if self._closed:
            raise ClosedError("closed already")
        super().close()


class ClosedStillGives(Local):
    def in_(self, key, timeout=None, *, context=None):
        if self._closed and self.len(key):
            return self.inp(key)
        return super().in_(key, timeout, context=context)


class ClosedTakesIn(Local):
    def out(self, key, value, **ttl):
        closed, self._closed = self._closed, False
        super().out(key, value, **ttl)
        self._closed = closed


class ClosedForgets(Local):
    def close(self):
        super().close()
        self._bags.clear()


class ClosedBeforeMisuse(Local):
    def in_(self, key, timeout=None, *, context=None):
        if self._closed:
            raise ClosedError("closed")
        return super().in_(key, timeout, context=context)


class BlockStaysOpen(Local):
    def __exit__(self, *_: object):
        pass


class BlockSwallows(Local):
    def __exit__(self, *_: object):
        self.close()
        return True


class NoContextManager:
    """All verbs, passed on, and nothing else."""

    def __init__(self):
        local = Local()
        for verb in ("out", "in_", "rd", "inp", "rdp", "len", "close"):
            setattr(self, verb, getattr(local, verb))


class Breaks(Local):
    def rdp(self, key, default=None):
        raise RuntimeError("the server is gone")


class Hangs(Local):
    def inp(self, key, default=None):
        threading.Event().wait()


PLANTED: list[tuple[str, type]] = [
    ("is_a_space", NoContextManager),
    ("a_new_space_is_empty", NoDefault),
    ("a_new_space_is_empty", Breaks),
    ("a_new_space_is_empty", Hangs),
    ("entries_are_taken_in_order", LastInFirstOut),
    ("entries_are_taken_in_order", ZeroDoesNotLook),
    ("keys_are_independent", OneBagForAllKeys),
    ("every_key_within_the_limits_is_one", KeysWithoutCase),
    ("every_key_within_the_limits_is_one", ShortKeys),
    ("wrong_keys_are_refused", AnyKey),
    ("values_come_back", TextOnly),
    ("falsy_values_are_values", NoneIsAbsent),
    ("falsy_values_are_values", FalsyIsAbsent),
    ("reading_takes_nothing", ReadThatTakes),
    ("reading_takes_nothing", ProbeThatTakes),
    ("len_counts_the_entries", StaleCount),
    ("a_wait_always_looks_once", ZeroDoesNotLook),
    ("a_wait_always_looks_once", ExpiredContextDoesNotLook),
    ("a_wait_always_looks_once", ForeignTimeout),
    ("a_wait_ends_in_time", NeverTooLate),
    ("a_wait_ends_in_time", GivesUpEarly),
    ("a_wait_ends_in_time", ForeignTimeout),
    ("a_wait_without_end_waits", NoInfinity),
    ("a_wait_without_end_waits", OutWakesNobody),
    ("wrong_bounds_are_refused", NegativeTimeoutLooks),
    ("wrong_bounds_are_refused", NanWaits),
    ("out_wakes_a_taker", OutWakesNobody),
    ("out_wakes_readers", OutWakesNobody),
    ("out_wakes_readers", OneReaderOnly),
    ("each_taker_waits_for_its_own_key", WakesAcrossKeys),
    ("every_taker_is_woken", OutWakesNobody),
    ("each_entry_is_taken_once", DeliversTwice),
    ("each_entry_is_taken_once", LosesOne),
    ("a_wait_whose_time_is_over_takes_nothing", EatsAfterTimeout),
    ("a_canceled_wait_takes_nothing", EatsAfterCancel),
    ("cancel_ends_waits", CancelWakesNobody),
    ("cancel_ends_waits", CancelTakesAllWithIt),
    ("cancel_is_sticky", EntryBeforeCancel),
    ("one_context_bounds_many_waits", ContextForOne),
    ("a_wait_asks_in_order", TimeBeforeCancel),
    ("a_wait_asks_in_order", EntryBeforeCancel),
    ("close_ends_waits", CloseWakesNobody),
    ("close_ends_waits", CloseWakesReadersOnly),
    ("close_is_idempotent", CloseOnce),
    ("a_closed_space_waits_for_nothing", ClosedStillGives),
    ("a_closed_space_takes_in_nothing", ClosedTakesIn),
    ("a_closed_space_takes_in_nothing", ClosedForgets),
    ("misuse_comes_before_close", ClosedBeforeMisuse),
    ("leaving_the_block_closes", BlockStaysOpen),
    ("leaving_the_block_closes", BlockSwallows),
]


def test_local_keeps_the_law():
    """Local is a right backend."""
    assert check_space(Local) is None


def test_every_law_is_put_to_a_space_of_its_own():
    """make_space() is called once for each law, and each space is closed afterwards."""
    made: list[Any] = []

    def make_space() -> Space:
        made.append(Local())
        return made[-1]

    check_space(make_space)
    assert len(made) == len(testing.LAWS) == len({law.__doc__ for law in testing.LAWS})
    assert all(space._closed for space in made)


@pytest.mark.parametrize(("law", "backend"), PLANTED, ids=lambda it: getattr(it, "__name__", it))
def test_a_planted_bug_is_told_by_its_law(law, backend, monkeypatch):
    """A broken backend raises AssertionError with the sentence and the name of the law."""
    # A park doesn't look again by itself, so that a lost wake-up isn't healed.
    monkeypatch.setattr("sqlspace.waiting.LOOK_AGAIN_SECONDS", 3600.0)
    # The others may catch it too; this one must.
    monkeypatch.setattr(testing, "LAWS", (getattr(laws, law),))
    with pytest.raises(AssertionError) as raised:
        check_space(backend, patience_seconds=PATIENCE_SECONDS)
    sentence = " ".join(getattr(laws, law).__doc__.split())
    assert str(raised.value).startswith(f"{sentence} ({law}): ")


def test_every_law_is_broken_by_a_planted_bug():
    """A law that no planted bug breaks would prove nothing."""
    assert {law.__name__ for law in testing.LAWS} == {law for law, _ in PLANTED}


class NotAllAsync(aio.Local):
    def len(self, key):
        return super().len(key)


class LosesWhatIsCancelled(aio.Local):
    async def in_(self, key):
        value = await super().in_(key)
        await asyncio.sleep(0)
        return value


class OneWaitAtATime(aio.Local):
    def __init__(self):
        super().__init__()
        self._one = asyncio.Lock()

    async def in_(self, key):
        if self._one.locked():
            raise RuntimeError("too many")
        async with self._one:
            return await super().in_(key)


class LastInFirstOutAsync(aio.Local):
    async def inp(self, key, default=None):
        taken = [
            await super(LastInFirstOutAsync, self).inp(key) for _ in range(await self.len(key))
        ]
        for value in taken[:-1]:
            await self.out(key, value)
        return taken[-1] if taken else default


PLANTED_ASYNC = [
    ("is_an_async_space", NotAllAsync),
    ("a_cancelled_take_loses_nothing", LosesWhatIsCancelled),
    ("many_tasks_wait_at_once", OneWaitAtATime),
    ("entries_are_taken_in_order", LastInFirstOutAsync),
]


@pytest.mark.parametrize(
    ("law", "backend"), PLANTED_ASYNC, ids=lambda it: getattr(it, "__name__", it)
)
def test_a_planted_bug_of_an_async_backend_is_told_by_its_law(law, backend, monkeypatch):
    """Those of a Space, and those that only coroutines can break."""
    (broken,) = [each for each in testing.ASYNC_LAWS if each.__name__ == law]
    monkeypatch.setattr(testing, "ASYNC_LAWS", (broken,))
    with pytest.raises(AssertionError, match=rf"\({law}\): "):
        check_async_space(backend, patience_seconds=PATIENCE_SECONDS)


def test_every_async_law_stands_in_one_of_the_tables():
    """None is there that no planted bug breaks."""
    own = {law.__name__ for law in testing.ASYNC_LAWS} - {law.__name__ for law in testing.LAWS}
    assert own == {law for law, _ in PLANTED_ASYNC} - {"entries_are_taken_in_order"}


def test_what_the_backend_raised_is_the_cause():
    """An exception of the backend's own is told in the sentence and attached."""
    with pytest.raises(AssertionError, match="the server is gone") as raised:
        check_space(Breaks, patience_seconds=PATIENCE_SECONDS)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_the_suite_needs_no_pytest_and_no_asserts():
    """A user runs it in a plain interpreter, with -O too, and it still sees a broken backend."""
    script = """
import sys
from sqlspace import Local
from sqlspace.testing import check_async_space, check_space, laws
check_space(Local)
class Broken(Local):
    def rdp(self, key, default=None):
        return self.inp(key, default)
try:
    check_space(Broken)
except AssertionError:
    print(sorted({"pytest", "unittest"} & set(sys.modules)), __debug__)
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[] False\n"
