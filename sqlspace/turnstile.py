"""The turnstile: writers of all processes go through one by one, in the order they came.

SQLite's own busy handling sleeps and retries, and starves: of 8 processes that push as fast as
they can, one got 6,376 pushes while another got 1. The kernel's queue for flock is fair. The lock
is taken on a descriptor of the -wal. It is courtesy, not safety: writers that don't know of it (the
sqlite3 shell) are kept apart by SQLite's own locks.

flock knows no deadline, and a writer that is stopped inside its commit would block everybody for
ever. So a thread never blocks in it itself: it asks once, and if the lock is taken, a helper thread
waits in flock and hands over, while the caller waits for the helper with a deadline. Polling
instead was faster (7.0k against 3.9k commits a second, 8 processes) and unfair (a share of 0.38
against 0.94).
"""

import fcntl
import threading
import time

from .errors import BusyError, StoreError
from .marks import QUEUED_AT, Marks
from .waiting import surely

__all__ = ["Turnstile"]

_QUEUED = Marks.ask(QUEUED_AT, 1)
_BUSY = "other writers held the write lock beyond busy_timeout"


class Turnstile:
    """One descriptor's way through; used by one thread at a time (its store's lock sees to that).

    Args:
        descriptor: Of the -wal file; None if there is none, and then everybody passes.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._marks = Marks(descriptor)
        self._mutex = threading.Lock()
        self._go = threading.Lock()  # released to send the helper to wait
        self._go.acquire()
        self._granted = threading.Lock()  # released when the helper hands over
        self._granted.acquire()
        self._helper: threading.Thread | None = None
        self._pending = False  # the helper is on its way, or waits in flock
        self._wanted = False  # and somebody still wants what it brings
        self._closed = False

    def enter(self, deadline: float) -> None:
        """Go in, alone; `leave` must follow in a finally, whether this succeeds or not.

        Args:
            deadline: On the monotonic clock.

        Raises:
            BusyError: Others were inside until the deadline.
        """
        if self._descriptor is None:
            return
        # Whoever has just left would overtake those whom the kernel is still waking, so it queues
        # behind them: else the slowest of 8 processes once got a third of the fastest one's share.
        others = self._marks.find(_QUEUED) is not None
        if not self._pending and (not others or time.monotonic() >= deadline):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                return
        self._queue(deadline)

    def leave(self) -> None:
        """Let the next one in; does nothing outside."""
        # While the helper is on its way we are outside, and what it brings is its to give back: to
        # unlock under it would have it hand over a lock that it no longer holds.
        if self._descriptor is not None and not self._pending:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """End the helper. The descriptor is its owner's to close, after this."""
        with self._mutex:
            self._closed = True
            if self._helper is not None and not self._pending:
                self._go.release()

    def _queue(self, deadline: float) -> None:
        if time.monotonic() >= deadline:
            raise BusyError(_BUSY)
        try:
            self._send()
            if self._granted.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return
            self._give_up()
            if self._granted.acquire(blocking=False):  # in the meantime
                return
        except BaseException:
            surely(self._give_up)
            raise
        raise BusyError(_BUSY)

    def _send(self) -> None:
        """Have the helper wait, if it doesn't yet."""
        with self._mutex:
            self._wanted = True
            if not self._pending:
                self._granted.acquire(blocking=False)  # what came as its caller was interrupted
                self._pending = True
                self._go.release()
        # An interrupt may have kept it from starting. A second one does no harm: one go, one goes.
        if self._helper is None or not self._helper.is_alive():
            self._helper = threading.Thread(
                target=self._help, name="sqlspace-turnstile", daemon=True
            )
            try:
                self._helper.start()
            except RuntimeError as error:  # the process may have no more threads
                raise StoreError(f"no thread to wait for the write lock: {error}") from error

    def _give_up(self) -> None:
        """What the helper brings from now on, it gives back by itself."""
        with self._mutex:
            self._wanted = False

    def _is_closed(self) -> bool:
        return self._closed

    def _help(self) -> None:
        assert self._descriptor is not None
        while True:
            self._go.acquire()
            if self._is_closed():
                return
            locked = True
            try:
                self._marks.hold(QUEUED_AT)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            except OSError:  # closed just now; or the system has no lock to give
                locked = False
            with self._mutex:
                if self._is_closed():  # the lock went with the descriptor
                    return
                self._marks.drop(QUEUED_AT)
                self._pending = False
                if not locked:
                    continue
                if self._wanted:
                    self._wanted = False
                    self._granted.release()
                else:
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
