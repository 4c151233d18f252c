"""The only file that opens apsw: which files are opened, how, and with which settings.

The law: look first, touch then. A file that is damaged, another application's, a newer sqlspace's
or tampered with is refused before one byte of it or of its -wal has changed; so the look is
read-only, and closing it checkpoints nothing.

No descriptor of the database or the -shm is opened past SQLite: to close one would drop SQLite's
POSIX locks for the whole process.
"""

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import apsw

from . import schema
from .errors import CorruptError, SchemaError, StoreError
from .marks import Marks
from .mounts import is_mount_point, network_file_system

__all__ = [
    "Connection",
    "Options",
    "change_each",
    "connect",
    "disagreement",
    "has_moved",
    "holds_lock",
    "nested",
    "open_verified",
    "roll_back",
    "run",
    "sync",
    "sync_anew",
]

# The first SQLite with the fix of the WAL-reset bug, which could lose commits.
_SQLITE_NEEDED = (3, 51, 3)
if tuple(map(int, apsw.sqlite_lib_version().split("."))) < _SQLITE_NEEDED:
    raise ImportError(
        f"sqlspace needs SQLite 3.51.3 or later inside apsw, not {apsw.sqlite_lib_version()}: "
        "earlier ones can lose commits (the WAL-reset bug)"
    )


class Connection(apsw.Connection):
    """SQLite's, with one cursor for all statements: a new one for each would cost 0.5 to 1.2 µs.

    So each result is fetched whole before the next statement.
    """

    def __init__(self, path: str, flags: int, vfs: str | None = None) -> None:
        super().__init__(path, flags, vfs=vfs)
        self.execute = self.cursor().execute  # type: ignore[method-assign]


T = TypeVar("T")

# After a checkpoint the -wal is cut to this; it is a little more than what 1,000 pages take, after
# which SQLite checkpoints by itself.
_WAL_BYTES = 8 << 20

# SQLite's page, unless a file says otherwise.
_FIRST_PAGE_BYTES = 4096

_LOOKS_AT_LOCKS = 20

_CHUNK_BYTES = 1 << 20

_DATABASE_MAGIC = b"SQLite format 3\0"
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


@dataclass(frozen=True, slots=True)
class Options:
    """What `sqlspace.open` was told."""

    path: str
    sync: bool | Literal["group"]
    history: int | None
    embed: bool
    mode: int
    busy_timeout: float
    allow_network: bool
    vfs: str | None
    create: bool = True
    """Whether a store is made where there is none."""


def check_in_place(path: str, *, allow_network: bool, create: bool = True) -> None:
    """Refuse what can't be a store's file, without opening it.

    Raises:
        StoreError: with the path, and the system's error as its cause.
    """
    try:
        directory = os.path.dirname(path)
        if not stat.S_ISDIR(os.stat(directory).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)
        if not os.access(directory, os.W_OK | os.X_OK):
            # SQLite keeps the -wal and the -shm there.
            raise PermissionError(errno.EACCES, "the directory can't be written to", directory)
        found = None
        if not create or os.path.lexists(path):
            found = os.stat(path)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            if not os.access(path, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, "the file can't be read and written", path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    if found is not None and found.st_nlink > 1:
        raise StoreError(
            f"{path}: it has {found.st_nlink} hard links; under each name SQLite would keep a "
            "-wal of its own, and entries would be lost"
        )
    if found is not None and is_mount_point(path):
        raise StoreError(
            f"{path}: the file itself is a mount point, so its -wal would lie on another mount, "
            "and entries would be lost; mount its directory"
        )
    if not allow_network and (kind := network_file_system(path)) is not None:
        raise StoreError(
            f"{path}: it lies on a network file system ({kind}), where the -wal's shared memory "
            "doesn't work; allow_network=True overrides this"
        )


def open_verified(options: Options) -> Connection:
    """Look first, touch then: a connection to a file with our schema, or an error and no change."""
    path = options.path
    if options.vfs is None:
        check_in_place(path, allow_network=options.allow_network, create=options.create)
    deadline = time.monotonic() + options.busy_timeout
    found = _patiently(deadline, lambda: _look(options))
    if found == schema.FOREIGN and not options.embed:
        raise schema.foreign()
    flags = apsw.SQLITE_OPEN_READWRITE
    if options.create:
        flags |= apsw.SQLITE_OPEN_CREATE
        if options.vfs is None and not os.path.exists(path):
            _create(path, options.mode)
    elif found in (schema.EMPTY, schema.FOREIGN):
        raise StoreError(f"{path}: there is no store in it")
    at_rest = not os.path.exists(path + "-wal")
    connection = connect(options, flags)
    try:
        mode = _patiently(deadline, lambda: connection.pragma("journal_mode", "wal"))
        if mode != "wal":
            raise StoreError(f"{path}: SQLite can't keep a -wal here (journal mode {mode})")
        _patiently(deadline, lambda: _secure(connection, path))
        _patiently(deadline, lambda: schema.migrate(connection, embed=options.embed))
    except BaseException:
        # Without a checkpoint. But to read made a -wal, in which there is nothing to move: it goes.
        if at_rest and _is_empty(path + "-wal"):
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        connection.close()
        raise
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
    return connection


def _is_empty(path: str) -> bool:
    return os.path.exists(path) and os.stat(path).st_size == 0


def connect(options: Options, flags: int) -> Connection:
    """A connection with our settings, which doesn't checkpoint when it is closed."""
    connection = Connection(options.path, flags, options.vfs)
    try:
        _set_up(connection, options)
    except BaseException:
        connection.close()
        raise
    return connection


def _set_up(connection: Connection, options: Options) -> None:
    connection.set_busy_timeout(int(options.busy_timeout * 1000))
    for setting, value in (
        (apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1),
        (apsw.SQLITE_DBCONFIG_DEFENSIVE, 1),
        # What somebody has planted in the file must not run.
        (apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0),
        (apsw.SQLITE_DBCONFIG_ENABLE_VIEW, 0),
        (apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0),
        # Without it, apsw's SQLite plans a statement anew whenever its key changes: a look at a
        # queue's head took 10 µs instead of 4.
        (apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1),
    ):
        connection.config(setting, value)
    connection.pragma("cell_size_check", 1)
    connection.pragma("synchronous", "FULL" if options.sync else "NORMAL")
    connection.pragma("journal_size_limit", _WAL_BYTES)
    if options.sync:  # where fsync doesn't reach the platter (macOS)
        connection.pragma("fullfsync", 1)
        connection.pragma("checkpoint_fullfsync", 1)


def _secure(connection: Connection, path: str) -> None:
    """Have a -wal on the disk that was left behind, before anything is built upon it.

    Who left it may have failed to sync it: then it is whole in the system's cache only. What comes
    behind it would be lost with it, and a checkpoint that a power cut ends would leave half of it.

    Raises:
        apsw.Error, StoreError: It may not be on the disk.
    """
    try:
        descriptor = os.open(path + "-wal", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # under a vfs that keeps its files elsewhere
        return
    try:
        # Whoever has it open has done so, or knows by SQLite's shared memory how far it is whole.
        if os.fstat(descriptor).st_size and not Marks(descriptor).others():
            connection.execute("BEGIN IMMEDIATE")
            try:
                sync_anew(descriptor)
            finally:
                roll_back(connection)
    except OSError as error:
        raise StoreError(f"{path}-wal: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _look(options: Options) -> int:
    """Which schema the file has, EMPTY and FOREIGN included; not one byte of it changes."""
    path = options.path
    header = _header(options)
    if not header:
        return schema.EMPTY
    if len(header) < 100 or not header.startswith(_DATABASE_MAGIC):
        # A first open that a power cut ended may leave anything in its one page, and the journal
        # that leads back.
        if _pages_before(_journal(path)) == 0 and os.stat(path).st_size <= _FIRST_PAGE_BYTES:
            return schema.EMPTY
        raise CorruptError(f"{path}: it is no SQLite database")
    # Its version for readers is what SQLite goes by.
    if header[19] == 2 and options.vfs is None and not os.path.exists(path + "-wal"):
        return _look_at_rest(path)
    try:
        return _examine(f"file:{quote(path)}", options.vfs)
    except (apsw.ReadOnlyError, apsw.CantOpenError):
        journal = _journal(path)
        if _pages_before(journal) == 0:
            return schema.EMPTY
        if journal[:1] in (b"", b"\0"):  # not hot
            raise
        if options.embed:
            return schema.FOREIGN  # whoever opens it for writing rolls it back
        raise StoreError(
            f"{path}: a transaction was cut off in the middle, and its -journal waits to be rolled "
            "back; open it once with the application that it belongs to"
        ) from None


def _look_at_rest(path: str) -> int:
    """Which schema is in a file in WAL mode without a -wal: to open it as usual would make one.

    Nobody has it open, and all of it is in the file. If somebody opens it meanwhile, what is read
    without locks may be torn, so bad news counts only if all has stayed as it was.
    """
    before = _stamp(path)
    try:
        return _examine(f"file:{quote(path)}?immutable=1", None)
    except (apsw.Error, SchemaError):
        if os.path.exists(path + "-wal") or _stamp(path) != before:
            raise apsw.BusyError("others opened the file meanwhile") from None
        raise


def _stamp(path: str) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _examine(uri: str, vfs: str | None) -> int:
    connection = apsw.Connection(uri, apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI, vfs=vfs)
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.pragma("cell_size_check", 1)
        return schema.examine(connection)
    finally:
        connection.close()


def _header(options: Options) -> bytes:
    """The first 100 bytes, read through SQLite: a descriptor of our own would drop its locks."""
    if options.vfs is None and not os.path.exists(options.path):
        return b""
    flags = apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_READONLY
    try:
        file = apsw.VFSFile(options.vfs or "", options.path, [flags, 0])
    except apsw.CantOpenError:
        if options.vfs is None:
            raise
        return b""  # the file isn't there yet, as this vfs has it
    try:
        size = file.xFileSize()
        if not size and options.vfs is None and os.stat(options.path).st_size == 1:
            size = 1  # SQLite takes such a file for empty, and would write over it
        return file.xRead(min(100, size), 0) if size else b""
    finally:
        file.xClose()


def _journal(path: str) -> bytes:
    """The beginning of the rollback journal, empty if there is none."""
    try:
        with open(path + "-journal", "rb") as file:
            return file.read(20)
    except OSError:
        return b""


def _pages_before(journal: bytes) -> int | None:
    """How many pages the database had that a journal leads back to; None if it leads nowhere.

    Of a first open that was cut off it is 0.
    """
    if not journal.startswith(_JOURNAL_MAGIC) or len(journal) < 20:
        return None
    (pages,) = struct.unpack(">I", journal[16:20])
    return int(pages)


def _create(path: str, mode: int) -> None:
    """Make the empty file with just these permissions; the -wal and -shm get the same."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        return
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    try:
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def _patiently(deadline: float, step: Callable[[], Any]) -> Any:
    """Run a step of opening, again while others are at it: SQLite itself doesn't always wait."""
    pause = 0.001
    while True:
        try:
            return step()
        except (apsw.BusyError, apsw.LockedError):
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def has_moved(connection: apsw.Connection) -> bool:
    """Ask SQLite whether the path is still the file that it has open."""
    import ctypes  # noqa: PLC0415  # at an open only

    answer = ctypes.c_int(0)
    known = connection.file_control("main", apsw.SQLITE_FCNTL_HAS_MOVED, ctypes.addressof(answer))
    return bool(known and answer.value)


def holds_lock(path: str) -> bool:
    """Whether this process holds a POSIX lock on the file; True where that can't be asked.

    While others lock and unlock, a read of /proc/locks may miss a line: of children that were
    forked on a busy machine, one in about 60 was refused. So only several that miss it count.
    """
    try:
        inode = str(os.stat(path).st_ino)
        return any(_is_listed(inode) for _ in range(_LOOKS_AT_LOCKS))
    except OSError:
        return True


def _is_listed(inode: str) -> bool:
    """Whether a lock of this process on the file is in one reading of the system's list."""
    with open("/proc/locks", encoding="ascii") as file:
        lines = file.read().splitlines()
    wanted = str(os.getpid())
    for line in lines:
        fields = line.split()
        if "POSIX" in fields and wanted in fields:
            place = fields[fields.index(wanted) + 1]
            if place.rsplit(":", 1)[-1] == inode:
                return True
    return not lines


def run(done: list[Any], connection: Connection, sql: str, arguments: Sequence[Any]) -> None:
    """Run a statement that returns no rows; `done` isn't empty once it has.

    Both happen in one C call, so no Ctrl-C can come between the commit and the note of it: as two
    steps, 704 of 704 interrupted pulls lost their entry.
    """
    done.extend(map(connection.execute, (sql,), (arguments,)))


def change_each(connection: Connection, sql: str, rows: Sequence[Sequence[Any]]) -> None:
    """Run a statement that changes one row of the table for each of `rows`.

    Raises:
        apsw.CorruptError: It has not. What a damaged index tells of isn't there, and would be told
            again for ever.
    """
    before = connection.total_changes()
    connection.executemany(sql, rows)
    if connection.total_changes() - before != len(rows):
        raise disagreement()


def disagreement() -> apsw.CorruptError:
    """What to raise when the table doesn't hold what an index tells of."""
    return apsw.CorruptError("an index and its table disagree")


def nested(connection: Connection, step: Callable[[Connection], T]) -> T:
    """What `step` returns; in the caller's transaction, all of it or, if it raises, nothing."""
    connection.execute("SAVEPOINT sqlspace")
    try:
        found = step(connection)
    except Exception:
        if connection.in_transaction:
            connection.execute("ROLLBACK TO sqlspace")
            connection.execute("RELEASE sqlspace")
        raise
    connection.execute("RELEASE sqlspace")
    return found


def roll_back(connection: Connection) -> None:
    """End the transaction, if there is one. Idempotent."""
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def sync(descriptor: int) -> None:
    """Have what was written to the file on the disk: the one place where we do so, not SQLite."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # where fsync doesn't reach the platter (macOS)
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)


def sync_anew(descriptor: int) -> None:
    """Have on the disk what a sync has failed to write.

    The system takes that for clean, and no later sync writes it: so all of the file is written once
    more, as it stands. Nobody else may write to it meanwhile.
    """
    offset = 0
    while data := os.pread(descriptor, _CHUNK_BYTES, offset):
        offset += os.pwrite(descriptor, data, offset)
    sync(descriptor)
