"""Looking into a store: counts, entries, history, stats. Nothing here writes.

All of it runs on the connection for browsing, and what is handed out lazily is read in batches: a
read transaction that stays open would keep the -wal from being used again.
"""

import functools
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from . import upkeep
from .arguments import check_key
from .connection import Connection
from .database import Database
from .errors import CorruptError
from .records import Entry, KeyStats, Stats, Tombstone

__all__ = [
    "count",
    "entries",
    "entry",
    "has_live",
    "has_ready",
    "head",
    "history",
    "keys",
    "stats",
    "stirring",
]

SELECT_READY = """
SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ? AND state = 0 AND state < 3 LIMIT 1
"""
SELECT_LIVE = """
SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ? AND state < 3 LIMIT 1
"""
SELECT_PAYLOAD = """
SELECT ifnull(payload, x'') FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key = ? AND state = 0 AND state < 3 ORDER BY seq LIMIT 1
"""
COUNT = """
SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_live WHERE key = ? AND state < 3
"""
# The headers as a blob: what somebody else's SQL made of no valid UTF-8 can't be a str.
SELECT_ENTRY = """
SELECT seq, key, ifnull(payload, x''), CAST(headers AS BLOB), state, pushed_at, due_at,
       expires_at, deadline, attempts
  FROM sqlspace_entries
 WHERE seq = ? AND key = ? AND state < 3
"""
SELECT_ENTRIES = """
SELECT seq, key, ifnull(payload, x''), CAST(headers AS BLOB), state, pushed_at, due_at,
       expires_at, deadline, attempts
  FROM sqlspace_entries INDEXED BY sqlite_autoindex_sqlspace_entries_1
 WHERE key = ? AND seq > ? AND state < 3 ORDER BY seq
"""
# The keys are read as blobs: one that somebody else's SQL made of no valid UTF-8 can't be a str.
SELECT_NEXT_KEY = """
SELECT CAST(min(key) AS BLOB) FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE key > CAST(? AS TEXT) AND state < 3
"""
SELECT_STATS = """
SELECT CAST(key AS BLOB), state, count(*), min(pushed_at), sum(length(payload))
  FROM sqlspace_entries INDEXED BY sqlspace_entries_live
 WHERE state < 3 GROUP BY key, state
"""
SELECT_HISTORY = """
SELECT taken_no, seq, key, pushed_at, taken_at, state
  FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
 WHERE taken_no > ? AND taken_no IS NOT NULL AND key = ? ORDER BY taken_no LIMIT ?
"""
COUNT_HISTORY = """
SELECT count(*) FROM sqlspace_entries INDEXED BY sqlspace_entries_taken
 WHERE taken_no > ? AND taken_no IS NOT NULL
"""

_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 20

_STATES: tuple[Literal["ready", "delayed", "leased"], ...] = ("ready", "delayed", "leased")
_OUTCOMES: dict[int, Literal["taken", "acked", "expired", "dead"]] = {
    3: "taken",
    4: "acked",
    5: "expired",
    6: "dead",
}


def has_ready(database: Database, key: str) -> bool:
    """Whether an entry of `key` can be taken now."""
    return bool(database.read(SELECT_READY, (key,)))


def has_live(database: Database, key: str) -> bool:
    """Whether `key` holds any live entry."""
    return bool(database.read(SELECT_LIVE, (key,)))


def head(database: Database, key: str) -> bytes | None:
    """The payload of the head."""
    rows = database.read(SELECT_PAYLOAD, (key,))
    return rows[0][0] if rows else None


def stirring(database: Database, tokens: Iterable[str]) -> Iterable[str] | None:
    """For the doorbell: of these tokens, those that have something; None if nothing changed."""
    if not database.changed():
        return None
    # A key can't hold a NUL; a token for room begins with one.
    return [
        token
        for token in tokens
        if (not has_live(database, token[1:]) if token[0] == "\0" else has_ready(database, token))
    ]


def count(database: Database, key: str) -> int:
    """How many live entries."""
    return int(database.read(COUNT, (key,))[0][0])


def entry(database: Database, key: str, seq: int) -> Entry | None:
    """One live entry."""
    rows = database.read(SELECT_ENTRY, (seq, key))
    return _entry(rows[0], database.options.path) if rows else None


def entries(database: Database, key: str) -> Iterator[Entry]:
    """The live entries of `key`, by seq."""
    last = 0
    while True:
        batch: list[Any] = database.browse(functools.partial(_some, key=key, last=last))
        for row in batch:
            yield _entry(row, database.options.path)
        if not batch:
            return
        last = batch[-1][0]


def keys(database: Database) -> list[str]:
    """The keys with live entries, sorted; those that no caller could name are left out."""

    def step(connection: Connection) -> list[str]:
        found: list[str] = []
        last: Any = b""
        while (last := connection.execute(SELECT_NEXT_KEY, (last,)).get) is not None:
            key = _nameable(last)
            if key is not None:
                found.append(key)
        return found

    return sorted(database.browse(step))


def history(database: Database, key: str) -> Iterator[Tombstone]:
    """The tombstones of `key`, oldest first."""
    last = _forgotten(database)
    while True:
        batch = database.read(SELECT_HISTORY, (last, key, _BATCH_ROWS))
        for _, seq, name, pushed_at, taken_at, state in batch:
            yield Tombstone(seq, name, pushed_at / 1e6, taken_at / 1e6, _OUTCOMES[state])
        if len(batch) < _BATCH_ROWS:
            return
        last = batch[-1][0]


def stats(database: Database) -> Stats:
    """All that can be counted."""

    def step(connection: Connection) -> tuple[list[Any], int, int]:
        return (
            connection.execute(SELECT_STATS).fetchall(),
            connection.pragma("freelist_count"),
            connection.pragma("page_size"),
        )

    rows, free_pages, page_bytes = database.browse(step)
    now = time.time_ns() // 1000
    found: dict[str, dict[str, int]] = {}
    for name, state, number, pushed_at, size in rows:
        key = name.decode(errors="backslashreplace")
        sums = found.setdefault(key, {"ready": 0, "delayed": 0, "leased": 0, "bytes": 0, "at": now})
        sums[_STATES[state]] += number
        sums["bytes"] += size or 0
        sums["at"] = min(sums["at"], pushed_at)
    live = {key: sum(sums[state] for state in _STATES) for key, sums in found.items()}
    for dead in [key for key in live if key.endswith("/dead")]:
        found.setdefault(dead.removesuffix("/dead"), dict.fromkeys((*_STATES, "bytes"), 0))
    file_bytes, wal_bytes = database.sizes()
    return Stats(
        keys={
            key: KeyStats(
                ready=sums["ready"],
                leased=sums["leased"],
                delayed=sums["delayed"],
                dead=live.get(f"{key}/dead", 0),
                oldest_age=(now - sums.get("at", now)) / 1e6,
                bytes=sums["bytes"],
            )
            for key, sums in sorted(found.items())
            if key
        },
        file_bytes=file_bytes,
        wal_bytes=wal_bytes,
        free_pages=free_pages,
        page_bytes=page_bytes,
        tombstones=int(database.read(COUNT_HISTORY, (_forgotten(database),))[0][0]),
    )


def _forgotten(database: Database) -> int:
    """The last taking that is beyond the history; pruning may not have got to it yet."""
    keep = database.history()
    if keep is None:
        return 0
    return max(0, int(database.read(upkeep.SELECT_LAST_TAKEN)[0][0]) - keep)


def _some(connection: Connection, key: str, last: int) -> list[Any]:
    """The next entries, bounded in number and in bytes."""
    batch: list[Any] = []
    size = 0
    cursor = connection.execute(SELECT_ENTRIES, (key, last))
    for row in cursor:
        batch.append(row)
        size += len(row[2])
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            break
    cursor.close()
    return batch


def _nameable(key: bytes) -> str | None:
    try:
        return check_key(key.decode())
    except ValueError:
        return None


def _headers(text: bytes | None) -> dict[str, str]:
    """Those of an entry; ValueError if somebody else's SQL made them what they shouldn't be."""
    if text is None:
        return {}
    try:
        found = json.loads(text.decode())
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("something else")
    return found


def _entry(row: Any, path: str) -> Entry:
    seq, key, payload, headers, state, pushed_at, due_at, expires_at, deadline, attempts = row
    try:
        named = _headers(headers)
    except ValueError as error:
        raise CorruptError(
            f"{path}: the headers of entry {seq} of {key!a} aren't a JSON object of strings; it "
            "stays where it is"
        ) from error
    return Entry(
        seq=seq,
        key=key,
        payload=payload,
        headers=named,
        state=_STATES[state],
        pushed_at=pushed_at / 1e6,
        due_at=None if due_at is None else due_at / 1e6,
        expires_at=None if expires_at is None else expires_at / 1e6,
        deadline=None if deadline is None else deadline / 1e6,
        attempts=attempts,
    )
