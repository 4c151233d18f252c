"""push_on: a push inside the transaction of a connection of the caller's own.

The transactional outbox: the application's rows and the entry are committed together, or not at
all. So nothing here begins, commits or rolls back; one statement adds the entry, atomic also where
there is no transaction. The connection may be any library's, so only what all of them have is used,
and an error of its is the caller's to handle, as it is.

No doorbell is rung: waiters see that the file changes.
"""

import contextlib
import logging
from typing import Any, Protocol

from . import clock
from .arguments import kind
from .errors import SchemaError
from .pushing import Push

__all__ = ["push_on"]

log = logging.getLogger("sqlspace")

# One statement with and without dedupe: where that is NULL, the index has no say, and no time goes
# into it. A hit must be an update, if of nothing: after DO NOTHING no row would be returned.
INSERT_OR_FIND = """
INSERT INTO sqlspace_entries
  (key, payload, headers, pushed_at, state, due_at, delay, expires_at, dedupe)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key, dedupe) WHERE dedupe IS NOT NULL DO UPDATE SET dedupe = excluded.dedupe
RETURNING seq
"""
# As a blob, for what a str becomes is the connection's choice.
SELECT_VERSION = "SELECT CAST(sqlite_version() AS BLOB)"
PRAGMA_AUTOCHECKPOINT = "PRAGMA wal_autocheckpoint"  # there is no table-valued form of it

_MISSING = "no such table: sqlspace_entries"  # SQLite's own words, in whatever exception

# What makes other rows than tuples: of the stdlib's sqlite3, of apsw.
_ROW_HOOKS = ("row_factory", "row_trace")

_FIXED = (3, 51, 3)  # the first SQLite without the WAL-reset bug
_ADVICE = (
    "push_on: a connection's SQLite %s has the WAL-reset bug (fixed in 3.51.3), which can lose "
    "commits if it checkpoints; say PRAGMA wal_autocheckpoint=0 on each such connection, and leave "
    "checkpoints to the Stores"
)
_untold = [_ADVICE]  # who pops it, tells: once a process
_versions: dict[type, str] = {}  # of the library behind each kind of connection; '' if it is fixed


class SupportsExecute(Protocol):
    """A connection of any SQLite library, as far as it is needed here."""

    def execute(self, sql: str, parameters: Any, /) -> Any:
        """Run one statement; returns a cursor with `fetchall`."""


def push_on(
    connection: SupportsExecute,
    key: str,
    payload: bytes,
    *,
    ttl: float | None = None,
    delay: float | None = None,
    dedupe: str | None = None,
    headers: dict[str, str] | None = None,
) -> int:
    """Push on a connection of the caller's own, inside its transaction.

    The entry is committed with the caller's rows, or rolled back with them, and nobody sees it
    before; then it wakes whoever waits for it, in any process. On a connection in autocommit it is
    committed by itself.

    The tables must be in the connection's database: `sqlspace.open(path, embed=True)`, once, moves
    in with an application's own.

    With SQLAlchemy the driver connection is `connection.connection.driver_connection`, and the
    transaction must be one that SQLAlchemy knows of (`engine.begin()`, or a statement of its own
    before): what only the driver began, it would not commit.

    Never use the standard library's sqlite3 in a process that has a Store open on the same file
    (see `sqlspace.guard`): there, connect with apsw.

    Args:
        connection: Anything with `execute(sql, parameters)`: apsw's, the standard library's,
            SQLAlchemy's driver connection.
        key: 1 to 1,024 bytes in UTF-8, no NUL.
        payload: Bytes-like; copied. At most 1,000,000,000 bytes less the rest of its row.
        ttl: Seconds from now until the entry expires, more than 0; None or infinity is never.
        delay: Seconds from now until the entry is ready, less than ttl.
        dedupe: With a key's rules. If an entry of `key` has the same, live or in the history,
            nothing is added.
        headers: Kept with the entry, and readable without its payload.

    Returns:
        The entry's seq; on a hit of `dedupe`, the earlier entry's.

    Raises:
        SchemaError: the tables are not in this database; nothing was added.
        Exception: the connection's own, as it is.
    """
    if not callable(getattr(connection, "execute", None)):
        raise TypeError(
            f"connection must have execute(sql, parameters), and {kind(connection)} has not"
        )
    if hasattr(connection, "exec_driver_sql"):
        raise TypeError(
            "connection must be a driver's: of SQLAlchemy's, hand in "
            "connection.connection.driver_connection"
        )
    wanted = Push(key, payload, headers=headers, ttl=ttl, delay=delay, dedupe=dedupe)
    if _untold and _versions.get(type(connection)) != "":
        _advise(connection)
    try:
        return int(_fetch(connection, INSERT_OR_FIND, wanted.row(clock.now())))
    except Exception as error:
        if _MISSING in str(error):
            raise SchemaError(
                "sqlspace's tables are not in this connection's database; open it once with "
                "sqlspace.open(path, embed=True)"
            ) from error
        raise


def _fetch(connection: SupportsExecute, sql: str, row: tuple[Any, ...] = ()) -> Any:
    """The first column of the one row, whatever the caller's connection makes of rows.

    The cursor is drained: in autocommit, that is what commits.
    """
    cursor = connection.execute(sql, row)
    hooks = {name: getattr(cursor, name) for name in _ROW_HOOKS if hasattr(cursor, name)}
    try:
        for name in hooks:
            setattr(cursor, name, None)
        return cursor.fetchall()[0][0]
    finally:
        for name, hook in hooks.items():  # `execute` of a cursor returns the caller's own
            setattr(cursor, name, hook)


def _advise(connection: SupportsExecute) -> None:
    """Tell once of a library that may lose commits, if this connection lets it.

    The version is asked for once, and of a fixed library no more than that; of another, the setting
    with each push (2 µs of 12) until there was something to tell.
    """
    # A connection may forbid to ask, and the push is to be judged by itself.
    with contextlib.suppress(Exception):
        version = _versions.get(type(connection))
        if version is None:
            version = bytes(_fetch(connection, SELECT_VERSION)).decode()
            fixed = tuple(map(int, version.split("."))) >= _FIXED
            version = _versions[type(connection)] = "" if fixed else version
        if version and _fetch(connection, PRAGMA_AUTOCHECKPOINT):
            with contextlib.suppress(IndexError):  # another thread was first
                log.warning(_untold.pop(), version)
