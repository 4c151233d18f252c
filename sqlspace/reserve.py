"""The reserve: room that pushes may not use up, so that a full disk can be drained.

To take an entry needs room too: frames in the -wal, and, when these are checkpointed, pages by
which the file must grow for what was pushed before. On a disk that pushes have filled to the last
byte nobody could pull, checkpoint or compact. So a file `PATH-reserve` holds room, and the first
take or ack that finds the disk full gives it back. No push ever does.

The law: no push is committed unless the reserve covers what the file still has to grow by, that
push included, a claim of the largest entry, and `_SPARE_PAGES` for the -wal. The -wal's size bounds
that growth, so it is what is compared with the reserve's; only where there is no room for as much
are pages counted. A claim writes its entry's whole row anew, before the old one's pages are free.
A fixed size can't do: 64 KB drained nothing when SQLite checkpoints every 1,000 pages, and one
entry of 8 MB was too much for 8 MB. The reserve of a new store has 512 KB, that of one whose -wal
has grown to what it mostly has, 5 MB; it is cut again when the last store closes the file.

Whoever makes it, lets it grow or gives it back is inside the turnstile; that it was given back, all
processes see in its size. It is truncated and not removed, for others may have it open. Its content
says what it is, and how large the largest entry may be. None of it is synced: what a power cut
takes away of it, the next push makes again. The one who cuts it outside of the turnstile is
`release`, and whoever has just been alone may be inside without having asked: so room is allocated
from the file's beginning, and no cut in between leaves a hole.

A file of that name that isn't ours is left alone, and then there is no reserve; once a second it is
tried again.
"""

import contextlib
import errno
import logging
import os
import stat
import time
from typing import Protocol

import apsw

from .connection import Connection
from .errors import FullError

__all__ = ["Reserve", "is_tight", "release"]

log = logging.getLogger("sqlspace")

_TITLE = (
    b"sqlspace keeps this room, so that the database beside it can be emptied on a full disk.\n"
    b"It may be deleted while no program has the database open.\n"
    b"It covers entries of so many bytes: "
)
_CONTENT_BYTES = len(_TITLE) + 11  # ten digits and a newline
_SMALL_BYTES = 32 << 10  # entries up to that are all alike
_STEP_BYTES = 256 << 10
_SPARE_PAGES = 32
# The file may grow by so many for the indexes, and for what a page can't be filled with. Mostly it
# is a tenth of that; what splits many pages at once, the spare ones cover.
_PUSH_PAGES = 1

_BLOCK_BYTES = 512  # that stat counts in

_SHM_PAGE_BYTES = 4096
_SHM_BYTES = 64 << 10  # twice what an open maps of it

_LOOK_AGAIN_SECONDS = 1.0

_PATIENCE_SECONDS = 0.1  # for those who read; one that never ends must not stop every push

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Patience(Protocol):
    deadline: float


class Reserve:
    """That of one open file, as one process knows it; its user is inside the turnstile.

    Args:
        path: Of the database.
        wal_descriptor: Of its -wal; None if there is none, and then there is no reserve.
        patience: The connection's, with others that use the file.

    Attributes:
        due: Whether it is time to `tend` it.
    """

    def __init__(self, path: str, wal_descriptor: int | None, patience: _Patience) -> None:
        self._path = path
        self._patience = patience
        self.due = wal_descriptor is not None
        self._wal_descriptor = wal_descriptor
        self._descriptor: int | None = None
        self._missing = wal_descriptor is None  # and can't be had
        self._told = False
        self._look_at = 0.0  # on the monotonic clock
        self._page_bytes = 0  # 0: not used yet
        self._left = -1  # bytes to push until the next look, if nobody else writes
        self._entry_bytes = _SMALL_BYTES

    def cover(
        self, connection: Connection, size: int, entry: int, *, alone: bool, pushes: int = 1
    ) -> None:
        """Before a push: make sure that its room can be had when it is needed.

        Args:
            connection: For writing.
            size: Bytes that are to be pushed; in a transaction, since it began.
            entry: Bytes of the largest entry among what is pushed now.
            alone: Whether no other process has the file open.
            pushes: As how many entries `size` is pushed.

        Raises:
            FullError: It can't.
        """
        self._left -= size + size // 64 + pushes * _PUSH_PAGES * self._page_bytes
        if entry <= self._entry_bytes:
            if alone and self._left >= 0:
                return
            covered = self._ensure(connection, size, pushes)
        else:
            covered = self._cover_larger(connection, size, entry, pushes)
        if alone:  # a thousand stores of one process need no thousand descriptors more
            self._forget()
        if not covered:
            raise FullError(f"{self._path}: no room left on the disk")

    def remind(self) -> None:
        """Now and then: it is time to `tend` it, if a second has gone by."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_AGAIN_SECONDS
            self.due = self._wal_descriptor is not None

    def tend(self, connection: Connection) -> None:
        """Make it again, if it is gone or was given back, and there is room."""
        self.due = False
        self._left = -1
        self._missing = self._wal_descriptor is None
        self._forget()  # others may have noted a larger entry; somebody may have deleted it
        self._ensure(connection, 0, 0)
        self._forget()

    def give_back(self, connection: Connection) -> None:
        """A take has found the disk full: let it have this room; outside of a transaction.

        What it leaves is the reserve again from the next operation on: else the -wal would take all
        of it, and when that must be checkpointed the file couldn't grow by a single page.
        """
        self._left = -1
        self.due = True
        if not self._missing and self._open() and self._descriptor is not None:
            _cut(self._descriptor, _CONTENT_BYTES)
        # What it was kept for; then the -wal is written from its beginning, and needs no more room.
        self._checkpoint(connection, apsw.SQLITE_CHECKPOINT_RESTART)

    def is_large(self) -> bool:
        """Whether there is something to `shrink`."""
        if not self._page_bytes or not self._open() or self._descriptor is None:
            return False
        return os.lseek(self._descriptor, 0, os.SEEK_END) > _rounded(self._needed(0, 0))

    def shrink(self, connection: Connection, entry: int | None = None) -> None:
        """Empty the -wal, if no reader is in the way, and keep no more than is needed then.

        Args:
            connection: For writing.
            entry: Bytes of the largest entry that there is; None: not known.
        """
        self._left = -1
        self._forget()
        self._checkpoint(connection, apsw.SQLITE_CHECKPOINT_TRUNCATE)
        if not self._missing and self._open() and self._descriptor is not None:
            if entry is not None:
                self._entry_bytes = _SMALL_BYTES
                self._note(entry)
            assert self._wal_descriptor is not None
            wal = os.lseek(self._wal_descriptor, 0, os.SEEK_END)
            _cut(self._descriptor, _rounded(self._needed(wal, wal)))

    def close(self) -> None:
        """Let go the file, which stays. Idempotent."""
        self._missing = True
        self._wal_descriptor = None
        self._forget()

    # -- how much

    def _ensure(self, connection: Connection, size: int, pushes: int) -> bool:
        """Have it cover so much more; whether it does, or there is none."""
        if not self._open(create=True) or self._wal_descriptor is None:
            return self._missing
        if not self._page_bytes:
            self._page_bytes = connection.pragma("page_size")
        # A push leaves more than it must: while the file is drained it grows by a page or two.
        pages = pushes * _PUSH_PAGES + _SPARE_PAGES if pushes else 0
        more = size + size // 64 + pages * self._page_bytes
        wal = os.lseek(self._wal_descriptor, 0, os.SEEK_END)
        if self._extend(self._needed(wal + more, wal + more)):
            return True
        if self._extend(self._needed(self._growth(connection) + more, wal + more)):
            return True
        if connection.in_transaction:
            return False
        # The -wal's own room will do as well.
        self._checkpoint(connection, apsw.SQLITE_CHECKPOINT_TRUNCATE)
        wal = os.lseek(self._wal_descriptor, 0, os.SEEK_END)
        return self._extend(self._needed(self._growth(connection) + more, wal + more))

    def _cover_larger(self, connection: Connection, size: int, entry: int, pushes: int) -> bool:
        """As `_ensure`, for an entry larger than all before; if it is False, nothing changed."""
        if not self._open(create=True) or self._descriptor is None:
            return self._missing
        before = os.lseek(self._descriptor, 0, os.SEEK_END), self._entry_bytes
        self._note(entry)
        if self._ensure(connection, size, pushes) and self._is_room(size):
            return True
        if self._descriptor is not None:
            _cut(self._descriptor, before[0])
            self._note(before[1])
        self._left = -1
        return self._missing

    def _is_room(self, size: int) -> bool:
        """Whether the -wal can take so much, for all that is known beforehand."""
        if self._missing or self._wal_descriptor is None:
            return True
        disk = os.fstatvfs(self._wal_descriptor)
        wal = os.lseek(self._wal_descriptor, 0, os.SEEK_END)
        return disk.f_bavail * disk.f_frsize + wal > size

    def _needed(self, growth: int, wal: int) -> int:
        """How large it must be.

        Args:
            growth: By so many bytes the file will grow.
            wal: The bytes of the -wal, which are written again once they are in the file.
        """
        entry = self._entry_bytes + self._entry_bytes // 64
        return growth + entry + max(0, entry - wal) + _SPARE_PAGES * self._page_bytes

    def _growth(self, connection: Connection) -> int:
        """By how many bytes the file must grow for what is in the -wal."""
        size = int(connection.pragma("page_count")) * self._page_bytes
        with contextlib.suppress(OSError):  # it was moved, and that is noticed elsewhere
            size -= os.stat(self._path).st_size
        return max(0, size)

    def _checkpoint(self, connection: Connection, mode: int) -> None:
        deadline = self._patience.deadline
        self._patience.deadline = min(deadline, time.monotonic() + _PATIENCE_SECONDS)
        try:
            connection.wal_checkpoint(mode=mode)
        except apsw.Error as error:  # a reader is in the way, or there still is no room
            log.debug("%s: %s", self._path, error)
        finally:
            self._patience.deadline = deadline

    def _extend(self, needed: int) -> bool:
        """Have it at least so large; whether it is, or there is none."""
        if self._descriptor is None:
            return self._missing
        size = os.lseek(self._descriptor, 0, os.SEEK_END)
        for wanted in (_rounded(needed + _STEP_BYTES), needed):  # that not each push looks
            if size >= min(wanted, needed + _STEP_BYTES // 2):
                break
            try:
                _allocate(self._descriptor, wanted)
            except OSError as error:
                _cut(self._descriptor, size)
                if self._is_done_without(error):
                    return True
            else:
                size = wanted
        self._left = size - needed
        return size >= needed

    # -- the file

    def _open(self, *, create: bool = False) -> bool:
        """Whether it is there, or could be made."""
        if self._descriptor is not None or self._missing:
            return not self._missing
        try:
            self._descriptor = _open(self._path, create=create)
        except OSError as error:
            self._is_done_without(error)
        if self._descriptor is not None:
            if not self._page_bytes and _has_holes(self._descriptor):
                _cut(self._descriptor, _CONTENT_BYTES)
            digits = os.pread(self._descriptor, _CONTENT_BYTES, 0).removeprefix(_TITLE).strip()
            if digits.isdigit():
                self._entry_bytes = int(digits)
            else:
                self._note(self._entry_bytes)
        return self._descriptor is not None

    def _note(self, entry: int) -> None:
        """There is so large an entry, or may be."""
        self._entry_bytes = _rounded(entry) if entry > _SMALL_BYTES else _SMALL_BYTES
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, b"%s%10d\n" % (_TITLE, self._entry_bytes), 0)

    def _is_done_without(self, error: OSError) -> bool:
        """Whether pushes go on without it: it isn't for want of room that there is none."""
        if error.errno in _FULL:
            return False
        if not self._told:
            log.warning(
                "%s-reserve: %s; so if the disk fills up, nothing can be taken until there is room",
                self._path,
                error.strerror,
            )
        self._told = self._missing = True
        self._forget()
        return True

    def _forget(self) -> None:
        # Ctrl-C in between leaves one open; the other way round it would be closed twice.
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _rounded(size: int) -> int:
    return -(-size // _STEP_BYTES) * _STEP_BYTES


def is_tight(path: str) -> bool:
    """Whether to open the database could end the process with SIGBUS, for want of room.

    SQLite maps the -shm, and makes sure of one block in each of its pages. Where blocks are
    smaller, as on a small ext4, a full disk may have none for the rest of the page.
    """
    disk = os.statvfs(os.path.dirname(path))
    return disk.f_frsize < _SHM_PAGE_BYTES and disk.f_bavail * disk.f_frsize < _SHM_BYTES


def release(path: str) -> bool:
    """Give it back where the database can't even be opened; whether that made room."""
    try:
        descriptor = _open(path, create=False)
    except OSError:
        return False
    if descriptor is None:
        return False
    try:
        found = os.lseek(descriptor, 0, os.SEEK_END) > _CONTENT_BYTES
        _cut(descriptor, _CONTENT_BYTES)
    finally:
        os.close(descriptor)
    return found


def _open(path: str, *, create: bool) -> int | None:
    """The reserve of the database at `path`; None if there is none."""
    # Not through a link, nor waiting for a pipe's other end.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path + "-reserve", flags)
    except FileNotFoundError:
        if not create:
            return None
        try:
            descriptor = _make(path, flags)
        except FileExistsError:  # another process has, just now
            descriptor = os.open(path + "-reserve", flags)
    try:
        if not _is_ours(descriptor):
            raise OSError(errno.EEXIST, "it isn't a reserve of sqlspace's")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make(path: str, flags: int) -> int:
    """An empty one, with the database's permissions; like its -wal, of its owner."""
    like = os.stat(path)
    mode = like.st_mode & 0o777
    descriptor = os.open(path + "-reserve", flags | os.O_CREAT | os.O_EXCL, mode)
    try:
        if os.geteuid() == 0:
            os.fchown(descriptor, like.st_uid, like.st_gid)
        os.fchmod(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_ours(descriptor: int) -> bool:
    """Whether it may be truncated: a file with one name, and in it what we write or zeros."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return False
    title = os.pread(descriptor, len(_TITLE), 0)
    if title == _TITLE:
        return True
    # What a power cut may have left: a part of it, or nothing, and zeros.
    return _TITLE.startswith(title.rstrip(b"\0")) and all(
        not any(os.pread(descriptor, _STEP_BYTES, start))
        for start in range(len(_TITLE), found.st_size, _STEP_BYTES)
    )


def _has_holes(descriptor: int) -> bool:
    """A copy may have some where this had room."""
    found = os.fstat(descriptor)
    return found.st_size > max(_CONTENT_BYTES, found.st_blocks * _BLOCK_BYTES)


def _allocate(descriptor: int, end: int) -> None:
    """Have room on the disk for so many bytes of it."""
    try:
        os.posix_fallocate(descriptor, 0, end)
    except (AttributeError, OSError) as error:  # macOS has none; nor have some file systems
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        while (left := end - os.lseek(descriptor, 0, os.SEEK_END)) > 0:
            os.write(descriptor, bytes(min(_STEP_BYTES, left)))


def _cut(descriptor: int, size: int) -> None:
    """Make it no larger than that."""
    if os.lseek(descriptor, 0, os.SEEK_END) > size:
        os.ftruncate(descriptor, size)
