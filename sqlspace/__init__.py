"""A keyed tuple space for Python, on one machine: in memory, or durable in one SQLite file.

>>> import sqlspace, tempfile
>>> with tempfile.TemporaryDirectory() as folder, sqlspace.open(f"{folder}/queue.db") as store:
...     seq = store.push("mail", b"hello")
...     store.pull("mail")
b'hello'
"""

from .errors import (
    BackendError,
    BusyError,
    CanceledError,
    ClosedError,
    CorruptError,
    DeadlineError,
    DecodeError,
    FullError,
    LeaseError,
    MovedError,
    SchemaError,
    SpaceError,
    StoreError,
    UndecidedError,
)
from .local import Local
from .records import Compaction, Entry, KeyStats, Stats, Tombstone
from .rendezvous import call, serve
from .space import Context, Space
from .store import Store, open

__all__ = [
    "BackendError",
    "BusyError",
    "CanceledError",
    "ClosedError",
    "Compaction",
    "Context",
    "CorruptError",
    "DeadlineError",
    "DecodeError",
    "Entry",
    "FullError",
    "KeyStats",
    "LeaseError",
    "Local",
    "MovedError",
    "SchemaError",
    "Space",
    "SpaceError",
    "Stats",
    "Store",
    "StoreError",
    "Tombstone",
    "UndecidedError",
    "call",
    "open",
    "serve",
]
