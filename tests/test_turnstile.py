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
from sqlspace.errors import BusyError, StoreError
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
        made.append((Turnstile(descriptor), descriptor))
        return made[-1][0]

    yield make
    for turnstile, descriptor in made:
        turnstile.leave()
        turnstile.close()
        helper = turnstile._helper
        os.close(descriptor)
        if helper is not None:
            helper.join(PATIENCE_SECONDS)
            assert not helper.is_alive(), "the helper ends with its turnstile"


def soon():
    return time.monotonic() + PATIENCE_SECONDS


def in_a_moment():
    return time.monotonic() + 0.05


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
    first.enter(soon())
    with pytest.raises(BusyError):
        second.enter(in_a_moment())
    second.leave()
    first.leave()
    second.enter(soon())
    assert not is_free(second)
    second.leave()
    assert is_free(second)


def test_a_waiting_writer_is_let_in_when_the_other_leaves(gate):
    """The helper hands over what it got to the thread that waits for it."""
    first, second = gate(), gate()
    first.enter(soon())
    inside = []

    def wait():
        second.enter(soon())
        inside.append(True)
        second.leave()

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: second._pending, "the helper's start")
    assert not inside
    first.leave()
    thread.join(PATIENCE_SECONDS)
    assert inside
    assert is_free(second)


def test_what_comes_too_late_is_given_back(gate):
    """The helper of a writer that gave up lets the lock go as soon as it gets it."""
    first, second, third = gate(), gate(), gate()
    first.enter(soon())
    with pytest.raises(BusyError):
        second.enter(in_a_moment())
    second.leave()
    assert second._pending, "the helper still waits: flock knows no deadline"
    first.leave()
    eventually(lambda: not second._pending, "the helper's return")
    third.enter(soon())
    third.leave()


def test_a_late_helper_serves_the_next_who_waits(gate):
    """A writer that comes while an earlier one's helper still waits gets what that brings."""
    first, second = gate(), gate()
    first.enter(soon())
    for _ in range(3):
        with pytest.raises(BusyError):
            second.enter(in_a_moment())
        second.leave()
    helper = second._helper
    entered = threading.Event()

    def wait():
        second.enter(soon())
        entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: second._wanted, "the second's wait")
    first.leave()
    assert entered.wait(PATIENCE_SECONDS)
    thread.join(PATIENCE_SECONDS)
    assert second._helper is helper, "one helper is enough"
    assert not is_free(second)
    second.leave()
    assert is_free(second)


def test_an_interrupted_wait_leaves_nothing_held(gate, monkeypatch):
    """Ctrl-C anywhere in the wait: the lock isn't kept, and the next writer gets in."""

    class Cut(BaseException):
        pass

    for cut_at in ("acquire", "start"):
        first, second, third = gate(), gate(), gate()
        first.enter(soon())
        real = second._granted

        class Interrupted:
            def acquire(self, *arguments, real=real, **named):
                if named.get("timeout"):
                    raise Cut
                return real.acquire(*arguments, **named)

            def release(self, real=real):
                real.release()

        with monkeypatch.context() as patch:
            if cut_at == "acquire":
                second._granted = Interrupted()
            else:
                patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(Cut))
            with pytest.raises(Cut):
                second.enter(soon())
            second.leave()
        second._granted = real
        first.leave()
        if cut_at == "acquire":
            eventually(lambda second=second: not second._pending, "the helper's return")
        third.enter(soon())
        third.leave()
        first.enter(soon())
        threading.Timer(0.01, first.leave).start()
        second.enter(soon())
        second.leave()
        assert is_free(second)


def test_a_stale_grant_lets_nobody_in(gate):
    """What was handed over to a caller that was interrupted is not taken for the lock later."""
    first, second = gate(), gate()
    second._granted.release()
    first.enter(soon())
    with pytest.raises(BusyError):
        second.enter(in_a_moment())
    second.leave()
    first.leave()


def test_leaving_does_not_let_go_what_the_helper_brings(gate, monkeypatch):
    """A writer that gave up leaves just as the helper got the lock: the next one really has it."""
    first, second = gate(), gate()
    first.enter(soon())
    got, proceed = threading.Event(), threading.Event()
    flock = fcntl.flock

    def slow(descriptor, operation):
        flock(descriptor, operation)
        if threading.current_thread() is second._helper and operation == fcntl.LOCK_EX:
            got.set()
            assert proceed.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(BusyError):
        second.enter(in_a_moment())
    first.leave()
    assert got.wait(PATIENCE_SECONDS)
    second.leave()
    held = []

    def enter():
        second.enter(soon())
        held.append(not is_free(second))

    thread = threading.Thread(target=enter)
    thread.start()
    eventually(lambda: second._wanted, "the second's wait")
    proceed.set()
    thread.join(PATIENCE_SECONDS)
    assert held == [True]
    second.leave()


def test_no_thread_to_wait_with_is_an_error_and_no_hang(gate, monkeypatch):
    """A process at its limit of threads gets a StoreError, and can go on when it has room."""
    first, second = gate(), gate()
    first.enter(soon())

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StoreError):
            second.enter(soon())
        second.leave()
    threading.Timer(0.01, first.leave).start()
    second.enter(soon())
    second.leave()


def test_no_time_means_one_look(gate):
    """With a deadline that is over, a taken lock is busy at once, and no helper is sent."""
    first, second = gate(), gate()
    second.enter(0.0)
    with pytest.raises(BusyError):
        first.enter(0.0)
    assert first._helper is None
    second.leave()


def test_without_a_wal_everybody_passes():
    """Where there is no real -wal, SQLite's own lock is all there is."""
    turnstile = Turnstile(None)
    turnstile.enter(0.0)
    turnstile.leave()
    turnstile.close()
    assert turnstile._helper is None


def test_closing_while_the_helper_waits_frees_the_lock_in_the_end(tmp_path):
    """The lock that a helper gets after the close goes with the descriptor."""
    name = tmp_path / "gate"
    name.touch()
    holder = os.open(name, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    descriptor = os.open(name, os.O_RDONLY)
    turnstile = Turnstile(descriptor)
    with pytest.raises(BusyError):
        turnstile.enter(in_a_moment())
    turnstile.leave()
    helper = turnstile._helper
    eventually(lambda: is_blocked(holder), "the helper's wait")
    turnstile.close()
    os.close(descriptor)
    os.close(holder)
    helper.join(PATIENCE_SECONDS)
    assert not helper.is_alive()
    other = os.open(name, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def is_blocked(descriptor):
    """Whether somebody waits in flock for the file."""
    inode = f":{os.fstat(descriptor).st_ino} "
    with open("/proc/locks", encoding="ascii") as file:
        return any("->" in line and "FLOCK" in line and inode in line for line in file)


# -- stores

PUSH_ALL_THE_TIME = """
store = sqlspace.open(argv[0], sync=argv[2] == "True")
tell("ready")
hear()
number, ends = 0, time.monotonic() + 2.0
while time.monotonic() < ends:
    store.push(argv[1], b"%d" % number)
    number += 1
tell(number)
store.close()
"""


@pytest.mark.parametrize("sync", [True, False])
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
        store._database._session.turnstile.enter(time.monotonic() + 10)
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
            connection.execute("BEGIN IMMEDIATE")
            tell("inside")
            hear()
            connection.execute("ROLLBACK")
            return ()
        store._database.write(freeze)
        store.close()
        """,
}


@pytest.mark.parametrize("end", ["CONT", "KILL"])
@pytest.mark.parametrize("where", FREEZE)
def test_a_frozen_writer_blocks_nobody_beyond_busy_timeout(path, child, where, end):
    """Ctrl-Z inside a commit: the others get BusyError, nothing changed; afterwards all goes on."""
    with sqlspace.open(path, busy_timeout=0.2) as store:
        store.push("k", b"first")
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
            store.compact,
        ):
            with pytest.raises(BusyError):
                verb()
        assert store.pullp("nothing there") is None, "to look takes no lock"
        assert store.peek("k") == b"first"
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
                turnstile.enter(soon())
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
        one._database._session.turnstile.enter(soon())
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
