"""Opening a store: what is made, what is refused, and that what is refused stays as it was."""

import fcntl
import hashlib
import itertools
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import uuid

import apsw
import pytest
from killed import opens_killed

import sqlspace
from sqlspace import connection as opener
from sqlspace import mounts, schema, session

MAGIC = b"SQLite format 3\0"
JOURNAL = (  # hot, and leading back to a database of no pages
    bytes.fromhex("d9d505f920a163d7") + bytes(4) + b"seed" + bytes(4) + b"\0\0\2\0\0\0\x10\0"
).ljust(512, b"\0")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture(params=["local", "shell"])
def embedded_path(path, request):
    """Another application's file, made by apsw's SQLite and by the plain shell."""
    script = (
        "PRAGMA page_size=1024; PRAGMA application_id=77; PRAGMA user_version=42;"
        "CREATE TABLE app (a TEXT); INSERT INTO app(rowid, a) VALUES (7, 'seven'), (900, 'x');"
        "CREATE INDEX app_a ON app (a);"
    )
    if request.param == "local":
        make(path, script)
    else:
        subprocess.run(["sqlite3", path, script], check=True)
    return path


def make(path, script, *, crash=False):
    """Make or change a database as another program would; crash=True leaves the -wal behind."""
    database = apsw.Connection(path)
    database.execute(script).fetchall()
    if crash:
        database.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    database.close()
    if crash:
        os.unlink(path + "-shm")


def make_store(path, *, key="mail"):
    with sqlspace.open(path) as store:
        store.push(key, b"one")
        store.push(key, b"two")
        store.pull(key)


def picture(path):
    """Name, permissions and bytes of every file beside the path, but for the -shm."""
    beside = pathlib.Path(path).parent
    return {
        entry.name: (
            stat.S_IMODE(entry.stat().st_mode),
            hashlib.sha256(entry.read_bytes()).digest(),
        )
        for entry in sorted(beside.iterdir())
        if entry.is_file() and not entry.name.endswith("-shm")
    }


def ensure_refused(path, error, words, **options):
    """The law of refusing: this error, naming the path, and nothing touched."""
    before = picture(path)
    with pytest.raises(error) as caught:
        sqlspace.open(path, **options)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert picture(path) == before
    return caught.value


# -- a new file


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o660])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o177])
def test_a_new_file_and_its_wal_and_shm_have_exactly_the_mode_whatever_the_umask(path, mode, umask):
    """`mode`: the permissions of a new file, -wal and -shm included; the umask has no say."""
    old = os.umask(umask)
    try:
        with sqlspace.open(path, mode=mode) as store:
            store.push("mail", b"x")
            found = {
                name: stat.S_IMODE(os.stat(path + name).st_mode) for name in ("", "-wal", "-shm")
            }
    finally:
        os.umask(old)
    assert found == {"": mode, "-wal": mode, "-shm": mode}


def test_a_file_that_is_there_keeps_its_mode(path):
    """`mode` is that of a new file."""
    make_store(path)
    os.chmod(path, 0o640)
    with sqlspace.open(path, mode=0o666) as store:
        store.push("mail", b"x")
        assert [stat.S_IMODE(os.stat(path + end).st_mode) for end in ("", "-wal")] == [0o640] * 2


def test_an_existing_file_of_no_bytes_becomes_a_store(path):
    """`mkstemp` and touch leave such files; there is nothing in them to protect."""
    pathlib.Path(path).touch(mode=0o640)
    with sqlspace.open(path) as store:
        store.push("mail", b"x")
    with sqlspace.open(path) as store:
        assert store.pullp("mail") == b"x"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


def test_an_empty_database_becomes_a_store(path):
    """A valid file without a table, user_version or application_id is nobody's."""
    make(path, "CREATE TABLE t (a); DROP TABLE t; VACUUM")
    with sqlspace.open(path) as store:
        assert store.push("mail", b"x") == 1


@pytest.mark.parametrize(
    "name", ["a b", "a?b", "a#b", "a%41b", "ä☂", "-", "a'b", 'a"b', "a\nb", "a;b"]
)
def test_any_name_that_a_file_can_have_will_do(tmp_path, name):
    """The path is a path, no URI and no SQL."""
    path = tmp_path / name
    make_store(path)
    with sqlspace.open(path) as store:
        assert store.path == os.path.realpath(path)
        assert store.pullp("mail") == b"two"
    assert {entry.name for entry in tmp_path.iterdir()} == {name, name + "-reserve"}


def test_a_symbolic_link_is_resolved_once(tmp_path):
    """The files lie beside the target; a link that is turned elsewhere later changes nothing."""
    (tmp_path / "real").mkdir()
    target, other, link = tmp_path / "real" / "q.db", tmp_path / "other.db", tmp_path / "link.db"
    link.symlink_to(target)
    with sqlspace.open(link) as store, sqlspace.open(target) as direct:
        assert store.path == direct.path == str(target)
        store.push("mail", b"x")
        link.unlink()
        link.symlink_to(other)
        store.push("mail", b"y")
        assert direct.pull_many("mail", 3) == [b"x", b"y"]
    assert not other.exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.db", "real"]


def test_a_relative_path_stays_the_same_file_after_chdir(tmp_path, monkeypatch):
    """The path is resolved once, at the open."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with sqlspace.open("queue.db") as store:
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.push("mail", b"x")
        assert [entry.payload for entry in store.entries("mail")] == [b"x"]
        with sqlspace.open("../queue.db") as again:
            assert again.path == store.path == str(tmp_path / "queue.db")
            assert again.pullp("mail") == b"x"
    assert list((tmp_path / "elsewhere").iterdir()) == []


RACER = """
import fcntl, sys
import sqlspace
print("there", flush=True)
for line in sys.stdin:
    path, gate = line.rstrip("\\n").split("|")
    with open(gate, "rb") as file:
        print("ready", flush=True)
        fcntl.flock(file, fcntl.LOCK_SH)  # the starting gun
        try:
            with sqlspace.open(path) as store:
                store.push("mail", b"x")
            print("opened", flush=True)
        except Exception as error:
            print(repr(error), flush=True)
"""


def test_eight_processes_open_a_new_path_at_once_and_all_succeed(tmp_path):
    """`PRAGMA journal_mode=WAL` skips the busy handler: 16 of 150 opens failed before the retry."""
    rounds, racers = 12, []
    try:
        racers.extend(
            subprocess.Popen(
                [sys.executable, "-c", RACER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(8)
        )
        assert [racer.stdout.readline() for racer in racers] == ["there\n"] * 8
        for number in range(rounds):
            path, gate = tmp_path / f"{number}.db", tmp_path / f"{number}.gate"
            with open(gate, "wb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                for racer in racers:
                    racer.stdin.write(f"{path}|{gate}\n")
                    racer.stdin.flush()
                assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 8
            assert [racer.stdout.readline() for racer in racers] == ["opened\n"] * 8
            with sqlspace.open(path) as store:
                assert len(store.pull_many("mail", 100)) == 8
    finally:
        for racer in racers:
            racer.stdin.close()
            racer.wait()
            racer.stdout.close()


@pytest.mark.parametrize("half", ["half", "whole"])
@pytest.mark.parametrize("embed", [False, True])
def test_a_first_open_that_was_killed_at_any_moment_can_be_opened_again(tmp_path, half, embed):
    """Wherever it is cut off, the next open goes on, and an application's own rows are there."""
    prepared = ""
    if embed:
        prepared = str(tmp_path / "app")
        make(prepared, "CREATE TABLE app (a); INSERT INTO app VALUES ('theirs')")
    folder = tmp_path / "killed"
    folder.mkdir()
    moments = opens_killed(folder, half, prepared)
    assert moments > 15
    for number in range(moments + 1):
        path = f"{folder}/{number:03}.db"
        with sqlspace.open(path, embed=embed) as store:
            assert store.push("mail", b"x") == 1
            assert store.pullp("mail") == b"x"
        look = apsw.Connection(path)
        assert look.pragma("integrity_check") == "ok"
        assert look.pragma("journal_mode") == "wal"
        if embed:
            assert look.execute("SELECT a FROM app").get == "theirs"
        look.close()
        assert not os.path.exists(path + "-journal")


@pytest.mark.parametrize("left", [bytes(4096), b"junk" * 1024, MAGIC + bytes(5)])
def test_a_first_open_that_a_power_cut_ended_can_be_opened_again(path, left):
    """The file may have its length and other bytes; the journal leads back to nothing."""
    pathlib.Path(path).write_bytes(left)
    pathlib.Path(path + "-journal").write_bytes(JOURNAL)
    with sqlspace.open(path) as store:
        assert store.push("mail", b"x") == 1
    assert not os.path.exists(path + "-journal")


@pytest.mark.parametrize("left", [bytes(5000), b"junk" * 1025])
def test_a_file_longer_than_a_first_open_makes_it_is_somebodys(path, left):
    """Whatever lies beside it: to roll that back would empty the file."""
    pathlib.Path(path).write_bytes(left)
    pathlib.Path(path + "-journal").write_bytes(JOURNAL)
    with pytest.raises(sqlspace.CorruptError):
        sqlspace.open(path)
    assert pathlib.Path(path).read_bytes() == left
    assert pathlib.Path(path + "-journal").read_bytes() == JOURNAL


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_file_whose_first_transaction_was_cut_off_is_nobodys(path, mode):
    """SQLite rolls it back to nothing, whatever its first page says by now."""
    make(path, f"PRAGMA journal_mode={mode}; CREATE TABLE app (a)")
    if mode == "wal":
        make(path, "DROP TABLE app")
    pathlib.Path(path + "-journal").write_bytes(JOURNAL)
    with sqlspace.open(path) as store:
        assert store.push("mail", b"x") == 1
    assert not os.path.exists(path + "-journal")
    look = apsw.Connection(path)
    assert look.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'app'").get == 0
    look.close()


def test_a_look_that_others_disturbed_is_taken_again(path, monkeypatch):
    """A file at rest is read without locks: if it wakes meanwhile, what is seen may be torn."""
    make_store(path)
    examine, calls, others = opener._examine, [], []

    def disturbed(uri, vfs):
        calls.append(uri)
        if len(calls) == 1:
            others.append(apsw.Connection(path))
            others[0].execute("UPDATE sqlspace_schema SET boots = boots + 1")
            raise apsw.CorruptError("torn")
        return examine(uri, vfs)

    monkeypatch.setattr(opener, "_examine", disturbed)
    with sqlspace.open(path) as store:
        assert store.pullp("mail") == b"two"
    others[0].close()
    assert ["immutable" in uri for uri in calls] == [True, False]


# -- what can't be a store's file


def test_a_file_that_is_replaced_while_it_is_opened_is_noticed(path, monkeypatch):
    """Else all that is pushed would go into a file that nobody else ever sees."""
    sqlspace.open(path).close()
    real = session.open_verified

    def slow(options):
        connection = real(options)
        shutil.copy(path, path + ".copy")
        os.rename(path + ".copy", path)
        return connection

    monkeypatch.setattr(session, "open_verified", slow)
    with pytest.raises(sqlspace.MovedError):
        sqlspace.open(path)


def test_a_missing_directory_is_a_store_error(tmp_path):
    """One StoreError with the path and the system's error as its cause."""
    error = None
    with pytest.raises(sqlspace.StoreError) as caught:
        sqlspace.open(tmp_path / "no" / "queue.db")
    error = caught.value
    assert str(tmp_path / "no" / "queue.db") in str(error)
    assert isinstance(error.__cause__, FileNotFoundError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("directory", IsADirectoryError),
        ("fifo", OSError),
        ("under a file", NotADirectoryError),
        ("loop", OSError),
        ("long name", OSError),
    ],
)
def test_what_is_no_regular_file_is_refused(tmp_path, kind, cause):
    """A directory, a pipe, a name under a file, a loop of links, a name that is too long."""
    path = tmp_path / "queue.db"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "under a file":
        path.touch()
        path = path / "queue.db"
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path = tmp_path / ("n" * 300)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(sqlspace.StoreError) as caught:
        sqlspace.open(path)
    assert type(caught.value) is sqlspace.StoreError
    assert str(path) in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)
    assert sorted(tmp_path.iterdir()) == before


DROPPED = """
import os, sys
import sqlspace
if os.getuid() == 0:  # root may read and write everything
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    sqlspace.open(sys.argv[1])
except sqlspace.StoreError as error:
    print(type(error).__name__, type(error.__cause__).__name__, error)
else:
    print("opened")
"""


@pytest.mark.parametrize(
    ("which", "mode"),
    [("file", 0o000), ("file", 0o444), ("file", 0o222), ("folder", 0o000), ("folder", 0o555)],
)
@pytest.mark.parametrize("there", [True, False])
def test_what_may_not_be_read_and_written_is_refused_before_any_statement(which, mode, there):
    """A -wal and -shm of somebody who may only read would lock the owner out."""
    if which == "file" and not there:
        which = "folder"
    with tempfile.TemporaryDirectory() as outer:  # pytest's own directory is closed to others
        os.chmod(outer, 0o755)
        folder = pathlib.Path(os.path.realpath(outer)) / "folder"
        folder.mkdir(mode=0o777)
        folder.chmod(0o777)
        path = folder / "queue.db"
        if there:
            make_store(path)
            path.chmod(0o666)
        before = picture(path)
        closed = path if which == "file" else folder
        old = stat.S_IMODE(closed.stat().st_mode)
        closed.chmod(mode & 0o555 if which == "folder" else mode)
        try:
            done = subprocess.run(
                [sys.executable, "-c", DROPPED, str(path)],
                check=True,
                capture_output=True,
                text=True,
            )
        finally:
            closed.chmod(old)
        assert done.stdout.startswith(f"StoreError PermissionError {path}: ")
        assert picture(path) == before
        assert not os.path.exists(f"{path}-shm")


def test_a_file_with_a_second_hard_link_is_refused(path):
    """Under each name SQLite would keep a -wal of its own, and entries would be lost."""
    make_store(path)
    os.link(path, path + ".link")
    ensure_refused(path, sqlspace.StoreError, "2 hard links")
    ensure_refused(path + ".link", sqlspace.StoreError, "2 hard links")
    os.unlink(path + ".link")
    with sqlspace.open(path) as store:
        assert store.pullp("mail") == b"two"


# -- another application's file


def test_another_applications_file_is_refused_in_rollback_mode(embedded_path):
    """Its journal mode isn't changed either: that stands in the file, which is as it was."""
    ensure_refused(embedded_path, sqlspace.SchemaError, "another application")


@pytest.mark.parametrize("left", ["at rest", "with content", "in use"])
def test_another_applications_file_is_refused_in_wal_mode(path, left):
    """Without a -wal none is made; with one, its content isn't checkpointed."""
    script = "PRAGMA journal_mode=WAL; CREATE TABLE app (a); INSERT INTO app VALUES (1)"
    make(path, script, crash=left == "with content")
    user = apsw.Connection(path) if left == "in use" else None
    if user:
        user.execute("INSERT INTO app VALUES (2)")
    assert os.path.exists(path + "-wal") == (left != "at rest")
    if user:  # to read its bytes here would drop the user's locks: the subprocess does it
        before = subprocess.check_output(["sha256sum", path, path + "-wal"])
        with pytest.raises(sqlspace.SchemaError, match="another application"):
            sqlspace.open(path)
        assert subprocess.check_output(["sha256sum", path, path + "-wal"]) == before
        user.execute("INSERT INTO app VALUES (3)")
        user.close()
    else:
        ensure_refused(path, sqlspace.SchemaError, "another application")
    look = apsw.Connection(path)
    assert look.pragma("journal_mode") == "wal"
    assert look.execute("SELECT count(*) FROM app").get == (3 if left == "in use" else 1)
    look.close()


def test_another_applications_file_in_wal_mode_is_known_by_its_version_for_readers(path):
    """SQLite goes by byte 19 of the header, and would make a -wal whatever byte 18 says."""
    make(path, "PRAGMA journal_mode=WAL; CREATE TABLE app (a)")
    header = bytearray(pathlib.Path(path).read_bytes())
    assert header[18:20] == b"\2\2"
    for writers in (0, 1, 3):
        header[18] = writers
        pathlib.Path(path).write_bytes(header)
        ensure_refused(path, sqlspace.SchemaError, "another application")


@pytest.mark.parametrize("mark", ["user_version", "application_id"])
def test_a_file_without_tables_that_somebody_has_marked_is_refused(path, mark):
    """An application may have marked its file before its first table."""
    make(path, f"PRAGMA {mark} = 7")
    ensure_refused(path, sqlspace.SchemaError, "another application")


@pytest.mark.parametrize("encoding", ["UTF-16le", "UTF-16be"])
@pytest.mark.parametrize("embed", [False, True])
def test_a_database_in_utf_16_is_refused(path, encoding, embed):
    """Keys are compared byte by byte, in UTF-8; embed doesn't help."""
    make(path, f"PRAGMA encoding='{encoding}'; CREATE TABLE app (a)")
    ensure_refused(path, sqlspace.SchemaError, "UTF-16", embed=embed)


def test_a_file_that_a_crash_left_with_a_hot_journal_is_rolled_back_by_nobody_but_its_owner(path):
    """With embed=True we live there too, and SQLite rolls it back for us."""
    make(path, "CREATE TABLE app (a); INSERT INTO app VALUES (1)")
    size = os.stat(path).st_size
    torn = pathlib.Path(path).read_bytes()
    database = apsw.Connection(path)
    database.pragma("cache_size", 1)
    database.pragma("cache_spill", 1)
    database.execute("BEGIN; CREATE TABLE b (x); INSERT INTO b VALUES (zeroblob(100000))")
    database.execute("INSERT INTO app VALUES (2)")
    journal = subprocess.check_output(["cat", path + "-journal"])
    database.execute("ROLLBACK")
    database.close()
    assert os.stat(path).st_size == size
    assert journal[:8] == JOURNAL[:8]
    pathlib.Path(path).write_bytes(torn + bytes(4096))
    pathlib.Path(path + "-journal").write_bytes(journal)
    ensure_refused(path, sqlspace.StoreError, "-journal waits to be rolled back")
    with sqlspace.open(path, embed=True) as store:
        assert store.push("mail", b"x") == 1
    look = apsw.Connection(path)
    assert look.execute("SELECT count(*) FROM app").get == 1
    assert look.pragma("integrity_check") == "ok"
    look.close()


# -- damage


def test_what_is_no_database_is_refused(path):
    """Text, a byte, half a header, random bytes such as an encrypted file's."""
    seed = hashlib.sha256(b"encrypted").digest()
    noise = b"".join(hashlib.sha256(seed + bytes([number])).digest() for number in range(256))
    for content in (
        b"Dear diary,\n" * 40,
        b"\0",
        b"S",
        MAGIC,
        MAGIC + bytes(83),
        MAGIC[:15] + b"1" + bytes(4080),
        bytes(4096),
        noise,
        b"** This file contains an SQLite 2.1 database **" + bytes(1000),
    ):
        pathlib.Path(path).write_bytes(content)
        ensure_refused(path, sqlspace.CorruptError, "no SQLite database")
    for length in (84, 400, 4080):
        pathlib.Path(path).write_bytes(MAGIC + bytes(length))
        ensure_refused(path, sqlspace.CorruptError, "damaged")


def test_a_file_with_any_byte_of_its_header_flipped_is_opened_or_refused_untouched(path):
    """Whatever SQLite makes of it: ours is a StoreError that names the path, or a store."""
    make_store(path)
    whole = pathlib.Path(path).read_bytes()
    refused = 0
    flips = [(at, at % 8) for at in range(100)]
    flips += [(at, bit) for at in (18, 19) for bit in range(8)]  # who may write, who may read
    for at, bit in flips:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << bit
        pathlib.Path(path).write_bytes(flipped)
        before = picture(path)
        try:
            sqlspace.open(path).close()
        except sqlspace.StoreError as error:
            refused += 1
            assert str(path) in str(error), at
            assert picture(path) == before, at
        for name in os.listdir(os.path.dirname(path)):
            os.unlink(os.path.join(os.path.dirname(path), name))
    assert refused > 20


def test_a_damaged_schema_is_refused_untouched(path):
    """Also where what is left of the text is no UTF-8, or is another statement."""
    make_store(path)
    make(path, "VACUUM")  # one copy of the text, and no other on a page that was freed
    whole = pathlib.Path(path).read_bytes()
    start = whole.rindex(b"CREATE VIEW sqlspace_tombstones")
    for at, bit in [
        (start, 7),
        (start, 5),
        (start + 7, 7),
        (start + 40, 1),
        (start + 90, 7),
        (100, 3),
    ]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << bit
        pathlib.Path(path).write_bytes(flipped)
        before = picture(path)
        with pytest.raises(sqlspace.StoreError) as caught:
            sqlspace.open(path)
        assert isinstance(caught.value, sqlspace.CorruptError | sqlspace.SchemaError), at
        assert str(path) in str(caught.value)
        assert picture(path) == before


@pytest.mark.parametrize("keep", [512, 4096, 8192, -4096])
def test_a_truncated_file_is_refused(path, keep):
    """SQLite notices by the header's count of pages."""
    make_store(path)
    whole = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(whole[:keep])
    ensure_refused(path, sqlspace.CorruptError, "damaged")


def test_a_zeroed_page_is_refused(path):
    """A look at each b-tree's edge is part of the open; the first page holds the schema."""
    make_store(path)
    whole = pathlib.Path(path).read_bytes()
    look = apsw.Connection(path)
    roots = [1, *(root for (root,) in look.execute("SELECT rootpage FROM sqlite_schema"))]
    names = dict(look.execute("SELECT rootpage, name FROM sqlite_schema"))
    look.close()
    looked_at = [
        root
        for root in roots
        if root == 1
        or names[root]
        in (
            "sqlspace_schema",
            "sqlspace_entries",
            "sqlspace_entries_live",
            "sqlspace_entries_taken",
        )
    ]
    assert len(looked_at) == 5
    for root in looked_at:
        start = (root - 1) * 4096 + (100 if root == 1 else 0)
        pathlib.Path(path).write_bytes(
            whole[:start] + bytes(root * 4096 - start) + whole[root * 4096 :]
        )
        ensure_refused(path, sqlspace.CorruptError, "damaged")


# -- a schema that isn't ours, or not as we made it


NEWER = """
INSERT INTO sqlspace_schema (version, name, applied_at)
SELECT max(version) + 1, 'z', 1 FROM sqlspace_schema
"""
TAMPERED = {
    "added column": "ALTER TABLE sqlspace_entries ADD COLUMN extra TEXT",
    "renamed column": "ALTER TABLE sqlspace_entries RENAME COLUMN lease TO leash",
    "changed index": "DROP INDEX sqlspace_entries_until;"
    "CREATE INDEX sqlspace_entries_until ON sqlspace_entries (due_at) WHERE state = 1",
    "dropped index": "DROP INDEX sqlspace_entries_live",
    "dropped table": "DROP TABLE sqlspace_entries",
    "dropped trigger": "DROP TRIGGER sqlspace_outbox_push",
    "dropped view": "DROP VIEW sqlspace_tombstones",
    "planted index": "CREATE UNIQUE INDEX mine ON sqlspace_entries (payload)",
    "planted trigger": "CREATE TRIGGER mine AFTER INSERT ON sqlspace_entries BEGIN DELETE FROM "
    "sqlspace_entries; END",
    "trigger on the view": "CREATE TRIGGER mine INSTEAD OF DELETE ON sqlspace_live "
    "BEGIN SELECT 1; END",
    "trigger on the schema": "CREATE TRIGGER mine AFTER UPDATE ON sqlspace_schema "
    "BEGIN SELECT 1; END",
    "view for a table": "ALTER TABLE sqlspace_entries RENAME TO hidden;"
    "CREATE VIEW sqlspace_entries AS SELECT * FROM hidden",
    "extra table": "CREATE TABLE sqlspace_extra (a)",
    "extra table in capitals": "CREATE TABLE SQLSPACE_EXTRA (a)",
    "no migrations recorded": "DELETE FROM sqlspace_schema",
    "version 0": "UPDATE sqlspace_schema SET version = version - 2",
    "version -1": "UPDATE sqlspace_schema SET version = version - 3",
    "schema table of others": "DROP TABLE sqlspace_schema; CREATE TABLE sqlspace_schema (version)",
    "schema table as a view": "DROP TABLE sqlspace_schema;"
    "CREATE VIEW sqlspace_schema AS SELECT 1 AS version",
    "no schema table": "DROP TABLE sqlspace_schema",
    "seq 2**62": "INSERT INTO sqlspace_entries (seq, key, pushed_at) VALUES (1 << 62, 'k', 1)",
    "seq 2**63 - 1": "INSERT INTO sqlspace_entries (seq, key, pushed_at) "
    "VALUES (9223372036854775807, 'k', 1)",
    "seq 0": "INSERT INTO sqlspace_entries (seq, key, pushed_at) VALUES (0, 'k', 1)",
    "seq -5": "INSERT INTO sqlspace_entries (seq, key, pushed_at) VALUES (-5, 'k', 1)",
    "taking 2**62": "UPDATE sqlspace_entries SET taken_no = 1 << 62 WHERE state = 3",
    "no file id": "UPDATE sqlspace_schema SET file_id = NULL",
    "another file id": "UPDATE sqlspace_schema SET file_id = upper(file_id) || 'G'",
    "file id of no UTF-8": "UPDATE sqlspace_schema SET file_id = CAST(x'ff' AS TEXT)",
    "boots that can't grow": "UPDATE sqlspace_schema SET boots = NULL",
    "boots at the end": "UPDATE sqlspace_schema SET boots = 9223372036854775807",
    "newer": NEWER,
}


@pytest.mark.parametrize("how", TAMPERED)
@pytest.mark.parametrize("embed", [False, True])
def test_a_schema_that_was_tampered_with_is_refused(path, how, embed):
    """A planted trigger could eat entries, a planted seq make two of them the same."""
    make_store(path)
    make(path, f"PRAGMA ignore_check_constraints=1; PRAGMA legacy_alter_table=1; {TAMPERED[how]}")
    error = ensure_refused(path, sqlspace.SchemaError, "", embed=embed)
    if how == "newer":
        assert "newer sqlspace" in str(error)
        assert f"schema {len(schema.migrations()) + 1};" in str(error)


def test_tampering_that_is_still_in_the_wal_is_refused_and_stays_there(path):
    """The look reads through the -wal, and closing it checkpoints nothing."""
    make_store(path)
    make(path, TAMPERED["planted trigger"], crash=True)
    assert os.stat(path + "-wal").st_size > 0
    ensure_refused(path, sqlspace.SchemaError, "trigger mine")


@pytest.mark.parametrize("whose", ["ours", "foreign"])
def test_what_is_seen_only_at_the_second_look_is_refused_and_stays_in_the_wal(
    path, monkeypatch, whose
):
    """Others may have come between the look and the open; closing then checkpoints nothing."""
    if whose == "ours":
        make_store(path)
        make(path, TAMPERED["planted trigger"], crash=True)
    else:
        make(path, "PRAGMA journal_mode=WAL; CREATE TABLE app (a)", crash=True)
    monkeypatch.setattr(opener, "_look", lambda _: schema.EMPTY)
    ensure_refused(path, sqlspace.SchemaError, "mine" if whose == "ours" else "another application")


def test_the_last_seq_of_all_is_pushed_and_after_it_a_push_fails_and_adds_nothing(path):
    """A planted seq below the end is no tampering; the end is an error, never a seq used twice."""
    make_store(path)
    make(
        path, f"INSERT INTO sqlspace_entries (seq, key, pushed_at) VALUES ({(1 << 62) - 2}, 'k', 1)"
    )
    with sqlspace.open(path) as store:
        assert store.push("k", b"x") == (1 << 62) - 1
        with pytest.raises(sqlspace.StoreError):
            store.push("k", b"y")
        assert store.len("k") == 2
        assert store.get("k", (1 << 62) - 1).payload == b"x"
    with sqlspace.open(path) as store:
        assert store.pull_many("k", 5) == [b"", b"x"]


@pytest.mark.parametrize("seq", ["1 << 62", "0", "-1", "9223372036854775807"])
def test_a_seq_beyond_the_range_is_refused_by_the_table_itself(path, seq):
    """So another program has to switch the checks off to plant one."""
    make_store(path)
    database = apsw.Connection(path)
    with pytest.raises(apsw.ConstraintError):
        database.execute(
            f"INSERT INTO sqlspace_entries (seq, key, pushed_at) VALUES ({seq}, 'k', 1)"
        )
    database.close()


def test_what_analyze_leaves_is_no_tampering(path):
    """sqlite_stat1 is SQLite's own."""
    make_store(path)
    make(path, "ANALYZE")
    with sqlspace.open(path) as store:
        assert store.pullp("mail") == b"two"


def test_a_dump_that_is_read_back_is_the_same_store(path, tmp_path):
    """`sqlite3 a .dump | sqlite3 b` is how people move a database."""
    make_store(path)
    dump = subprocess.check_output(["sqlite3", path, ".dump"])
    copy = str(tmp_path / "copy.db")
    subprocess.run(["sqlite3", copy], input=dump, check=True)
    with sqlspace.open(copy) as store:
        assert store.pullp("mail") == b"two"
        assert [stone.seq for stone in store.history("mail")] == [1, 2]


# -- living in an application's file


def test_embed_moves_in_and_leaves_all_of_the_applications_alone(embedded_path):
    """user_version, application_id, tables, rowids: as they were; compact renumbers nothing."""
    path = embedded_path
    asked = "SELECT rowid, a FROM app ORDER BY rowid"
    make(path, "CREATE TABLE bulk (x); INSERT INTO bulk VALUES (zeroblob(50000)); DROP TABLE bulk")
    with sqlspace.open(path, embed=True) as store:
        for number in range(20):
            store.push("mail", b"%d" % number * 1000)
        store.pull_many("mail", 15)
        store.compact()
        free = store.stats().free_pages
        assert list(store.history("mail")) == []
    assert free > 0  # it was not rewritten
    look = apsw.Connection(path)
    assert look.pragma("user_version") == 42
    assert look.pragma("application_id") == 77
    assert look.pragma("page_size") == 1024
    assert look.execute(asked).fetchall() == [(7, "seven"), (900, "x")]
    assert look.pragma("integrity_check") == "ok"
    names = [name for (name,) in look.execute("SELECT name FROM sqlite_schema")]
    look.close()
    assert {name for name in names if not name.startswith(("sqlspace_", "sqlite_auto"))} == {
        "app",
        "app_a",
    }
    with sqlspace.open(path) as store:  # our schema is there: embed matters no more
        assert store.len("mail") == 5


def test_an_application_may_change_its_own_tables_later(embedded_path):
    """Only what is named sqlspace_ or stands on our tables is ours to judge."""
    sqlspace.open(embedded_path, embed=True).close()
    make(
        embedded_path,
        "CREATE TABLE more (a); CREATE TRIGGER push AFTER INSERT ON more BEGIN "
        "INSERT INTO sqlspace_outbox VALUES ('mail', NEW.a); END; INSERT INTO more VALUES ('hi');"
        "ALTER TABLE app RENAME TO renamed; CREATE VIEW look AS SELECT * FROM sqlspace_entries",
    )
    with sqlspace.open(embedded_path) as store:
        assert store.pullp("mail") == b"hi"


def test_embed_makes_no_difference_to_a_new_file(path):
    """It matters only where others' tables are."""
    with sqlspace.open(path, embed=True) as store:
        store.push("mail", b"x")
    with sqlspace.open(path) as store:
        assert store.pullp("mail") == b"x"


# -- migrations


def test_the_migrations_are_recorded_and_add_up_to_what_is_there(path, tmp_path):
    """One row each in sqlspace_schema; the first one carries the file's random id."""
    ids = []
    for file in (path, str(tmp_path / "other.db")):
        earliest = time.time_ns() // 1000 - 2000  # SQLite's clock counts milliseconds
        sqlspace.open(file).close()
        latest = time.time_ns() // 1000
        look = apsw.Connection(file)
        rows = look.execute(
            "SELECT version, name, applied_at, file_id FROM sqlspace_schema ORDER BY version"
        ).fetchall()
        found = frozenset(schema._objects(look))
        look.close()
        migrations = schema.migrations()
        assert [row[:2] for row in rows] == [(each.version, each.name) for each in migrations]
        assert all(earliest <= row[2] <= latest for row in rows)
        assert len(rows[0][3]) == 32
        ids.append(uuid.UUID(hex=rows[0][3]))
        assert all(row[3] is None for row in rows[1:])
        assert found == schema._expected(len(migrations))
    assert ids[0] != ids[1]


@pytest.mark.parametrize("there", [(), ("0002_second.sql",), ("0001_a.sql", "0003_c.sql")])
def test_an_installation_without_its_migrations_says_so(path, tmp_path, monkeypatch, there):
    """A file that can't be judged is not opened, and not made."""
    broken = tmp_path / "migrations"
    broken.mkdir()
    for name in there:
        (broken / name).write_text("SELECT 1")
    schema.migrations.cache_clear()
    schema._expected.cache_clear()
    monkeypatch.setattr(schema, "_MIGRATIONS", broken)
    try:
        with pytest.raises(sqlspace.SchemaError, match="this installation is broken"):
            sqlspace.open(path)
    finally:
        schema.migrations.cache_clear()
        schema._expected.cache_clear()


# -- mounts


def mountinfo(tmp_path, *lines):
    """A /proc/self/mountinfo: (number, parent, mount point as written, file system)."""
    text = "".join(
        f"{number} {parent} 0:{number} / {point} rw,relatime shared:1 - {kind} source rw\n"
        for number, parent, point, kind in lines
    )
    path = tmp_path / "mountinfo"
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/q.db", None),
        ("/data/q.db", None),
        ("/data/net/q.db", "nfs4"),
        ("/data/net/disk/q.db", None),
        ("/data/network/q.db", None),
        ("/data/net", "nfs4"),
        ("/with space/q.db", "cifs"),
        ("/with\ttab\\and\nline/q.db", "fuse.sshfs"),
        ("/page\x0cfeed\u2028/q.db", "9p"),
        ("/twice/q.db", "nfs"),
        ("/twice-back/q.db", None),
        ("/auto/q.db", "nfs"),
        ("/hidden/deep/q.db", None),
        ("/hiding/deep/q.db", "nfs"),
        ("/literal\\040/q.db", "smb3"),
    ],
)
def test_a_network_file_system_is_found_by_the_mount_that_the_path_leads_to(tmp_path, path, kind):
    """Mounts nest, hide one another, and are written with escapes."""
    fake = mountinfo(
        tmp_path,
        (1, 1, "/", "ext4"),
        (2, 1, "/data", "ext4"),
        (3, 2, "/data/net", "nfs4"),
        (4, 3, "/data/net/disk", "xfs"),
        (5, 1, r"/with\040space", "cifs"),
        (6, 1, r"/with\011tab\134and\012line", "fuse.sshfs"),
        (7, 1, "/page\x0cfeed\u2028", "9p"),
        (8, 1, "/twice", "ext4"),
        (9, 8, "/twice", "nfs"),
        (10, 1, "/twice-back", "nfs"),
        (11, 1, "/twice-back", "ext4"),
        (12, 1, "/auto", "autofs"),
        (13, 12, "/auto", "nfs"),
        (14, 1, "/hidden/deep", "nfs"),
        (15, 1, "/hidden", "ext4"),
        (16, 1, "/hiding/deep", "ext4"),
        (17, 1, "/hiding", "nfs"),
        (18, 1, r"/literal\134040", "smb3"),
    )
    assert mounts.network_file_system(path, fake) == kind


def test_without_mountinfo_or_a_root_nothing_is_known(tmp_path):
    """There is none on macOS; in a chroot the root's own parent isn't listed."""
    assert mounts.network_file_system("/q.db", str(tmp_path / "none")) is None
    fake = mountinfo(tmp_path, (20, 19, "/", "nfs"), (21, 20, "/local", "ext4"))
    assert mounts.network_file_system("/q.db", fake) == "nfs"
    assert mounts.network_file_system("/local/q.db", fake) is None
    fake = mountinfo(tmp_path, (21, 20, "/local", "nfs"))
    assert mounts.network_file_system("/q.db", fake) is None
    assert mounts.network_file_system("/local/q.db", fake) == "nfs"


def test_this_machines_own_mounts_are_understood(tmp_path):
    """The real thing: the tests' directory lies on a mount, and isn't one."""
    assert not mounts.is_mount_point(str(tmp_path / "queue.db"))
    if os.path.exists("/proc/self/mountinfo"):
        assert mounts.is_mount_point("/proc")
        assert not mounts.is_mount_point("/proc/self")


def mount(monkeypatch, fake):
    for name in ("network_file_system", "is_mount_point"):
        asked = getattr(mounts, name)
        monkeypatch.setattr(opener, name, lambda path, asked=asked: asked(path, fake))


def test_a_network_file_system_is_refused_unless_told_otherwise(path, tmp_path, monkeypatch):
    """Several machines that have it open would corrupt it; allow_network=True overrides."""
    (tmp_path / "fake").mkdir()
    mount(monkeypatch, mountinfo(tmp_path / "fake", (1, 1, "/", "ext4"), (2, 1, tmp_path, "nfs4")))
    ensure_refused(path, sqlspace.StoreError, "network file system (nfs4)")
    assert not os.path.exists(path)
    with sqlspace.open(path, allow_network=True) as store:
        store.push("mail", b"x")
    ensure_refused(path, sqlspace.StoreError, "allow_network=True overrides")


def test_a_file_that_is_itself_a_mount_point_is_refused(path, tmp_path, monkeypatch):
    """`docker -v queue.db:/app/queue.db`: the -wal would stay in the container, and be lost."""
    make_store(path)
    (tmp_path / "fake").mkdir()
    mount(monkeypatch, mountinfo(tmp_path / "fake", (1, 1, "/", "ext4"), (2, 1, path, "ext4")))
    ensure_refused(path, sqlspace.StoreError, "mount its directory")
    ensure_refused(path, sqlspace.StoreError, "mount its directory", allow_network=True)


# -- other VFSes


class Passing(apsw.VFS):
    """Passes everything on, and notes what it opened."""

    def __init__(self, name):
        self.opened = []
        super().__init__(name, "unix")

    def xOpen(self, name, flags):  # SQLite's name
        self.opened.append(os.path.basename(getattr(name, "filename", lambda: name)() or ""))
        return apsw.VFSFile("unix", name, flags)


def test_a_store_works_through_a_registered_vfs(path):
    """Fault injection and encryption come in this way; here the files are real."""
    vfs = Passing("passing")
    try:
        with sqlspace.open(path, vfs="passing") as store:
            store.push("mail", b"one")
            with sqlspace.open(path, vfs="passing") as other:
                other.push("mail", b"two")
            assert store.pull_many("mail", 3) == [b"one", b"two"]
        assert {"queue.db", "queue.db-wal"} <= set(vfs.opened)
        with sqlspace.open(path) as store:
            assert [stone.seq for stone in store.history("mail")] == [1, 2]
        pathlib.Path(path).write_bytes(b"text" * 100)
        ensure_refused(path, sqlspace.CorruptError, "no SQLite database", vfs="passing")
        os.unlink(path)
        make(path, "CREATE TABLE app (a)")
        ensure_refused(path, sqlspace.SchemaError, "another application", vfs="passing")
    finally:
        vfs.unregister()


def test_a_vfs_that_isnt_registered_is_misuse(path):
    """A ValueError with its name, and no file."""
    with pytest.raises(ValueError, match="vfs must name a VFS that is registered, not 'nowhere'"):
        sqlspace.open(path, vfs="nowhere")
    assert not os.path.exists(path)


class _Failing(apsw.VFS):
    """Of the files of stores, one operation fails."""

    def __init__(self, name):
        super().__init__(name, "unix")
        self.name = name
        self.fails = None
        self.spared = 0  # so many before one fails

    def xOpen(self, name, flags):
        return _FailingFile(self, name, flags)


class _FailingFile(apsw.VFSFile):
    def __init__(self, vfs, name, flags):
        super().__init__("unix", name, flags)
        self._vfs = vfs

    def _ask(self, kind):
        if self._vfs.fails != kind:
            return
        self._vfs.spared -= 1
        if self._vfs.spared < 0:
            raise apsw.IOError("the disk fails")

    def xRead(self, amount, offset):
        self._ask("read")
        return super().xRead(amount, offset)

    def xSync(self, flags):
        self._ask("sync")
        return super().xSync(flags)


def descriptors(path):
    links = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.exists(link) and os.readlink(link).startswith(path)]


@pytest.fixture
def failing():
    vfs = _Failing("failing")
    yield vfs
    vfs.unregister()


def test_a_store_that_the_disk_fails_while_it_closes_leaves_nothing_open(path, failing):
    """All that can be let go is; closing again is nothing."""
    store = sqlspace.open(path, vfs="failing")
    store.push("k", b"x")
    failing.fails = "sync"
    with pytest.raises(sqlspace.StoreError, match="the disk fails"):
        store.close()
    store.close()
    assert descriptors(path) == []


def test_a_connection_that_the_disk_fails_while_it_opens_is_closed(path, failing):
    """At whichever read; also if the error is kept, and with it all that it came through."""
    sqlspace.open(path).close()
    errors = []
    for failing.spared in itertools.count():
        failing.fails = "read"
        try:
            store = sqlspace.open(path, vfs="failing")
        except sqlspace.StoreError as error:
            errors.append(error)
            assert descriptors(path) == []
        else:
            break
    failing.fails = None
    store.close()
    assert len(errors) > 3
