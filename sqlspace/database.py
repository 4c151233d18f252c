"""One file as one process has it open: its session, its forks, who may come in, what it raises.

Everything that a fork invalidates hangs on a `Session`; the child drops the parent's and opens its
own at the next call. One lock lets one thread at a time to the writing connection; another guards
the reading one, so that browsing a large store delays no push.

The law of a write: closed? moved? is there anything to do? Then through the turnstile; what is done
in there is the law of `commits`.
"""

import dataclasses
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import apsw

from . import forks, schema
from .commits import Commits
from .committer import Committer, Operation, Seizure, Step, Work
from .connection import Connection, Options, holds_lock, roll_back
from .doorbell import Doorbell, Stirring
from .errors import (
    BusyError,
    ClosedError,
    CorruptError,
    FullError,
    MovedError,
    SchemaError,
    SpaceError,
    StoreError,
)
from .marks import HISTORY_AT
from .reserve import is_tight, release
from .session import UPDATE_BOOTS, Session
from .turnstile import Turnstile
from .waiting import surely

__all__ = ["Database"]

log = logging.getLogger("sqlspace")

SELECT_LARGEST = "SELECT ifnull(max(length(payload)), 0) FROM sqlspace_entries"


class Database:
    """One file, as this process has it open; for any number of threads.

    Args:
        options: How to open it.
        stirring: As `Doorbell` has it, of this database.
        tidy: Called now and then, in a transaction, with how many tombstones to keep; returns
            the doorbell's tokens.
    """

    def __init__(
        self,
        options: Options,
        stirring: Callable[["Database", Iterable[str], bool], Any],
        tidy: Callable[[Connection, int | None], list[str]],
    ) -> None:
        self.options = options
        self.closed = False
        this = weakref.ref(self)  # the doorbell must not keep a forgotten store alive

        def look(tokens: Iterable[str], timed: bool) -> Any:
            database = this()
            return None if database is None else stirring(database, tokens, timed)

        self._stirring: Stirring = look
        self._tidy = tidy
        self._poison: StoreError | None = None
        self._forked = False
        self._still: list[threading.Lock] = []  # locks that are held while the process forks
        self._unclosed = False  # by a signal's handler, which had to leave it to the call
        self._committer = Committer(self)
        self._commits = Commits(self, self._committer)
        self._read_lock = threading.Lock()
        self._browser: int | None = None  # the thread that has it
        self.inside = False  # whether the thread that forks, or did, is in the middle of a call
        self._whole: Session | None = None  # in which a caller's own transaction is open
        self._busy_timeout = options.busy_timeout
        self._session: Session | None = None
        self._spent: Session | None = None  # one that is only to be closed
        self._file_id: Any = None  # once it was closed
        with forks.opening:
            self._session = self._open()
            forks.databases.add(self)

    # -- work

    def write(self, operation: Operation) -> None:
        """Have it carried out; when this returns it is committed, and as durable as promised.

        Raises:
            ClosedError, StoreError: nothing happened, unless the error says otherwise.
        """
        thread = threading.get_ident()
        committer = self._committer
        if thread in (committer.leader, self._browser) or thread in committer.joined:
            self._ensure_outside(thread)
        operation.deadline = time.monotonic() + self._busy_timeout
        try:
            committer.submit(operation, thread)
        except Exception:
            self.ensure_not_forked_inside()
            raise
        finally:
            if self._unclosed:
                self.close()

    def write_all(self, operations: Sequence[Operation]) -> None:
        """Carry out what several callers want who don't wait here, in as few commits as can be.

        Each that was refused has its own `error` afterwards, and nothing is raised.
        """
        thread = threading.get_ident()
        deadline = time.monotonic() + self._busy_timeout
        for operation in operations:
            operation.deadline = deadline
            self._committer.join(operation)
        for operation in operations:
            if not operation.finished:
                try:
                    self._committer.submit(operation, thread)
                except Exception as error:  # noqa: BLE001  # raised where it was asked for
                    operation.error = error
        if self._unclosed:
            self.close()

    def transact(
        self,
        step: Step,
        *,
        probe: Callable[[Connection], bool] | None = None,
        undo: Callable[[Connection], None] | None = None,
        adds: int | None = None,
        largest: int = 0,
    ) -> None:
        """The same with functions: all of `step` is done or, if anything is raised, nothing.

        Args:
            step: As `Operation` has it, like the others.
            probe: Or None.
            undo: Or None.
            adds: Or None, of what takes.
            largest: Of what pushes.
        """
        self.write(Work(step, probe, undo, adds, largest))

    def lead(self, operation: Operation) -> None:
        """Carry it out with those that have joined, or have it await its turn."""
        session = self._session or self._ready()
        identity = session.identity
        now = operation.deadline - self._busy_timeout
        if session.poll(0) or identity.alarmed or now >= identity.look_at:
            self.ensure_in_place(session, undecided=False)
        session.patience.deadline = operation.deadline
        try:
            if not operation.probe(session.connection):
                operation.finished = True
                return
        except apsw.Error as error:
            raise self.mapped(error) from error
        committer = self._committer
        try:
            if committer.enter(session.turnstile, operation):
                if committer.queue:
                    self._commits.commit_together(session, operation)
                else:
                    self._commits.commit_alone(session, operation)
        except BaseException:
            if not committer.waiting:  # else it is not ours, but the helper's
                session.turnstile.leave()
            raise

    def serve(self, turnstile: Turnstile) -> None:
        """Inside the turnstile, in the helper's thread: carry out those that have joined."""
        session = self._session
        if session is None or session.turnstile is not turnstile:  # closed, or unusable now
            turnstile.leave()
            self._committer.wake_all()
            return
        session.patience.deadline = time.monotonic() + self._busy_timeout
        operation = self._committer.take_only()
        if operation is None:
            self._commits.commit_together(session, None)
            return
        try:
            # What it found before it had to wait is mostly gone.
            if operation.probe(session.connection):
                self._commits.commit_alone(session, operation)
        except Exception as error:  # noqa: BLE001  # raised where it was asked for
            operation.error = self.mapped(error) if isinstance(error, apsw.Error) else error
        turnstile.leave()
        operation.finished = True
        self._committer.answer()

    def call_off(self, operation: Operation) -> bool:
        """Whether it has not been begun, and never will be; by another thread than its own."""
        return self._committer.call_off(operation)

    def undo(self, operation: Operation) -> None:
        """Take back what it did, even if the store was closed since."""
        committer = self._committer
        with committer.lock:
            committer.leader = threading.get_ident()
            try:
                self._undo_inside(operation)
            finally:
                committer.leader = None
        committer.wake_first()  # it may have come while somebody led

    def _undo_inside(self, operation: Operation) -> None:
        try:
            if self._session is not None:
                self._commits.take_all_back([operation], self._session, committed=True)
            elif self._poison is not None:
                raise self._poison
            else:
                self._undo_behind(operation)
        except (apsw.Error, OSError, SpaceError):
            log.exception("%s: a call that failed could not be undone", self.options.path)

    def _undo_behind(self, operation: Operation) -> None:
        """Once it was closed."""
        with forks.opening:
            session = Session(dataclasses.replace(self.options, create=False), self._stirring)
        try:
            if session.file_id != self._file_id:
                raise MovedError(f"{self.options.path}: the file is another one now")
            self._commits.take_all_back([operation], session, committed=True)
        finally:
            session.close()

    def _seize(self, held: list[Any]) -> Session:
        """Go in alone, until `end`."""
        self._ensure_outside(threading.get_ident())
        committer = self._committer
        seizure = Seizure()
        seizure.deadline = time.monotonic() + self._busy_timeout

        def enter() -> bool:
            session = self._ready()
            self.ensure_in_place(session, undecided=False)
            return committer.enter(session.turnstile, seizure)

        committer.seize(seizure, held, enter)
        session = self._ready()
        self.ensure_in_place(session, undecided=False)  # again, for it may have had to wait
        session.patience.deadline = seizure.deadline
        return session

    def begin(self, held: list[Any]) -> Connection:
        """Open a transaction that is the calling thread's, until `end`.

        `end` must follow, also if this raises. Others that write wait meanwhile, and every other
        call of this thread is refused.

        Args:
            held: An empty list, for `end`.

        Raises:
            ClosedError, StoreError, ValueError: as `write`; inside another call.
        """
        try:
            self._whole = session = self._seize(held)
        except Exception:
            self.ensure_not_forked_inside()
            raise
        try:
            if session.reserve.due:
                session.reserve.tend(session.connection)
            self._commits.boot(session)
            session.connection.execute("BEGIN IMMEDIATE")
        except Exception as error:
            self.ensure_not_forked_inside()
            if isinstance(error, apsw.Error):
                raise self._commits.explained(session, error) from error
            raise
        return session.connection

    def cover(self, added: int, largest: int, pushes: int) -> None:
        """Before a push in the transaction that was begun: as `Reserve.cover`."""
        if (session := self._whole) is not None:
            connection = session.connection
            session.reserve.cover(connection, added, largest, alone=False, pushes=pushes)

    def relieve(self) -> None:
        """What was begun only takes, and found the disk full: it is over, the next one has room."""
        if (session := self._whole) is not None:
            self._commits.relieve(session, [])

    def commit(self, tokens: Iterable[str], *, takes: bool) -> None:
        """Commit what was begun, and ring; raises as `write`, and then nothing happened.

        Args:
            tokens: The doorbell's.
            takes: Whether it only takes.
        """
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
            self._commits.confirm(session)
            session.bell.ring_all(tokens)
        except BaseException as error:
            self.ensure_not_forked_inside()
            if takes and isinstance(error, apsw.FullError):
                self.relieve()
            self._commits.take_back(session, error, None)
            if isinstance(error, apsw.Error):
                raise self._commits.explained(session, error) from error
            raise

    def end(self, held: list[Any]) -> None:
        """Roll back what wasn't committed, and let the others go on. Idempotent.

        Args:
            held: That of `begin`.
        """
        session = self._whole or self._session or self._spent
        if held and session is not None and not self._committer.waiting:
            try:
                roll_back(session.connection)
            except apsw.Error:
                log.exception("%s: a transaction could not be rolled back", self.options.path)
            session.turnstile.leave()
        if held:
            self._whole = None
        self._committer.release(held)
        if self._unclosed:
            self.close()

    def tidy(self, connection: Connection) -> list[str]:
        """In a transaction: delete what is beyond the history, and age what is due; tokens."""
        return self._tidy(connection, self.history())

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
                self.ensure_in_place(session, undecided=False)
                found = step(session.open_reader(self.options))
            except apsw.Error as error:
                raise self.mapped(error) from error
            finally:
                self._browser = None
        if self._unclosed:
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
        """Move the -wal into the file and cut it to nothing, if no reader is in the way.

        On a full disk it may use the reserve, which is made again with the room that it makes.
        """

        def cut(connection: Connection) -> None:
            try:
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            except apsw.BusyError:
                log.warning("%s: a reader keeps the -wal from being cut", self.options.path)

        def step(session: Session) -> None:
            try:
                cut(session.connection)
            except apsw.FullError:
                session.reserve.give_back(session.connection)
                cut(session.connection)
            largest: Any = session.connection.execute(SELECT_LARGEST).get
            session.reserve.shrink(session.connection, largest)
            session.reserve.tend(session.connection)

        self._by_itself(step)

    def vacuum(self) -> None:
        """Rewrite the file without its free pages, unless others' tables live in it."""

        def step(session: Session) -> None:
            if not schema.is_embedded(session.connection):
                session.connection.execute("VACUUM")
                self._commits.confirm(session)  # else a checkpoint's failed sync could lose it

        self._by_itself(step)

    def _by_itself(self, step: Callable[[Session], None]) -> None:
        """Run what no transaction may hold, as the only writer."""
        held: list[Any] = []
        try:
            session = self._seize(held)
            try:
                step(session)
            except apsw.Error as error:
                raise self._commits.explained(session, error) from error
        finally:
            try:
                surely(lambda: self.end(held))
            except BaseException:  # on the way into it or out of it
                surely(lambda: self.end(held))
                raise

    def backup(self, target: str) -> None:
        """Copy a consistent state to a new file."""

        def step(source: Connection) -> None:
            copy = apsw.Connection(target)
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
            with self._committer.lock:
                session = self._ready()
        if session.poll(0) or session.identity.alarmed:  # somebody may have come
            session.marks.alone = False
        return session.bell

    @property
    def file_id(self) -> str:
        """The random id of the file."""
        with self._committer.lock:
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

    def ensure_not_forked_inside(self) -> None:
        """In a child that goes on with a call of its parent's, all else that fails is noise."""
        if self.inside:
            self.ensure_usable()

    def close(self) -> None:
        """Close it; idempotent. Calls under way end first."""
        self.closed = True
        session = self._session
        if session is not None:
            session.bell.wake_all()
        self._committer.wake_all()
        thread = threading.get_ident()
        if self._is_inside(thread):
            self._unclosed = True  # a signal's handler in the middle of a call, which will close it
            return
        committer = self._committer
        with committer.lock, self._read_lock:
            committer.leader = thread
            try:
                self._close()
            finally:
                committer.leader = None

    def _close(self) -> None:
        self._unclosed = False
        self._committer.close()
        session = self._session or self._spent
        self._session = self._spent = None
        if session is None:
            return
        self._file_id = session.file_id
        try:
            if not session.identity.stands():
                # The path is another file's now: leave its -wal alone.
                session.connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            elif not self._committer.waiting:
                session.shrink_reserve()
            session.close()
        except apsw.Error as error:
            raise self.mapped(error) from error

    # -- the session

    def _open(self) -> Session:
        self._ensure_room()
        try:
            try:
                return Session(self.options, self._stirring)
            except (apsw.FullError, apsw.IOError):  # the -shm and the -wal need room too
                if not release(self.options.path):
                    raise
                return Session(self.options, self._stirring)
        except apsw.Error as error:
            raise self.mapped(error) from error
        except OSError as error:  # the process may open no more files
            raise StoreError(f"{self.options.path}: {error.strerror}") from error
        except SchemaError as error:
            raise type(error)(f"{self.options.path}: {error}") from error.__cause__

    def _ensure_room(self) -> None:
        """Raise FullError where SQLite would have no room for the -shm, and no error for that."""
        path = self.options.path
        if self.options.vfs is None and os.path.isdir(os.path.dirname(path)) and is_tight(path):
            release(path)
            if is_tight(path):
                raise FullError(f"{path}: no room left on the disk for the -shm")

    def _ready(self) -> Session:
        """The session to work in, with one of the locks held."""
        self.ensure_usable()
        return self._session or self._reopen()

    def _reopen(self) -> Session:
        """Open again, in a forked child."""
        with forks.opening:
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
        if not self._is_inside(thread):
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

    def _is_inside(self, thread: int) -> bool:
        committer = self._committer
        return thread in (committer.leader, self._browser) or thread in committer.joined

    def ensure_in_place(self, session: Session, *, undecided: bool) -> None:
        """Raise MovedError if the file under the path is another; see who else has it open."""
        if not session.identity.stands():
            moved = f"{self.options.path}: the file was unlinked, replaced or moved underneath"
            self.spoil(MovedError(moved))
            raise MovedError(moved, undecided)
        session.marks.look_around(hears=session.identity.hears)
        session.reserve.remind()

    def spoil(self, error: StoreError) -> None:
        """From now on, every verb raises this."""
        self._poison = error
        self._spent, self._session = self._session, None
        if self._spent is not None:
            self._spent.bell.wake_all()
        self._committer.wake_all()

    def busy(self) -> BusyError:
        """What to raise when the time for the write lock is over."""
        return BusyError(
            f"{self.options.path}: others held the write lock for more than "
            f"{self.options.busy_timeout:g} s"
        )

    def mapped(self, error: apsw.Error) -> StoreError:
        """Ours for apsw's."""
        path = self.options.path
        if isinstance(error, apsw.BusyError):
            return self.busy()
        if isinstance(error, apsw.FullError):
            return FullError(f"{path}: no room left on the disk")
        if isinstance(error, apsw.CorruptError | apsw.NotADBError):
            return CorruptError(f"{path}: the file is damaged, or no SQLite database: {error}")
        return StoreError(f"{path}: {type(error).__name__}: {error}")

    # -- forks

    def before_fork(self) -> None:
        """Stand still: nobody is inside SQLite, but the thread that forks."""
        thread = threading.get_ident()
        self.inside = self._is_inside(thread)
        for lock, owner in self._owned():
            if owner != thread and lock not in self._still:
                forks.acquire(self._still, lock)

    def _owned(self) -> tuple[tuple[threading.Lock, int | None], ...]:
        """The locks, and the threads that have them."""
        committer = self._committer
        thread = threading.get_ident()
        seized = committer.joined.get(thread)  # and may not lead yet
        leader = thread if seized else committer.leader
        return (committer.lock, leader), (self._read_lock, self._browser)

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self.inside = False
        forks.release_all(self._still)

    def after_fork_in_child(self) -> None:
        """Let go what is the parent's; the next call opens anew."""
        # This thread may have been waiting for one of them, and its handler forked.
        forks.release_all(self._still)
        self._browser = None
        self._read_lock = threading.Lock()
        self._forked = True
        if self.inside:
            self._poison = StoreError(
                f"{self.options.path}: the process was forked in the middle of a call of this "
                "store, or of a transaction; the child can't use it"
            )
        self._committer.forget()
        session = self._session or self._spent
        if session is not None:
            session.abandon()
        self._session = self._spent = self._whole = None
