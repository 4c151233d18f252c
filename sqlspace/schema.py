"""The schema: what `migrations/*.sql` say, applied, recorded, and compared with what is there.

A file is ours if it has a table `sqlspace_schema`. Then every object of ours must be exactly what
the migrations made, and nobody else's index or trigger may stand on our tables: a planted one could
eat entries. Whoever else's file it is, is refused unless the caller says that we may move in.
"""

import functools
import pathlib
import re
import secrets
from typing import Any, NamedTuple

import apsw

from .errors import SchemaError

__all__ = ["EMPTY", "FOREIGN", "examine", "is_embedded", "migrate"]

EMPTY = 0  # versions are positive; these two say that none of ours is there
FOREIGN = -1

_HERE = pathlib.Path(__file__).parent
# In the wheel they stand inside the package, in a checkout beside it.
_MIGRATIONS = next(
    (path for path in (_HERE / "migrations", _HERE.parent / "migrations") if path.is_dir()),
    _HERE / "migrations",
)

# Read as blobs: a damaged file, or another application's, may hold what is no valid UTF-8.
SELECT_OBJECTS = """
SELECT CAST(type AS BLOB), CAST(name AS BLOB), CAST(tbl_name AS BLOB), CAST(sql AS BLOB)
  FROM sqlite_schema
"""
SELECT_VERSION = "SELECT max(version) FROM sqlspace_schema"
SELECT_ORIGIN = "SELECT CAST(file_id AS BLOB), boots FROM sqlspace_schema WHERE version = 1"
# Seeks into each b-tree: gross damage and planted numbers show here, at no cost that grows.
SELECT_EXTREMES = """
SELECT (SELECT min(seq) FROM sqlspace_entries),
       (SELECT max(seq) FROM sqlspace_entries),
       (SELECT max(taken_no) FROM sqlspace_entries WHERE taken_no IS NOT NULL),
       (SELECT seq FROM sqlspace_entries INDEXED BY sqlspace_entries_live WHERE state < 3 LIMIT 1)
"""
INSERT_VERSION = """
INSERT INTO sqlspace_schema (version, name, applied_at, file_id, boots)
VALUES (?, ?, CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER), ?, ?)
"""

_SEQ_END = 1 << 62
_FILE_ID = re.compile(rb"[0-9a-f]{32}")


class Migration(NamedTuple):
    version: int
    name: str
    sql: str


class SchemaObject(NamedTuple):
    type: str
    name: str
    table: str
    sql: str  # '' of an index that a UNIQUE made


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """All migrations, in order."""
    # Not by glob: where no descriptor is left to list them with, it finds none (3.13).
    there = _MIGRATIONS.iterdir() if _MIGRATIONS.is_dir() else ()
    found = tuple(
        Migration(int(path.name[:4]), path.stem, path.read_text(encoding="utf-8"))
        for path in sorted(there)
        if path.match("[0-9][0-9][0-9][0-9]_*.sql")
    )
    if [migration.version for migration in found] != list(range(1, len(found) + 1)) or not found:
        raise SchemaError(f"this installation is broken: no complete migrations in {_MIGRATIONS}")
    return found


@functools.cache
def _expected(version: int) -> frozenset[SchemaObject]:
    """Our objects, as the first `version` migrations make them."""
    scratch = apsw.Connection(":memory:")
    for migration in migrations()[:version]:
        scratch.execute(migration.sql)
    return frozenset(_objects(scratch))


def _objects(connection: apsw.Connection) -> list[SchemaObject]:
    rows: list[Any] = connection.execute(SELECT_OBJECTS).fetchall()
    return [SchemaObject(*map(_text, row)) for row in rows]


def _text(blob: bytes | None) -> str:
    return "" if blob is None else blob.decode(errors="backslashreplace")


def _is_ours(found: SchemaObject) -> bool:
    return found.name.lower().startswith("sqlspace_") or (
        found.table.lower().startswith("sqlspace_")
    )


def examine(connection: apsw.Connection) -> int:
    """Which schema is there: EMPTY, FOREIGN, or the version of ours. Changes nothing.

    Raises:
        SchemaError: tampered with, newer than this package, or a database in UTF-16.
    """
    with connection:  # one state, though others may be at a migration
        version = _examine(connection)
    return version  # noqa: RET504  # in the block, mypy takes it for one that swallows errors


def _examine(connection: apsw.Connection) -> int:
    if connection.pragma("encoding") != "UTF-8":
        raise SchemaError("the database is in UTF-16; sqlspace needs UTF-8")
    objects = _objects(connection)
    ours = {found for found in objects if _is_ours(found)}
    if not any(found[:2] == ("table", "sqlspace_schema") for found in ours):
        if ours:
            raise SchemaError(f"it has {_names(ours)}, but no table sqlspace_schema")
        marked = connection.pragma("user_version") or connection.pragma("application_id")
        return FOREIGN if objects or marked else EMPTY
    first = {found for found in _expected(1) if found.table == "sqlspace_schema"}
    if not first <= ours:
        raise SchemaError("its table sqlspace_schema isn't the one that sqlspace makes")
    version: Any = connection.execute(SELECT_VERSION).get
    newest = migrations()[-1].version
    if not isinstance(version, int) or version < 1:
        raise SchemaError("its table sqlspace_schema records no migration")
    if version > newest:
        raise SchemaError(
            f"it was written by a newer sqlspace (schema {version}; this one knows {newest})"
        )
    if ours != _expected(version):
        raise SchemaError(
            f"objects were tampered with: {_names(ours.symmetric_difference(_expected(version)))}"
        )
    origin: Any = connection.execute(SELECT_ORIGIN).fetchall()
    if not origin or not _FILE_ID.fullmatch(origin[0][0] or b""):
        raise SchemaError("its file_id isn't one that sqlspace makes")
    boots = origin[0][1]
    if not isinstance(boots, int) or not 0 <= boots < _SEQ_END:
        raise SchemaError(f"boots were tampered with: they are {boots!a}")
    extremes: Any = connection.execute(SELECT_EXTREMES).fetchall()[0]
    lowest, highest, taken_no, _ = extremes
    if highest is not None and not 1 <= lowest <= highest < _SEQ_END:
        raise SchemaError(f"seqs were tampered with: they run from {lowest} to {highest}")
    # What is damaged may not even be a number.
    if taken_no is not None and not (isinstance(taken_no, int) and 0 <= taken_no < _SEQ_END):
        raise SchemaError(f"the order of taking was tampered with: it is at {taken_no!a}")
    return int(version)


def is_embedded(connection: apsw.Connection) -> bool:
    """Whether others' tables live in the file too."""
    return any(
        not _is_ours(found) and not found.name.startswith("sqlite_")
        for found in _objects(connection)
    )


def migrate(connection: apsw.Connection, *, embed: bool) -> None:
    """Bring the schema up to date, each migration in one transaction.

    Raises:
        SchemaError: another application's file, and `embed` is False; as `examine`.
    """
    while True:
        version = examine(connection)  # others may be at the same: what they did is seen here
        if version == migrations()[-1].version:
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = examine(connection)
            if version == FOREIGN and not embed:
                raise foreign()
            done = max(version, 0)
            for migration in migrations()[done : done + 1]:
                connection.execute(migration.sql)
                row = (secrets.token_hex(16), 0) if migration.version == 1 else (None, None)
                connection.execute(INSERT_VERSION, (migration.version, migration.name, *row))
            _examine(connection)  # what damage shows only now is refused, and nothing is changed
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def foreign() -> SchemaError:
    """The error for another application's file."""
    return SchemaError(
        "it is another application's database; open it with embed=True to live in it together"
    )


def _names(objects: set[SchemaObject] | frozenset[SchemaObject]) -> str:
    return ", ".join(sorted({f"{found.type} {found.name}" for found in objects}))
