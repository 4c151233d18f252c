"""A commit wakes those who wait for it, in any process, and nobody else; and a file that moved."""

import os
import signal
import subprocess
import sys
import threading
import time

import apsw
import pytest
from children import PATIENCE_SECONDS, eventually, parked, patient_inotify

import sqlspace
from sqlspace import doorbell, identity, taking, waiting
from sqlspace import watch as watching
from sqlspace.doorbell import Doorbell, room_token
from sqlspace.identity import Identity
from sqlspace.marks import Marks
from sqlspace.waiting import Waiter


@pytest.fixture(autouse=True)
def _ears(monkeypatch):
    """This process has inotify, even if the user's instances were used up when it asked first."""
    for module, name in ((watching, "_watch"), (identity, "_sentry")):
        monkeypatch.setattr(module, "open_inotify", patient_inotify)
        found = getattr(module, name)
        if found is not None and found._inotify is None:
            monkeypatch.setattr(module, name, None)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path, sync=False) as opened:
        yield opened


def is_awaited(store, token):
    """Whether another store than this one waits for the token."""
    bell = store._database.bell
    return bell._marks.find(bell._post(token).question) is not None


def in_threads(number, step):
    """Run `step(n)` in threads; what they returned or raised, when they end."""
    found = []

    def run(n):
        try:
            found.append(step(n))
        except sqlspace.SpaceError as error:
            found.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()

    def join():
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), "a waiter was left asleep"
        return found

    return join


# It hears only what it is told to hear, waits in as many threads as it is told, and says what came.
WAITER = """
deaf(*filter(None, argv[1].split(",")))
store = sqlspace.open(argv[0], sync=False)
looks = []
stirring = store._database.bell.stirring
def look(tokens, timed):
    looks.append(tokens)
    return stirring(tokens, timed)
store._database.bell.stirring = look
def run():
    found = eval(argv[2])
    tell(found if isinstance(found, str) else repr(found))
threads = [threading.Thread(target=run) for _ in range(int(argv[3]))]
for thread in threads:
    thread.start()
parked(len(threads))
tell("parked")
for thread in threads:
    thread.join()
tell("looks" if looks else "no looks")
store.close()
"""
DEAF = {
    "a datagram": ("signs", "no looks"),
    "inotify": ("datagrams", "looks"),
    "data_version": ("datagrams,inotify", "looks"),
}


@pytest.mark.parametrize("by", DEAF)
def test_a_push_wakes_a_waiter_in_another_process(store, path, child, by):
    """Each of the three ways is enough by itself: the other two are off, and nobody polls."""
    off, looks = DEAF[by]
    waiter = child(WAITER, path, off, "store.pull('k')", 1)
    waiter.expect("parked")
    store.push("other", b"not for it")
    store.push("k", b"for it")
    waiter.expect("b'for it'", looks)
    waiter.finish()


@pytest.mark.parametrize("by", ["inotify", "data_version"])
def test_a_foreign_writer_wakes_a_waiter(store, path, child, by):
    """An INSERT through the outbox in another program rings no bell, and yet the waiter wakes."""
    waiter = child(WAITER, path, DEAF[by][0], "store.pull('k')", 1)
    waiter.expect("parked")
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=30);"
        "c.execute('PRAGMA wal_autocheckpoint=0');"
        "c.execute(\"INSERT INTO sqlspace_outbox (key, payload) VALUES ('k', 'from afar')\");"
        "c.commit(); c.close()"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True, timeout=PATIENCE_SECONDS)
    waiter.expect("b'from afar'", "looks")
    waiter.finish()


def test_a_foreign_writer_is_seen_when_its_sign_came_long_before_its_commit(store, path, child):
    """The -wal is written before the commit can be seen: looks go on for a while after the sign."""
    waiter = child(WAITER, path, "datagrams", "store.pull('k')", 1)
    waiter.expect("parked")
    writer = child(
        """
        import apsw
        other = apsw.Connection(argv[0])
        other.pragma("cache_size", 1)
        other.execute("BEGIN IMMEDIATE")
        # It doesn't fit into the cache, so the -wal is written long before the commit.
        insert = "INSERT INTO sqlspace_outbox (key, payload) VALUES (?, ?)"
        for _ in range(200):
            other.execute(insert, ("big", bytes(10_000)))
        other.execute(insert, ("k", b"late"))
        tell(os.path.getsize(argv[0] + "-wal") > 1_000_000)
        hear()
        other.execute("COMMIT")
        other.close()
        """,
        path,
    )
    writer.expect("True")
    writer.tell("commit")
    writer.finish()
    waiter.expect("b'late'", "looks")
    waiter.finish()


def test_a_foreign_writer_is_seen_after_a_long_calm(store, path, monkeypatch):
    """No look is planned any more: only the sign leads to one."""
    monkeypatch.setattr(watching, "_LOOK_ON_SECONDS", 0.01)
    thread = threading.Thread(target=store.pull, args=("k",))
    thread.start()
    files = watching.the_watch()._files
    eventually(
        lambda: any(file.number and file.look_at is None for file in list(files.values())),
        "calm",
    )
    add_quietly(path)
    thread.join(waiting.LOOK_AGAIN_SECONDS / 2)  # sooner than it would look by itself
    assert not thread.is_alive()


@pytest.mark.parametrize("verb", ["store.pull('k')", "store.wait('k')", "store.wait_empty('full')"])
def test_an_idle_waiter_costs_nothing(store, path, child, verb):
    """Once all is calm, waiting threads neither look nor come round, and take no CPU."""
    store.push("full", b"x")
    waiter = child(
        """
        deaf()
        store = sqlspace.open(argv[0], sync=False)
        from sqlspace import watch as watching
        rounds, looks = [], []
        until_look = watching.Watch._until_look
        def counted(watch, ends):
            rounds.append(ends)
            return until_look(watch, ends)
        watching.Watch._until_look = counted
        stirring = store._database.bell.stirring
        store._database.bell.stirring = lambda *words: looks.append(words) or stirring(*words)
        context = sqlspace.Context()
        def run():
            try:
                eval(argv[1].replace(")", ", context=context)"))
            except sqlspace.CanceledError:
                pass
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        parked(8)
        # It looks for a while after it has asked for a sign of change; then all is calm.
        files = watching._watch._files.values()
        eventually(lambda: all(f.number is not None and f.look_at is None for f in files))
        parked(8)
        del rounds[:], looks[:]
        tell("parked")
        hear()
        tell(len(rounds), len(looks))
        context.cancel()
        for thread in threads:
            thread.join()
        store.close()
        """,
        path,
        verb,
    )
    waiter.expect("parked")
    before = waiter.cpu_seconds()
    threading.Event().wait(1.0)  # the bounded time over which idleness is measured
    spent = waiter.cpu_seconds() - before
    waiter.tell("enough")
    rounds, looks = map(int, waiter.told().split())
    waiter.finish()
    assert looks == 0
    assert rounds <= 1, "the watcher may have been on its way into its sleep"
    assert spent <= 0.25


COUNTED_TAKERS = """
deaf(*filter(None, argv[1].split(",")))
store = sqlspace.open(argv[0], sync=False)
takes = []
from sqlspace import taking
take = taking.Grab.run
def counted(*arguments):
    takes.append(arguments)
    return take(*arguments)
def run():
    while store.pull("k") != b"end":
        done.release()
done = threading.Semaphore(0)
threads = [threading.Thread(target=run) for _ in range(16)]
for thread in threads:
    thread.start()
parked(16)
taking.Grab.run = counted
tell("parked")
while (line := hear()) != "end":
    if line == "push":
        store.push("k", b"from within")
    assert done.acquire(timeout=60)
    parked(16)
    number = len(takes)
    del takes[:]
    tell(number)
for thread in threads:
    store.push("k", b"end")
for thread in threads:
    thread.join()
store.close()
"""


@pytest.mark.parametrize("off", ["", "signs"])
def test_one_push_wakes_one_taker(store, path, child, off):
    """Of 16 that wait, one looks, and if it was the watcher its heir: there is no stampede."""
    takers = child(COUNTED_TAKERS, path, off)
    takers.expect("parked")
    looks = []
    for line in ["push", "pushed"] * 8:
        if line == "pushed":
            store.push("k", b"from outside")
        takers.tell(line)
        looks.append(int(takers.told()))
    takers.tell("end")
    takers.finish()
    # The taker's look, and when it comes back for more two, enrolled and not.
    assert sum(looks) >= 16 * 3
    assert sum(looks) <= 16 * 6, f"a stampede: {looks}"


@pytest.mark.parametrize("off", ["", "signs", "datagrams"])
def test_many_entries_wake_as_many_takers(store, path, child, off):
    """push_many rings once; each taker that finds more wakes the next, in whatever process."""
    waiters = [child(WAITER, path, off, "store.pull('k')", 4) for _ in range(4)]
    for waiter in waiters:
        waiter.expect("parked")
    store.push_many("k", [b"%02d" % n for n in range(16)])
    found = [waiter.told() for waiter in waiters for _ in range(4)]
    assert sorted(found) == sorted(repr(b"%02d" % n) for n in range(16))
    for waiter in waiters:
        waiter.told()
        waiter.finish()
    assert store.len("k") == 0


@pytest.mark.parametrize("off", ["", "signs", "datagrams"])
def test_all_who_wait_without_taking_are_woken(store, path, child, off):
    """One push wakes every `wait`, in every process; a taker beside them doesn't keep it."""
    readers = [child(WAITER, path, off, "store.wait('k')", 3) for _ in range(3)]
    for reader in readers:
        reader.expect("parked")
    store.push("k", b"x")
    for reader in readers:
        reader.expect("None", "None", "None")
        reader.told()
        reader.finish()
    assert store.len("k") == 1


def test_readers_elsewhere_are_woken_though_a_taker_here_comes_first(store, path, child):
    """A taker in the pusher's own process takes one of two; who waits elsewhere sees the other."""
    reader = child(WAITER, path, "signs", "store.wait('k')", 2)
    reader.expect("parked")
    join = in_threads(1, lambda _: store.pull("k", PATIENCE_SECONDS))
    eventually(lambda: store._database.bell.tokens() == ["k"], "the taker's wait")
    parked(1)
    store.push_many("k", [b"1", b"2"])
    assert join() == [b"1"]
    reader.expect("None", "None", "no looks")
    reader.finish()


def test_a_ring_finds_all_processes_in_whatever_order_they_came(store, monkeypatch):
    """The kernel names any mark of several: all readers are rung, and takers until one answers."""
    bell = store._database.bell
    base = bell._post("k").base
    rung = []
    answers = set()

    def send(pid, message):
        rung.append(pid)
        return pid in answers

    monkeypatch.setattr(bell._watch, "send", send)
    bell._marks.alone = False  # descriptors that nobody has announced
    pids = [70, 10, 50, 20, 60]
    descriptors = [os.open(f"{store.path}-wal", os.O_RDONLY) for _ in pids]
    try:
        all_marks = [Marks(descriptor) for descriptor in descriptors]
        all_rung = []
        for marks, pid in zip(all_marks, pids, strict=True):
            marks.hold(base + doorbell._READING + pid)
            bell.ring("k")
            assert sorted(rung) == sorted(all_rung := [*all_rung, pid])
            rung.clear()
        for marks, pid in zip(all_marks, pids, strict=True):
            marks.drop(base + doorbell._READING + pid)
            marks.hold(base + doorbell._TAKING + pid)
        for alive in (set(), *({pid} for pid in pids)):
            answers = alive
            rung.clear()
            bell.ring("k")
            assert alive <= set(rung)
            assert len(rung) == len(set(rung))
            assert alive == set(rung[-1:]) if alive else sorted(rung) == sorted(pids)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


EMPTYING = {
    "pull": lambda store: [store.pull("k"), store.pull("k")],
    "pullp": lambda store: [store.pullp("k"), store.pullp("k")],
    "pull_any": lambda store: [store.pull_any(["j", "k"]), store.pull_any(["k"])],
    "pull_many": lambda store: store.pull_many("k", 10),
    "clear": lambda store: store.clear("k"),
    "remove": lambda store: [store.remove("k", entry.seq) for entry in store.entries("k")],
}


@pytest.mark.parametrize("off", ["signs", "datagrams"])
@pytest.mark.parametrize("verb", EMPTYING)
def test_whoever_empties_a_key_wakes_who_waits_for_that(store, path, child, verb, off):
    """wait_empty in another process returns after the last entry went, by whatever verb."""
    store.push_many("k", [b"1", b"2"])
    waiter = child(WAITER, path, off, "store.wait_empty('k')", 2)
    waiter.expect("parked")
    EMPTYING[verb](store)
    waiter.expect("None", "None")
    waiter.told()
    waiter.finish()


@pytest.mark.parametrize("key", ["a", "b"])
def test_pull_any_is_woken_for_each_of_its_keys(store, path, child, key):
    """Who waits for several keys is rung for any of them."""
    waiter = child(WAITER, path, "signs", "store.pull_any(['a', 'b'])", 1)
    waiter.expect("parked")
    store.push(key, b"x")
    waiter.expect(repr((key, b"x")), "no looks")
    waiter.finish()


def test_who_is_rung_for_one_key_and_takes_of_another_wakes_the_next(store, monkeypatch):
    """A ring whose taker finds something that it prefers is passed on, not used up."""
    for module in (watching, waiting):
        monkeypatch.setattr(module, "LOOK_AGAIN_SECONDS", 1000.0)
    monkeypatch.setattr(watching, "_LOOK_FIRST_SECONDS", 1e9)  # nor does it see a change by itself
    monkeypatch.setattr(watching.Watch, "_arm", lambda *_: None)
    join_watcher = in_threads(1, lambda _: store.pull("watched", 60))  # its heir would look too
    parked(1)
    join_both = in_threads(1, lambda _: store.pull_any(["preferred", "shared"], 60))
    parked(2)
    join_one = in_threads(1, lambda _: store.pull("shared", 60))
    parked(3)
    with store.transaction() as together:
        together.push("shared", b"1")
        insert = "INSERT INTO sqlspace_entries (key, payload, pushed_at) VALUES (?, ?, 1)"
        together._connection.execute(insert, ("preferred", b"2"))  # which rings for nobody
    assert join_both() == [("preferred", b"2")]
    assert join_one() == [b"1"]
    store.push("watched", b"3")
    assert join_watcher() == [b"3"]


def test_who_is_stopped_does_not_swallow_the_ring(store, path, child):
    """A ring may go to a process that stands still; then the others hear it through inotify."""
    source = """
    deaf()
    store = sqlspace.open(argv[0], sync=False)
    while (found := store.pull("k")) != b"end":
        tell(found)
    store.close()
    """
    waiters = [child(source, path) for _ in range(2)]
    bell = store._database.bell
    base = bell._post("k").base

    def are_waiting(*waiters):
        assert store._database.bell is bell  # which hears of those who came
        return all(
            bell._marks.find(Marks.ask(base + waiter.pid, 1)) is not None for waiter in waiters
        )

    eventually(lambda: are_waiting(*waiters), "the waits")
    stopped, awake = waiters
    stopped.stop()
    for n in range(24):  # its socket gets full in between
        store.push("k", b"%d" % n)
        awake.expect(repr(b"%d" % n))
        eventually(lambda: are_waiting(awake), "the next wait")
    stopped.send(signal.SIGCONT)
    for _ in waiters:
        store.push("k", b"end")
    for waiter in waiters:
        waiter.finish()


def test_a_ring_that_others_want_too_is_not_used_up_by_who_hears_it(store, path):
    """The listening thread keeps a ring for itself only if nobody else here is to be woken."""
    bell = store._database.bell
    taker, other, reader = Waiter(), Waiter(), Waiter()
    ring = bell._post("k").message
    bell.enroll(taker, ["j", "k"], takes=True)
    bell.enroll(other, [room_token("k"), "i"], takes=True)
    assert bell.takes(ring, taker)
    assert not bell.takes(ring, other)
    assert not bell.takes(bell._post(room_token("k")).message, other), "the greatest limit first"
    assert not bell.takes(b"0 0 k", taker), "another file's"
    bell.enroll(reader, ["k"], takes=False)
    assert not bell.takes(ring, taker)
    bell.dismiss(reader, ["k"])
    with sqlspace.open(path, sync=False) as second:
        second._database.bell.enroll(reader, ["k"], takes=False)
        assert not bell.takes(ring, taker)
        second._database.bell.dismiss(reader, ["k"])
    assert bell.takes(ring, taker)
    bell.dismiss(taker, ["j", "k"])
    assert not bell.takes(ring, taker)
    bell.dismiss(other, [room_token("k"), "i"])
    assert bell._rung == {}


@pytest.mark.parametrize("verb", ["pull", "claim"])
def test_a_call_that_waits_has_looked_twice(store, monkeypatch, verb):
    """Once before it is enrolled, once afterwards: a third look would only take time."""
    looks = []
    run = taking.Grab.run
    monkeypatch.setattr(taking.Grab, "run", lambda grab: looks.append(grab) or run(grab))
    join = in_threads(1, lambda _: getattr(store, verb)("k", PATIENCE_SECONDS))
    parked(1)
    assert len(looks) == 2
    store.push("k", b"x")
    assert [getattr(found, "payload", found) for found in join()] == [b"x"]
    assert len(looks) == 3


@pytest.mark.usefixtures("_only_rings")
def test_what_is_pushed_right_after_the_last_look_wakes_who_goes_to_sleep(store, monkeypatch):
    """Who is enrolled looks once more, and is rung for from before that look on."""
    looks = []
    run = taking.Grab.run

    def slow(grab):
        found = run(grab)
        looks.append(found)
        if len(looks) == 2:
            join = in_threads(1, lambda _: store.push("k", b"x"))
            join()
        return found

    monkeypatch.setattr(taking.Grab, "run", slow)
    thread = threading.Thread(target=store.pull, args=("k",))
    thread.start()
    thread.join(waiting.LOOK_AGAIN_SECONDS / 2)  # sooner than it would look by itself
    assert not thread.is_alive()
    assert looks == [False, False, True]


def test_a_ring_wakes_all_who_read_and_of_those_who_take_the_first(store):
    """But for the one that knows: what it has left is another's."""
    bell, waiters = store._database.bell, [Waiter() for _ in range(5)]
    for number, waiter in enumerate(waiters):
        bell.enroll(waiter, ["k"], takes=number > 1)
    bell.ring("k", besides=waiters[2])
    assert [waiter.park(0) for waiter in waiters] == [True, True, False, True, False]
    for waiter in waiters:
        bell.dismiss(waiter, ["k"])


def test_a_second_ring_is_for_the_next(store):
    """One that was rung for may be slow to wake: the other needn't wait for it."""
    bell, waiters = store._database.bell, [Waiter(), Waiter()]
    for waiter in waiters:
        bell.enroll(waiter, ["k"], takes=True)
    for _ in waiters:
        bell.ring("k")
    assert all(waiter.park(0) for waiter in waiters)
    for waiter in waiters:
        bell.dismiss(waiter, ["k"])


def test_who_leaves_passes_on_a_ring_that_came_in_vain(store):
    """It has found what it waits for by itself, so the ring was another's."""
    bell, other = store._database.bell, Waiter()

    def look(waiter, enrolled):
        if enrolled:
            bell.enroll(other, ["k"], takes=True)
            bell.ring("k")
            waiter.found = "by itself"

    vigil = taking.vigil(store._database, look, ["k"], restore=print)
    assert waiting.wait(vigil, 60, None) == "by itself"
    assert other.park(0)
    bell.dismiss(other, ["k"])


def test_a_handler_may_close_the_store_while_its_thread_is_at_the_bell(path):
    """A signal comes anywhere: also where a waiter is being enrolled, under the bell's lock."""
    store = sqlspace.open(path, sync=False)

    def interrupted(_):
        with store._database.bell._lock:
            store.close()

    in_threads(1, interrupted)()
    assert store._database.closed


def add_quietly(path):
    """An entry for which nobody rings, and which who is deaf to signs doesn't see."""
    connection = apsw.Connection(path)
    insert = "INSERT INTO sqlspace_entries (key, payload, pushed_at) VALUES ('k', x'31', 1)"
    connection.execute(insert)
    connection.close()


def test_a_ring_that_comes_as_its_only_waiter_leaves_is_passed_on(store, path, child):
    """Who leaves reads what was rung for, and hands it to another process that waits."""
    other = child(WAITER, path, "signs", "store.pull('k')", 1)
    other.expect("parked")
    bell, waiter = store._database.bell, Waiter()
    bell.enroll(waiter, ["k"], takes=True)
    add_quietly(path)
    assert bell._watch.send(os.getpid(), bell._post("k").message)
    bell.dismiss(waiter, ["k"])
    other.expect("b'1'", "no looks")
    other.finish()


def test_a_ring_is_passed_on_to_a_process_that_came_after_the_last_look_around(store, path, child):
    """Who hears another process's ring knows that it is not alone any more."""
    bell = store._database.bell
    store.push("mine", b"x")
    assert bell._marks.alone
    other = child(WAITER, path, "signs", "store.pull('k')", 1)
    other.expect("parked")
    add_quietly(path)
    assert bell._marks.alone, "it has not written since, nor waited"
    bell._watch._wake_for(bell._post("k").message, bell)
    other.expect("b'1'", "no looks")
    other.finish()


def test_a_ring_at_one_that_has_just_left_goes_to_the_next(store, path, child, monkeypatch):
    """Whoever rings looks once more whether the one it rang at still waits."""
    other = child(WAITER, path, "signs", "store.pull('k')", 1)
    other.expect("parked")
    with sqlspace.open(path, sync=False) as leaving:
        bell, gone = store._database.bell, leaving._database.bell
        bell._marks.alone = False  # as it is once this store writes
        gone.enroll(Waiter(), ["k"], takes=True)
        monkeypatch.setattr(doorbell.random, "randrange", lambda _: os.getpid())
        send = bell._watch.send

        def leave_meanwhile(pid, *words):
            if pid == os.getpid():
                gone._marks.drop(gone._mark("k", takes=True))
                return True
            return send(pid, *words)

        monkeypatch.setattr(bell._watch, "send", leave_meanwhile)
        add_quietly(path)
        bell.ring("k")
        other.expect("b'1'", "no looks")
    other.finish()


def test_the_dead_do_not_swallow_the_ring(store, path, child):
    """A process that is killed while it waits leaves no mark behind."""
    killed = child(WAITER, path, "", "store.pull('k')", 3)
    killed.expect("parked")
    assert is_awaited(store, "k")
    killed.kill()
    assert not is_awaited(store, "k")
    waiter = child(WAITER, path, "signs", "store.pull('k')", 1)
    waiter.expect("parked")
    store.push("k", b"x")
    waiter.expect("b'x'", "no looks")
    waiter.finish()


def test_another_takes_the_role_of_the_watcher_that_leaves(store, path, child):
    """In each process one thread listens for all; when it has what it waits for, another does."""
    source = """
    deaf("signs")
    store = sqlspace.open(argv[0], sync=False)
    def run(key):
        store.pull(key)
        tell(key)
    threads = []
    for n in range(12):
        threads.append(threading.Thread(target=run, args=(f"key-{n}",)))
        threads[-1].start()
        parked(n + 1)  # so the first watches, and the others follow in their order
    tell("parked")
    for thread in threads:
        thread.join()
    store.close()
    """
    waiter = child(source, path)
    waiter.expect("parked")
    for n in range(12):
        store.push(f"key-{n}", b"x")
        waiter.expect(f"key-{n}")
    waiter.finish()


def test_an_heir_that_has_no_time_passes_the_role_on(store):
    """Who is called to watch and finds something instead calls the next one, and so on."""
    bell, watch = store._database.bell, watching.Watch()
    try:
        waiters = [Waiter() for _ in range(4)]
        ended = []

        def park(waiter):
            watch.park(bell, waiter, PATIENCE_SECONDS)
            ended.append(waiter)

        threads = []
        for number, waiter in enumerate(waiters):
            threads.append(threading.Thread(target=park, args=(waiter,)))
            threads[-1].start()
            eventually(
                lambda number=number: (
                    (watch._watcher is not None) + len(watch._parked) == number + 1
                )
            )
        assert watch._watcher is waiters[0]
        waiters[0].wake()
        for number, waiter in enumerate(waiters):
            threads[number].join(PATIENCE_SECONDS)
            assert waiter in ended
            assert set(ended) <= set(waiters[: number + 2]), "no more are called than one"
            watch.resign(waiter)
        assert watch._watcher is watch._heir is None
        assert not watch._parked
    finally:
        watch.close()


def test_who_parks_takes_over_a_role_that_is_lost(store, monkeypatch):
    """Its watcher has not come round for long: it hangs, or is gone."""
    monkeypatch.setattr(watching, "LOOK_AGAIN_SECONDS", -1.0)  # every role counts as lost
    bell, watch, waiters = store._database.bell, watching.Watch(), [Waiter(), Waiter()]
    try:
        joins = []
        for waiter in waiters:
            # Two that listen share the pipe, and one may read what the other was nudged by.
            joins.append(in_threads(1, lambda _, it=waiter: watch.park(bell, it, 2.0)))
            eventually(lambda it=waiter: watch._watcher is it, "a new watcher")
        for waiter in waiters:
            waiter.wake()
        for join in joins:
            join()
    finally:
        watch.close()


def test_a_lost_role_is_taken_over_while_the_lost_one_listens(store, monkeypatch):
    """After a long stop two threads may listen at once for a while: neither is harmed."""
    monkeypatch.setattr(watching, "LOOK_AGAIN_SECONDS", -1.0)  # every role counts as lost
    bell, watch = store._database.bell, watching.Watch()
    try:
        waiters = [Waiter() for _ in range(8)]
        join = in_threads(8, lambda n: watch.park(bell, waiters[n], 0.1))
        assert join() == [None] * 8
    finally:
        watch.close()


def test_a_bell_is_attended_although_another_waiter_leaves_meanwhile(store):
    """Enrolling and dismissing at once never leaves a waiter whose file nobody listens to."""
    bell = store._database.bell
    watch = watching._watch
    mark, unmark = Waiter(), Waiter()
    bell.enroll(unmark, ["k"], takes=True)
    attend = watch.attend

    def slow(found):
        peers = attend(found)
        if threading.current_thread() is threading.main_thread():
            thread.start()
            thread.join(0.05)  # it may finish here, if nothing keeps it out
        return peers

    thread = threading.Thread(target=bell.dismiss, args=(unmark, ["k"]))
    watch.attend = slow
    try:
        bell.enroll(mark, ["j"], takes=True)
    finally:
        del watch.attend
    thread.join(PATIENCE_SECONDS)
    assert bell in watch._files[bell.file_id].bells
    bell.dismiss(mark, ["j"])


# -- what waiters leave behind


def nothing_is_left(store, *tokens):
    bell = store._database.bell
    assert bell._takers == bell._readers == {}
    watch = watching._watch
    assert watch._watcher is watch._heir is None
    assert not watch._parked
    assert not any(file.bells for file in watch._files.values())
    with sqlspace.open(store.path, sync=False) as other:
        for token in tokens:
            assert not is_awaited(other, token)


def test_waiters_leave_nothing_behind(store):
    """However a wait ends, it is enrolled nowhere afterwards, and its mark is gone."""
    store.push("full", b"x")
    context = sqlspace.Context()
    verbs = [
        lambda **bounds: store.pull("k", **bounds),
        lambda **bounds: store.pull_any(["j", "k"], **bounds),
        lambda **bounds: store.wait("k", **bounds),
        lambda **bounds: store.wait_empty("full", **bounds),
    ]
    with sqlspace.open(store.path, sync=False) as other:
        for verb in verbs:
            with pytest.raises(sqlspace.DeadlineError):
                verb(timeout=0.01)
            nothing_is_left(store, "j", "k", room_token("full"))
        join = in_threads(4, lambda n: verbs[n](context=context))
        parked(4)
        assert is_awaited(other, "j")
        assert is_awaited(other, "k")
        assert is_awaited(other, room_token("full"))
        context.cancel()
        assert [type(error) for error in join()] == [sqlspace.CanceledError] * 4
        nothing_is_left(store, "j", "k", room_token("full"))
        join = in_threads(2, lambda n: verbs[n](timeout=PATIENCE_SECONDS))
        parked(2)
        store.push_many("k", [b"1", b"2"])
        assert len(join()) == 2
        nothing_is_left(store, "j", "k", room_token("full"))
    assert store.len("k") == 0


def test_two_waiters_for_one_key_share_a_mark_until_the_last_leaves(store):
    """One of them leaving doesn't make the other one deaf."""
    bell = store._database.bell
    first, second = Waiter(), Waiter()
    with sqlspace.open(store.path, sync=False) as other:
        bell.enroll(first, ["k"], takes=True)
        bell.enroll(second, ["k"], takes=True)
        bell.dismiss(first, ["k"])
        assert is_awaited(other, "k")
        bell.dismiss(first, ["k"])
        assert is_awaited(other, "k")
        bell.dismiss(second, ["k"])
        assert not is_awaited(other, "k")


def test_an_enrolment_cut_off_in_the_middle_is_undone_whole(store, monkeypatch):
    """Ctrl-C between the mark and the entry in the list: dismissing leaves neither."""

    class Cut(BaseException):
        pass

    bell = store._database.bell
    hold = bell._marks.hold

    def cut(offset):
        hold(offset)
        raise Cut

    monkeypatch.setattr(bell._marks, "hold", cut)
    waiter = Waiter()
    with pytest.raises(Cut):
        bell.enroll(waiter, ["k"], takes=True)
    monkeypatch.undo()
    bell.dismiss(waiter, ["k"])
    bell.enroll(waiter, ["k"], takes=True)
    with sqlspace.open(store.path, sync=False) as other:
        assert is_awaited(other, "k")
        bell.dismiss(waiter, ["k"])
        assert not is_awaited(other, "k")


def test_close_ends_every_wait(path):
    """All who wait get ClosedError, promptly, and so does whoever comes later."""
    store = sqlspace.open(path, sync=False)
    store.push("full", b"x")
    verbs = [
        lambda: store.pull("k"),
        lambda: store.pull_any(["j", "k"]),
        lambda: store.wait("k"),
        lambda: store.wait_empty("full"),
    ]
    join = in_threads(12, lambda n: verbs[n % 4]())
    parked(12)
    store.close()
    assert [type(error) for error in join()] == [sqlspace.ClosedError] * 12
    for verb in verbs:
        with pytest.raises(sqlspace.ClosedError):
            verb()
    parked(0)


def test_closing_one_store_leaves_the_waiters_of_another_alone(path):
    """Two stores of a process share its ears; each close ends only its own waits."""
    with sqlspace.open(path, sync=False) as kept:
        closed = sqlspace.open(path, sync=False)
        join_closed = in_threads(3, lambda _: closed.pull("k"))
        join_kept = in_threads(3, lambda _: kept.pull("k"))
        parked(6)
        closed.close()
        assert [type(error) for error in join_closed()] == [sqlspace.ClosedError] * 3
        parked(3)
        with sqlspace.open(path, sync=False) as pusher:
            pusher.push_many("k", [b"x"] * 3)
            assert join_kept() == [b"x"] * 3


@pytest.mark.parametrize("closes", [False, True])
def test_the_interpreter_ends_although_daemon_threads_wait(path, child, closes):
    """Exit code 0, no hang, and not a word on stderr."""
    ending = child(
        """
        store = sqlspace.open(argv[0], sync=False)
        store.push("full", b"x")
        def pull(): store.pull("k")
        def empty(): store.wait_empty("full")
        if argv[1] == "True":
            threading.excepthook = lambda args: None
        for target in (pull, empty) * 4:
            threading.Thread(target=target, daemon=True).start()
        parked(8)
        if argv[1] == "True":
            store.close()
        """,
        path,
        closes,
    )
    ending.finish()
    with sqlspace.open(path) as store:
        assert store.len("full") == 1


def test_two_hundred_threads_wait_and_leave(store):
    """Waiting is cheap and bounded by nothing but threads."""
    contexts = [sqlspace.Context() for _ in range(200)]
    join = in_threads(200, lambda n: store.pull(f"key-{n % 7}", context=contexts[n]))
    parked(200)
    for n in range(0, 200, 2):
        contexts[n].cancel()
    parked(100)
    for n in range(7):
        store.push_many(f"key-{n}", [b"x"] * len(range(n, 200, 7)))
    found = join()
    assert sum(isinstance(each, sqlspace.CanceledError) for each in found) == 100
    assert found.count(b"x") == 100
    nothing_is_left(store, *(f"key-{n}" for n in range(7)))


def test_a_full_queue_of_signs_loses_no_file(store):
    """After an overflow of inotify every file is looked at, and watched anew."""
    bell = store._database.bell
    watch = watching._watch
    waiter = Waiter()
    bell.enroll(waiter, ["k"], takes=True)
    file = watch._files[bell.file_id]
    watch._arm(file, bell)
    assert file.number is not None
    real = watch._inotify

    class Overflown:
        def read(self, timeout):
            return [type("Event", (), {"wd": -1})]

    watch._inotify = Overflown()
    try:
        watch._note()
    finally:
        watch._inotify = real
    assert (file.number, file.look_at) == (None, 0.0)
    watch._look()
    file.look_at = 0.0
    watch._look()  # nothing changes any more
    assert file.number is not None, "a new sign was asked for"
    bell.dismiss(waiter, ["k"])


def test_what_a_look_finds_wakes_somebody_if_the_next_look_still_finds_it(store, path):
    """Who was rung for it mostly has it by then: of 16 processes one wakes, and not all."""
    bell, watch, waiter = store._database.bell, watching._watch, Waiter()
    bell.enroll(waiter, ["k"], takes=True)
    try:
        file = watch._files[bell.file_id]
        for payload in (b"rung for", b"not rung for"):
            add_quietly(path)
            file.look_at = 0.0
            watch._look()
            assert not waiter.park(0)
            assert file.look_at is not None, "it looks again"
            if payload == b"rung for":
                store.pullp("k")
            file.look_at = 0.0
            watch._look()
            assert waiter.park(0) == (payload == b"not rung for")
    finally:
        bell.dismiss(waiter, ["k"])


def test_looks_take_a_small_part_of_the_time(store):
    """To look for a thousand keys takes long, and nobody hears a ring meanwhile."""
    bell, watch, waiter = store._database.bell, watching._watch, Waiter()
    bell.enroll(waiter, ["k"], takes=True)
    try:
        file = watch._files[bell.file_id]
        now = time.monotonic()
        watch._plan_next(file, now - 1.0, changed=True, stirred=True)
        assert file.look_at >= now + watching._REST_AFTER_LOOK
    finally:
        bell.dismiss(waiter, ["k"])


# -- the file moved


@pytest.fixture(params=["inotify", "no inotify"])
def sentry(request, monkeypatch):
    """With inotify, and where there is none."""
    if request.param == "no inotify":
        monkeypatch.setattr(identity, "open_inotify", lambda: None)
        monkeypatch.setattr(identity, "_sentry", None)
    return request.param


def recreate_wal(path):
    os.unlink(f"{path}-wal")
    with open(f"{path}-wal", "wb"):
        pass


MOVES = {
    "unlinked": os.unlink,
    "renamed": lambda path: os.rename(path, f"{path}.moved"),
    "replaced by an empty file": lambda path: os.replace(path + ".empty", path),
    "-wal unlinked": lambda path: os.unlink(f"{path}-wal"),
    "-wal renamed": lambda path: os.rename(f"{path}-wal", f"{path}-wal.moved"),
    "-wal replaced": recreate_wal,
}


@pytest.mark.parametrize("move", MOVES)
def test_a_file_that_moved_underneath_takes_no_more_entries(path, sentry, move):
    """Nothing is acknowledged that would be lost with the file; the store is unusable for good."""
    with open(path + ".empty", "wb"):
        pass
    store = sqlspace.open(path, sync=False)
    store.push("k", b"before")
    MOVES[move](path)
    verbs = [
        lambda: store.push("k", b"after"),
        lambda: store.push_many("k", [b"after"]),
        lambda: store.pullp("k"),
        lambda: store.pull("k"),
        lambda: store.put("k", b"after"),
        lambda: store.clear("k"),
        lambda: store.peek("k"),
        lambda: store.len("k"),
        lambda: store.wait("k"),
    ]
    for verb in verbs + verbs:
        with pytest.raises(sqlspace.MovedError) as caught:
            verb()
        assert caught.value.undecided is False
    store.close()
    with pytest.raises(sqlspace.ClosedError):
        store.push("k", b"after")


def test_a_file_replaced_by_its_copy_takes_no_more_entries(path, sentry, child):
    """A restore over a store in use: same content, another inode."""
    store = sqlspace.open(path, sync=False)
    store.push("k", b"before")
    # In another process: to open and close the file here would drop SQLite's locks.
    child(
        """
        import shutil
        shutil.copy(argv[0], argv[0] + ".copy")
        os.replace(argv[0] + ".copy", argv[0])
        """,
        path,
    ).finish()
    with pytest.raises(sqlspace.MovedError):
        store.push("k", b"after")
    store.close()


def test_who_closes_after_its_wal_was_replaced_leaves_that_alone(path):
    """It is another's by now; SQLite would delete whatever stands under the name."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"x")
        os.rename(path + "-wal", path + ".moved")
        with open(path + "-wal", "wb") as file:
            file.write(b"another's")
    with open(path + "-wal", "rb") as file:
        assert file.read() == b"another's"


def test_a_store_whose_directory_was_renamed_loses_nothing(tmp_path, sentry):
    """Soon it raises; what it acknowledged until then is in the file, which moved along."""
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    store = sqlspace.open(folder / "queue.db", sync=False)
    store.push("k", b"before")
    os.rename(tmp_path / "deep", tmp_path / "moved")
    acknowledged = [b"before"]

    def has_noticed():
        payload = b"%d" % len(acknowledged)
        try:
            store.push("k", payload)
        except sqlspace.MovedError:
            return True
        acknowledged.append(payload)
        return False

    eventually(has_noticed, "a MovedError")
    with pytest.raises(sqlspace.MovedError):
        store.peek("k")
    store.close()
    with sqlspace.open(tmp_path / "moved" / "folder" / "queue.db", sync=False) as moved:
        found = [entry.payload for entry in moved.entries("k")]
    assert found[: len(acknowledged)] == acknowledged


def test_a_file_that_moves_during_the_commit_is_noticed_before_the_answer(path, sentry):
    """A push or pull that was under way raises an undecided MovedError; the pull puts back."""
    for verb, held in (
        (lambda store: store.push("k", b"after"), [[b"before"], [b"before", b"after"]]),
        (lambda store: store.pull("k"), [[b"before"]]),
        (lambda store: store.pullp("k"), [[b"before"]]),
        (lambda store: store.pull_many("k", 5), [[b"before"]]),
    ):
        store = sqlspace.open(path, sync=False)
        store.clear("k")
        store.push("k", b"before")
        turnstile = store._database._session.turnstile
        leave = turnstile.leave

        def moved(turnstile=turnstile, leave=leave):
            leave()
            turnstile.leave = leave
            os.rename(path, f"{path}.moved")
            os.rename(f"{path}-wal", f"{path}.moved-wal")

        turnstile.leave = moved
        with pytest.raises(sqlspace.MovedError) as caught:
            verb(store)
        assert caught.value.undecided is True
        store.close()
        assert not os.path.exists(path)
        os.rename(f"{path}.moved", path)
        if os.path.exists(f"{path}.moved-wal"):
            os.rename(f"{path}.moved-wal", f"{path}-wal")
        if os.path.exists(f"{path}-shm"):
            os.unlink(f"{path}-shm")
        with sqlspace.open(path, sync=False) as store:
            assert [entry.payload for entry in store.entries("k")] in held


def test_a_waiter_learns_that_the_file_is_gone(store, path, monkeypatch):
    """Who waits looks again now and then, so it doesn't wait for ever on a file that is gone."""
    monkeypatch.setattr(waiting, "LOOK_AGAIN_SECONDS", 0.02)
    join = in_threads(3, lambda _: store.pull("k"))
    parked(3)
    os.unlink(path)
    assert [type(error) for error in join()] == [sqlspace.MovedError] * 3


HARMLESS = {
    "chmod": lambda path: os.chmod(path, 0o640),
    "utime": os.utime,
    "a hard link that comes and goes": lambda path: (
        os.link(path, f"{path}.link"),
        os.unlink(f"{path}.link"),
    ),
    "a hard link that stays": lambda path: os.link(path, f"{path}.link"),
    "chmod of the -wal": lambda path: os.chmod(f"{path}-wal", 0o640),
    "there and back": lambda path: (
        os.rename(path, f"{path}.away"),
        os.rename(f"{path}.away", path),
    ),
}


@pytest.mark.parametrize("happening", HARMLESS)
def test_an_event_is_a_hint_and_no_verdict(store, path, sentry, happening):
    """What raises an event of inotify and leaves the file in its place does no harm."""
    store.push("k", b"1")
    HARMLESS[happening](path)
    store.push("k", b"2")
    HARMLESS["utime"](path)
    assert [store.pull("k"), store.pullp("k")] == [b"1", b"2"]
    assert not store._database._session.identity.alarmed or sentry == "no inotify"


def test_every_store_of_the_process_learns_of_it(tmp_path):
    """One inotify serves all: what one store's verb reads from it concerns the others too."""
    file = tmp_path / "file"
    file.touch()
    identities = [Identity(str(file)) for _ in range(3)]
    try:
        assert all(each.stands() for each in identities)
        file.unlink()
        assert not any(each.stands() for each in identities)
    finally:
        for each in identities:
            each.close()


def test_no_store_trusts_its_file_while_another_reads_the_events(tmp_path, monkeypatch):
    """What one thread reads, another can't poll: no alarm ends before it is read and told."""
    monkeypatch.setattr(identity, "_LOOK_AGAIN_SECONDS", 1000.0)
    for slow_after in (False, True):
        file = tmp_path / f"file-{slow_after}"
        file.touch()
        first, second = Identity(str(file)), Identity(str(file))
        try:
            assert first.stands()
            assert second.stands()
            inside, proceed = threading.Event(), threading.Event()
            inotify = first._sentry._inotify
            real = inotify.read

            def slow(inside=inside, proceed=proceed, real=real, after=slow_after, **named):
                found = real(**named) if after else None
                inside.set()
                assert proceed.wait(PATIENCE_SECONDS)
                return found if after else real(**named)

            with monkeypatch.context() as patch:
                patch.setattr(inotify, "read", slow)
                if slow_after:
                    file.unlink()
                else:
                    file.chmod(0o640)
                join_first = in_threads(1, lambda _, first=first: first.stands())
                assert inside.wait(PATIENCE_SECONDS)
                # Also if it has polled just before the event.
                patch.setattr(second, "poll", second.poll if slow_after else lambda _: ())
                join_second = in_threads(1, lambda _, second=second: second.stands())
                threading.Event().wait(0.02)  # time to be wrong in
                file.unlink(missing_ok=True)
                proceed.set()
                assert join_first() == [False]
                found = join_second()
                assert found == [False] or not slow_after, "it was gone before"
            assert not second.stands()
        finally:
            first.close()
            second.close()


def test_a_closed_store_is_watched_no_more(path):
    """Opening and closing leaves no watch behind, not even of files that are gone."""
    sentry = identity._the_sentry()
    before = dict(sentry._watchers)
    for _ in range(3):
        with sqlspace.open(path, sync=False) as store:
            store.push("k", b"x")
        os.unlink(path)
    assert sentry._watchers == before


def test_the_bell_without_a_file_to_watch_still_wakes(path):
    """With neither descriptor nor id (a vfs of memory) waits in one process work all the same."""
    changes = []

    def stirring(tokens, timed):
        return (list(tokens), None) if changes else None

    bell = Doorbell(None, path + "-wal", Marks(None), stirring)
    waiter = Waiter()
    bell.enroll(waiter, ["k"], takes=True)
    try:
        join = in_threads(1, lambda _: bell.park(waiter, PATIENCE_SECONDS))
        parked(1)
        changes.append("somebody wrote")
        join()
    finally:
        bell.dismiss(waiter, ["k"])
        bell.close()
