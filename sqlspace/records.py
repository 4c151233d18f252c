"""What a store tells: plain, frozen records."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Compaction", "Entry", "KeyStats", "Stats", "Tombstone"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One live entry. Times are Unix seconds; those that don't apply are None."""

    seq: int
    """Its number: grows over the whole file, never used twice."""
    key: str
    payload: bytes
    headers: dict[str, str]
    state: Literal["ready", "delayed", "leased"]
    pushed_at: float
    due_at: float | None
    """When a delayed entry gets ready."""
    expires_at: float | None
    """When the entry is gone if nobody takes it."""
    deadline: float | None
    """When the lease of a leased entry ends."""
    attempts: int
    """How often it was claimed."""


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of an entry that was taken. Times are Unix seconds."""

    seq: int
    key: str
    pushed_at: float
    taken_at: float
    outcome: Literal["taken", "acked", "expired", "dead"]


@dataclass(frozen=True, slots=True)
class KeyStats:
    """What stands under one key."""

    ready: int
    leased: int
    delayed: int
    dead: int
    """Entries under KEY/dead."""
    oldest_age: float
    """Seconds since the oldest live entry was pushed; 0 if there is none."""
    bytes: int
    """Of all live payloads together."""


@dataclass(frozen=True, slots=True)
class Stats:
    """A store at one moment."""

    keys: dict[str, KeyStats] = field(default_factory=dict)
    """Per key with live entries, or with dead letters, sorted by key."""
    file_bytes: int = 0
    """The database file."""
    wal_bytes: int = 0
    """Its -wal; bounded by checkpoints, unless a reader never ends."""
    free_pages: int = 0
    """Pages inside the file that the next pushes use before it grows."""
    page_bytes: int = 0
    """The size of a page."""
    tombstones: int = 0
    """Entries taken and still in the history."""


@dataclass(frozen=True, slots=True)
class Compaction:
    """What `compact` did: the bytes of the file and its -wal together, before and after."""

    bytes_before: int
    bytes_after: int
