"""What the clock decides wakes who waits for it, in any process, by timer and not by polling."""

import signal
import threading
import time

import pytest
from children import PATIENCE_SECONDS, eventually, parked

import sqlspace
from sqlspace import browsing, clock, dead_letters, taking, waiting
from sqlspace import watch as watching
from sqlspace.doorbell import Doorbell, limit_token, room_token, turn_token
from sqlspace.marks import Marks
from sqlspace.waiting import Waiter

SECONDS = 1.0  # from what happens to the end that the clock sets
LATE_SECONDS = 10.0  # a bound, for a machine that is busy; by itself nobody looks for 1,000 s


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path, sync=False) as opened:
        yield opened


def in_thread(step):
    """Run `step` in a thread; gives a function that waits for what it returned."""
    found = []
    thread = threading.Thread(target=lambda: found.append(step()))
    thread.start()

    def join():
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "a waiter was left asleep"
        return found[0]

    return join


# Counts how often it looks, by itself and as the process's watch. It looks on after a sign of a
# change for a short time only, so that it is calm long before the clock decides.
COUNTING = """
import logging
from sqlspace import taking
from sqlspace import watch as watching
logging.getLogger("sqlspace").setLevel(logging.ERROR)  # it would tell of leases that run out
watching._LOOK_ON_SECONDS = 0.05
looks = []
Vigil = taking.Vigil
def counted(look, **named):
    return Vigil(lambda *words: looks.append(words) or look(*words), **named)
taking.Vigil = counted
store = sqlspace.open(argv[0], sync=False)
stirring = store._database.bell.stirring
store._database.bell.stirring = lambda *words: looks.append(words) or stirring(*words)
def calm():
    files = watching._watch._files.values()
    eventually(lambda: all(f.look_at is None or f.look_at > 1e8 for f in files), "calm")
"""
WAITER = (
    """
deaf(*filter(None, argv[1].split(",")))
"""
    + COUNTING
    + """
def run():
    found = eval(argv[2])
    tell(time.time())
    tell(len(looks))
    found = getattr(found, "payload", found)
    tell(found.decode() if isinstance(found, bytes) else type(found).__name__)
thread = threading.Thread(target=run)
thread.start()
parked(1)
calm()
del looks[:]
tell("parked")
thread.join()
store.close()
"""
)
HOLDER = """
store = sqlspace.open(argv[0], sync=False)
held = store.claim("k", 0, lease=1000.0, max_attempts=eval(argv[1]))
tell("holds")
while (line := hear()) != "end":
    eval(line)
    tell("done")
"""
EARLIER = (
    """
deaf("signs")
"""
    + COUNTING
    + """
pushed = time.time()
store.push("k", b"payload", delay=float(argv[1]))
found = eval(argv[2])
tell(time.time() >= pushed + float(argv[1]), len(looks) <= 6)
found = getattr(found, "payload", found)
tell(found.decode() if isinstance(found, bytes) else type(found).__name__)
store.close()
"""
)
PULL = "store.pull('k')"
CLAIM = "store.claim('k')"
WAIT = "store.wait('k')"
IN_TURN = "store.claim('k', ordered=True)"


def wakes(waiter, happens, said):
    """The waiter is woken when the clock says so after `happens`, and hardly looks before."""
    waiter.expect("parked")
    earliest = time.time() + SECONDS
    happens()
    latest = time.time() + SECONDS + LATE_SECONDS
    woken, looks = float(waiter.told()), int(waiter.told())
    assert earliest <= woken <= latest
    assert looks <= 16, "it looked again and again"
    waiter.expect(said)
    waiter.finish()


def holder_of(child, path, max_attempts=None):
    holder = child(HOLDER, path, max_attempts)
    holder.expect("holds")
    return holder


def does(holder, line):
    holder.tell(line)
    holder.expect("done")


def dies(holder):
    """It gives its lease a second, and is killed."""
    does(holder, f"held.extend({SECONDS})")
    holder.kill()


@pytest.mark.parametrize(
    ("verb", "said"),
    [(PULL, "payload"), (CLAIM, "payload"), (IN_TURN, "payload"), (WAIT, "NoneType")],
)
def test_the_lease_of_a_killed_holder_runs_out(store, path, child, verb, said):
    """Nobody is left to ring, and yet whoever waits gets the entry when the lease is over."""
    store.push("k", b"payload")
    holder = holder_of(child, path)
    waiter = child(WAITER, path, "", verb)
    wakes(waiter, lambda: dies(holder), said)


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("store.pull('k/dead')", "payload"),
        ("store.wait('k/dead')", "NoneType"),
        ("store.claim('k/dead', ordered=True)", "payload"),
        ("store.wait_empty('k')", "NoneType"),
    ],
)
def test_a_dead_letter_appears_when_the_last_lease_runs_out(store, path, child, verb, said):
    """Who waits for dead letters, or for the key to be empty, is woken by the same end."""
    store.push("k", b"payload")
    holder = holder_of(child, path, max_attempts=1)
    waiter = child(WAITER, path, "", verb)
    wakes(waiter, lambda: dies(holder), said)


@pytest.mark.parametrize(
    ("verb", "said", "off"),
    [
        (PULL, "payload", ""),
        (PULL, "payload", "signs"),
        (PULL, "payload", "datagrams"),
        (CLAIM, "payload", ""),
        (IN_TURN, "payload", "signs"),
        (WAIT, "NoneType", "datagrams"),
    ],
)
def test_a_delay_ends(store, path, child, verb, said, off):
    """Pushed with a delay by another process while it was parked, by either way of learning it."""
    waiter = child(WAITER, path, off, verb)
    wakes(waiter, lambda: store.push("k", b"payload", delay=SECONDS), said)


def test_a_delay_that_a_foreign_connection_has_pushed_ends(store, path, child):
    """push_on rings no bell: the change is seen, and the time read from the file."""
    waiter = child(WAITER, path, "", PULL)
    foreign = child(
        """
        import sqlite3
        connection = sqlite3.connect(argv[0])
        connection.execute("PRAGMA wal_autocheckpoint=0")
        tell("open")
        hear()
        sqlspace.push_on(connection, "k", b"payload", delay=float(argv[1]))
        connection.commit()
        connection.close()
        """,
        path,
        SECONDS,
    )
    foreign.expect("open")
    wakes(waiter, foreign.tell, "payload")
    foreign.finish()


@pytest.mark.parametrize(
    ("verb", "said"),
    [(PULL, "payload"), (CLAIM, "payload"), (IN_TURN, "payload"), (WAIT, "NoneType")],
)
def test_a_delay_that_was_there_before_the_wait_ends(path, child, verb, said):
    """Its own look tells it when to look again, where nothing changes afterwards."""
    waiter = child(
        EARLIER,
        path,
        SECONDS,
        verb,
    )
    waiter.expect("True True", said)
    waiter.finish()


@pytest.mark.parametrize(
    ("verb", "said", "off"),
    [
        (PULL, "payload", ""),
        (PULL, "payload", "signs"),
        (PULL, "payload", "datagrams"),
        (CLAIM, "payload", ""),
        (IN_TURN, "payload", "signs"),
        (WAIT, "NoneType", "datagrams"),
    ],
)
def test_a_nack_s_delay_ends(store, path, child, verb, said, off):
    """Given back by another process with a delay, while it was parked."""
    store.push("k", b"payload")
    holder = holder_of(child, path)
    waiter = child(WAITER, path, off, verb)
    wakes(waiter, lambda: does(holder, f"held.nack({SECONDS})"), said)
    holder.kill()


def test_a_time_to_live_makes_a_key_empty(store, path, child):
    """wait_empty returns when the last entry expires, though nobody asks for it."""
    store.push("k", b"x")
    waiter = child(WAITER, path, "", "store.wait_empty('k')")
    wakes(waiter, lambda: store.put("k", b"y", ttl=SECONDS), "NoneType")


def test_a_time_to_live_makes_room(store, path, child):
    """A push into a full key is done when one of its entries expires, and others stay."""
    store.push_many("k", [b"1", b"2"])
    waiter = child(WAITER, path, "", "store.push('k', b'new', max_len=2)")

    def happens():
        with store.transaction() as together:
            together.clear("k")
            together.push("k", b"3")
            together.push("k", b"4", ttl=SECONDS)

    wakes(waiter, happens, "int")
    assert [entry.payload for entry in store.entries("k")] == [b"3", b"new"]


def test_a_last_lease_makes_room(store, path, child):
    """A push into a full key is done when one of its entries is dead, and others stay."""
    store.push_many("k", [b"1", b"2"])
    holder = holder_of(child, path, max_attempts=1)
    waiter = child(WAITER, path, "", "store.push('k', b'new', max_len=2)")
    wakes(waiter, lambda: dies(holder), "int")
    assert [entry.payload for entry in store.entries("k")] == [b"2", b"new"]
    assert store.pullp("k/dead") == b"1"


def test_who_waits_for_its_turn_is_woken_when_what_stands_before_expires(store, path, child):
    """What has expired is gone, and holds nobody up, though its nack's delay is not over."""
    store.push("k", b"before", ttl=1000.0)
    store.push("k", b"payload")
    holder = holder_of(child, path)
    waiter = child(WAITER, path, "", IN_TURN)

    def happens():
        expires_at = clock.now() + int(SECONDS * 1e6)
        with store.transaction() as together:
            update = "UPDATE sqlspace_entries SET expires_at = ? WHERE payload = ?"
            together._connection.execute(update, (expires_at, b"before"))
        does(holder, "held.nack(500.0)")

    wakes(waiter, happens, "payload")
    holder.kill()


def test_what_others_keys_expire_is_not_looked_for(store, path, child):
    """A thousand entries expire under another key, one after the other, and it sleeps on."""
    store.push("k", b"x")
    waiter = child(WAITER, path, "", "store.wait_empty('k')")

    def happens():
        with store.transaction() as together:
            together.put("k", b"y", ttl=SECONDS)
            for n in range(200):
                together.push("other", b"x", ttl=0.2 + n * SECONDS / 400)

    wakes(waiter, happens, "NoneType")


def test_a_dead_letter_is_found_behind_a_crowd_of_others(store, monkeypatch):
    """However many have died under other keys, and before: what a key's reader needs is moved."""
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now)
    store.push_many("other", [b"x"] * 3 * dead_letters.BURY_ROWS)
    store.claim_many("other", 3 * dead_letters.BURY_ROWS, lease=1.0, max_attempts=1)
    store.push("k", b"payload")
    store.claim("k", 0, lease=2.0, max_attempts=1)
    now += 10_000_000
    assert store.pullp("k/dead") == b"payload"
    assert store.len("other/dead") == 3 * dead_letters.BURY_ROWS


# -- what comes due between two looks at the clock


@pytest.fixture
def _only_timers(monkeypatch):
    """Nobody looks again for no reason, nor for a sign of a change."""
    for module in (watching, waiting):
        monkeypatch.setattr(module, "LOOK_AGAIN_SECONDS", 1000.0)
    monkeypatch.setattr(watching, "_LOOK_FIRST_SECONDS", 1e9)
    monkeypatch.setattr(watching.Watch, "_arm", lambda *_: None)


@pytest.mark.usefixtures("_only_timers")
@pytest.mark.parametrize(
    "verb",
    [
        lambda store: store.pull("k", PATIENCE_SECONDS),
        lambda store: store.claim("k", PATIENCE_SECONDS).payload,
        lambda store: store.wait("k", PATIENCE_SECONDS) or store.peek("k"),
    ],
)
def test_what_comes_due_between_the_look_and_the_sleep_is_not_missed(store, monkeypatch, verb):
    """Its time is over when the sleeper asks when to wake: then it is at once."""
    real, ahead, skew = clock.now, browsing.seconds_ahead, 0
    monkeypatch.setattr(clock, "now", lambda: real() + skew)

    def late(*words):
        nonlocal skew
        skew = 600_000_000
        return ahead(*words)

    store.push("k", b"payload", delay=500.0)
    monkeypatch.setattr(browsing, "seconds_ahead", late)
    assert verb(store) == b"payload"


@pytest.mark.usefixtures("_only_timers")
def test_the_watching_thread_is_told_of_times_that_others_wait_for(store):
    """It looks for all of its process, and may sleep long for itself."""
    watcher = in_thread(lambda: store.pull("nothing"))
    parked(1)
    store.push("k", b"payload", delay=0.05)
    assert in_thread(lambda: store.pull("k"))() == b"payload"
    store.push("nothing", b"the end")
    assert watcher() == b"the end"


@pytest.mark.usefixtures("_only_timers")
def test_the_nearest_time_counts(store):
    """Whoever told it, and whenever: others' times are found anew by the look."""
    bell, waiter = store._database.bell, Waiter()
    bell.enroll(waiter, ["k"], takes=True)
    file = bell._watch._files[bell.name]
    for seconds in (300.0, 100.0, 200.0):
        bell.expect(seconds)
    assert 0 < file.timers[bell] - time.monotonic() <= 100.0
    bell.dismiss(waiter, ["k"])


@pytest.mark.usefixtures("_only_timers")
def test_what_comes_due_right_after_the_last_look_is_not_missed(store, monkeypatch):
    """When to wake is asked as of the look, not of a moment later."""
    real, run, skew, looks = clock.now, taking.Grab.run, 0, []
    monkeypatch.setattr(clock, "now", lambda: real() + skew)

    def slow(grab):
        nonlocal skew
        looks.append(run(grab))
        if len(looks) == 2:
            skew = 600_000_000
        return looks[-1]

    store.push("k", b"payload", delay=500.0)
    monkeypatch.setattr(taking.Grab, "run", slow)
    join = in_thread(lambda: store.pull("k"))
    assert join() == b"payload"
    assert looks == [False, False, True]


@pytest.mark.parametrize(
    "token", ["k", turn_token("k"), room_token("gone"), limit_token("gone", 1)]
)
def test_the_watch_misses_nothing_that_comes_due_while_it_looks(store, monkeypatch, token):
    """At each reading of the clock it is later: what wasn't there yet is still ahead, or over."""
    store.push("k", b"x", delay=500.0)
    store.push("gone", b"x", ttl=500.0)
    real, calls = clock.now, []

    def later():
        calls.append(None)
        return real() + 600_000_000 * (len(calls) - 1)

    monkeypatch.setattr(clock, "now", later)
    tokens, ahead = browsing.stirring(store._database, [token], True)
    assert tokens == [token] or ahead is not None


def test_a_timer_that_meets_an_error_does_not_come_round_for_ever(path):
    """Those who wait are woken to meet it; the watch itself lets it rest."""
    looks = []

    def stirring(tokens, timed):
        looks.append(timed)
        raise sqlspace.BusyError

    bell = Doorbell(None, path + "-wal", Marks(None), stirring)
    other, sleeper = Waiter(), Waiter()
    bell.enroll(other, ["k"], takes=True)
    try:
        bell.expect(0.01)
        join = in_thread(lambda: bell.park(sleeper, PATIENCE_SECONDS))
        parked(1)
        eventually(lambda: True in looks, "the timer")
        assert other.park(PATIENCE_SECONDS), "who waits is woken"
        bell.expect(0.2)
        eventually(lambda: looks.count(True) == 2, "the next timer")
        sleeper.wake()
        join()
        assert len(looks) <= 16
    finally:
        bell.dismiss(other, ["k"])
        bell.close()


# -- backpressure


PUSHERS = (
    """
deaf(*filter(None, argv[1].split(",")))
"""
    + COUNTING
    + """
def run(n):
    for turn in range(5):
        store.push("k", b"%s %d %d" % (argv[2].encode(), n, turn), max_len=3)
threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
for thread in threads:
    thread.start()
parked(2)
tell("parked")
for thread in threads:
    thread.join()
tell(len(looks))
store.close()
"""
)


def pull(store):
    return [store.pull("k", PATIENCE_SECONDS)]


def ack(store):
    delivery = store.claim("k", PATIENCE_SECONDS)
    delivery.ack()
    return [delivery.payload]


def clear(store):
    found = []
    with store.transaction() as together:
        found += together.pull_many("k", 1)  # to have read what is cleared
        count = together.clear("k")
    return found + [b"cleared"] * count


def take_many(store):
    return store.pull_many("k", 2)


def remove(store):
    return [entry.payload for entry in store.entries("k") if store.remove("k", entry.seq)]


@pytest.mark.parametrize(
    ("verb", "off"),
    [
        (pull, ""),
        (pull, "signs"),
        (pull, "datagrams"),
        (ack, ""),
        (clear, "signs"),
        (take_many, "datagrams"),
        (remove, "signs"),
    ],
)
def test_pushers_in_several_processes_get_in_one_after_the_other(store, path, child, verb, off):
    """A key of limited length: each that goes lets one in, whoever waits, and none starves."""
    store.push_many("k", [b"first"] * 3)
    pushers = [child(PUSHERS, path, off, name) for name in ("a", "b", "c")]
    for pusher in pushers:
        pusher.expect("parked")
    taken = []
    ends = time.monotonic() + PATIENCE_SECONDS
    while len(taken) < 3 + 3 * 2 * 5:
        assert store.len("k") <= 3
        taken += verb(store)
        assert time.monotonic() < ends, f"only {len(taken)} got in"
    looks = 0
    for pusher in pushers:
        looks += int(pusher.told())
        pusher.finish()
    # Two of its own for each, and one or two of another that is let in or is not.
    assert looks <= 30 * 8, "a stampede"
    assert store.len("k") == 0
    for name in "abc":
        for n in "01":
            turns = [each[4:] for each in taken if each.startswith(f"{name} {n}".encode())]
            assert turns == sorted(turns), "of one pusher, in the order of its pushes"


def test_a_pusher_that_stands_still_keeps_no_other_out(store, path, child):
    """The ring for the room may go to a process that is stopped; then another sees it by itself."""
    store.push_many("k", [b"first"] * 3)
    source = """
    deaf()
    store = sqlspace.open(argv[0], sync=False)
    def run():
        store.push("k", argv[1].encode(), max_len=3)
        tell("in")
    thread = threading.Thread(target=run)
    thread.start()
    parked(1)  # and so with no lock in its hands
    tell("parked")
    thread.join()
    store.close()
    """
    pushers = [child(source, path, name) for name in ("stopped", "awake")]
    for pusher in pushers:
        pusher.expect("parked")
    bell = store._database.bell
    stopped, awake = pushers
    stopped.stop()
    # The rings go to the stopped one only.
    bell._watch.send, send = (lambda *words: send(stopped.pid, *words[1:])), bell._watch.send
    try:
        assert store.pull("k") == b"first"
        awake.expect("in")
    finally:
        del bell._watch.send
    awake.finish()
    stopped.send(signal.SIGCONT)
    assert store.pull("k") == b"first"
    stopped.expect("in")
    stopped.finish()


@pytest.mark.usefixtures("_only_timers")
def test_the_pusher_with_the_greatest_limit_is_let_in_first(store):
    """There may be room for it, and for none else; then the ring is of use to it alone."""
    store.push_many("k", [b"x"] * 10)
    contexts = [sqlspace.Context() for _ in range(2)]

    def small(context):
        with pytest.raises(sqlspace.CanceledError):
            store.push("k", b"small", max_len=5, context=context)

    watcher = in_thread(lambda: store.pull("watched", PATIENCE_SECONDS))  # its heir would look too
    parked(1)
    joins = [in_thread(lambda: small(contexts[0]))]
    parked(2)
    great = in_thread(lambda: store.push("k", b"great", max_len=10, timeout=PATIENCE_SECONDS))
    parked(3)
    joins.append(in_thread(lambda: small(contexts[1])))
    parked(4)
    store.pull("k")
    great()
    for context in contexts:
        context.cancel()
    for join in joins:
        join()
    store.push("watched", b"x")
    assert watcher() == b"x"
    assert store.len("k") == 10


# -- in turn


CLAIMERS = (
    """
deaf(*filter(None, argv[1].split(",")))
"""
    + COUNTING
    + """
def run(n):
    while True:
        delivery = store.claim("k", ordered=True)
        tell(delivery.payload.decode(), delivery.attempts)
        if delivery.payload == b"end":
            delivery.nack()
            return
        if delivery.attempts == 1 and delivery.seq % 3 == 0:
            delivery.nack()
        else:
            delivery.ack()
threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
for thread in threads:
    thread.start()
parked(2)
tell("parked")
for thread in threads:
    thread.join()
tell("looks", len(looks))
store.close()
"""
)


BLOCKED = (
    """
deaf()
"""
    + COUNTING
    + """
thread = threading.Thread(target=lambda: tell(store.claim("k", ordered=True).seq))
thread.start()
parked(1)
calm()
del looks[:]
tell("parked")
hear()
tell(len(looks))
thread.join()
store.close()
"""
)


@pytest.mark.parametrize("off", ["", "signs", "datagrams"])
def test_claimers_in_turn_wake_each_other(store, path, child, off):
    """Each ack, and each nack, of whatever process lets the next one in, until all is done."""
    claimers = [child(CLAIMERS, path, off) for _ in range(3)]
    for claimer in claimers:
        claimer.expect("parked")
    store.push_many("k", [b"%d" % n for n in range(60)])
    store.push("k", b"end")
    for claimer in claimers:
        while not claimer.told().startswith("looks"):
            pass
        claimer.finish()
    acked = [tombstone.seq for tombstone in store.history("k")]
    assert acked == sorted(acked)
    assert len(acked) == 60


def test_a_claim_in_turn_wakes_nobody(store, path, child):
    """What stands ready behind it has to wait for it, and so has everybody else."""
    elsewhere = child(WAITER, path, "", IN_TURN)
    elsewhere.expect("parked")
    rung = []
    bell = store._database.bell
    ring_all = bell.ring_all

    def spy(tokens, *words):
        rung.extend(tokens)
        ring_all(tokens, *words)

    join = in_thread(lambda: store.claim("k", PATIENCE_SECONDS, ordered=True).seq)
    parked(1)
    elsewhere.stop()  # it waits on, and can't be the one that claims
    bell.ring_all = spy
    first, _ = store.push_many("k", [b"1", b"2"])
    assert join() == first
    assert rung == ["k"], "by the push alone"
    elsewhere.kill()


def test_claimers_in_turn_sleep_while_another_works(store, path, child):
    """Behind a leased entry they do not come round, however many stand ready behind it."""
    store.push_many("k", [b"%d" % n for n in range(100)])
    held = store.claim("k", 0, lease=1000.0, ordered=True)
    waiter = child(BLOCKED, path)
    waiter.expect("parked")
    before = waiter.cpu_seconds()
    threading.Event().wait(0.5)  # the bounded time over which idleness is measured
    assert waiter.cpu_seconds() - before <= 0.25
    waiter.tell()
    waiter.expect("0")
    held.ack()
    waiter.expect(str(held.seq + 1))
    waiter.finish()


# -- many who wait for what comes due


TAKERS = (
    """
deaf(*filter(None, argv[1].split(",")))
"""
    + COUNTING
    + """
def run():
    while (found := store.pull("k")) != b"end":
        tell(found.decode(), time.time())
threads = [threading.Thread(target=run) for _ in range(8)]
for thread in threads:
    thread.start()
parked(8)
tell("parked")
for thread in threads:
    thread.join()
tell("looks", len(looks))
store.close()
"""
)


@pytest.mark.parametrize("off", ["", "datagrams"])
def test_many_takers_get_each_delayed_entry_once_and_in_time(store, path, child, off):
    """8 threads in each of 2 processes: none is taken early, twice, late, or by a stampede."""
    takers = [child(TAKERS, path, off) for _ in range(2)]
    for taker in takers:
        taker.expect("parked")
    due = {}
    for n in range(64):
        delay = 0.3 + (n * 37 % 64) / 64
        due[n] = time.time() + delay
        store.push("k", b"%d" % n, delay=delay)
    eventually(lambda: store.len("k") == 0, "all taken")
    store.push_many("k", [b"end"] * 16)
    found, looks = {}, 0
    for taker in takers:
        while not (line := taker.told()).startswith("looks"):
            n, at = line.split()
            assert int(n) not in found
            found[int(n)] = float(at)
        looks += int(line.split()[1])
        taker.finish()
    assert found.keys() == due.keys()
    for n, at in found.items():
        assert due[n] <= at <= due[n] + LATE_SECONDS
    # Half of them are of those who are rung for a push, and learn when it will be ready.
    assert looks <= 64 * 24, "a stampede"
