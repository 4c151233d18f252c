"""Migrations: a file that an earlier version made is opened, and nothing of it is lost.

Earlier files are made here by the earlier migrations, and filled by the SQL of their time.
"""

import collections
import fcntl
import itertools
import os
import pathlib
import time

import apsw
import pytest
from killed import opens_killed
from shells import PROGRAMS, Shell

import sqlspace
from sqlspace import schema

NEWEST = len(schema.migrations())
EARLIER = range(1, NEWEST)
DAY = 86_400_000_000  # microseconds
FILE_ID = "0123456789abcdef" * 2

# All that schema 1 knew to say, whoever wrote it: Stores, push_on, shells.
ROW = collections.namedtuple(  # noqa: PYI024
    "Row",
    "seq key payload headers state pushed_at due_at delay expires_at dedupe taken_at taken_no",
    defaults=(None, 0, 0, None, None, None, None, None, None),
)
NOW = time.time_ns() // 1000
ROWS = [
    ROW(1, "mail", None, state=3, taken_at=NOW - 5, taken_no=3, dedupe="order 1"),
    ROW(2, "mail", b"plain"),
    ROW(3, "mail", b"named", '{"from":"me"}', dedupe="order 3"),
    ROW(4, "mail", None, state=4, taken_at=NOW - 8, taken_no=1),
    ROW(5, "mail", None, state=5, taken_at=NOW - 7, taken_no=2),
    ROW(6, "mail", None, state=6, taken_at=NOW - 3, taken_no=4),
    ROW(7, "work", b"late", state=1, due_at=NOW + DAY, delay=DAY),
    ROW(8, "work", b"due", state=1, due_at=NOW - 5, delay=5),
    ROW(9, "work", b"gone", expires_at=NOW - 5),
    ROW(10, "work", b"lives", expires_at=NOW + DAY),
    ROW(
        11, "work", b"gone before it was due", state=1, due_at=NOW - 9, delay=1, expires_at=NOW - 5
    ),
    ROW(12, "letters/dead", b"poison"),
    ROW(13, "", None, state=7, taken_no=0),
]
INSERT = f"""
INSERT INTO sqlspace_entries ({", ".join(ROW._fields)})
VALUES ({", ".join("?" * len(ROW._fields))})
"""
APPLICATION = """
PRAGMA user_version = 42;
PRAGMA application_id = 77;
CREATE TABLE orders (n INTEGER);
INSERT INTO orders (rowid, n) VALUES (7, 1), (900, 2);
CREATE TRIGGER orders_push AFTER INSERT ON orders BEGIN
  INSERT INTO sqlspace_outbox (key, payload) VALUES ('orders', NEW.n);
END;
"""


def lay_out(path, version, *, wal=True):
    """A file of an earlier schema."""
    database = apsw.Connection(path)
    if wal:
        database.pragma("journal_mode", "wal")
    for migration in schema.migrations()[:version]:
        database.execute(migration.sql)
        first = (FILE_ID, 0) if migration.version == 1 else (None, None)
        database.execute(schema.INSERT_VERSION, (migration.version, migration.name, *first))
    return database


def make(path, version=1, *, crash=False, wal=True, application=False):
    """The same, with entries and tombstones; crash=True leaves them in the -wal."""
    database = lay_out(path, version, wal=wal)
    if application:
        database.execute(APPLICATION)
    if crash:
        database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        database.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    with database:
        database.executemany(INSERT, [row._replace(pushed_at=NOW - 100 + row.seq) for row in ROWS])
    database.close()
    if crash:
        os.unlink(path + "-shm")
    return path


def version_of(path):
    look = apsw.Connection(path)
    found = look.execute(schema.SELECT_VERSION).get
    look.close()
    return found


def objects_of(path):
    look = apsw.Connection(path)
    found = {thing for thing in schema._objects(look) if schema._is_ours(thing)}
    assert look.pragma("integrity_check") == "ok"
    look.close()
    return found


def ensure_all_there(path):
    """What ROWS say, in the words of the newest version; and it goes on from there."""
    with sqlspace.open(path) as store:
        assert store.keys() == ["letters/dead", "mail", "work"]
        assert [
            (entry.seq, entry.payload, entry.headers, entry.state)
            for entry in itertools.chain(store.entries("mail"), store.entries("work"))
        ] == [
            (2, b"plain", {}, "ready"),
            (3, b"named", {"from": "me"}, "ready"),
            (7, b"late", {}, "delayed"),
            (8, b"due", {}, "ready"),
            (10, b"lives", {}, "ready"),
        ]
        assert [(stone.seq, stone.outcome) for stone in store.history("mail")] == [
            *((4, "acked"), (5, "expired"), (1, "taken"), (6, "dead")),
        ]
        assert [(store.len(key), store.peek(key)) for key in ("mail", "work", "letters/dead")] == [
            *((2, b"plain"), (3, b"due"), (1, b"poison")),
        ]
        assert store.get("work", 7).due_at == (NOW + DAY) / 1e6
        assert store.get("work", 10).expires_at == (NOW + DAY) / 1e6
        assert store._database.file_id == FILE_ID
        assert store.push("mail", b"dup", dedupe="order 1") == 1
        assert store.push("mail", b"dup", dedupe="order 3") == 3
        assert store.push("mail", b"new") == 14  # the bare row's number stays used
        assert store.pull_many("mail", 9) == [b"plain", b"named", b"new"]
        with store.claim("work", max_attempts=1) as job:
            assert job.payload == b"due"
        assert store.pull_many("work", 9) == [b"lives"]
        assert store.requeue("letters") == 1
        assert store.pull("letters", 0) == b"poison"
        assert store.keys() == ["work"]
        assert store.clear("work") == 1  # and what has expired is gone by now, too
        outcomes = {stone.seq: stone.outcome for stone in store.history("work")}
        assert outcomes == {8: "acked", 9: "expired", 10: "taken", 11: "expired"}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


def test_the_migrations_are_numbered_without_a_gap():
    """The number of the last is the version of the schema."""
    assert [migration.version for migration in schema.migrations()] == [*range(1, NEWEST + 1)]


@pytest.mark.parametrize("wal", [True, False])
@pytest.mark.parametrize("version", range(1, NEWEST + 1))
def test_a_file_of_any_version_is_opened_with_all_that_is_in_it(path, version, wal):
    """Entries, their headers and times, tombstones, dedupes, numbers; and work goes on."""
    make(path, version, wal=wal)
    ensure_all_there(path)
    assert version_of(path) == NEWEST
    assert objects_of(path) == schema._expected(NEWEST)


@pytest.mark.parametrize("version", EARLIER)
def test_what_a_crash_has_left_in_the_wal_is_migrated_too(path, version):
    """The last commits of the earlier version are as good as the first."""
    make(path, version, crash=True)
    assert os.stat(path + "-wal").st_size > 0
    ensure_all_there(path)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("version", EARLIER)
def test_the_views_of_a_migrated_file_show_it(path, version, program):
    """With the clock's word on what the earlier version never carried out."""
    make(path, version)
    with sqlspace.open(path):
        shell = Shell(program, path)
        assert shell("SELECT seq, key, state, headers FROM sqlspace_live ORDER BY seq;") == [
            "2|mail|ready|",
            '3|mail|ready|{"from":"me"}',
            "7|work|delayed|",
            "8|work|ready|",
            "10|work|ready|",
            "12|letters/dead|ready|",
        ]
        assert shell("SELECT key, ready, leased, delayed FROM sqlspace_keys ORDER BY key;") == [
            "letters/dead|1|0|0",
            "mail|2|0|0",
            "work|2|0|1",
        ]
        assert shell("SELECT seq, key, outcome FROM sqlspace_tombstones;") == [
            *("4|mail|acked", "5|mail|expired", "1|mail|taken", "6|mail|dead"),
        ]
        assert shell("SELECT count(*) FROM sqlspace_outbox;") == ["6"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_whichever_sqlite_applies_the_migrations_the_file_is_the_same(path, program):
    """The text of every object, whose comparison is how tampering is found."""
    sqlspace.open(path + ".made").close()
    script = "\n".join(migration.sql for migration in schema.migrations())
    Shell(program, path)(script)
    assert objects_of(path) == objects_of(path + ".made")


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("version", EARLIER)
def test_an_applications_file_is_migrated_and_the_rest_of_it_is_left_alone(path, version, embed):
    """Their tables, rowids, triggers and marks; embed matters no more, for ours are there."""
    make(path, version, application=True)
    asked = "SELECT type, name, sql FROM sqlite_schema WHERE name LIKE 'orders%' ORDER BY name"
    look = apsw.Connection(path)
    before = look.execute(asked).fetchall()
    look.close()
    with sqlspace.open(path, embed=embed):
        pass
    ensure_all_there(path)
    look = apsw.Connection(path)
    assert look.execute(asked).fetchall() == before
    assert look.execute("SELECT rowid, n FROM orders").fetchall() == [(7, 1), (900, 2)]
    assert (look.pragma("user_version"), look.pragma("application_id")) == (42, 77)
    look.execute("INSERT INTO orders (n) VALUES (3)")
    look.close()
    with sqlspace.open(path) as store:
        assert store.pull("orders", 0) == b"3"


OPENER = """
import fcntl
while True:
    path, gate = hear(), hear()
    with open(gate, "rb") as file:
        tell("ready")
        fcntl.flock(file, fcntl.LOCK_SH)  # the starting gun
        with sqlspace.open(path) as store:
            tell(store.len("mail"), store.push("opened", b"x") > 13)
"""


@pytest.mark.parametrize("version", EARLIER)
def test_processes_that_open_an_earlier_file_at_once_migrate_it_once(child, tmp_path, version):
    """One of them does it, the others find it done; none fails, and each goes on at once."""
    openers = [child(OPENER) for _ in range(4)]
    for number in range(10):
        path, gate = tmp_path / f"{number}.db", tmp_path / f"{number}.gate"
        make(str(path), version, crash=number % 2 == 1)
        with open(gate, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for opener in openers:
                opener.tell(path)
                opener.tell(gate)
                opener.expect("ready")
        for opener in openers:
            opener.expect("2 True")
        with sqlspace.open(path) as store:
            assert len(store.pull_many("opened", 9)) == 4
            rows = store._database.read("SELECT version, name FROM sqlspace_schema ORDER BY 1")
        assert rows == [(each.version, each.name) for each in schema.migrations()]
    for opener in openers:
        opener.end()


@pytest.mark.parametrize("version", EARLIER)
def test_a_writer_that_is_at_work_keeps_the_file_at_its_version(path, version):
    """A migration is a write like any other: BusyError after busy_timeout, and nothing changed."""
    make(path, version)
    writer = apsw.Connection(path)
    writer.execute("BEGIN IMMEDIATE; INSERT INTO sqlspace_outbox VALUES ('mail', 'in time')")
    with pytest.raises(sqlspace.BusyError):
        sqlspace.open(path, busy_timeout=0.01)
    assert writer.execute(schema.SELECT_VERSION).get == version
    writer.execute("COMMIT")
    writer.close()
    with sqlspace.open(path) as store:
        assert [entry.seq for entry in store.entries("mail")] == [2, 3, 14]


@pytest.mark.parametrize("half", ["half", "whole"])
@pytest.mark.parametrize("how", ["closed", "crashed", "application", "no wal"])
@pytest.mark.parametrize("version", EARLIER)
def test_a_migration_that_was_killed_at_any_moment_goes_on_at_the_next_open(
    tmp_path, version, how, half
):
    """The earlier schema or the next, never one between; and nothing in it is lost."""
    prepared = make(
        str(tmp_path / "prepared"),
        version,
        crash=how == "crashed",
        application=how == "application",
        wal=how != "no wal",
    )
    folder = tmp_path / "killed"
    folder.mkdir()
    moments = opens_killed(folder, half, prepared)
    assert moments > 5
    found = set()
    for number in range(moments + 1):
        path = f"{folder}/{number:03}.db"
        found.add(version_of(path))
        ensure_all_there(path)
        assert objects_of(path) == schema._expected(NEWEST)
    assert found == {version, NEWEST} | set(range(version, NEWEST))


@pytest.mark.parametrize("version", EARLIER)
def test_a_migration_that_fails_leaves_the_file_at_the_version_it_had(path, version, monkeypatch):
    """All of a migration, or nothing: also when its last statement is what fails."""
    make(path, version)
    before = objects_of(path)
    good = schema.migrations()
    broken = [*good[:version], good[version]._replace(sql=good[version].sql + "; SELECT nothing")]
    monkeypatch.setattr(schema, "migrations", lambda: (*broken, *good[version + 1 :]))
    with pytest.raises(sqlspace.StoreError, match="nothing"):
        sqlspace.open(path)
    monkeypatch.undo()
    assert objects_of(path) == before
    ensure_all_there(path)


def test_a_damaged_file_that_must_be_migrated_is_refused_untouched(path):
    """The migration reads what no other open looks at; the -wal that it makes goes again."""
    database = apsw.Connection(path)
    database.pragma("journal_mode", "wal")
    first = schema.migrations()[0]
    database.execute(first.sql)
    database.execute(schema.INSERT_VERSION, (1, first.name, "0" * 32, 3))
    root = database.execute(
        "SELECT rootpage FROM sqlite_schema WHERE name = 'sqlspace_entries_due'"
    ).get
    database.close()
    whole = bytearray(pathlib.Path(path).read_bytes())
    whole[(root - 1) * 4096 : root * 4096] = bytes(4096)
    pathlib.Path(path).write_bytes(whole)
    with pytest.raises(sqlspace.CorruptError):
        sqlspace.open(path)
    assert os.listdir(os.path.dirname(path)) == ["queue.db"]
    assert pathlib.Path(path).read_bytes() == whole
