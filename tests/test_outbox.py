"""push_on: the application's rows and the entry, both or none, on whatever connection.

Python's own sqlite3 meets files with Stores in processes of its own only: see `sqlspace.guard`. In
this one it gets databases in memory.
"""

import logging
import random
import sqlite3
import threading
import types

import apsw
import pytest

import sqlspace
from sqlspace import outbox, push_on, schema

SECONDS = 60.0  # until a test gives up


@pytest.fixture
def path(tmp_path):
    """An application's own database, into which a Store has moved."""
    path = str(tmp_path / "application.db")
    connection = apsw.Connection(path)
    connection.execute("CREATE TABLE orders (n INTEGER PRIMARY KEY)")
    connection.close()
    sqlspace.open(path, embed=True).close()
    return path


@pytest.fixture
def store(path):
    with sqlspace.open(path) as store:
        yield store


@pytest.fixture
def connection(path):
    """The application's, with apsw, in the process of the Store."""
    connection = apsw.Connection(path)
    yield connection
    connection.close()


@pytest.fixture(params=["apsw", "sqlite3"])
def memory(request):
    """A connection of either library to a database in memory with our tables."""
    connection = (
        apsw.Connection(":memory:")
        if request.param == "apsw"
        else sqlite3.connect(":memory:", isolation_level=None)
    )
    for migration in schema.migrations():
        for statement in statements(migration.sql):
            connection.execute(statement)
    yield connection
    connection.close()


def statements(script):
    """The script's, one by one, for libraries that take no more at once."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def rows(connection, columns="*"):
    return list(connection.execute(f"SELECT {columns} FROM sqlspace_entries ORDER BY seq"))


def orders(store):
    return [n for (n,) in store._database.read("SELECT n FROM orders ORDER BY n")]


# -- what is written


@pytest.fixture
def clock(monkeypatch):
    """The time of a push, in nanoseconds."""
    clock = types.SimpleNamespace(now=1_700_000_000_000_000_999)
    clock.time_ns = lambda: clock.now
    monkeypatch.setattr("sqlspace.clock.time", clock)
    return clock


COLUMNS = "key, payload, headers, state, pushed_at, due_at, delay, expires_at, dedupe"
NOW = 1_700_000_000_000_000
WRITTEN = {
    "plain": ({}, (None, 0, NOW, None, None, None, None)),
    "ttl": ({"ttl": 1.5}, (None, 0, NOW, None, None, NOW + 1_500_000, None)),
    "ttl for ever": ({"ttl": float("inf")}, (None, 0, NOW, None, None, None, None)),
    "delay": ({"delay": 2}, (None, 1, NOW, NOW + 2_000_000, 2_000_000, None, None)),
    "delay of nothing": ({"delay": 0}, (None, 0, NOW, None, None, None, None)),
    "both": (
        {"delay": 0.25, "ttl": 0.5},
        (None, 1, NOW, NOW + 250_000, 250_000, NOW + 500_000, None),
    ),
    "dedupe": ({"dedupe": "№ 1"}, (None, 0, NOW, None, None, None, "№ 1")),
    "headers": ({"headers": {"a": "ü"}}, ('{"a":"ü"}', 0, NOW, None, None, None, None)),
    "no headers": ({"headers": {}}, (None, 0, NOW, None, None, None, None)),
}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("name", WRITTEN)
def test_the_row_is_that_of_a_push(memory, name):
    """Times are whole microseconds; what was not asked for is NULL; the rest has its default."""
    options, expected = WRITTEN[name]
    assert push_on(memory, "mail", bytearray(b"hello"), **options) == 1
    assert rows(memory, COLUMNS) == [("mail", b"hello", *expected)]
    others = "deadline, lease, token, attempts, max_attempts, taken_at, taken_no"
    assert rows(memory, others) == [(None, None, None, 0, None, None, None)]


def test_durations_beyond_all_bounds_fit_the_columns(memory, clock):
    """A thousand years is the longest; the sum with any clock is an int that SQLite can hold."""
    clock.now = 1 << 62
    push_on(memory, "mail", b"", delay=1e300)
    push_on(memory, "mail", b"", ttl=1e300)
    longest = 31_557_600_000_000_000
    now = (1 << 62) // 1000
    assert rows(memory, "due_at, delay, expires_at") == [
        (now + longest, longest, None),
        (None, None, now + longest),
    ]


def test_seqs_follow_each_other_whoever_pushes(store, connection):
    """They are those of the Store: the file gives them."""
    assert store.push("mail", b"1") == 1
    assert push_on(connection, "mail", b"2") == 2
    assert push_on(connection, "log", b"3") == 3
    assert store.push("mail", b"4") == 4
    assert store.pull_many("mail", 9) == [b"1", b"2", b"4"]


def test_headers_arrive(store, connection):
    """They are read back as they were given."""
    headers = {"type": "order", "ü": "\0\u2028"}
    push_on(connection, "mail", b"x", headers=headers)
    (entry,) = store.entries("mail")
    assert entry.headers == headers


# -- dedupe


def test_a_second_push_with_the_same_dedupe_adds_nothing(memory):
    """It returns the seq of the first, and leaves that as it is."""
    first = push_on(memory, "mail", b"one", dedupe="a")
    before = rows(memory)
    assert push_on(memory, "mail", b"two", dedupe="a", ttl=5, headers={"x": "y"}) == first
    assert rows(memory) == before
    # Neither is the seq of the last insertion, nor one used up.
    last = push_on(memory, "mail", b"three", dedupe="b")
    assert last == first + 1
    assert push_on(memory, "mail", b"four", dedupe="a") == first
    assert push_on(memory, "mail", b"five", dedupe="b") == last


def test_dedupe_is_a_keys_own_and_none_is_like_no_other(memory):
    """What has no dedupe is never a duplicate."""
    seqs = [
        push_on(memory, "mail", b"x", dedupe="a"),
        push_on(memory, "log", b"x", dedupe="a"),
        push_on(memory, "mail", b"x"),
        push_on(memory, "mail", b"x"),
    ]
    assert seqs == [1, 2, 3, 4]


def test_dedupe_knows_what_is_in_the_history(store, connection):
    """What was taken is not pushed again, while it is remembered."""
    seq = push_on(connection, "mail", b"one", dedupe="a")
    push_on(connection, "mail", b"two")
    assert store.pull("mail", 0) == b"one"
    assert push_on(connection, "mail", b"again", dedupe="a") == seq
    assert store.pull_many("mail", 9) == [b"two"]


def test_dedupe_is_rolled_back_too(store, connection):
    """A push that never happened has no duplicates."""
    connection.execute("BEGIN")
    push_on(connection, "mail", b"one", dedupe="a")
    connection.execute("ROLLBACK")
    push_on(connection, "mail", b"two", dedupe="a")
    assert store.pull_many("mail", 9) == [b"two"]


# -- whose transaction it is


def test_entry_and_rows_are_committed_together_and_not_before(store, connection):
    """Until the COMMIT nobody else sees either."""
    connection.execute("BEGIN")
    connection.execute("INSERT INTO orders VALUES (1)")
    push_on(connection, "mail", b"1")
    assert connection.in_transaction
    assert (store.len("mail"), orders(store)) == (0, [])
    connection.execute("COMMIT")
    assert (store.len("mail"), orders(store)) == (1, [1])


def test_entry_and_rows_are_rolled_back_together(store, connection):
    """As if neither had been; the seq is the next one's."""
    connection.execute("BEGIN")
    connection.execute("INSERT INTO orders VALUES (1)")
    seq = push_on(connection, "mail", b"1")
    connection.execute("ROLLBACK")
    assert (store.len("mail"), orders(store)) == (0, [])
    assert store.push("mail", b"2") == seq


def test_a_savepoint_takes_back_just_what_came_after_it(store, connection):
    """The push is one statement among the application's."""
    with connection:
        push_on(connection, "mail", b"kept")
        connection.execute("SAVEPOINT here")
        connection.execute("INSERT INTO orders VALUES (1)")
        push_on(connection, "mail", b"undone")
        connection.execute("ROLLBACK TO here")
        connection.execute("RELEASE here")
        connection.execute("INSERT INTO orders VALUES (2)")
        push_on(connection, "mail", b"kept too")
    assert orders(store) == [2]
    assert store.pull_many("mail", 9) == [b"kept", b"kept too"]


def test_in_autocommit_the_push_is_a_transaction_of_its_own(store, connection):
    """When it returns, no cursor holds the file: it is committed, and others may write."""
    assert not connection.in_transaction
    push_on(connection, "mail", b"1")
    assert not connection.in_transaction
    assert store.pull("mail", 0) == b"1"
    store.push("mail", b"2")
    cursor = connection.cursor()  # one that outlives the call
    push_on(cursor, "mail", b"3")
    store.push("mail", b"4")
    assert store.pull_many("mail", 9) == [b"2", b"3", b"4"]


def test_a_push_that_fails_leaves_the_transaction_to_the_application(store, connection):
    """Misuse touches nothing; what came before can be committed."""
    connection.execute("BEGIN")
    connection.execute("INSERT INTO orders VALUES (1)")
    with pytest.raises(ValueError, match="key must not be the empty str"):
        push_on(connection, "", b"1")
    assert connection.in_transaction
    connection.execute("COMMIT")
    assert (orders(store), store.keys()) == ([1], [])


# -- whatever the connection makes of rows


class Row(dict):
    def __init__(self, cursor, row):
        super().__init__(seq=row)


@pytest.mark.parametrize("row", [Row, lambda *_: 17, lambda *_: None])
def test_the_applications_rows_are_its_own_business(memory, row):
    """A row factory or tracer changes neither the result, nor is it changed."""
    name = "row_trace" if isinstance(memory, apsw.Connection) else "row_factory"
    push_on(memory, "mail", b"x")
    setattr(memory, name, row)
    assert push_on(memory, "mail", b"x") == 2
    assert getattr(memory, name) is row
    cursor = memory.cursor()
    setattr(cursor, name, row)
    assert push_on(cursor, "mail", b"x") == 3
    assert getattr(cursor, name) is row


def test_text_as_bytes_is_no_hindrance():
    """The standard library's text_factory decides what texts become."""
    connection = sqlite3.connect(":memory:")
    connection.text_factory = bytes
    for migration in schema.migrations():
        connection.executescript(migration.sql)
    assert push_on(connection, "mail", b"x") == 1
    connection.close()


# -- errors

GOOD = {"key": "mail", "payload": b"x"}
MISUSE = {
    "connection None": ({"connection": None}, TypeError, "execute.*NoneType has not"),
    "connection str": ({"connection": "a.db"}, TypeError, "execute.*str has not"),
    "execute is no method": (
        {"connection": types.SimpleNamespace(execute=5)},
        TypeError,
        "execute.*SimpleNamespace has not",
    ),
    "SQLAlchemy's own": (
        {"connection": types.SimpleNamespace(execute=print, exec_driver_sql=print)},
        TypeError,
        "driver_connection",
    ),
    "key int": ({"key": 5}, TypeError, "key must be str, not int"),
    "key empty": ({"key": ""}, ValueError, "key must not be the empty str"),
    "key too long": ({"key": "k" * 1025}, ValueError, "key must be at most 1,024 bytes"),
    "key NUL": ({"key": "a\0"}, ValueError, "key must not hold a NUL"),
    "key surrogate": ({"key": "\ud800"}, ValueError, "key holds a lone surrogate"),
    "payload str": ({"payload": "x"}, TypeError, "payload must be bytes-like, not str"),
    "payload None": ({"payload": None}, TypeError, "payload must be bytes-like, not NoneType"),
    "headers list": ({"headers": []}, TypeError, "headers must be dict"),
    "headers int": ({"headers": {"a": 1}}, TypeError, "must be str, not int"),
    "ttl str": ({"ttl": "1"}, TypeError, "ttl must be seconds"),
    "ttl 0": ({"ttl": 0}, ValueError, "ttl must be more than 0"),
    "ttl negative": ({"ttl": -1}, ValueError, "ttl must be 0 or more"),
    "ttl NaN": ({"ttl": float("nan")}, ValueError, "ttl must be 0 or more"),
    "delay bool": ({"delay": True}, TypeError, "delay must be seconds"),
    "delay negative": ({"delay": -1}, ValueError, "delay must be 0 or more"),
    "delay infinite": ({"delay": float("inf")}, ValueError, "delay must be finite"),
    "delay as long as ttl": ({"delay": 1, "ttl": 1}, ValueError, "delay must be less than ttl"),
    "dedupe int": ({"dedupe": 5}, TypeError, "dedupe must be str, not int"),
    "dedupe bytes": ({"dedupe": b"a"}, TypeError, "dedupe must be str, not bytes"),
    "dedupe empty": ({"dedupe": ""}, ValueError, "dedupe must not be the empty str"),
    "dedupe too long": ({"dedupe": "d" * 1025}, ValueError, "dedupe must be at most 1,024"),
    "dedupe NUL": ({"dedupe": "\0"}, ValueError, "dedupe must not hold a NUL"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_refused_before_anything_is_touched(name):
    """The connection isn't even asked; the message names the argument."""
    wrong, error, message = MISUSE[name]
    asked = []
    connection = types.SimpleNamespace(execute=lambda *arguments: asked.append(arguments))
    with pytest.raises(error, match=message):
        push_on(**{"connection": connection, **GOOD, **wrong})
    assert not asked


def test_what_fits_no_row_is_refused_before_anything_is_touched(memory, monkeypatch):
    """With the rest of its row it must stay below SQLite's limit."""
    monkeypatch.setattr("sqlspace.arguments.ROW_BYTES", 20_000)
    with pytest.raises(ValueError, match=r"payload must be .* bytes here, not 15,000"):
        push_on(memory, "mail", bytes(15_000))
    with pytest.raises(ValueError, match="headers must be at most"):
        push_on(memory, "mail", b"x", headers={"a": "b" * 10_000})
    assert not rows(memory)


@pytest.mark.parametrize("library", [apsw, sqlite3])
def test_a_database_without_our_tables_is_a_schema_error(library):
    """It says what to do, its cause is the library's own, and the transaction goes on."""
    error = getattr(library, "SQLError", None) or library.OperationalError
    connection = library.Connection(":memory:")
    connection.execute("CREATE TABLE orders (n)")
    connection.execute("BEGIN")
    connection.execute("INSERT INTO orders VALUES (1)")
    with pytest.raises(sqlspace.SchemaError, match=r"sqlspace\.open\(path, embed=True\)") as caught:
        push_on(connection, "mail", b"x")
    assert isinstance(caught.value.__cause__, error)
    connection.execute("COMMIT")
    assert connection.execute("SELECT n FROM orders").fetchall() == [(1,)]
    connection.close()


def test_other_errors_are_the_librarys_own(path, connection):
    """Busy, read-only, closed: the application handles them as it always does."""
    other = apsw.Connection(path)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(apsw.BusyError):
        push_on(connection, "mail", b"x")
    other.execute("ROLLBACK")
    other.close()
    reader = apsw.Connection(path, apsw.SQLITE_OPEN_READONLY)
    with pytest.raises(apsw.ReadOnlyError):
        push_on(reader, "mail", b"x")
    reader.close()
    with pytest.raises(apsw.ConnectionClosedError):
        push_on(reader, "mail", b"x")
    closed = sqlite3.connect(":memory:")
    closed.close()
    with pytest.raises(sqlite3.ProgrammingError):
        push_on(closed, "mail", b"x")


# -- libraries that may lose commits


@pytest.fixture
def untold(monkeypatch):
    """A process that was told nothing yet, and knows no library."""
    monkeypatch.setattr(outbox, "_untold", [outbox._ADVICE])
    monkeypatch.setattr(outbox, "_versions", {})


def pretend(connection, version):
    if isinstance(connection, apsw.Connection):
        connection.create_scalar_function("sqlite_version", lambda: version, 0)
    else:
        connection.create_function("sqlite_version", 0, lambda: version)


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize("version", ["3.40.1", "3.51.2", "3.9.100"])
def test_an_unfixed_library_that_checkpoints_is_told_of_once(memory, version, caplog):
    """One warning a process, with the version and the remedy; the pushes happen all the same."""
    pretend(memory, version)
    with caplog.at_level(logging.WARNING, "sqlspace"):
        for _ in range(3):
            push_on(memory, "mail", b"x")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("sqlspace", "WARNING")
    assert f"SQLite {version}" in record.message
    assert "PRAGMA wal_autocheckpoint=0" in record.message
    assert len(rows(memory)) == 3


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize(
    ("version", "pages"), [("3.40.1", 0), ("3.51.2", 0), ("3.51.3", 1000), ("4.0", 1000)]
)
def test_of_others_nothing_is_said(memory, version, pages, caplog):
    """Who doesn't checkpoint harms nobody, nor who is fixed."""
    pretend(memory, version)
    memory.execute(f"PRAGMA wal_autocheckpoint={pages}")
    push_on(memory, "mail", b"x")
    assert not caplog.records


@pytest.mark.usefixtures("untold")
def test_a_fixed_library_is_asked_once(memory):
    """Afterwards a push is one statement."""
    pretend(memory, "3.51.3")
    push_on(memory, "mail", b"x")
    traced = []
    if isinstance(memory, apsw.Connection):
        memory.exec_trace = lambda _, sql, __: traced.append(sql) or True
    else:
        memory.set_trace_callback(traced.append)
    push_on(memory, "mail", b"x")
    assert len(traced) == 1


@pytest.mark.usefixtures("untold")
def test_a_connection_that_forbids_pragmas_can_push(memory):
    """The advice is a courtesy; the push is to be judged by itself."""
    pretend(memory, "3.40.1")

    def authorize(action, *_):
        return apsw.SQLITE_DENY if action == apsw.SQLITE_PRAGMA else apsw.SQLITE_OK

    if isinstance(memory, apsw.Connection):
        memory.authorizer = authorize
    else:
        memory.set_authorizer(authorize)
    assert push_on(memory, "mail", b"x") == 1


# -- every library, in a process of its own

# begin() begins a transaction with a row of the application's own; pushes go to `driver()`.
APPLICATION = """
import sqlite3
from contextlib import closing

class Apsw:
    def __init__(self, path, vfs=None):
        import apsw
        self.connection = self.open(apsw, path, vfs)
        self.connection.set_busy_timeout(60_000)
        self.explicit = True

    def open(self, apsw, path, vfs):
        return apsw.Connection(path, vfs=vfs)

    def insert(self, n):
        if self.explicit:
            self.connection.execute("BEGIN")
        self.connection.execute("INSERT INTO orders VALUES (?)", (n,))

    def push(self, n, **options):
        return sqlspace.push_on(self.connection, "mail", b"%d" % n, **options)

    def commit(self):
        self.connection.execute("COMMIT")

    def rollback(self):
        self.connection.execute("ROLLBACK")

    def close(self):
        self.connection.close()

class Explicit(Apsw):
    options = {"isolation_level": None}

    def __init__(self, path):
        self.connection = sqlite3.connect(path, timeout=60, **self.options)
        self.connection.execute("PRAGMA wal_autocheckpoint=0")
        self.explicit = True

class Implicit(Explicit):
    options = {}

    def __init__(self, path):
        super().__init__(path)
        self.explicit = False

    def commit(self):
        self.connection.commit()

    def rollback(self):
        self.connection.rollback()

class NoAutocommit(Implicit):
    def __init__(self, path):
        super().__init__(path)
        self.connection.autocommit = False

class SQLAlchemy:
    def __init__(self, path):
        import sqlalchemy
        self.text = sqlalchemy.text
        self.engine = sqlalchemy.create_engine(
            f"sqlite:///{path}", connect_args={"timeout": 60}
        )
        self.connection = self.engine.connect()
        self.connection.exec_driver_sql("PRAGMA wal_autocheckpoint=0")
        self.connection.commit()

    def insert(self, n):
        self.connection.execute(self.text("INSERT INTO orders VALUES (:n)"), {"n": n})

    def push(self, n, **options):
        if not self.connection.in_transaction():
            self.connection.begin()  # what the driver does alone, SQLAlchemy would not commit
        driver = self.connection.connection.driver_connection
        return sqlspace.push_on(driver, "mail", b"%d" % n, **options)

    def commit(self):
        self.connection.commit()

    def rollback(self):
        self.connection.rollback()

    def close(self):
        self.connection.close()
        self.engine.dispose()

kinds = {
    "apsw": Apsw,
    "explicit": Explicit,
    "implicit": Implicit,
    "no autocommit": NoAutocommit,
    "SQLAlchemy": SQLAlchemy,
}
"""
KINDS = ["apsw", "explicit", "implicit", "SQLAlchemy"]
if hasattr(sqlite3, "LEGACY_TRANSACTION_CONTROL"):  # Python 3.12
    KINDS.append("no autocommit")

CONSUMER = """
deaf()  # hears of commits, and never looks for no reason
with sqlspace.open(argv[0]) as store:
    thread = threading.Thread(target=lambda: tell("pulled", store.pull("mail", 60).decode()))
    thread.start()
    parked(1)
    tell("waiting")
    thread.join()
"""

APPLY = (
    APPLICATION
    + """
with closing(kinds[argv[1]](argv[0])) as application:
    application.insert(1)
    tell("pushed", application.push(1))
    hear()
    application.rollback()
    tell("rolled back")
    hear()
    application.insert(2)
    tell("pushed", application.push(2, dedupe="two", headers={"a": "b"}, ttl=1000))
    tell("pushed", application.push(22, dedupe="two"))
    hear()
    application.commit()
    tell("committed")
    application.insert(3)
    application.rollback()
"""
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_entry_shares_the_fate_of_the_row_and_wakes_a_consumer(child, path, kind):
    """In whatever mode of whatever library; the consumer waits in another process."""
    consumer = child(CONSUMER, path)
    consumer.expect("waiting")
    application = child(APPLY, path, kind)
    with sqlspace.open(path) as store:
        application.expect("pushed 1")
        assert (store.len("mail"), orders(store)) == (0, [])
        application.tell()
        application.expect("rolled back")
        assert (store.len("mail"), orders(store)) == (0, [])
        application.tell()
        application.expect("pushed 1", "pushed 1")
        assert (store.len("mail"), orders(store)) == (0, [])
        application.tell()
        application.expect("committed")
        consumer.expect("pulled 2")
        consumer.finish()
        application.finish()
        assert (store.len("mail"), orders(store)) == (0, [2])


@pytest.mark.parametrize("kind", KINDS)
def test_on_autocommit_or_not_a_push_alone_is_atomic(child, path, kind):
    """Without a row of the application's own there may be no transaction; commit() is harmless."""
    source = """
with closing(kinds[argv[1]](argv[0])) as application:
    tell(application.push(1))
    if argv[1] not in ("apsw", "explicit"):
        application.commit()
    tell("done")
    hear()
"""
    application = child(APPLICATION + source, path, kind)
    application.expect("1", "done")
    with sqlspace.open(path) as store:
        store.push("mail", b"2")
        assert store.pull_many("mail", 9) == [b"1", b"2"]
    application.tell()
    application.finish()


def test_a_push_wakes_a_waiter_of_the_same_process(store, connection, monkeypatch):
    """With apsw, one process may hold both."""
    monkeypatch.setattr("sqlspace.waiting.LOOK_AGAIN_SECONDS", 10_000.0)
    monkeypatch.setattr("sqlspace.watch.LOOK_AGAIN_SECONDS", 10_000.0)
    pulled = []
    thread = threading.Thread(target=lambda: pulled.append(store.pull("mail", SECONDS)))
    thread.start()
    ready = threading.Event()
    while "mail" not in store._database.bell.tokens():
        ready.wait(0.001)
    with connection:
        connection.execute("INSERT INTO orders VALUES (1)")
        push_on(connection, "mail", b"1")
    thread.join(SECONDS)
    assert pulled == [b"1"]


# -- kill -9

# Each worker is a fork of a process without connections, so a death costs a millisecond.
AT_EACH_STEP = (
    APPLICATION
    + """
import apsw, itertools

class File(apsw.VFSFile):
    def __init__(self, name, flags):
        super().__init__("", name, flags)

    def xWrite(self, data, offset):
        if not step():
            super().xWrite(data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        super().xWrite(data, offset)

    def xSync(self, flags):
        if not step():
            os.kill(os.getpid(), signal.SIGKILL)
        super().xSync(flags)

class Killing(apsw.VFS):
    def __init__(self):
        super().__init__("killing", "")

    def xOpen(self, name, flags):
        return File(name, flags)

left = None

def step():
    global left
    if left is not None:
        left -= 1
    return left is None or left >= 0

def work(n):
    global left
    vfs = Killing()
    application = Apsw(argv[0], "killing")
    application.connection.execute("PRAGMA synchronous=FULL")
    left = n
    application.insert(n)
    step() or os.kill(os.getpid(), signal.SIGKILL)  # before push_on
    application.push(n)
    step() or os.kill(os.getpid(), signal.SIGKILL)  # after it
    application.commit()
    os._exit(0)

for n in itertools.count():
    forked = os.fork()
    if not forked:
        work(n)
    if os.waitpid(forked, 0)[1] == 0:
        break
tell(n)
"""
)


def test_a_kill_at_any_step_up_to_the_end_of_the_commit_leaves_both_or_none(child, path):
    """Before push_on, after it, and at each write (half of it done) and sync of the COMMIT."""
    process = child(AT_EACH_STEP, path)
    steps = int(process.told())
    process.finish()
    assert steps > 6  # two around push_on, then header and content of each page, then the sync
    with sqlspace.open(path) as store:
        found = [int(payload) for payload in store.pull_many("mail", steps + 1)]
        assert found == orders(store)
        assert found[-1] == steps
        # Nothing was half a commit until it was a whole one; after the sync it may be one.
        assert set(found) <= {steps - 1, steps}
        assert store._database.read("PRAGMA integrity_check") == [("ok",)]


STORM = (
    APPLICATION
    + """
import random
if argv[1] == "SQLAlchemy":
    import sqlalchemy  # once, and not in each worker
dice = random.Random(int(argv[2]))

def work(n, pipe):
    application = kinds[argv[1]](argv[0])
    while True:
        n += 1
        application.insert(n)
        application.push(n)
        application.commit()
        os.write(pipe, b"%d\\n" % n)

acknowledged = 0
for _ in range(int(argv[3])):
    reading, writing = os.pipe()
    forked = os.fork()
    if not forked:
        os.close(reading)
        work(acknowledged + 1, writing)  # leaves out the one that may be there or not
    os.close(writing)
    with open(reading) as lines:
        for _ in range(dice.randrange(1, 12)):
            acknowledged = int(lines.readline())
        for _ in range(int(dice.expovariate(1 / 4000))):
            pass
        os.kill(forked, signal.SIGKILL)
        assert os.waitpid(forked, 0)[1] == signal.SIGKILL
        for line in lines:
            acknowledged = int(line)
    tell(acknowledged)
"""
)


@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_random_moments_leave_both_or_none(child, path, kind):
    """For every n; and what was acknowledged before the kill is there."""
    seed, kills = random.randrange(1 << 32), 100
    print("seed", seed)
    process = child(STORM, path, kind, seed, kills)
    acknowledged = [int(process.told()) for _ in range(kills)]
    process.finish()
    with sqlspace.open(path) as store:
        pushed = [int(payload) for payload in store.pull_many("mail", acknowledged[-1] + kills)]
        assert pushed == sorted(set(pushed))
        assert pushed == orders(store)
        assert set(acknowledged) <= set(pushed)
        # Each death leaves one n undecided; all others that were begun were acknowledged.
        undecided = {n + 1 for n in acknowledged}
        assert set(range(2, acknowledged[-1] + 1)) - undecided <= set(pushed)
        assert store._database.read("PRAGMA integrity_check") == [("ok",)]
