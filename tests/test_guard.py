"""The guard: Python's own sqlite3 stays away from the file of a Store of the same process.

Where it is refused, nothing is opened; where the accident itself is shown, it is in a child.
"""

import contextlib
import gc
import os
import pathlib
import sqlite3
import threading

import pytest

import sqlspace
from sqlspace import guard

REFUSED = "a Store of this process has this file open"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path) as store:
        yield store


def connects(database, **options):
    """Whether sqlite3 may; it must not complain of anything else."""
    try:
        sqlite3.connect(database, **options).close()
    except sqlspace.StoreError as error:
        assert REFUSED in str(error)
        assert "push_on" in str(error)
        return False
    return True


# -- why it is there

NEIGHBOUR = """
import apsw
with sqlspace.open(argv[0]) as store:
    connection = apsw.Connection(store.path)
    tell("open")
    hear()
    try:
        tell("pushed", sqlspace.push_on(connection, "mail", b"theirs"))
    except apsw.BusyError:
        tell("busy")
    connection.close()
    hear()
"""
ACCIDENT = """
import sqlite3
from sqlspace import guard
if argv[1] == "unguarded":
    guard._uninstalled.clear()

def look():
    with_other_library = sqlite3.connect(store.path)
    with_other_library.execute("SELECT count(*) FROM sqlspace_entries").fetchall()
    with_other_library.close()

def step(connection):
    tell("pushed", sqlspace.push_on(connection, "mail", b"ours"))
    try:
        look()
        tell("looked")
    except sqlspace.StoreError:
        tell("refused")
    hear()
    return ()

store = sqlspace.open(argv[0])
store._database.transact(step)
tell(*(bytes(entry.payload).decode() for entry in store.entries("mail")))
os._exit(0)  # without a word more to a file that may be broken
"""


@pytest.mark.parametrize("guarded", [False, True])
def test_a_look_with_another_library_loses_acknowledged_pushes_unless_it_is_refused(
    child, path, guarded
):
    """Its close drops the Store's lock in the middle of a write: two write the same place.

    Unguarded, both pushes are acknowledged, with one and the same seq, and the neighbour's is gone.
    Guarded, the neighbour can't write meanwhile, and knows it.
    """
    sqlspace.open(path).close()
    neighbour = child(NEIGHBOUR, path)
    neighbour.expect("open")
    process = child(ACCIDENT, path, "guarded" if guarded else "unguarded")
    process.expect("pushed 1", "refused" if guarded else "looked")
    neighbour.tell()
    neighbour.expect("busy" if guarded else "pushed 1")
    process.tell()
    process.expect("ours")
    process.finish()
    neighbour.kill()


# -- what is refused

SPELLINGS = {
    "str": lambda path: path,
    "bytes": os.fsencode,
    "PathLike": pathlib.Path,
    "relative": os.path.relpath,
    "roundabout": lambda path: os.path.join(
        os.path.dirname(path), ".", "..", *path.split("/")[-2:]
    ),
    "-wal": lambda path: path + "-wal",
    "-shm": lambda path: path + "-shm",
}
URIS = {
    "file:/…": lambda path: f"file:{path}",
    "file:///…": lambda path: f"file://{path}",
    "localhost": lambda path: f"file://localhost{path}",
    "relative": lambda path: f"file:{os.path.relpath(path)}",
    "query": lambda path: f"file:{path}?mode=ro&cache=private",
    "fragment": lambda path: f"file:{path}#part?",
    "nolock": lambda path: f"file:{path}?nolock=1",
    "percent": lambda path: "file:" + "".join(f"%{byte:02x}" for byte in os.fsencode(path)),
    "percent and query": lambda path: f"file:{path.replace('queue', '%71ueue')}?immutable=1",
    "NUL": lambda path: f"file:{path}%00.txt",
    "bytes": lambda path: os.fsencode(f"file:{path}?mode=rw"),
    "-shm": lambda path: f"file:{path}-shm?mode=ro",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_file_is_known_by_whatever_name(store, name):
    """What counts is the file, as the system knows it."""
    assert not connects(SPELLINGS[name](store.path))


@pytest.mark.parametrize("name", URIS)
def test_the_file_is_known_behind_a_uri(store, name):
    """As SQLite reads it: authority, escapes, query and fragment."""
    assert not connects(URIS[name](store.path), uri=True)


def test_the_file_is_known_behind_a_link_and_in_the_working_directory(store, tmp_path, monkeypatch):
    """A symlink is followed; a bare name is one in the directory where the process is."""
    (tmp_path / "link.db").symlink_to(store.path)
    assert not connects(tmp_path / "link.db")
    monkeypatch.chdir(tmp_path)
    assert not connects("queue.db")
    assert not connects("file:queue.db", uri=True)


def test_every_way_to_connect_is_guarded(store):
    """The class itself, and whatever is derived from it."""

    class Derived(sqlite3.Connection):
        pass

    for connect in (sqlite3.Connection, Derived, sqlite3.dbapi2.connect):
        with pytest.raises(sqlspace.StoreError, match=REFUSED):
            connect(store.path)
    assert not connects(store.path, factory=Derived)


def test_a_refusal_leaves_the_store_as_it_is(store):
    """Nothing was opened, so nothing is closed: the locks are there."""
    store.push("mail", b"one")
    for _ in range(3):
        assert not connects(store.path)
    assert sqlspace.connection.holds_lock(store.path)
    assert store.pull("mail", 0) == b"one"


# -- what passes


@pytest.mark.usefixtures("store")
def test_other_databases_pass(tmp_path):
    """Files beside it, missing ones, those in memory: the guard has no business with them."""
    assert connects(tmp_path / "other.db")
    assert connects(tmp_path / "other.db")
    assert connects(os.fsencode(tmp_path / "other.db-wal"))
    assert connects(":memory:")
    assert connects(b":memory:")
    assert connects("")
    assert connects("file::memory:?cache=shared", uri=True)
    assert connects("file:?mode=memory", uri=True)
    assert connects(f"file:{tmp_path}/another%20one.db?mode=rwc", uri=True)


class _Bad:
    def __fspath__(self):
        raise ZeroDivisionError


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("database", "error"),
    [
        (5, TypeError),
        (None, TypeError),
        (_Bad(), ZeroDivisionError),
        ("a\0b", ValueError),
        ("\ud800.db", UnicodeEncodeError),
        ("/nowhere/at/all.db", sqlite3.OperationalError),
    ],
)
def test_what_sqlite3_refuses_it_refuses_itself(database, error):
    """With its own words."""
    with pytest.raises(error):
        sqlite3.connect(database)


def test_a_closed_store_is_guarded_no_more(path):
    """Counted: while one of two is open, the file is in use."""
    one, two = sqlspace.open(path), sqlspace.open(path)
    one.close()
    one.close()
    assert not connects(path)
    two.close()
    assert connects(path)
    with sqlspace.open(path):
        assert not connects(path)
    assert connects(path)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_forgotten_store_is_guarded_no_more(path):
    """Whoever drops it without close gets a ResourceWarning, and not a file refused for ever."""
    store = sqlspace.open(path)
    assert not connects(path)
    del store
    gc.collect()
    assert connects(path)


def test_a_failed_open_guards_nothing(path, monkeypatch):
    """Its connection is closed, so there is nothing to lose."""

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("sqlspace.session.Doorbell", fail)
    with pytest.raises(ZeroDivisionError):
        sqlspace.open(path)
    assert connects(path)


def test_another_file_under_the_name_passes(store, tmp_path):
    """The store is spoiled then; its file is the one that was moved away."""
    os.rename(store.path, tmp_path / "moved.db")
    assert connects(store.path)
    assert not connects(tmp_path / "moved.db")


# -- the process

COUNT_HOOKS = """
hooks = []
sys.addaudithook(lambda event, _: event == "sys.addaudithook" and hooks.append(event))
sqlspace.Local().close()
if argv[1] == "before":
    import sqlite3
tell(len(hooks))
store = sqlspace.open(argv[0])  # one that an import had installed would be missing here
tell(len(hooks))
import sqlite3
tell(len(hooks))
try:
    sqlite3.connect(argv[0])
except sqlspace.StoreError:
    tell("refused")
sqlspace.open(argv[0]).close()
store.close()
sqlspace.open(argv[0]).close()
tell(len(hooks))
"""


@pytest.mark.parametrize(("imported", "counts"), [("before", "0 1 1"), ("after", "0 0 1")])
def test_the_hook_is_installed_once_and_not_before_a_store_is_open_and_sqlite3_is_there(
    child, path, imported, counts
):
    """Hooks can't be removed, and cost each push its share: who has no use for one has none."""
    process = child(COUNT_HOOKS, path, imported)
    process.expect(*counts.split(), "refused", "1")
    process.finish()


WITHOUT_STORES = """
import sqlite3
from sqlspace import guard
sqlspace.open(argv[0]).close()
guard._paths = guard._identify = None  # to look at the path would fail
sqlite3.connect(argv[0]).close()
tell("connected")
sys.audit("another.event", argv[0])
"""


def test_the_guard_looks_at_no_path_while_no_store_is_open(child, path):
    """Others pay for one look at an empty dict."""
    process = child(WITHOUT_STORES, path)
    process.expect("connected")
    process.finish()


FORK = """
import sqlite3
store = sqlspace.open(argv[0])

def connects():
    try:
        sqlite3.connect(argv[0]).close()
    except sqlspace.StoreError:
        return False
    return True

forked = os.fork()
if not forked:
    tell("before", connects())
    store.push("mail", b"child's")
    tell("reopened", connects())
    store.close()
    tell("closed", connects())
    os._exit(0)
assert os.waitpid(forked, 0)[1] == 0
tell("parent", connects())
store.push("mail", b"parent's")
tell(*(payload.decode() for payload in store.pull_many("mail", 9)))
store.close()
"""


def test_a_forked_child_is_guarded_from_when_it_opens_the_store_again(child, path):
    """It has let go the parent's connection; the parent's is guarded all the time."""
    process = child(FORK, path)
    process.expect("before True", "reopened False", "closed True", "parent False")
    process.expect("child's parent's")
    process.finish()


def test_threads_open_close_and_connect_at_will(tmp_path):
    """Each file is guarded just while its own store is open, whatever the others do."""
    rounds, wrong, done = 30, [], []

    def work(number):
        mine = str(tmp_path / f"{number}.db")
        for _ in range(rounds):
            with sqlspace.open(mine):
                if connects(mine):
                    wrong.append("it connected")
            if not connects(mine) or not connects(":memory:"):
                wrong.append("it was refused")
        done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(done) == len(threads)


def test_nothing_is_guarded_when_the_last_store_is_closed(path):
    """No registration is left behind, in the file or in the process."""
    before = dict(guard._guarded)
    with contextlib.closing(sqlspace.open(path)) as store:
        store.keys()
        assert len(guard._guarded) == len(before) + 1
    assert guard._guarded == before
