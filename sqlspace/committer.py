"""One writer at a time, many operations a commit.

A commit under fsync costs the same for one operation as for a hundred. So whoever finds nobody at
work leads: it carries out its own operation, and with it, in one transaction, all that joined the
queue until then. Whoever finds a leader at work joins, and is answered after the next commit. No
thread is kept for it, and an operation that is alone is committed by itself, at no cost.

While another process is at work, operations stay in the queue, and a helper thread waits at the
turnstile. It commits for all of them, and only then are they woken. To hand the turn over to a
caller, while everybody waits, gave 6.6k to 7.1k commits a second of 8 processes instead of 8.7k to
9.9k.

An operation is in the queue, or in one leader's hands, or finished. Whoever has led, and whoever
leaves the queue, wakes the first one there that may lead. So while the queue isn't empty, somebody
leads, or the helper waits, or somebody has been woken to lead.

Nobody leads past a transaction that waits for its turn: while others pushed as fast as they could,
one waited 2 to 5 s.

No lock guards the queue. Each change of it is one C call, which an interrupt can't cut in two, and
a signal's handler in the middle of anything here finds nothing taken that it, or a fork, must wait
for. Under a lock it did, and hung.
"""

import contextlib
import itertools
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .connection import Connection
from .errors import SpaceError, StoreError
from .turnstile import Turnstile
from .waiting import Waiter, surely

__all__ = [
    "Committer",
    "Operation",
    "Seizure",
    "Step",
    "Work",
]

_ACQUIRE = operator.methodcaller("acquire")

Step = Callable[[Connection], Iterable[str]]
"""Work on the connection; returns the doorbell's tokens to ring for."""

# The rest waits for the next commit, so that none of them takes without end.
BATCH_OPERATIONS = 256


class Operation:
    """What a verb does to the file; carried out by whoever leads, and again if it is rolled back.

    Attributes:
        whole: Whether it takes several statements, so that it needs a transaction for itself.
        besides: The caller's own waiter, which needs no ring.
        adds: How many bytes it pushes, for which there must be room besides the reserve. None: it
            takes, and may use the reserve.
        largest: Bytes of the largest entry of these.
        done: Not empty while something of it stands that `undo` would take back. It is filled in
            the C call that makes it stand, so that no Ctrl-C comes in between.
        tokens: To ring for.
        tidies: Whether it is one of those behind which the file is tidied.
        finished: Whether it was carried out, or refused.
        error: Why it was refused.
        deadline: On the monotonic clock, until when it may wait for its turn.
    """

    whole = False
    adds: int | None = None
    largest = 0
    besides: Waiter | None = None
    tokens: Iterable[str] = ()
    tidies = False
    finished = False
    error: BaseException | None = None
    deadline = 0.0
    called_off = False  # by a thread that it isn't waited for in
    awaits = False  # the helper: it has looked already, and there is something to do
    latch: Any = None  # of one that was in the queue

    def __init__(self) -> None:
        self.done: list[Any] = []

    def probe(self, connection: Connection) -> bool:  # noqa: ARG002
        """Asked first, with no lock taken in the file; if False, there is nothing to do."""
        return True

    def step(self, connection: Connection) -> Iterable[str] | None:
        """Do it; the doorbell's tokens to ring for.

        What this raises refuses the operation alone; it must have changed nothing then, or be
        `whole`. None: it changed nothing, for it turned out that it must be `whole`, and is now.
        """
        raise NotImplementedError

    def undo(self, connection: Connection) -> None:
        """Take back what stands, when the call that did it raises after all."""

    def retract(self) -> None:
        """It was rolled back, or undone."""
        self.done.clear()
        self.error = None
        self.tokens = ()


class Work(Operation):
    """An operation of several statements, made of functions."""

    whole = True

    def __init__(
        self,
        step: Step,
        probe: Callable[[Connection], bool] | None = None,
        undo: Callable[[Connection], None] | None = None,
        adds: int | None = None,
        largest: int = 0,
    ) -> None:
        super().__init__()
        self.adds = adds
        self.largest = largest
        self._step = step
        self._probe = probe
        self._undo = undo

    def probe(self, connection: Connection) -> bool:
        """As above."""
        return self._probe is None or self._probe(connection)

    def step(self, connection: Connection) -> Iterable[str]:
        """As above."""
        return self._step(connection)

    def undo(self, connection: Connection) -> None:
        """As above."""
        if self._undo is not None:
            self._undo(connection)


class Seizure(Operation):
    """Takes the turn to write for a transaction of the caller's, in the caller's own thread."""

    def __init__(self) -> None:
        super().__init__()
        self.granted: list[Any] = []  # not empty once the turnstile was entered for it


class File(Protocol):
    """What a committer needs of the database that it commits for."""

    def lead(self, operation: Operation) -> None:
        """With the lock: probe, go in by `Committer.enter`, and commit it with what is queued."""

    def serve(self, turnstile: Turnstile) -> None:
        """With the lock, inside the turnstile: commit what is queued, and leave."""

    def undo(self, operation: Operation) -> None:
        """Take back what a finished operation did."""

    def ensure_usable(self) -> None:
        """Raise why there is nothing more to wait for."""

    def busy(self) -> Exception:
        """What to raise when the time is over."""


class Committer:
    """Who may write to one database of this process, and who waits for that.

    Attributes:
        lock: Held by whoever uses the writing connection.
        leader: The thread that leads, or has a transaction of its own.
        queue: Of operations, in the order they came.
        carried: What the leader has taken from it, and not answered yet.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self.lock = threading.Lock()
        self.leader: int | None = None
        self.carried: list[Operation] = []
        # The threads in the queue; with what `held` gets, of one that seizes.
        self.joined: dict[int, list[Any]] = {}
        self.queue: deque[Operation] = deque()
        self._answered: list[Operation] = []  # was carried; to be woken
        # The helper waits at the turnstile, or has gone in for a seizure; nobody else may enter.
        self.waiting = False
        self._lent = False  # it has
        self._turnstile: Turnstile
        self._go = threading.Lock()  # released to send the helper there
        self._go.acquire()
        self._helper: threading.Thread | None = None
        self._closed = False

    # -- in the caller's thread

    def submit(self, operation: Operation, thread: int) -> None:
        """Have it carried out; what it was refused for is raised.

        What is raised besides, Ctrl-C, leaves it undone.
        """
        try:
            if self.leader is None and not (self.queue and self._is_behind(operation)):
                self._lead(operation, thread)
            if not operation.finished:
                self._join(operation, thread)
        except BaseException as error:
            try:
                interrupt = surely(lambda: self._settle(operation, thread))
            except BaseException:  # on the way into it or out of it
                surely(lambda: self._settle(operation, thread))
                raise
            if interrupt is not None and isinstance(error, Exception):
                raise interrupt from None
            raise
        if operation.error is not None:
            raise operation.error

    def _lead(self, operation: Operation, thread: int) -> None:
        with self.lock:
            self.leader = thread
            try:
                if not operation.finished:  # by another leader, in the meantime
                    queued = operation.latch is not None and self._withdraw(operation)
                    if queued or not operation.called_off:
                        self._file.lead(operation)
            finally:
                self.leader = None
        if self.queue:
            self.wake_first()

    def _join(self, operation: Operation, thread: int) -> None:
        """Wait in the queue until it is finished, leading when nobody else does."""
        try:
            self.joined[thread] = []
            while not operation.finished:
                self.join(operation)
                if operation.called_off and not self._is_in_hand(operation):
                    return
                self._ensure_usable(operation)
                if operation.awaits or self.leader is not None or self._is_behind(operation):
                    self._park(operation)
                    if not operation.finished:
                        self._file.ensure_usable()
                else:
                    self._lead(operation, thread)
        finally:
            self.joined.pop(thread, None)

    def _ensure_usable(self, operation: Operation) -> None:
        """Raise why there is nothing to wait for, unless somebody has begun with it."""
        try:
            self._file.ensure_usable()
        except SpaceError:
            self._withdraw(operation)
            if operation not in self.carried and not operation.finished:
                raise

    def _is_in_hand(self, operation: Operation) -> bool:
        # Asked in the order that it goes.
        return operation in self.queue or operation in self.carried or operation.finished

    def _is_behind(self, operation: Operation) -> bool:
        """Whether a transaction comes first that may go in as soon as nobody leads."""
        for each in list(self.queue):
            if each is operation:
                return False
            if isinstance(each, Seizure) and not each.awaits:
                return True
        return False

    def _park(self, operation: Operation) -> None:
        """Sleep until woken: it is finished, or is to lead, or was rolled back for another's sake.

        Raises:
            BusyError: Its time is over, and nobody has begun with it.
        """
        if operation.latch.acquire(timeout=max(0.0, operation.deadline - time.monotonic())):
            return
        if self._withdraw(operation):
            raise self._file.busy()
        operation.latch.acquire()

    def _settle(self, operation: Operation, thread: int) -> None:
        """Have nothing of it stand: its call raises. Idempotent."""
        self.joined[thread] = []
        self._withdraw(operation)
        while operation in self.carried and not operation.finished:
            operation.latch.acquire()
        if operation.done and operation.finished:
            self._file.undo(operation)
        self.joined.pop(thread, None)
        self.wake_first()

    def seize(self, seizure: Seizure, held: list[Any], enter: Callable[[], bool]) -> None:
        """Take the lock and the turnstile, until `release`, which must follow even if this raises.

        Args:
            seizure: Of this call.
            held: An empty list, which gets the lock.
            enter: With the lock: what `Committer.enter` says.
        """
        thread = threading.get_ident()
        try:
            self.joined[thread] = held
            while not self._has_seized(seizure, held, enter):
                self._file.ensure_usable()
                if seizure.awaits or self.leader is not None or self._is_behind(seizure):
                    self._park(seizure)
        except BaseException as error:
            try:
                interrupt = surely(lambda: self._give_up(seizure, held))
            except BaseException:  # on the way into it or out of it
                surely(lambda: self._give_up(seizure, held))
                raise
            if interrupt is not None and isinstance(error, Exception):
                raise interrupt from None
            raise
        finally:
            self.joined.pop(thread, None)

    def _has_seized(self, seizure: Seizure, held: list[Any], enter: Callable[[], bool]) -> bool:
        waits = self.leader is not None or self._is_behind(seizure)
        if waits and not seizure.granted:
            self.join(seizure)
            return False
        held.extend(filter(_ACQUIRE, (self.lock,)))  # one C call: no Ctrl-C comes in between
        self.leader = threading.get_ident()
        if seizure.granted:
            self.waiting = self._lent = False
            seizure.granted = []
        elif not enter():
            self.release(held)
            return False
        self._withdraw(seizure)  # not before, or it would lose its place
        return True

    def _give_up(self, seizure: Seizure, held: list[Any]) -> None:
        self._withdraw(seizure)
        if seizure.granted:
            if not held:
                held.extend(filter(_ACQUIRE, (self.lock,)))
            self._turnstile.leave()
            self.waiting = self._lent = False
            seizure.granted = []

    def release(self, held: list[Any]) -> None:
        """Let the others go on; idempotent."""
        if held:
            if not self.waiting:
                self._free_all()
            lock = held[0]
            # Plain stores up to the release: no Ctrl-C can come in between.
            self.leader = None
            del held[:]
            lock.release()
        self.wake_first()

    # -- with the lock

    def enter(self, turnstile: Turnstile, operation: Operation) -> bool:
        """Go through the turnstile, if it is free; else the operation awaits the helper."""
        if not self.waiting:
            if turnstile.try_enter():
                return True
            self._turnstile = turnstile
            self.waiting = True
        operation.awaits = True
        self.join(operation)
        self._send()
        return False

    def take(self, own: Operation | None, limit: int | None = None) -> None:
        """Take what is to be committed together into one's own hands: `carried`.

        Args:
            own: That of the one who leads.
            limit: No more than so many; None: than a batch may have.
        """
        self.carried = [] if own is None else [own]
        room = (limit or BATCH_OPERATIONS) - len(self.carried)
        joined = [each for each in list(self.queue) if not isinstance(each, Seizure)]
        # Out of the queue and into our hands in one C call. If one has just left by itself, those
        # behind it wait for the next commit.
        with contextlib.suppress(ValueError):
            self.carried.extend(itertools.filterfalse(self.queue.remove, joined[:room]))

    def answer(self) -> None:
        """Wake those whose operations were carried: finished, or handed back. Idempotent."""
        if self.carried:  # out of our hands first: who is woken may join again
            self._answered = self.carried
            self.carried = []
        for each in self._answered:
            each.awaits = False
            _wake(each)
        self._answered = []

    def take_only(self) -> Operation | None:
        """The same, if there is just one; None: there are more, or none."""
        if len(self.queue) == 1:
            self.take(None, 1)
        return self.carried[0] if self.carried else None

    # -- the queue

    def join(self, operation: Operation) -> None:
        """Put it there, if it isn't; by its own thread."""
        if operation.latch is None:
            latch = threading.Lock()
            latch.acquire()
            operation.latch = latch
        # Whether it was called off is asked last, for that is said before it is taken out.
        if not self._is_in_hand(operation) and not operation.called_off:
            self.queue.append(operation)

    def call_off(self, operation: Operation) -> bool:
        """Whether it has not been begun, and never will be; by another thread than its own."""
        operation.called_off = True
        if not self._withdraw(operation):
            return False
        _wake(operation)
        self.wake_first()
        return True

    def _withdraw(self, operation: Operation) -> bool:
        """Take it out of the queue; whether it was there."""
        try:
            self.queue.remove(operation)
        except ValueError:
            return False
        return True

    def wake_first(self) -> None:
        """Wake the first that may lead."""
        for each in list(self.queue):
            if not each.awaits:
                _wake(each)
                return

    def wake_all(self) -> None:
        """Wake everybody: there is nothing more to wait for."""
        for each in list(self.queue):
            _wake(each)

    # -- the helper

    def _send(self) -> None:
        """Have the helper wait at the turnstile, if it doesn't yet."""
        _release(self._go)
        # An interrupt may have kept it from starting. A second one does no harm: one go, one goes.
        if self._helper is None or not self._helper.is_alive():
            self._helper = threading.Thread(target=self._help, name="sqlspace-helper", daemon=True)
            try:
                self._helper.start()
            except RuntimeError as error:  # the process may have no more threads
                raise StoreError(f"no thread to wait for the write lock: {error}") from error

    def _help(self) -> None:
        while True:
            self._go.acquire()
            if self._is_closed():
                return
            if self.waiting and not self._lent:
                entered = self._turnstile.wait()
                with self.lock:
                    self._serve(entered=entered)
                self.wake_first()

    def _is_closed(self) -> bool:
        return self._closed

    def _serve(self, *, entered: bool) -> None:
        """Commit for those in the queue, or let in the transaction that is the first there."""
        if entered and self._grant():
            return
        self.waiting = False
        try:
            if entered:
                self.leader = threading.get_ident()
                self._file.serve(self._turnstile)
        finally:
            self.leader = None
            self._free_all()

    def _free_all(self) -> None:
        """Who is still there need not wait for the helper any more."""
        for each in list(self.queue):
            each.awaits = False

    def _grant(self) -> bool:
        """Let in the transaction that is the first, if one is."""
        first = next(iter(list(self.queue)), None)
        if not isinstance(first, Seizure):
            return False
        # Out of the queue and granted in one C call, or its thread might leave in between.
        with contextlib.suppress(ValueError):  # it has left
            first.granted.extend(map(self.queue.remove, (first,)))
        self._lent = bool(first.granted)
        _wake(first)
        return self._lent

    # -- the end

    def close(self) -> None:
        """End the helper, unless it waits at the turnstile: then it ends when that lets it in."""
        self._closed = True
        _release(self._go)

    def forget(self) -> None:
        """In a forked child: nobody else is there."""
        for each in (*self.queue, *self.carried):
            _wake(each)  # it may be this thread's, which forked in a signal's handler
        self.__init__(self._file)  # type: ignore[misc]


def _wake(operation: Operation) -> None:
    if operation.latch is not None:
        _release(operation.latch)


def _release(latch: Any) -> None:
    with contextlib.suppress(RuntimeError):  # it is already
        latch.release()
