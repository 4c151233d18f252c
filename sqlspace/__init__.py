"""A keyed tuple space for Python, on one machine: in memory, or durable in one SQLite file.

>>> import sqlspace, tempfile
>>> with tempfile.TemporaryDirectory() as folder, sqlspace.open(f"{folder}/queue.db") as store:
...     seq = store.push("mail", b"hello")
...     store.pull("mail")
b'hello'
"""

from .delivery import Delivery
from .durable import DurableSpace
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
from .forwarding import forward
from .local import Local
from .outbox import push_on
from .records import Compaction, Entry, KeyStats, Stats, Tombstone
from .rendezvous import call, serve
from .space import AsyncSpace, Context, Space
from .store import Store, open
from .transaction import Transaction

__all__ = [
    "AsyncSpace",
    "BackendError",
    "BusyError",
    "CanceledError",
    "ClosedError",
    "Compaction",
    "Context",
    "CorruptError",
    "DeadlineError",
    "DecodeError",
    "Delivery",
    "DurableSpace",
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
    "Transaction",
    "UndecidedError",
    "call",
    "forward",
    "open",
    "push_on",
    "serve",
]
