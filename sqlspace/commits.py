"""How what was asked for is carried out and committed, and the truth of its errors.

The law, inside the turnstile: the reserve, the commit before the first write, the statements, the
commit; and out. Then the sync, if it is ours; is the file still in its place? Only then rings the
bell, and only then is anything acknowledged.

An error before the commit means that nothing happened; after a failed commit one more durable
commit makes that certain, or the error is UndecidedError. Whatever ends a call, an interrupt too,
nothing of it stands then, and no transaction is left open.

Who commits, and for whom, is the committer's to say; each call in here has its lock.
"""

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import apsw

from .committer import Committer, Operation
from .connection import Connection, Options, nested, roll_back, run, sync, sync_anew
from .errors import MovedError, SpaceError, StoreError, UndecidedError
from .session import UPDATE_BOOTS, Session
from .waiting import surely

__all__ = ["BrokenError", "Commits", "is_interrupt", "together"]

log = logging.getLogger("sqlspace")


class BrokenError(Exception):
    """An operation's failure took the transaction of all with it."""

    def __init__(self, operation: Operation, error: Exception) -> None:
        super().__init__()
        self.operation = operation
        self.error = error


def is_interrupt(error: Exception) -> bool:
    """Whether a signal's handler raised it, an alarm's TimeoutError: then it ends its own call.

    Handlers run in the main thread. What is raised there, and is neither ours nor SQLite's, is
    theirs.
    """
    ours = isinstance(error, apsw.Error | SpaceError | BrokenError)
    return not ours and threading.get_ident() == threading.main_thread().ident


def together(
    connection: Connection,
    operations: Iterable[Operation],
    cover: Callable[[int, int, int], None],
) -> None:
    """Carry them out in the caller's transaction, each by itself: a refusal is that one's alone.

    Args:
        connection: For writing.
        operations: In this order.
        cover: Called before each that pushes, with how many bytes this transaction will have pushed
            then, the largest entry of this one, and how many have pushed then.

    Raises:
        BrokenError: Because of one of them the transaction must be rolled back.
    """
    added = pushes = 0
    for operation in operations:
        try:
            if operation.probe(connection):
                if operation.adds is not None:
                    cover(added + operation.adds, operation.largest, pushes + 1)
                    added += operation.adds
                    pushes += 1
                operation.tokens = _within(connection, operation)
                operation.done.append(None)
        except Exception as error:
            if is_interrupt(error):
                raise
            stands = operation.done and not operation.whole
            disk = isinstance(error, apsw.IOError | apsw.FullError)
            if stands or disk or not connection.in_transaction:
                raise BrokenError(operation, error) from error
            operation.retract()
            operation.error = error


def _within(connection: Connection, operation: Operation) -> Iterable[str]:
    # One statement that fails changes nothing, so a savepoint, for 30 %, is for several only.
    tokens = None
    if not operation.whole:
        tokens = operation.step(connection)
    if tokens is None:
        tokens = nested(connection, operation.step)
    assert tokens is not None
    return tokens


class File(Protocol):
    """What a commit needs of the file that it is made in."""

    options: Options

    def ensure_in_place(self, session: Session, *, undecided: bool) -> None:
        """Raise MovedError if the file under the path is another; see who else has it open."""

    def spoil(self, error: StoreError) -> None:
        """From now on, every verb raises this."""

    def mapped(self, error: apsw.Error) -> StoreError:
        """Ours for apsw's."""

    def tidy(self, connection: Connection) -> list[str]:
        """Delete what is beyond the history, and age what is due; tokens."""


class Commits:
    """Those of one file.

    Args:
        file: That.
        committer: Has what was joined.
    """

    def __init__(self, file: File, committer: Committer) -> None:
        self._file = file
        self._committer = committer
        self._path = file.options.path
        self._busy_timeout = file.options.busy_timeout

    # -- one, or all that have joined

    def commit_alone(self, session: Session, operation: Operation) -> None:
        """Inside the turnstile: one operation, and out."""
        connection = session.connection
        try:
            try:
                if session.reserve.due:
                    session.reserve.tend(connection)
                try:
                    tokens = self._carry_out(session, operation)
                except apsw.FullError:
                    if operation.adds is not None:
                        raise
                    self.relieve(session, [operation])
                    tokens = self._carry_out(session, operation)
                if operation.tidies:
                    tokens = [*tokens, *self._tidied(connection)]
            finally:
                session.turnstile.leave()
            self.confirm(session)
            session.bell.ring_all(tokens, operation.besides)
            operation.finished = True
        except BaseException as error:
            try:
                self.take_back(session, error, operation)
            except BaseException:  # on the way into it or out of it
                self.take_back(session, error, operation)
                raise
            if isinstance(error, apsw.Error):
                raise self.explained(session, error) from error
            raise

    def _carry_out(self, session: Session, operation: Operation) -> Iterable[str]:
        """Do it, and commit; tokens."""
        connection = session.connection
        self.boot(session)  # first, for it may use the reserve
        if operation.adds is not None:
            alone = session.marks.alone
            session.reserve.cover(connection, operation.adds, operation.largest, alone=alone)
        tokens = None if operation.whole else operation.step(connection)
        if tokens is None:
            connection.execute("BEGIN IMMEDIATE")
            tokens = operation.step(connection) or ()
            run(operation.done, connection, "COMMIT", ())
        return tokens

    def boot(self, session: Session) -> None:
        """Before the first write, whoever it is for."""
        if not session.booted:
            try:
                session.boot()
            except apsw.FullError:
                session.reserve.give_back(session.connection)
                session.boot()
            # Were it lost and repeated, what a power cut left of the write behind it would stand.
            if session.syncs:
                self._sync(session)

    def relieve(self, session: Session, carried: list[Operation]) -> None:
        """The disk is full: have nothing stand of these, and make room for those that take."""
        self.take_all_back(carried, session, committed=False)
        session.reserve.give_back(session.connection)

    def commit_together(self, session: Session, own: Operation | None) -> None:
        """Inside the turnstile: those that have joined, in one transaction, and out."""
        committed: list[Any] = []  # not empty once they are
        failed: list[Exception] = []
        interrupt: BaseException | None = None

        def conclude() -> None:
            session.turnstile.leave()
            self._conclude(session, committed, failed)

        try:
            if session.reserve.due:
                session.reserve.tend(session.connection)
            try:
                self._carry_out_together(session, committed, own)
            except (apsw.FullError, BrokenError) as error:
                self._relieve_together(session, committed, error)
        except Exception as error:
            if is_interrupt(error):
                raise
            failed.append(error)  # told to each of them below
        finally:
            try:
                try:
                    conclude()
                except BaseException as error:  # noqa: BLE001  # raised below
                    interrupt = surely(conclude) or error
            except BaseException:  # on the way into it or out of it
                surely(conclude)
                raise
        if interrupt is not None:
            raise interrupt
        if failed and not isinstance(failed[0], BrokenError) and own and not own.finished:
            raise self.explained(session, failed[0]) from failed[0]

    def _carry_out_together(
        self, session: Session, committed: list[Any], own: Operation | None
    ) -> None:
        """Take what has joined, do it, and commit."""
        self.boot(session)
        session.connection.execute("BEGIN IMMEDIATE")
        self._committer.take(own)
        self._do_together(session, self._committer.carried, committed)

    def _do_together(
        self, session: Session, carried: list[Operation], committed: list[Any]
    ) -> None:
        connection = session.connection

        def cover(added: int, largest: int, pushes: int) -> None:
            session.reserve.cover(connection, added, largest, alone=False, pushes=pushes)

        together(connection, carried, cover)
        self._tidy_together(connection)
        run(committed, connection, "COMMIT", ())

    def _relieve_together(
        self, session: Session, committed: list[Any], error: apsw.FullError | BrokenError
    ) -> None:
        """If the disk is full: what pushes is refused, and what takes is done all the same."""
        cause: Exception = error
        if isinstance(error, BrokenError):
            cause = error.error
            if error.operation.adds is not None:  # it alone may be too large
                raise error
        carried = self._committer.carried
        taking = [each for each in carried if each.adds is None]
        if not isinstance(cause, apsw.FullError) or not taking:
            raise error
        self.relieve(session, carried)
        for each in carried:
            if each.adds is not None:
                each.error = cause
        session.connection.execute("BEGIN IMMEDIATE")
        self._do_together(session, taking, committed)

    def _tidy_together(self, connection: Connection) -> None:
        for operation in self._committer.carried:
            if operation.tidies:
                operation.tokens = [*operation.tokens, *self._tidied(connection)]
                return  # once for all of them

    def _tidied(self, connection: Connection) -> list[str]:
        """Tidy up, in a transaction by itself or within the caller's; tokens."""
        within = connection.in_transaction
        try:
            if within:
                return nested(connection, self._file.tidy)
            connection.execute("BEGIN IMMEDIATE")
            tokens = self._file.tidy(connection)
            connection.execute("COMMIT")
        except apsw.Error:  # the next one does it
            log.warning("%s: tidying failed", self._path, exc_info=True)
            if within and not connection.in_transaction:  # it took the caller's work with it
                raise
            if not within:
                roll_back(connection)
            return []
        except BaseException:
            # An open transaction would be taken for the caller's own, and nothing be undone.
            if not within:
                try:
                    surely(lambda: roll_back(connection))
                except BaseException:  # on the way into it or out of it
                    surely(lambda: roll_back(connection))
                    raise
            raise
        return tokens

    def _conclude(self, session: Session, committed: list[Any], failed: list[Exception]) -> None:
        """Finish what was committed, refuse what failed, hand back what it broke. Idempotent."""
        carried = [each for each in self._committer.carried if not each.finished]
        if committed and not failed:
            try:
                self.confirm(session)
                for operation in carried:
                    session.bell.ring_all(operation.tokens, operation.besides)
                    if isinstance(cause := operation.error, apsw.Error):
                        operation.error = self._file.mapped(cause)
                        operation.error.__cause__ = cause
                    operation.finished = True
            except StoreError as error:
                failed.append(error)
        if not committed or (failed and isinstance(failed[0], MovedError)):
            self.take_all_back(carried, session, committed=bool(committed))
        if failed and carried:
            self._refuse(session, carried, failed[0])
        self._committer.answer()

    def _refuse(self, session: Session, carried: list[Operation], error: Exception) -> None:
        """All of them have failed, or the one that broke the transaction of all."""
        refused = carried
        if isinstance(error, BrokenError):
            refused = [error.operation]
            error = error.error
        ours = self.explained(session, error)
        for operation in refused:
            operation.error = copy.copy(ours)
            operation.error.__cause__ = error.__cause__ if ours is error else error
            operation.finished = True

    def confirm(self, session: Session) -> None:
        """After a commit: it is as durable as promised, and in the file under this path."""
        if session.syncs:
            self._sync(session)
        if session.poll(0) or session.identity.alarmed:
            self._file.ensure_in_place(session, undecided=True)

    def _sync(self, session: Session) -> None:
        """Sync the -wal ourselves, outside of the turnstile, so that others' syncs go on meanwhile.

        If it fails, the system takes the pages for clean, and all can see what may never reach the
        disk. So it is written anew. A checkpoint instead would do, but for the power cut in the
        middle of it: it relies on a -wal that isn't on the disk.
        """
        assert session.wal_descriptor is not None
        try:
            sync(session.wal_descriptor)
        except OSError as error:
            log.warning("%s: the -wal could not be synced: %s", self._path, error)
            session.patience.deadline = time.monotonic() + self._busy_timeout
            try:
                session.connection.execute("BEGIN IMMEDIATE")
                try:
                    sync_anew(session.wal_descriptor)
                finally:
                    roll_back(session.connection)
            except (apsw.Error, OSError):
                raise self._undecided() from error

    # -- when it fails

    def take_all_back(self, carried: list[Operation], session: Session, *, committed: bool) -> None:
        """Have nothing stand of what these did. Idempotent."""
        connection = session.connection
        session.patience.deadline = time.monotonic() + self._busy_timeout
        try:
            if not committed:
                roll_back(connection)
            for operation in carried:
                if not committed:
                    operation.retract()
                elif operation.done:
                    try:
                        operation.undo(connection)
                    except apsw.FullError:
                        session.reserve.give_back(connection)
                        operation.undo(connection)
                    operation.done.clear()
        except apsw.Error:
            log.exception("%s: a call that failed could not be undone", self._path)

    def take_back(
        self, session: Session, error: BaseException, operation: Operation | None
    ) -> None:
        """After an interrupt or a failure: leave no transaction open, and nothing done.

        What SQLite refused to commit, or is rolled back, must not be undone as well: others may
        have taken the entries, or been given the seqs, in the meantime. What may be on the disk or
        not is left.

        Raises:
            BaseException: An interrupt that came meanwhile, which nothing else tells of.
        """
        connection = session.connection
        # What is noted of a single statement SQLite has committed with it.
        single = operation is not None and not operation.whole
        stands = not connection.in_transaction and (single or not isinstance(error, apsw.Error))
        carried = [] if operation is None or isinstance(error, UndecidedError) else [operation]

        def step() -> None:
            session.turnstile.leave()  # an interrupt may have kept it from that
            self.take_all_back(carried, session, committed=stands)

        interrupt = surely(step)
        if interrupt is not None and isinstance(error, Exception):
            raise interrupt

    def explained(self, session: Session, error: Exception) -> Exception:
        """Ours for apsw's, and what it says is true: after a failed write, nothing of it stands.

        Frames that a failed commit has left behind the log's end are valid for the next recovery.
        One more commit overwrites them; if that fails too, nobody knows.
        """
        if isinstance(error, apsw.IOError):
            session.patience.deadline = time.monotonic() + self._busy_timeout
            try:
                session.connection.execute(UPDATE_BOOTS)
            except apsw.Error:
                return self._undecided()
        return self._file.mapped(error) if isinstance(error, apsw.Error) else error

    def _undecided(self) -> UndecidedError:
        undecided = UndecidedError(
            f"{self._path}: the disk failed at the commit, and again afterwards: the last "
            "operation may or may not have happened; open the store anew and look"
        )
        self._file.spoil(undecided)
        return undecided
