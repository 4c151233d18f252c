"""Marks on the -wal file: what processes tell each other without writing a byte.

A mark is an open-file-description read lock on one byte far beyond the end of the -wal, where
nothing is ever stored and SQLite takes no locks. The kernel drops it when the process dies. To ask
whether somebody else holds one costs a single system call and disturbs nobody.

The -wal, and not the database or the -shm: closing any descriptor of those would drop SQLite's own
POSIX locks for the whole process.
"""

import fcntl
import struct

__all__ = ["HISTORY_AT", "PRESENT_AT", "QUEUED_AT", "WAITING_AT", "Marks"]

PRESENT_AT = 1 << 58  # somebody has the store open
QUEUED_AT = 1 << 59  # somebody waits at the turnstile
HISTORY_AT = 1 << 60  # + the history a store keeps
WAITING_AT = 1 << 61  # + a hash of what is waited for, + the waiting process (see doorbell)

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_NOBODY = struct.pack("h", fcntl.F_UNLCK)
_SUPPORTED = hasattr(fcntl, "F_OFD_GETLK")


class Marks:
    """The marks of one open descriptor of a -wal file; None or no such locks: there are none.

    Attributes:
        alone: Whether no other has the store open, as last seen: then nothing is asked for.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor if _SUPPORTED else None
        self.alone = False

    def look_around(self, *, hears: bool) -> None:
        """See whether others have the store open.

        Args:
            hears: Whether the caller will hear of it when somebody comes.
        """
        self.alone = False
        self.alone = hears and self._descriptor is not None and not self.others()

    def others(self) -> bool:
        """Whether others are known to have the store open."""
        return self.find(_PRESENT) is not None

    def hold(self, offset: int) -> None:
        """Set a mark; it shares its byte with others' marks."""
        self._set(fcntl.F_RDLCK, offset)

    def drop(self, offset: int) -> None:
        """Remove a mark of ours."""
        self._set(fcntl.F_UNLCK, offset)

    def find(self, question: bytes) -> int | None:
        """The offset of another descriptor's mark in the range that `ask` packed, or None.

        Of several, the kernel names any, not the first: see `smallest`.
        """
        if self.alone or self._descriptor is None:
            return None
        answer = fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, question)
        if answer.startswith(_NOBODY):
            return None
        return int(_FLOCK.unpack(answer)[2])

    def close(self) -> None:
        """Set none and find none from now on; the descriptor is its owner's to close."""
        self._descriptor = None

    @staticmethod
    def ask(start: int, length: int) -> bytes:
        """The question of `find`: who holds a mark in this range?"""
        return _FLOCK.pack(fcntl.F_WRLCK, 0, start, length, 0)

    def smallest(self, start: int, end: int) -> int | None:
        """The lowest offset in a range at which another descriptor holds a mark, or None."""
        lowest = None
        while end > start and (found := self.find(self.ask(start, end - start))) is not None:
            lowest = end = max(found, start)
        return lowest

    def _set(self, kind: int, offset: int) -> None:
        if self._descriptor is not None:
            lock = _FLOCK.pack(kind, 0, offset, 1, 0)
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, lock)


_PRESENT = Marks.ask(PRESENT_AT, 1)
