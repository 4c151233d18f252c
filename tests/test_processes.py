"""Many processes, one file: nothing lost, nothing twice, in order; forks and pickles."""

import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import threading
import traceback

import apsw
import pytest
import workers
from children import PATIENCE_SECONDS, eventually, parked

import sqlspace
from sqlspace import connection, identity, watch

ENTRIES = 20_000


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


def ensure_sound(path):
    connection = apsw.Connection(path, apsw.SQLITE_OPEN_READONLY)
    try:
        assert connection.pragma("integrity_check") == "ok"
    finally:
        connection.close()


@contextlib.contextmanager
def running(processes):
    """Started; at the end all have ended well, or are killed and the test fails."""
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join(PATIENCE_SECONDS)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_every_entry_goes_to_one_consumer_in_order(path, tmp_path, method):
    """4 producers, 4 consumers, 3 keys: each entry once, FIFO by key, and by producer in each."""
    context = multiprocessing.get_context(method)
    ended = context.Event()
    logs = [tmp_path / f"log-{n}" for n in range(workers.CONSUMERS)]
    with sqlspace.open(path, sync=False, history=None) as store:
        producers = [
            context.Process(
                target=workers.produce, args=(store, n, ENTRIES // workers.PRODUCERS), daemon=True
            )
            for n in range(workers.PRODUCERS)
        ]
        consumers = [
            context.Process(target=workers.consume, args=(store, n, log, ended), daemon=True)
            for n, log in enumerate(logs)
        ]
        with running(consumers):
            with running(producers):
                pass
            ended.set()
        assert store.keys() == []
        tombstones = {key: list(store.history(key)) for key in workers.KEYS}
    ensure_sound(path)

    assert sum(map(len, tombstones.values())) == ENTRIES
    for taken in tombstones.values():
        seqs = [tombstone.seq for tombstone in taken]
        assert seqs == sorted(seqs), "the order of taking is the order of the places"
    logged = [read(log) for log in logs]
    for key in workers.KEYS:
        everything = []
        for taken in logged:
            mine = [(producer, n) for _, _, name, producer, n in taken if name == key]
            everything += mine
            for each in range(workers.PRODUCERS):
                numbers = [n for producer, n in mine if producer == each]
                assert numbers == sorted(numbers), "of one producer, in the order of its pushes"
        assert len(everything) == len(tombstones[key])
        for each in range(workers.PRODUCERS):
            numbers = sorted(n for producer, n in everything if producer == each)
            assert numbers == list(range(len(numbers))), "each once, none missing"
        # Over all consumers: who ended before another began had the earlier entry.
        for each in range(workers.PRODUCERS):
            spans = sorted(
                (n, began, done)
                for taken in logged
                for began, done, name, producer, n in taken
                if (name, producer) == (key, each)
            )
            latest = 0
            for _, began, done in spans:
                assert done >= latest, (
                    "a later entry was handed out before an earlier was asked for"
                )
                latest = max(latest, began)


def read(log):
    """What a consumer logged: began, done, key, producer, number."""
    lines = log.read_text(encoding="ascii").splitlines()
    return [
        (int(began), int(done), key, int(producer), int(n))
        for began, done, key, producer, n in map(str.split, lines)
    ]


# -- forks


def in_child(step):
    """Fork; the child runs `step` and ends with 0 if that returns. Its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            step()
            code = 0
        except BaseException:  # the parent sees the code, a person the trace
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def ended_with(pid):
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def hear(descriptor):
    assert os.read(descriptor, 1) == b"!", "the other side ended early"


def tell(descriptor):
    os.write(descriptor, b"!")


@pytest.fixture
def pipes():
    """Two pipes: to the child and back."""
    made = os.pipe() + os.pipe()
    yield made
    for descriptor in made:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_parent_and_child_go_on_after_a_fork(path):
    """Both push and pull on: every acknowledged push is there once, every pulled entry is gone."""
    with sqlspace.open(path, sync=False, history=None) as store:
        store.push_many("before", [b"%d" % n for n in range(100)])

        def work(name):
            for n in range(300):
                store.push("k", b"%s %d" % (name, n))
                if n % 3 == 0:
                    assert store.pull("before", 0 if n % 2 else PATIENCE_SECONDS).isdigit()
                    if n >= 147:
                        return

        pid = in_child(lambda: work(b"child"))
        work(b"parent")
        assert ended_with(pid) == 0
        found = [entry.payload.split() for entry in store.entries("k")]
        for name in (b"child", b"parent"):
            numbers = [int(n) for who, n in found if who == name]
            assert numbers == list(range(148))
        assert store.len("before") == 0
        assert len(list(store.history("before"))) == 100
    ensure_sound(path)


LOCKED = """
store = sqlspace.open(argv[0], sync=False)
store.push("k", b"parent")
pid = os.fork()
if pid:
    tell(pid)
    hear()
    if argv[3] == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    store.close()
    hear()
else:
    to, back = os.open(argv[1], os.O_RDONLY), os.open(argv[2], os.O_WRONLY)
    n = 0
    while os.read(to, 1):
        store.push("k", b"child %d" % n)
        n += 1
        os.write(back, b"!")
    os._exit(0)
"""


@pytest.mark.parametrize("end", ["closes", "is killed"])
def test_a_forked_child_is_safe_when_its_parent_ends(path, tmp_path, child, end):
    """Its lock is its own, so the parent's end neither takes its -wal away nor its pushes."""
    to, back = str(tmp_path / "to"), str(tmp_path / "back")
    os.mkfifo(to)
    os.mkfifo(back)
    parent = child(LOCKED, path, to, back, end)
    pid = int(parent.told())
    teller, hearer = os.open(to, os.O_WRONLY), os.open(back, os.O_RDONLY)
    try:
        acknowledged = 0

        def push():
            nonlocal acknowledged
            tell(teller)
            hear(hearer)
            acknowledged += 1

        for _ in range(10):
            push()
        assert holds_posix_lock(pid, path), "the child's lock is real"
        parent.tell("end")
        eventually(lambda: not holds_posix_lock(parent.pid, path), "the parent's end")
        for _ in range(30):
            push()
        assert holds_posix_lock(pid, path)
        # Somebody else opens, looks, and closes: as the last one to close it would cut the -wal.
        with sqlspace.open(path) as store:
            assert store.len("k") == 1 + acknowledged
            store.push("k", b"from outside")
        for _ in range(10):
            push()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not holds_posix_lock(pid, path), "the child's end")
    finally:
        os.close(teller)
        os.close(hearer)
    with sqlspace.open(path) as store:
        found = [entry.payload for entry in store.entries("k")]
    assert [each for each in found if each.startswith(b"child")] == [
        b"child %d" % n for n in range(acknowledged)
    ]
    assert len(found) == acknowledged + 2
    ensure_sound(path)
    if end == "closes":
        parent.tell("end")
        parent.finish()


INTERRUPTED_FORKS = """
import itertools, os, sys
from interrupts import every_step, interrupted
from sqlspace.connection import holds_lock

sys.unraisablehook = [].append  # all that becomes of it, for it strikes in a hook
me = os.getpid()
store, other = sqlspace.open(argv[0]), sqlspace.open(argv[0])
pushed = 0
for steps in itertools.islice(every_step(int(argv[1])), int(argv[2]), None, 24):
    store.push("k", b"parent")
    other.peek("k")
    _, further = interrupted(os.fork, *steps)
    if os.getpid() != me:
        store.push("k", b"child")
        other.push("k", b"child")
        os._exit(0 if holds_lock(argv[0]) else 3)
    _, status = os.wait()
    assert status == 0, (steps, os.waitstatus_to_exitcode(status))
    other.push("k", b"parent")
    pushed += 4
    if not further:
        break
assert store.len("k") == pushed
store.close()
other.close()
tell(steps[0] > 100)
"""


@pytest.mark.parametrize(("gap", "first"), [(1, 0), (1, 8), (20, 16)])
def test_ctrl_c_in_the_moment_of_a_fork_leaves_both_a_store_of_their_own(path, child, gap, first):
    """It reaches parent and child at once; what a fork has to do is done all the same."""
    parent = child(INTERRUPTED_FORKS, path, gap, first)
    parent.expect("True")
    parent.finish()


def holds_posix_lock(pid, path):
    inode = os.stat(path).st_ino
    with open("/proc/locks", encoding="ascii") as file:
        for line in file:
            fields = line.split()
            if "POSIX" in fields and str(pid) in fields and f":{inode} " in line:
                return True
    return False


def test_a_child_that_closes_takes_nothing_from_its_parent(path):
    """A child that uses the store or not, and closes it or not, leaves the parent's -wal alone."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"0")
        steps = [
            lambda: None,
            store.close,
            lambda: store.push("child", b"x"),
            lambda: (store.push("child", b"x"), store.close()),
            lambda: (store.compact(), store.close()),
        ]
        for number, step in enumerate(steps, 1):
            assert ended_with(in_child(step)) == 0
            assert os.path.exists(f"{path}-wal")
            assert store.push("k", b"%d" % number)
            assert holds_posix_lock(os.getpid(), path)
        found = []
        pid = in_child(lambda: found.extend(store.entries("k")) or check(len(found) == 6))
        assert ended_with(pid) == 0
        assert [entry.payload for entry in store.entries("k")] == [b"%d" % n for n in range(6)]
        assert store.len("child") == 2
    ensure_sound(path)


def check(condition):
    assert condition


def test_grandchildren_and_brothers_work_too(path):
    """A fork of a fork, before and after the store was used there."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"parent")

        def child(name, depth):
            if depth % 2:
                store.push("k", name)
            if depth < 3:
                pids = [in_child(lambda n=n: child(name + b"%d" % n, depth + 1)) for n in range(2)]
                store.push("k", name + b"!")
                assert [ended_with(pid) for pid in pids] == [0, 0]

        child(b"-", 0)
        found = sorted(entry.payload for entry in store.entries("k"))
        firsts = [b"-", *(b"-" + a for a in (b"0", b"1"))]
        seconds = [b"-" + a + b for a in (b"0", b"1") for b in (b"0", b"1")]
        thirds = [name + c for name in seconds for c in (b"0", b"1")]
        expected = [b"parent", *(name + b"!" for name in firsts + seconds), *firsts[1:], *thirds]
        assert found == sorted(expected)
    ensure_sound(path)


def test_a_fork_while_other_threads_are_inside_verbs_does_not_lock_up(path):
    """Whatever the other threads are doing, the child's first verb works, and so do theirs."""
    with sqlspace.open(path, sync=False) as store, sqlspace.open(path, sync=False) as second:
        store.push("k", b"x")
        over = threading.Event()
        pushed = [0] * 4
        errors = []

        def work(n):
            try:
                mine = (store, second)[n % 2]
                while not over.is_set():
                    mine.push(f"key-{n}", b"x")
                    pushed[n] += 1
                    mine.len(f"key-{n}")
                    if n == 3:
                        with sqlspace.open(path, sync=False) as other:
                            other.peek("k")
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        try:
            for number in range(25):
                pid = in_child(
                    lambda number=number: (
                        store.push("child", b"%d" % number),
                        second.push("child", b"%d" % number),
                        store.len("child"),
                    )
                )
                assert ended_with(pid) == 0
        finally:
            over.set()
            for thread in threads:
                thread.join(PATIENCE_SECONDS)
        assert not errors
        assert [store.len(f"key-{n}") for n in range(4)] == pushed
        found = [int(entry.payload) for entry in store.entries("child")]
        assert found == [number for number in range(25) for _ in range(2)]
    ensure_sound(path)


def test_a_fork_beside_waiting_threads_leaves_them_waiting(path):
    """The parent's waiters go on; the child has none, waits by itself, and each wakes the other."""
    with sqlspace.open(path, sync=False) as store:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(store.pull("to parent"))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        parked(3)

        def child():
            parked(0)
            store.push_many("to parent", [b"1", b"2"])
            assert store.pull("to child", PATIENCE_SECONDS) == b"for the child"
            # Several threads of the child wait, too.
            got = []
            waiting = [
                threading.Thread(target=lambda: got.append(store.pull("to child")))
                for _ in range(3)
            ]
            for thread in waiting:
                thread.start()
            parked(3)
            store.push("to parent", b"3")
            for thread in waiting:
                thread.join(PATIENCE_SECONDS)
            assert got == [b"x"] * 3
            store.close()

        pid = in_child(child)
        eventually(lambda: len(found) == 2, "the parent's waiters")
        store.push("to child", b"for the child")
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert sorted(found) == [b"1", b"2", b"3"]
        store.push_many("to child", [b"x"] * 3)
        assert ended_with(pid) == 0
        assert store.keys() == []


def test_a_fork_while_the_turnstile_is_waited_for_keeps_no_lock(path, child):
    """The parent's helper waits in flock as it forks; parent, child and others get in later."""
    holder = child(
        """
        store = sqlspace.open(argv[0], sync=False)
        turnstile = store._database._session.turnstile
        assert turnstile.wait()
        tell("inside")
        hear()
        turnstile.leave()
        store.close()
        """,
        path,
    )
    holder.expect("inside")
    with sqlspace.open(path, sync=False, busy_timeout=0.1) as store:
        with pytest.raises(sqlspace.BusyError):
            store.push("k", b"x")

        def in_the_child():
            with pytest.raises(sqlspace.BusyError):
                store.push("k", b"x")

        assert ended_with(in_child(in_the_child)) == 0
        holder.tell("leave")
        holder.finish()
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"parent")
        assert ended_with(in_child(lambda: store.push("k", b"child"))) == 0
        store.push("k", b"parent again")
        assert store.len("k") == 3


def test_an_inherited_connection_of_the_application_is_refused(path, child):
    """Where the child inherits another connection, its locks are not real, and it says so."""
    forking = child(
        """
        import apsw
        store = sqlspace.open(argv[0], sync=False)
        store.push("k", b"parent")
        other = apsw.Connection(argv[0])
        other.execute("SELECT count(*) FROM sqlspace_entries").fetchall()
        pid = os.fork()
        if pid == 0:
            for verb in (lambda: store.push("k", b"child"), lambda: store.pullp("k"),
                         lambda: store.len("k")):
                try:
                    verb()
                except sqlspace.StoreError as error:
                    if "fork" not in str(error):
                        os._exit(3)
                else:
                    os._exit(4)
            os._exit(0)
        tell(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        store.push("k", b"parent")
        tell(store.len("k"))
        other.close()
        store.push("k", b"parent")
        store.close()
        """,
        path,
    )
    forking.expect("0", "2")
    forking.finish()
    with sqlspace.open(path) as store:
        assert [entry.payload for entry in store.entries("k")] == [b"parent"] * 3
    ensure_sound(path)


def test_a_list_of_locks_that_misses_ours_once_is_read_again(path, monkeypatch):
    """The system's list is torn while others lock and unlock; only one that never has it counts."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"x")
        whole, looks = connection._is_listed, []
        listed = lambda inode: len(looks) > 3 and whole(inode)  # noqa: E731
        monkeypatch.setattr(connection, "_is_listed", lambda i: (looks.append(i), listed(i))[1])
        assert connection.holds_lock(path)
        monkeypatch.setattr(connection, "_is_listed", lambda _: False)
        assert not connection.holds_lock(path)


def test_a_closed_store_stays_closed_in_the_child(path):
    """A fork doesn't open what was closed."""
    store = sqlspace.open(path, sync=False)
    store.close()

    def child():
        with pytest.raises(sqlspace.ClosedError):
            store.push("k", b"x")
        store.close()

    assert ended_with(in_child(child)) == 0


def test_a_store_opened_in_the_child_is_nothing_to_the_parent(path):
    """Without a store before the fork there is nothing to inherit."""

    def child():
        with sqlspace.open(path, sync=False) as store:
            store.push("k", b"child")

    assert ended_with(in_child(child)) == 0
    with sqlspace.open(path, sync=False) as store:
        assert store.pullp("k") == b"child"


def test_no_descriptor_of_the_parent_stays_open_in_the_child(path):
    """The child gives back all that it inherited, whatever it is; what others have open stays."""
    forget_the_process()
    before = descriptors()
    with sqlspace.open(path, sync=False) as store, sqlspace.open(path, sync=False) as second:
        second.push("k", b"x")
        assert store.len("k") == 1
        with pytest.raises(sqlspace.DeadlineError):
            store.pull("empty", 0.01)
        ours = descriptors() - before
        kinds = {link.rpartition("queue.db")[2].partition("[")[0] for _, link in ours}
        assert {"", "-wal", "-shm", "anon_inode:inotify", "socket:", "pipe:"} <= kinds

        def child():
            assert ours & descriptors() == set()

        assert ended_with(in_child(child)) == 0


def forget_the_process():
    """Let go what all stores of the process share, so that the next one opens it anew."""
    watch.forget()
    identity.forget()


def descriptors():
    """All that are open in this process, each with what it leads to."""
    found = set()
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add((each, os.readlink(f"/proc/self/fd/{each}")))
    return found


# -- pickling


OPTIONS = {
    "sync": False,
    "history": 17,
    "embed": True,
    "mode": 0o640,
    "busy_timeout": 1.5,
    "allow_network": True,
    "vfs": "unix",
}


def test_a_pickled_store_keeps_all_its_options(path):
    """`spawn` sends a store by pickle: path and options arrive, one by one."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with sqlspace.open(path, **OPTIONS) as store:
        options = store._database.options
        known = {name: getattr(options, name) for name in type(options).__slots__}
        assert OPTIONS.items() <= known.items()
        with running([context.Process(target=workers.report_options, args=(store, queue))]):
            found = queue.get(timeout=PATIENCE_SECONDS)
    queue.close()
    queue.join_thread()
    assert found == known


def test_a_pickled_store_opens_the_same_file(path, tmp_path, monkeypatch):
    """Also when the working directory is another, and several times over."""
    context = multiprocessing.get_context("spawn")
    monkeypatch.chdir(tmp_path)
    with sqlspace.open("queue.db", sync=False) as store:
        monkeypatch.chdir("/")
        args = [(store, "k", b"%d" % n) for n in range(3)]
        with running([context.Process(target=workers.push_one, args=each) for each in args]):
            pass
        assert sorted(entry.payload for entry in store.entries("k")) == [b"0", b"1", b"2"]


def test_a_copy_in_the_same_process_is_a_store_of_its_own(path):
    """Pickling and copying make another Store on the file; closing one leaves the other open."""
    with sqlspace.open(path, sync=False) as store:
        for another in (pickle.loads(pickle.dumps(store)), copy.copy(store), copy.deepcopy(store)):
            assert another is not store
            another.push("k", b"x")
            another.close()
            assert store.pullp("k") == b"x"


def test_a_closed_store_that_is_pickled_opens_where_it_is_unpickled(path):
    """A pickle is path and options, not a state: so a closed one opens, as an open one does."""
    store = sqlspace.open(path, sync=False)
    store.push("k", b"x")
    store.close()
    with pickle.loads(pickle.dumps(store)) as opened:
        assert opened.pullp("k") == b"x"
    with pytest.raises(sqlspace.ClosedError):
        store.push("k", b"x")
