"""What can go wrong, split by who can act on it.

Every error of this package is a `SpaceError`; misuse is the caller's own `TypeError` or
`ValueError` and is raised before anything is touched. Each docstring says whether anything changed.
The cause (apsw's error, the system's, a client's) is attached as `__cause__`.
"""

__all__ = [
    "BackendError",
    "BusyError",
    "CanceledError",
    "ClosedError",
    "CorruptError",
    "DeadlineError",
    "DecodeError",
    "FullError",
    "LeaseError",
    "MovedError",
    "SchemaError",
    "SpaceError",
    "StoreError",
    "UndecidedError",
]


class SpaceError(Exception):
    """The root of all errors of this package."""


class ClosedError(SpaceError):
    """The space is closed, or was closed while the call waited. Nothing changed."""


class DeadlineError(SpaceError, TimeoutError):
    """The wait's time is over. Nothing was taken, nothing was pushed."""


class CanceledError(SpaceError):
    """The wait's context was canceled. Nothing was taken, nothing was pushed."""


class LeaseError(SpaceError):
    """The delivery is settled already, or its lease is lost to another worker. Nothing changed."""


class DecodeError(SpaceError):
    """A payload that the codec can't read. It is not lost: it stays, or went to the dead letters.

    Attributes:
        key: Where the entry stood.
        seq: The entry's number there.
        payload: Its bytes, as pushed.
    """

    def __init__(self, message: str, key: str = "", seq: int = 0, payload: bytes = b"") -> None:
        super().__init__(message, key, seq, payload)
        self.key = key
        self.seq = seq
        self.payload = payload

    def __str__(self) -> str:
        return str(self.args[0])


class BackendError(SpaceError):
    """A backend that isn't a file failed. Whether anything changed, its message says."""


class StoreError(SpaceError):
    """The disk or the file failed. Nothing changed."""


class BusyError(StoreError):
    """Others held the write lock for longer than busy_timeout. Nothing changed."""


class FullError(StoreError):
    """There is no room left on the disk. Nothing changed.

    Pushes raise it while there still is room for those that take: see `sqlspace.reserve`. Who takes
    very many entries in one call may get it all the same; fewer at once will do. A transaction that
    only takes can be tried again at once.
    """


class UndecidedError(StoreError):
    """The disk failed at the worst moment: this operation may or may not have happened.

    The store can't be used any more: open it anew and look.
    """


class MovedError(StoreError):
    """The file was unlinked, replaced or moved underneath; the store can't be used any more.

    Attributes:
        undecided: False if nothing changed; True if the operation may have happened in the file
            that was moved away.
    """

    def __init__(self, message: str, undecided: bool = False) -> None:
        super().__init__(message, undecided)
        self.undecided = undecided

    def __str__(self) -> str:
        return str(self.args[0])


class CorruptError(StoreError):
    """The file is damaged, or no SQLite database at all. It was not touched."""


class SchemaError(StoreError):
    """Another application's file, a newer sqlspace's, or one tampered with. It was not touched."""
