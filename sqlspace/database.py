"""One file as one process has it open: the order of a write, its errors, and forks.

Everything that a fork invalidates hangs on a `_Session`; the child drops the parent's and opens its
own at the next call. One lock lets one thread at a time to the writing connection; another guards
the reading one, so that browsing a large store delays no push.

The law of `write`: closed? moved? then through the turnstile, the statements, out again, moved?
Only then is anything acknowledged. An error before the commit means that nothing happened; after a
failed commit one more durable commit makes that certain, or the error is UndecidedError.
"""

import functools
import logging
import operator
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import apsw

from . import doorbell, identity, schema
from .connection import Connection, Options, connect, has_moved, holds_lock, open_verified
from .doorbell import Doorbell, Stirring
from .errors import (
    BusyError,
    ClosedError,
    CorruptError,
    FullError,
    MovedError,
    SchemaError,
    StoreError,
    UndecidedError,
)
from .guard import Guard
from .identity import Identity
from .marks import HISTORY_AT, Marks
from .turnstile import Turnstile
from .waiting import Waiter, surely

__all__ = ["Database", "Step"]

log = logging.getLogger("sqlspace")

Step = Callable[[Connection], Iterable[str]]
"""Work on the connection; returns the doorbell's tokens to ring for."""

_ACQUIRE = operator.methodcaller("acquire")

# A commit that really changes a page; it decides what an earlier failure or crash left undecided.
UPDATE_BOOTS = "UPDATE sqlspace_schema SET boots = boots + 1 WHERE version = 1"
SELECT_FILE_ID = "SELECT file_id FROM sqlspace_schema WHERE version = 1"


class _Patience:
    """SQLite's busy handler: a writer that knows no turnstile is inside. In Python, for Ctrl-C."""

    deadline = 0.0  # of the call under way, on the monotonic clock

    def __call__(self, calls: int) -> bool:
        left = self.deadline - time.monotonic()
        if left <= 0:
            return False
        if calls:  # the first time it may be over already
            time.sleep(min(left, 0.0005 * min(calls, 20)))
        return True


class _Session:
    """What one process has open of the file."""

    def __init__(self, options: Options, stirring: Stirring) -> None:
        path = options.path
        self.connection = open_verified(options)
        self.patience = _Patience()
        self.connection.set_busy_handler(self.patience)
        self.reader: apsw.Connection | None = None
        self.data_version = 0
        self.booted = False  # whether the commit before the first write is done
        self.wal_descriptor: int | None = None
        self.identity = Identity()
        self.guard = Guard()
        try:
            self.file_id = self.connection.execute(SELECT_FILE_ID).get
            if os.path.exists(path + "-wal"):  # not so under a vfs that keeps its files elsewhere
                self.wal_descriptor = os.open(path + "-wal", os.O_RDONLY | os.O_CLOEXEC)
                self.identity = Identity(path, path + "-wal")
                if not self.identity.stands() or has_moved(self.connection):
                    raise MovedError(f"{path}: it was moved while it was opened")
            self.poll = self.identity.poll
            self.turnstile = Turnstile(self.wal_descriptor)
            self.marks = Marks(self.wal_descriptor)
            if options.history is not None:
                self.marks.hold(HISTORY_AT + options.history)
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

    def open_reader(self, options: Options) -> apsw.Connection:
        """The connection for browsing; made when first needed."""
        if self.reader is None:
            reader = connect(options, apsw.SQLITE_OPEN_READWRITE)
            reader.pragma("query_only", 1)
            self.reader = reader
        return self.reader

    def close(self) -> None:
        self.bell.close()
        self.turnstile.close()
        self._close_files()

    def _close_files(self) -> None:
        self.identity.close()
        if self.reader is not None:
            self.reader.close()
        self.connection.close()
        if self.wal_descriptor is not None:
            os.close(self.wal_descriptor)
            self.wal_descriptor = None
        self.guard.release()

    def abandon(self) -> None:
        """In a forked child: let go all that is the parent's, and leave no trace in the file."""
        for connection in (self.reader, self.connection):
            if connection is not None:
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
                connection.close()
        if self.wal_descriptor is not None:
            os.close(self.wal_descriptor)
        self.guard.release()


class Database:
    """One file, as this process has it open; for any number of threads.

    Args:
        options: How to open it.
        stirring: As `Doorbell` has it, of this database.
    """

    def __init__(
        self,
        options: Options,
        stirring: Callable[["Database", Iterable[str], bool], Any],
    ) -> None:
        self.options = options
        self.closed = False
        this = weakref.ref(self)  # the doorbell must not keep a forgotten store alive

        def look(tokens: Iterable[str], timed: bool) -> Any:
            database = this()
            return None if database is None else stirring(database, tokens, timed)

        self._stirring: Stirring = look
        self._poison: StoreError | None = None
        self._forked = False
        self._lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._writer: int | None = None  # the thread that has the one lock
        self._browser: int | None = None  # and the other
        self._inside = False  # whether the thread that forks is one of them
        self._whole: _Session | None = None  # in which a caller's own transaction is open
        self._busy_timeout = options.busy_timeout
        self._session: _Session | None = None
        self._spent: _Session | None = None  # one that is only to be closed
        with _opening:
            self._session = self._open()
            _databases.add(self)

    # -- work

    def write(
        self,
        step: Step,
        *,
        probe: Callable[[Connection], bool] | None = None,
        undo: Callable[[Connection], None] | None = None,
        besides: Waiter | None = None,
    ) -> None:
        """Run `step` as the only writer, each of its statements a transaction of its own.

        Args:
            step: Gets the connection; returns the doorbell's tokens to ring for afterwards. What
                must not be lost to an interrupt it keeps outside.
            probe: Asked first, with no lock taken in the file; if False, there is nothing to do.
            undo: Takes back what `step` has committed, if something is raised before this returns.
                Idempotent.
            besides: The caller's own waiter, which needs no ring.

        Raises:
            ClosedError, StoreError: nothing happened, unless the error says otherwise.
        """
        now = time.monotonic()
        thread = threading.get_ident()
        self._ensure_outside(thread)
        finished = False
        try:
            with self._lock:
                self._writer = thread
                try:
                    self._write(now, step, probe, undo, besides)
                    finished = True
                finally:
                    self._writer = None
        except BaseException:
            if finished and undo is not None:  # an interrupt, while the lock was let go
                with self._lock:
                    surely(functools.partial(undo, self._ready().connection))
            raise
        if self.closed:  # by a signal's handler, which had to leave it to us
            self.close()

    def _write(
        self,
        now: float,
        step: Step,
        probe: Callable[[Connection], bool] | None,
        undo: Callable[[Connection], None] | None,
        besides: Waiter | None,
    ) -> None:
        session = self._session or self._ready()
        identity = session.identity
        if session.poll(0) or identity.alarmed or now >= identity.look_at:
            self._ensure_in_place(session, undecided=False)
        deadline = session.patience.deadline = now + self._busy_timeout
        begun = False
        try:
            if probe is not None and not probe(session.connection):
                return
            try:
                session.turnstile.enter(deadline)
                begun = True
                if not session.booted:
                    session.boot()
                tokens = step(session.connection)
            finally:
                session.turnstile.leave()
            if session.poll(0) or identity.alarmed:
                self._ensure_in_place(session, undecided=True)
            session.bell.ring_all(tokens, besides)
        except BaseException as error:
            self._take_back(session, error, undo)
            self._explain(session, error, begun=begun)
            raise

    def begin(self, held: list[Any]) -> Connection:
        """Open a transaction that is the calling thread's, until `end`.

        `end` must follow, also if this raises. Others that write wait meanwhile, and every other
        call of this thread is refused.

        Args:
            held: An empty list, for `end`.

        Raises:
            ClosedError, StoreError, ValueError: as `write`; inside another call.
        """
        now = time.monotonic()
        self._ensure_outside(threading.get_ident())
        held.extend(filter(_ACQUIRE, (self._lock,)))  # one C call: no Ctrl-C comes in between
        self._writer = threading.get_ident()
        session = self._ready()
        self._ensure_in_place(session, undecided=False)
        deadline = session.patience.deadline = now + self._busy_timeout
        self._whole = session
        try:
            session.turnstile.enter(deadline)
            if not session.booted:
                session.boot()
            session.connection.execute("BEGIN IMMEDIATE")
        except Exception as error:
            self._explain(session, error, begun=isinstance(error, apsw.Error))
            raise
        return session.connection

    def commit(self, tokens: Iterable[str]) -> None:
        """Commit what was begun, and ring; raises as `write`, and then nothing happened."""
        session = self._whole
        if session is None:
            self._ready()  # raises why
            raise StoreError(f"{self.options.path}: the transaction is over")
        try:
            if not session.connection.in_transaction:
                raise StoreError(
                    f"{self.options.path}: SQLite rolled the transaction back when one of its "
                    "statements failed"
                )
            session.connection.execute("COMMIT")
            session.turnstile.leave()
            if session.poll(0) or session.identity.alarmed:
                self._ensure_in_place(session, undecided=True)
            session.bell.ring_all(tokens)
        except BaseException as error:
            self._take_back(session, error, None)
            self._explain(session, error, begun=True)
            raise

    def end(self, held: list[Any]) -> None:
        """Roll back what wasn't committed, and let the others go on. Idempotent.

        Args:
            held: That of `begin`.
        """
        if not held:
            return
        session = self._whole
        if session is not None:
            try:
                _roll_back(session.connection)
            except apsw.Error:
                log.exception("%s: a transaction could not be rolled back", self.options.path)
            session.turnstile.leave()
        lock = held[0]
        # Plain stores up to the release: no Ctrl-C can come in between.
        self._whole = self._writer = None
        del held[:]
        lock.release()
        if self.closed:  # in the meantime
            self.close()

    def transact(
        self,
        step: Step,
        *,
        probe: Callable[[Connection], bool] | None = None,
        undo: Callable[[Connection], None] | None = None,
    ) -> None:
        """Run `step` in one transaction: all of it, or, if anything is raised, nothing.

        Otherwise as `write`.
        """

        def whole(connection: Connection) -> Iterable[str]:
            connection.execute("BEGIN IMMEDIATE")
            tokens = step(connection)
            connection.execute("COMMIT")
            return tokens

        self.write(whole, probe=probe, undo=undo)

    def touch(self, connection: Connection) -> None:
        """Make sure that the commit to come writes something, and so is synced."""
        connection.execute(UPDATE_BOOTS)

    def read(self, sql: str, arguments: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query, on the connection for browsing."""
        rows: list[Any] = self.browse(
            lambda connection: connection.execute(sql, arguments).fetchall()
        )
        return rows

    def browse(self, step: Callable[[Connection], Any]) -> Any:
        """What `step` returns, run on the connection for browsing."""
        thread = threading.get_ident()
        self._ensure_outside(thread)
        with self._read_lock:
            self._browser = thread
            try:
                session = self._ready()
                self._ensure_in_place(session, undecided=False)
                found = step(session.open_reader(self.options))
            except apsw.Error as error:
                raise self.mapped(error) from error
            finally:
                self._browser = None
        if self.closed:
            self.close()
        return found

    def changed(self) -> bool:
        """Whether anybody committed since this was last asked."""

        def step(connection: Connection) -> bool:
            session = self._ready()
            version = connection.pragma("data_version")
            changed = bool(version != session.data_version)
            session.data_version = version
            return changed

        return bool(self.browse(step))

    def checkpoint(self) -> None:
        """Move the -wal into the file and cut it to nothing, if no reader is in the way."""

        def step(connection: Connection) -> Iterable[str]:
            try:
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except apsw.BusyError:
                log.warning("%s: a reader keeps the -wal from being cut", self.options.path)
            return ()

        self.write(step)

    def vacuum(self) -> None:
        """Rewrite the file without its free pages, unless others' tables live in it."""

        def step(connection: Connection) -> Iterable[str]:
            if not schema.is_embedded(connection):
                connection.execute("VACUUM")
            return ()

        self.write(step)

    def backup(self, target: str) -> None:
        """Copy a consistent state to a new file."""

        def step(source: Connection) -> None:
            copy = Connection(target)
            try:
                with copy.backup("main", source, "main") as progress:
                    progress.step()
            finally:
                copy.close()

        self.browse(step)

    def history(self) -> int | None:
        """How many tombstones to keep: the smallest number of all stores that have the file open.

        None: all.
        """
        own = self.options.history
        session = self._session
        if session is None:
            return own
        least = session.marks.smallest(HISTORY_AT, HISTORY_AT + (1 << 53 if own is None else own))
        return own if least is None else least - HISTORY_AT

    @property
    def bell(self) -> Doorbell:
        """The doorbell."""
        session = self._session
        if session is None:
            with self._lock:
                session = self._ready()
        return session.bell

    @property
    def file_id(self) -> str:
        """The random id of the file."""
        with self._lock:
            return str(self._ready().file_id)

    def sizes(self) -> tuple[int, int]:
        """Bytes of the file and of its -wal."""
        sizes = []
        for path in (self.options.path, self.options.path + "-wal"):
            try:
                sizes.append(os.stat(path).st_size)
            except OSError:
                sizes.append(0)
        return sizes[0], sizes[1]

    def ensure_open(self) -> None:
        """Raise ClosedError if it was closed."""
        if self.closed:
            raise ClosedError(f"the store {self.options.path} is closed")

    def ensure_usable(self) -> None:
        """Raise ClosedError, or what has made it unusable for ever."""
        self.ensure_open()
        if self._poison is not None:
            raise type(self._poison)(*self._poison.args) from self._poison

    def close(self) -> None:
        """Close it; idempotent. Calls under way end first."""
        self.closed = True
        session = self._session
        if session is not None:
            session.bell.wake_all()
        if threading.get_ident() in (self._writer, self._browser):
            return  # a signal's handler in the middle of a call, which will close it
        with self._lock, self._read_lock:
            session = self._session or self._spent
            self._session = self._spent = None
            if session is None:
                return
            try:
                if not session.identity.stands():
                    # The path is another file's now: leave its -wal alone.
                    session.connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
                session.close()
            except apsw.Error as error:
                raise self.mapped(error) from error

    # -- the session

    def _open(self) -> _Session:
        try:
            return _Session(self.options, self._stirring)
        except apsw.Error as error:
            raise self.mapped(error) from error
        except SchemaError as error:
            raise type(error)(f"{self.options.path}: {error}") from error.__cause__

    def _ready(self) -> _Session:
        """The session to work in, with one of the locks held."""
        self.ensure_usable()
        return self._session or self._reopen()

    def _reopen(self) -> _Session:
        """Open again, in a forked child."""
        with _opening:
            if self._session is None:
                session = self._open()
                if self._forked and not holds_lock(self.options.path):
                    session.abandon()
                    raise StoreError(
                        f"{self.options.path}: this process was forked while another connection "
                        "to the file was open, so its locks are not real; open no other connection "
                        "to the file before a fork"
                    )
                self._session = session
            return self._session

    # -- errors

    def _ensure_outside(self, thread: int) -> None:
        """Refuse a call from a signal's handler in the middle of another: its lock is taken."""
        if thread not in (self._writer, self._browser):
            return
        if self._whole is not None:
            raise ValueError(
                f"{self.options.path}: this thread is inside a transaction of the same store, "
                "which has verbs of its own"
            )
        raise ValueError(
            f"{self.options.path}: this thread is inside another call of the same store; a "
            "signal's handler, or a codec, can't use it, only close it"
        )

    def _ensure_in_place(self, session: _Session, *, undecided: bool) -> None:
        if not session.identity.stands():
            moved = f"{self.options.path}: the file was unlinked, replaced or moved underneath"
            self._spoil(MovedError(moved))
            raise MovedError(moved, undecided)

    def _spoil(self, error: StoreError) -> None:
        """From now on, every verb raises this."""
        self._poison = error
        self._spent, self._session = self._session, None
        if self._spent is not None:
            self._spent.bell.wake_all()

    def _busy(self) -> BusyError:
        return BusyError(
            f"{self.options.path}: others held the write lock for more than "
            f"{self.options.busy_timeout:g} s"
        )

    def mapped(self, error: apsw.Error) -> StoreError:
        """Ours for apsw's."""
        path = self.options.path
        if isinstance(error, apsw.BusyError):
            return self._busy()
        if isinstance(error, apsw.FullError):
            return FullError(f"{path}: no room left on the disk")
        if isinstance(error, apsw.CorruptError | apsw.NotADBError):
            return CorruptError(f"{path}: the file is damaged, or no SQLite database: {error}")
        return StoreError(f"{path}: {type(error).__name__}: {error}")

    def _take_back(
        self,
        session: _Session,
        error: BaseException,
        undo: Callable[[Connection], None] | None,
    ) -> None:
        """After an interrupt or a failure: leave no transaction open, and nothing done.

        What SQLite refused to commit, or is rolled back, must not be undone as well: others may
        have taken the entries, or been given the seqs, in the meantime.

        Raises:
            BaseException: An interrupt that came meanwhile, which nothing else tells of.
        """
        connection = session.connection
        interrupt = None
        try:
            if connection.in_transaction:
                interrupt = surely(functools.partial(_roll_back, connection))
            elif undo is not None and not isinstance(error, apsw.Error):
                interrupt = surely(functools.partial(undo, connection))
        except apsw.Error:
            log.exception("%s: a call that failed could not be undone", self.options.path)
        if interrupt is not None and isinstance(error, Exception):
            raise interrupt

    def _explain(self, session: _Session, error: BaseException, *, begun: bool) -> None:
        """Raise ours for apsw's, and make sure that what it says is true."""
        if isinstance(error, apsw.IOError) and begun:
            self._fence(session, error)
        if isinstance(error, apsw.Error):
            raise self.mapped(error) from error
        if isinstance(error, BusyError):  # at the turnstile, which doesn't know whose it is
            raise self._busy() from None

    def _fence(self, session: _Session, error: apsw.IOError) -> None:
        """After a failed write: one more commit, which makes sure that it didn't happen.

        Frames that a failed commit has left behind the log's end are valid for the next recovery;
        a commit that succeeds overwrites them.
        """
        session.patience.deadline = time.monotonic() + self._busy_timeout
        try:
            session.connection.execute(UPDATE_BOOTS)
        except apsw.Error:
            undecided = UndecidedError(
                f"{self.options.path}: the disk failed at the commit, and again afterwards: the "
                "last operation may or may not have happened; open the store anew and look"
            )
            self._spoil(undecided)
            raise undecided from error

    # -- forks

    def _before_fork(self) -> None:
        thread = threading.get_ident()
        self._inside = thread in (self._writer, self._browser)
        for lock, owner in ((self._lock, self._writer), (self._read_lock, self._browser)):
            if owner != thread:
                lock.acquire()

    def _after_fork_in_parent(self) -> None:
        thread = threading.get_ident()
        for lock, owner in ((self._read_lock, self._browser), (self._lock, self._writer)):
            if owner != thread:
                lock.release()

    def _after_fork_in_child(self) -> None:
        session = self._session or self._spent
        self._session = self._spent = self._whole = None
        self._writer = self._browser = None
        self._lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._forked = True
        if self._inside:
            self._poison = StoreError(
                f"{self.options.path}: the process was forked in the middle of a call of this "
                "store, or of a transaction; the child can't use it"
            )
        if session is not None:
            session.abandon()


def _roll_back(connection: Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")


# -- forks: the child inherits SQLite's table of locks, but not the locks. So every store of the
# process stands still outside of SQLite while it forks, and the child closes all it has inherited
# before it opens anything: then SQLite forgets the table.

_opening = threading.Lock()
_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_at_rest: list[Database] = []


def _before_fork() -> None:
    while True:
        # A database's locks come before _opening, as in a reopening.
        for database in sorted(set(_databases).difference(_at_rest), key=id):
            database._before_fork()  # noqa: SLF001
            _at_rest.append(database)
        _opening.acquire()
        if set(_databases) <= set(_at_rest):
            return
        _opening.release()


def _after_fork_in_parent() -> None:
    while _at_rest:
        _at_rest.pop()._after_fork_in_parent()  # noqa: SLF001
    _opening.release()


def _after_fork_in_child() -> None:
    global _opening  # noqa: PLW0603
    _opening = threading.Lock()
    doorbell.forget()
    identity.forget()
    while _at_rest:
        _at_rest.pop()._after_fork_in_child()  # noqa: SLF001


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
