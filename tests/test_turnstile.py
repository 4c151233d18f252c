"""Writers of all processes go through one by one, in order; nobody waits beyond busy_timeout."""

import fcntl
import itertools
import os
import signal
import threading
import time

import apsw
import pytest
from children import PATIENCE_SECONDS, eventually

import sqlspace
from sqlspace import identity
from sqlspace.errors import BusyError
from sqlspace.marks import PRESENT_AT, QUEUED_AT, Marks
from sqlspace.turnstile import Turnstile


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def gate(tmp_path):
    """Make turnstiles on descriptors of their own of one file, as processes have them."""
    name = tmp_path / "gate"
    name.touch()
    made = []

    def make():
        descriptor = os.open(name, os.O_RDONLY)
        made.append((Turnstile(descriptor, Marks(descriptor)), descriptor))
        return made[-1][0]

    yield make
    for turnstile, descriptor in made:
        turnstile.leave()
        turnstile.close()
        os.close(descriptor)


def soon():
    return time.monotonic() + PATIENCE_SECONDS


def is_free(turnstile):
    """Whether another descriptor could go in now."""
    descriptor = os.open(f"/proc/self/fd/{turnstile._descriptor}", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


# -- the turnstile by itself


def test_one_is_inside_at_a_time(gate):
    """Who is inside keeps the others out until it leaves; then the next one goes in."""
    first, second = gate(), gate()
    assert first.try_enter()
    assert not second.try_enter()
    second.leave()
    assert not is_free(first), "who is outside can't let the one inside go"
    first.leave()
    assert second.try_enter()
    assert not is_free(second)
    second.leave()
    assert is_free(second)


def test_who_waits_is_let_in_when_the_other_leaves(gate):
    """A wait ends inside."""
    first, second = gate(), gate()
    assert first.try_enter()
    inside = []
    thread = threading.Thread(target=lambda: inside.append(second.wait()))
    thread.start()
    eventually(lambda: is_blocked(first._descriptor), "the wait")
    assert not inside
    assert first._marks.find(Marks.ask(QUEUED_AT, 1)) is not None, "or it would be overtaken"
    first.leave()
    thread.join(PATIENCE_SECONDS)
    assert inside == [True]
    assert not is_free(second)


def test_who_comes_back_does_not_overtake_those_who_wait(gate):
    """The lock is free for a moment while the kernel wakes the next: it is not to be had then."""
    first, second, third = gate(), gate(), gate()
    assert first.try_enter()
    third._marks.hold(QUEUED_AT)
    first.leave()
    assert is_free(first)
    assert not first.try_enter()
    assert not second.try_enter()
    third._marks.drop(QUEUED_AT)
    assert second.try_enter()


def test_who_got_in_stands_in_nobodys_way_any_more(gate):
    """The mark of a wait is dropped when it ends."""
    first, second = gate(), gate()
    assert first.wait()
    first.leave()
    assert second.try_enter()


def test_without_a_wal_everybody_passes():
    """Where there is no real -wal, SQLite's own lock is all there is."""
    turnstile = Turnstile(None, Marks(None))
    assert turnstile.try_enter()
    assert turnstile.try_enter()
    turnstile.leave()
    turnstile.close()


def test_a_wait_that_outlives_the_turnstile_keeps_no_lock(tmp_path):
    """The lock that it gets after the close goes with the descriptor."""
    name = tmp_path / "gate"
    name.touch()
    holder = os.open(name, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    descriptor = os.open(name, os.O_RDONLY)
    turnstile = Turnstile(descriptor, Marks(descriptor))
    entered = []
    thread = threading.Thread(target=lambda: entered.append(turnstile.wait()))
    thread.start()
    eventually(lambda: is_blocked(holder), "the wait")
    turnstile.close()
    os.close(descriptor)
    os.close(holder)
    thread.join(PATIENCE_SECONDS)
    assert entered == [False]
    assert not turnstile.wait()
    other = os.open(name, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def is_blocked(descriptor):
    """Whether somebody waits in flock for the file."""
    inode = f":{os.fstat(descriptor).st_ino} "
    with open("/proc/locks", encoding="ascii") as file:
        return any("->" in line and "FLOCK" in line and inode in line for line in file)


# -- stores


@pytest.fixture
def turns(monkeypatch):
    """What flock is asked for."""
    asked = []
    flock = fcntl.flock

    def ask(descriptor, operation):
        asked.append(operation)
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", ask)
    return asked


def test_who_has_the_store_to_itself_takes_no_turns(path, turns):
    """Nobody is there to be kept out; SQLite's own lock is taken all the same."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"1")
        assert store.pull("k") == b"1"
        assert turns == []


def test_who_comes_is_noticed_before_the_next_write(path, turns, child):
    """As soon as an open has returned, in whatever process, every write there takes its turn."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"1")
        other = child("store = sqlspace.open(argv[0])\ntell('open')\nhear()\nstore.close()", path)
        other.expect("open")
        assert turns == []
        store.push("k", b"2")
        assert turns == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN]
        other.tell("close")
        other.finish()
        with sqlspace.open(path, sync=False) as second:  # in this process, too
            turns.clear()
            store.push("k", b"3")
            second.push("k", b"4")
            assert len(turns) == 4
        assert store.pull_many("k", 5) == [b"1", b"2", b"3", b"4"]


def test_who_comes_is_noticed_though_it_was_looked_for_a_moment_too_soon(path, turns, monkeypatch):
    """An open announces itself once it can be seen, and not only by opening the files before."""
    with sqlspace.open(path, sync=False) as store:
        hold = Marks.hold

        def late(marks, offset):
            if offset == PRESENT_AT:
                store.push("k", b"sees nobody yet")
                assert turns == []
            hold(marks, offset)

        monkeypatch.setattr(Marks, "hold", late)
        with sqlspace.open(path, sync=False):
            store.push("k", b"sees it")
            assert turns == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN]


def test_who_cannot_hear_others_come_takes_turns_from_the_first(path, turns, monkeypatch):
    """Without inotify nobody is sure to be alone."""
    monkeypatch.setattr(identity, "_sentry", None)
    monkeypatch.setattr(identity, "open_inotify", lambda: None)
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"1")
        assert turns == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_UN]


PUSH_ALL_THE_TIME = """
store = sqlspace.open(argv[0], sync={"True": True, "False": False}.get(argv[2], argv[2]))
tell("ready")
hear()
number, ends = 0, time.monotonic() + 2.0
while time.monotonic() < ends:
    store.push(argv[1], b"%d" % number)
    number += 1
tell(number)
store.close()
"""


@pytest.mark.parametrize("sync", [True, False, "group"])
def test_processes_that_push_as_fast_as_they_can_share_fairly(path, child, sync):
    """Of 8 processes none starves, and none sees an error."""
    pushers = [child(PUSH_ALL_THE_TIME, path, f"key-{n}", sync) for n in range(8)]
    for pusher in pushers:
        pusher.expect("ready")
    for pusher in pushers:
        pusher.tell("go")
    pushed = [int(pusher.told()) for pusher in pushers]
    for pusher in pushers:
        pusher.finish()
    with sqlspace.open(path) as store:
        assert [store.len(f"key-{n}") for n in range(8)] == pushed
    assert min(pushed) >= 0.5 * max(pushed), f"unfair: {pushed}"


FREEZE = {
    "in the turnstile": """
        store = sqlspace.open(argv[0])
        store.push("k", b"before")
        store._database._session.turnstile.wait()
        tell("inside")
        hear()
        store._database._session.turnstile.leave()
        store.close()
        """,
    "in SQLite's lock": """
        import apsw
        other = apsw.Connection(argv[0])
        other.execute("BEGIN IMMEDIATE")
        tell("inside")
        hear()
        other.execute("ROLLBACK")
        other.close()
        """,
    "inside its own commit": """
        store = sqlspace.open(argv[0], sync=False)
        def freeze(connection):
            tell("inside")
            hear()
            return ()
        store._database.transact(freeze)
        store.close()
        """,
}


@pytest.mark.parametrize("end", ["CONT", "KILL"])
@pytest.mark.parametrize("where", FREEZE)
def test_a_frozen_writer_blocks_nobody_beyond_busy_timeout(path, child, where, end):
    """Ctrl-Z inside a commit: the others get BusyError, nothing changed; afterwards all goes on."""
    with sqlspace.open(path, busy_timeout=0.2) as store:
        store.push("k", b"first")
        store.push("work", b"x")
        delivery = store.claim("work")
        frozen = child(FREEZE[where], path)
        frozen.expect("inside")
        frozen.stop()
        seqs = [entry.seq for entry in store.entries("k")]
        for verb in (
            lambda: store.push("k", b"x"),
            lambda: store.push_many("k", [b"x", b"y"]),
            lambda: store.put("k", b"x"),
            lambda: store.pull("k"),
            lambda: store.pullp("k"),
            lambda: store.pull_many("k", 2),
            lambda: store.clear("k"),
            lambda: store.remove("k", seqs[0]),
            lambda: store.claim("k"),
            lambda: store.claimp("k"),
            lambda: store.claim_many("k", 2),
            delivery.ack,
            delivery.nack,
            lambda: delivery.extend(60),
            lambda: store.transaction().__enter__(),
            store.compact,
        ):
            with pytest.raises(BusyError):
                verb()
        assert store.pullp("nothing there") is None, "to look takes no lock"
        assert store.peek("k") == b"first"
        assert store.len("work") == 1
        assert not delivery.lost
        with sqlspace.open(path, busy_timeout=0.2) as other:  # to open and to close, neither
            assert other.len("k") == len(seqs)
        assert [entry.seq for entry in store.entries("k")] == seqs
        assert list(store.history("k")) == []
        if end == "KILL":
            frozen.kill()
        else:
            frozen.send(signal.SIGCONT)
            frozen.tell("leave")
            frozen.finish()
        assert store.push("k", b"after") > max(seqs)
        assert store.pull("k") == b"first"
        delivery.ack()


BLOCKED = """
store = sqlspace.open(argv[0], busy_timeout=60.0)
assert store.push("other", b"") > 0
tell("ready")
hear()
try:
    tell("pushed", store.push("k", b"x")) if argv[1] == "push" else tell(store.pull("k"))
except KeyboardInterrupt:
    tell("interrupted")
hear()
store.push("k", b"after")
store.close()
tell("done")
"""


@pytest.mark.parametrize("verb", ["push", "pull"])
@pytest.mark.parametrize("lock", ["turnstile", "SQLite"])
def test_ctrl_c_ends_the_wait_for_the_lock_at_once(path, child, lock, verb):
    """A call that waits for the turnstile or for SQLite's lock sees Ctrl-C, and did nothing."""
    with sqlspace.open(path) as store:
        store.push("k", b"first")
        turnstile = store._database._session.turnstile
        blocked = child(BLOCKED, path, verb)
        blocked.expect("ready")
        other = apsw.Connection(path)
        try:
            if lock == "turnstile":
                assert turnstile.wait()
            else:
                other.execute("BEGIN IMMEDIATE")
            blocked.tell("go")
            if lock == "turnstile":
                eventually(lambda: is_blocked(turnstile._descriptor), "the child's wait")
            else:
                eventually(lambda: not is_free(turnstile), "the child's way through the turnstile")
            blocked.send(signal.SIGINT)
            blocked.expect("interrupted")  # while the lock is still held
        finally:
            if lock == "turnstile":
                turnstile.leave()
            else:
                other.execute("ROLLBACK")
            other.close()
        assert [entry.payload for entry in store.entries("k")] == [b"first"]
        assert list(store.history("k")) == []
        blocked.tell("go on")
        blocked.expect("done")
        blocked.finish()
        assert [entry.payload for entry in store.entries("k")] == [b"first", b"after"]


def test_two_stores_of_one_process_take_turns(path):
    """Each store has its own descriptor, so the turnstile keeps them apart as it does processes."""
    with sqlspace.open(path, sync=False) as one, sqlspace.open(path, sync=False) as two:
        push_in_threads([one, two], 2, 200)
        assert one.len("k") == two.len("k") == 800
        assert one._database._session.turnstile.wait()
        threading.Timer(0.05, one._database._session.turnstile.leave).start()
        two.push("k", b"waits its turn")
        assert two.len("k") == 801


def test_threads_share_one_store(path):
    """One store, many threads: each push is there once, in the order of the seqs it got."""
    with sqlspace.open(path, sync=False) as store:
        pushed = push_in_threads([store], 8, 100)
        found = [(entry.seq, entry.payload) for entry in store.entries("k")]
        assert found == sorted(itertools.chain.from_iterable(pushed))
        for seqs in pushed:
            assert seqs == sorted(seqs)


def push_in_threads(stores, threads, number):
    pushed = []

    def push(store, name):
        mine = []
        for n in range(number):
            payload = b"%d %d" % (name, n)
            mine.append((store.push("k", payload), payload))
        pushed.append(mine)

    started = [
        threading.Thread(target=push, args=(store, name))
        for store in stores
        for name in range(threads)
    ]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert len(pushed) == len(started)
    return pushed
