"""What one process has open of a file, and all that a fork invalidates.

Two connections, one for writing and one for browsing; a descriptor of the -wal, for the turnstile,
the marks and our own sync; the watch over the file's identity, the reserve, the bell, the guard.
"""

import contextlib
import os
import time

import apsw

from . import forks
from .connection import Connection, Options, connect, has_moved, open_verified
from .doorbell import Doorbell, Stirring
from .errors import MovedError
from .guard import Guard
from .identity import Identity
from .marks import HISTORY_AT, PRESENT_AT, Marks
from .reserve import Reserve
from .turnstile import Turnstile

__all__ = ["UPDATE_BOOTS", "Session"]

# A commit that really changes a page; it decides what an earlier failure or crash left undecided.
UPDATE_BOOTS = "UPDATE sqlspace_schema SET boots = boots + 1 WHERE version = 1"
SELECT_FILE_ID = "SELECT file_id FROM sqlspace_schema WHERE version = 1"


class _Patience:
    """SQLite's busy handler: a writer that knows no turnstile is inside. In Python, for Ctrl-C."""

    deadline = 0.0  # of the call under way, on the monotonic clock
    forked = False  # by a signal's handler, in here

    def __call__(self, calls: int) -> bool:
        left = self.deadline - time.monotonic()
        if left <= 0:
            return False
        if calls:  # the first time it may be over already
            time.sleep(min(left, 0.0005 * min(calls, 20)))
        if self.forked:
            # SQLite's mutex is the parent's thread's: the child would push what the parent pushes,
            # and then wait for that mutex for ever.
            os.write(2, b"sqlspace: forked while SQLite waited for its lock; this child ends\n")
            os._exit(os.EX_SOFTWARE)
        return True


class Session:
    """What one process has open of the file."""

    def __init__(self, options: Options, stirring: Stirring) -> None:
        path = options.path
        self.connection = open_verified(options)
        self.patience = _Patience()
        self.connection.set_busy_handler(self.patience)
        self.reader: Connection | None = None
        self.data_version = 0
        self.booted = False  # whether the commit before the first write is done
        self.wal_descriptor: int | None = None
        self.identity = Identity()
        self.guard = Guard()
        try:
            self.file_id = self.connection.execute(SELECT_FILE_ID).get
            if os.path.exists(path + "-wal"):  # not so under a vfs that keeps its files elsewhere
                self.wal_descriptor = os.open(path + "-wal", os.O_RDWR | os.O_CLOEXEC)
                self.identity = Identity(path, path + "-wal")
                if not self.identity.stands() or has_moved(self.connection):
                    raise MovedError(f"{path}: it was moved while it was opened")
            self.poll = self.identity.poll
            # Without a -wal of our own to sync, SQLite does it.
            self.syncs = options.sync == "group" and self.wal_descriptor is not None
            if self.syncs:
                self.connection.pragma("synchronous", "NORMAL")
            self.reserve = Reserve(path, self.wal_descriptor, self.patience)
            self.marks = Marks(self.wal_descriptor)
            self.turnstile = Turnstile(self.wal_descriptor, self.marks)
            if options.history is not None:
                self.marks.hold(HISTORY_AT + options.history)
            self.marks.hold(PRESENT_AT)
            self.identity.announce()
            self.marks.look_around(hears=self.identity.hears)
            file = os.stat(path) if self.wal_descriptor is not None else None
            place = (file.st_dev, file.st_ino) if file else None
            self.guard = Guard(place)
            self.bell = Doorbell(place, path + "-wal", self.marks, stirring)
        except BaseException:
            self._close_files()
            raise

    def boot(self) -> None:
        """The commit before the first write."""
        self.connection.execute(UPDATE_BOOTS)
        self.booted = True

    def open_reader(self, options: Options) -> Connection:
        """The connection for browsing; made when first needed."""
        if self.reader is None:
            reader = connect(options, apsw.SQLITE_OPEN_READWRITE)
            try:
                reader.pragma("query_only", 1)
            except BaseException:
                reader.close()
                raise
            self.reader = reader
        return self.reader

    def shrink_reserve(self) -> None:
        """If nobody else has the file open, keep no more of the reserve than it needs at rest."""
        if not self.reserve.is_large():
            return
        self.marks.look_around(hears=True)
        if self.marks.alone:
            self.marks.alone = False  # so that whoever comes now is kept at the turnstile
            try:
                if self.turnstile.try_enter():
                    self.reserve.shrink(self.connection)
            finally:
                self.turnstile.leave()

    def close(self) -> None:
        """Let go all of it."""
        self.bell.close()
        self.turnstile.close()
        self.reserve.close()
        self._close_files()

    def _close_files(self) -> None:
        with contextlib.ExitStack() as closing:  # from the last on, all of it, whatever one raises
            closing.callback(self.guard.release)
            if self.wal_descriptor is not None:
                closing.callback(os.close, self.wal_descriptor)
                self.wal_descriptor = None
            closing.callback(self.connection.close)
            if self.reader is not None:
                closing.callback(self.reader.close)
            self.identity.close()

    def abandon(self) -> None:
        """In a forked child: let go all that is the parent's, and leave no trace in the file.

        Idempotent, as far as it came.
        """
        self.turnstile.close()
        self.reserve.close()
        self.marks.close()
        for connection in (self.reader, self.connection):
            if connection is not None:
                try:
                    self._abandon(connection)
                except apsw.ConnectionClosedError:  # by this, when it was cut off
                    pass
                except apsw.ThreadingViolationError:  # it is in the middle of a statement
                    self.patience.forked = True
                    return
        descriptor, self.wal_descriptor = self.wal_descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        self.guard.release()

    @staticmethod
    def _abandon(connection: Connection) -> None:
        if connection.in_transaction:
            forks.detach(connection)
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.close()
