"""Dead letters: what died under KEY stands under KEY/dead, with its origin in its headers.

A tombstone `dead` where it was and a new entry where it goes, in the caller's transaction. What
died because its last lease ran out is moved by whoever comes by, a bounded number at a time.
"""

import json
import logging
from collections.abc import Iterable
from typing import Any

from . import upkeep
from .arguments import check_key, nameable
from .connection import Connection, disagreement
from .doorbell import room_token
from .rules import DIED_FIRST, LAST, LAST_LEASE, OVER, UNEXPIRED, dead_key

__all__ = [
    "BURY_ROWS",
    "bury",
    "bury_one",
    "bury_unreadable",
    "carry_out",
    "has_died",
    "origin",
    "readable_headers",
    "rooms",
    "spelled",
    "stripped",
]

log = logging.getLogger("sqlspace")

BURY_ROWS = 200  # moved in one step; each costs several statements

# The last leases of all keys that are over.
SELECT_LAST_OVER = f"""
SELECT EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_last
                WHERE deadline <= ?1 AND {LAST_LEASE})
    OR EXISTS (SELECT 1 FROM sqlspace_entries INDEXED BY sqlspace_entries_last_since
                WHERE since_at > ?1 AND {LAST_LEASE})
"""
SELECT_LAST = f"""
SELECT seq, CAST(key AS BLOB), {DIED_FIRST}
  FROM sqlspace_entries INDEXED BY sqlspace_entries_last
 WHERE deadline <= ?1 AND {LAST_LEASE}
 ORDER BY deadline LIMIT ?2
"""
# Those of one key, if others have died before and are not moved yet.
SELECT_LAST_OF_KEY = f"""
SELECT seq, CAST(key AS BLOB), {DIED_FIRST}
  FROM sqlspace_entries INDEXED BY sqlspace_entries_last
 WHERE deadline <= ?1 AND {LAST_LEASE} AND key = ?3
 ORDER BY deadline LIMIT ?2
"""
SELECT_LAST_STUCK = f"""
SELECT seq, CAST(key AS BLOB), {DIED_FIRST}
  FROM sqlspace_entries INDEXED BY sqlspace_entries_last_since
 WHERE since_at > ?1 AND {LAST_LEASE} LIMIT ?2
"""
# Ready, whether or not that has been carried out.
SELECT_IS_READY = f"""
SELECT 1 FROM sqlspace_entries
 WHERE seq = ?2 AND state < 3 AND {UNEXPIRED} AND (until_at IS NULL OR {OVER} AND NOT {LAST})
"""
SELECT_DYING = """
SELECT CAST(key AS BLOB), CAST(headers AS BLOB), ifnull(CAST(pushed_at AS INTEGER), 0),
       attempts
  FROM sqlspace_entries WHERE seq = ? AND state < 3
"""
INSERT_MOVED = """
INSERT INTO sqlspace_entries (key, payload, headers, pushed_at)
SELECT ?1, payload, ?2, ?3 FROM sqlspace_entries WHERE seq = ?4
"""

RELEASE = """
UPDATE sqlspace_entries
   SET state = 0, due_at = NULL, delay = NULL, deadline = NULL, lease = NULL, token = NULL
 WHERE seq = ? AND until_at IS NOT NULL AND state < 3
"""

# The headers of a dead letter that tell where it comes from.
ORIGIN_KEY, ORIGIN_SEQ = "sqlspace-key", "sqlspace-seq"
ORIGIN_PUSHED_AT, ORIGIN_ATTEMPTS = "sqlspace-pushed-at", "sqlspace-attempts"
ORIGIN_REASON = "sqlspace-reason"
ORIGIN_HEADERS = "sqlspace-headers"  # those that it had, if they were no JSON object of strings
_ORIGIN = {
    *(ORIGIN_KEY, ORIGIN_SEQ, ORIGIN_PUSHED_AT, ORIGIN_ATTEMPTS, ORIGIN_REASON, ORIGIN_HEADERS)
}


def has_died(connection: Connection, now: int) -> bool:
    """Whether there is something for `bury` to do."""
    return bool(connection.execute(SELECT_LAST_OVER, (now,)).get)


def bury(connection: Connection, now: int, origin: str | None = None) -> list[str]:
    """Move what died with its last lease to the dead letters, under whatever key; tokens.

    Args:
        connection: For writing.
        now: The time.
        origin: The key whose dead letters are needed: its own go first.
    """
    rows: list[Any] = connection.execute(SELECT_LAST, (now, BURY_ROWS)).fetchall()
    if origin is not None and len(rows) == BURY_ROWS:
        rows = connection.execute(SELECT_LAST_OF_KEY, (now, BURY_ROWS, origin)).fetchall() or rows
    rows += connection.execute(SELECT_LAST_STUCK, (now, BURY_ROWS)).fetchall()
    tokens: list[str] = []
    for seq, died in {row[0]: row[2] for row in rows}.items():
        tokens += carry_out(connection, seq, now, died=died)
    return [*tokens, *rooms(row[1] for row in rows)]


def carry_out(connection: Connection, seq: int, now: int, *, died: bool) -> list[str]:
    """Make a tombstone of what is gone by the clock: dead, or expired; tokens."""
    if died:
        return bury_one(connection, seq, now, "attempts")
    upkeep.entomb(connection, [seq], now, state=5)
    return []


def bury_unreadable(connection: Connection, seq: int, now: int) -> list[str]:
    """Move an entry to the dead letters because of what it holds, if it is still there; tokens."""
    if not connection.execute(SELECT_IS_READY, (now, seq)).fetchall():
        return []
    return bury_one(connection, seq, now, "unreadable")


def bury_one(connection: Connection, seq: int, now: int, reason: str) -> list[str]:
    """Move one entry; tokens."""
    rows: list[Any] = connection.execute(SELECT_DYING, (seq,)).fetchall()
    if not rows:
        raise disagreement()
    blob, headers, pushed_at, attempts = rows[0]
    key = nameable(blob)
    target = None if key is None else dead_key(key)
    if key is None or target is None:  # somebody's SQL asked for that; nothing is lost
        connection.execute(RELEASE, (seq,))
        return [] if key is None else [key]
    origin = {
        ORIGIN_KEY: key,
        ORIGIN_SEQ: str(seq),
        ORIGIN_PUSHED_AT: f"{pushed_at / 1e6:.6f}",
        ORIGIN_ATTEMPTS: str(attempts),
        ORIGIN_REASON: reason,
    }
    text = spelled({**readable_headers(headers), **origin})
    connection.execute(INSERT_MOVED, (target, text, now, seq))
    upkeep.entomb(connection, [seq], now, state=6)
    log.warning(
        "entry %d of %a is dead after %d attempts (%s): it is under %a now",
        *(seq, key, attempts, reason, target),
    )
    return [target, room_token(key)]


def rooms(keys: Iterable[bytes]) -> list[str]:
    """The tokens of those that can be named; nobody can wait for the others."""
    named = map(nameable, set(keys))
    return [room_token(key) for key in named if key is not None]


def origin(headers: dict[str, str]) -> str | None:
    """The key that a dead letter comes from, if the headers name one that a caller could name."""
    try:
        return check_key(headers[ORIGIN_KEY])
    except (KeyError, ValueError):
        return None


def readable_headers(headers: bytes | None) -> dict[str, str]:
    """Those of an entry, whatever somebody else's SQL made of them."""
    if headers is None:
        return {}
    text = headers.decode(errors="backslashreplace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
        return found
    return {ORIGIN_HEADERS: text}


def spelled(headers: dict[str, str]) -> str:
    """As JSON that is valid UTF-8: what somebody else's SQL escaped may be no character."""
    text = json.dumps(headers, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace").decode()


def stripped(headers: dict[str, str]) -> dict[str, str]:
    """Without those that tell of an origin."""
    return {name: text for name, text in headers.items() if name not in _ORIGIN}
