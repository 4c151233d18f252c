"""What a push may say of its entry: ttl, delay, dedupe, max_len; and what the clock makes of it."""

import math
import threading

import apsw
import pytest
from children import eventually
from clocks import YEAR_SECONDS, install
from interrupts import every_step, interrupted

import sqlspace
from sqlspace import CanceledError, DeadlineError, LeaseError, ageing
from sqlspace.doorbell import room_token
from sqlspace.pushing import Push
from sqlspace.waiting import LOOK_AGAIN_SECONDS


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path, sync=False) as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch):
    return install(monkeypatch)


def outcomes(store, key="k"):
    return [(stone.seq, stone.outcome) for stone in store.history(key)]


def states(store, key="k"):
    return [(entry.payload, entry.state) for entry in store.entries(key)]


PUSHES = {
    "push": lambda store, **options: store.push("k", b"1", **options),
    "push_many": lambda store, **options: store.push_many("k", [b"1"], **options)[0],
    "transaction": lambda store, **options: together(store, "push", b"1", **options),
    "transaction's push_many": lambda store, **options: together(
        store, "push_many", [b"1"], **options
    )[0],
}


def together(store, verb, *arguments, **options):
    with store.transaction() as transaction:
        return getattr(transaction, verb)("k", *arguments, **options)


# -- time to live


@pytest.mark.parametrize("push", PUSHES.values(), ids=PUSHES)
def test_an_entry_is_gone_when_its_time_is_over_whoever_looks(store, clock, push):
    """At that very moment, for every verb, swept or not."""
    seq = push(store, ttl=10)
    assert store.get("k", seq).expires_at == clock.at(10)
    clock.go(9.999999)
    assert (store.len("k"), store.peek("k"), store.keys()) == (1, b"1", ["k"])
    clock.go(0.000001)
    assert (store.len("k"), store.peek("k"), store.keys()) == (0, None, [])
    assert store.get("k", seq) is None
    assert list(store.entries("k")) == []
    assert store.stats().keys == {}
    store.wait_empty("k", 0)
    for verb in (store.wait, store.pull, store.claim):
        with pytest.raises(DeadlineError):
            verb("k", 0)
    assert store.pullp("k") is store.claimp("k") is None
    assert store.pull_many("k", 5) == store.claim_many("k", 5) == []
    assert store.remove("k", seq) is False
    assert together(store, "len") == 0
    assert together(store, "peek") is None
    assert store.clear("k") == 0
    assert outcomes(store) == [(seq, "expired")]


@pytest.mark.parametrize("how", ["store", "transaction"])
def test_what_is_put_may_have_a_time_to_live(store, clock, how):
    """Counted from the put."""
    seq = store.put("k", b"1", ttl=10) if how == "store" else together(store, "put", b"1", ttl=10)
    assert store.get("k", seq).expires_at == clock.at(10)
    clock.go(10)
    assert store.len("k") == 0
    store.put("k", b"2")
    assert store.get("k", seq + 1).expires_at is None


@pytest.mark.parametrize("ttl", [None, math.inf, 10**400])
def test_a_time_to_live_without_end_is_none(store, clock, ttl):
    """None, infinity, and what is beyond every clock."""
    seq = store.push("k", b"1", ttl=ttl)
    assert store.get("k", seq).expires_at is None
    clock.go(500 * YEAR_SECONDS)
    assert store.pullp("k") == b"1"


def test_the_expired_stand_in_nobodys_way(store, clock):
    """What lives is taken in its order, whatever has expired before it and between."""
    store.push_many("k", [b"x"] * 1500, ttl=5)
    store.push("k", b"1")
    store.push_many("k", [b"x"] * 1500, ttl=5)
    store.push("k", b"2")
    clock.go(5)
    assert store.len("k") == 2
    assert states(store) == [(b"1", "ready"), (b"2", "ready")]
    assert store.pull("k", 0) == b"1"
    assert store.claim("k", 0).payload == b"2"
    assert store.clear("k") == 1


def test_put_and_clear_leave_a_tombstone_of_what_had_expired_and_of_nothing_else(store, clock):
    """What they replace was there still; what has expired was not theirs to take."""
    store.push_many("k", [b"x"] * 1500, ttl=5)
    store.push("k", b"1")
    clock.go(5)
    assert store.clear("k") == 1
    assert [outcome for _, outcome in outcomes(store)] == ["expired"] * 1500
    store.push("k", b"1", ttl=5)
    clock.go(5)
    store.put("k", b"2")
    assert len(outcomes(store)) == 1501
    assert states(store) == [(b"2", "ready")]


def rows(path, sql):
    """Read by another SQLite, which knows nothing of the clock."""
    database = apsw.Connection(path, apsw.SQLITE_OPEN_READONLY)
    try:
        return database.execute(sql).fetchall()
    finally:
        database.close()


@pytest.mark.parametrize("verb", ["push", "pull", "ack", "push_many", "pull_many"])
def test_what_has_expired_under_keys_that_nobody_asks_for_is_swept_away(path, clock, verb):
    """By the work of others, a thousand at a time."""
    with sqlspace.open(path, sync=False) as store:
        for number in range(20):
            store.push_many(f"forgotten{number}", [b"x" * 1000] * 100, ttl=5)
        store.push_many("k", [b"y"] * 600)
        clock.go(5)
        for _ in range(64 * 5):
            if verb == "ack":
                store.claim("k").ack()
            elif verb == "push_many":
                store.push_many("k", [b"z"])
            elif verb == "pull_many":
                store.pull_many("k", 1)
            else:
                getattr(store, verb)("k", *([b"z"] if verb == "push" else [0]))
        store._database.checkpoint()
    count = "SELECT count(*) FROM sqlspace_entries WHERE state < 3 AND key GLOB 'forgotten*'"
    assert rows(path, count) == [(0,)]


# -- delay


@pytest.mark.parametrize("push", PUSHES.values(), ids=PUSHES)
def test_a_delayed_entry_counts_and_is_not_ready(store, clock, push):
    """Until it is due; then it stands at its place, before what was pushed later."""
    seq = push(store, delay=10)
    store.push("k", b"2")
    entry = store.get("k", seq)
    assert (entry.state, entry.due_at) == ("delayed", clock.at(10))
    assert (store.len("k"), store.peek("k")) == (2, b"2")
    stats = store.stats().keys["k"]
    assert (stats.delayed, stats.ready, stats.leased) == (1, 1, 0)
    clock.go(9.999999)
    assert [each.seq for each in store.claim_many("k", 5)] == [seq + 1]
    clock.go(0.000001)
    assert store.get("k", seq).state == "ready"
    assert store.peek("k") == b"1"
    assert store.pull("k", 0) == b"1"


@pytest.mark.parametrize("delay", [None, 0, 0.0, -0.0])
def test_no_delay_is_no_delay(store, delay):
    """Ready at once."""
    seq = store.push("k", b"1", delay=delay)
    assert (store.get("k", seq).state, store.get("k", seq).due_at) == ("ready", None)


def test_a_delayed_entry_may_expire_once_it_is_due(store, clock):
    """Its time to live counts from the push."""
    store.push("k", b"1", delay=5, ttl=5.000001)
    clock.go(5)
    assert store.peek("k") == b"1"
    clock.go(0.000001)
    assert store.len("k") == 0
    assert store.pullp("k") is None


@pytest.mark.parametrize("verb", ["clear", "put", "remove"])
def test_what_is_delayed_is_taken_away_like_any_other(store, clock, verb):
    """clear, put, remove; it does not come back when it would have been due."""
    seq = store.push("k", b"1", delay=5)
    if verb == "clear":
        assert store.clear("k") == 1
    elif verb == "remove":
        assert store.remove("k", seq)
    else:
        store.put("k", b"new")
        store.pull("k", 0)
    clock.go(5)
    assert store.keys() == []
    assert store.pullp("k") is None


def test_a_wait_ends_when_an_entry_is_due(store):
    """Nobody rings for it: wait, pull, pull_any and claim know the time."""
    for verb in (store.wait, store.pull, store.claim):
        store.push("k", b"1", delay=0.02)
        verb("k", 60)
        store.clear("k")
    store.push("k", b"1", delay=0.02)
    assert store.pull_any(["none", "k"], 60) == ("k", b"1")


# -- misuse


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ttl": 0}, ValueError, "ttl must be more than 0"),
        ({"ttl": -1}, ValueError, "ttl"),
        ({"ttl": math.nan}, ValueError, "ttl"),
        ({"ttl": "5"}, TypeError, "ttl"),
        ({"ttl": True}, TypeError, "ttl"),
        ({"delay": -1}, ValueError, "delay"),
        ({"delay": math.nan}, ValueError, "delay"),
        ({"delay": math.inf}, ValueError, "delay must be finite"),
        ({"delay": "5"}, TypeError, "delay"),
        ({"delay": 5, "ttl": 5}, ValueError, "delay must be less than ttl"),
        ({"delay": 6, "ttl": 5}, ValueError, "delay must be less than ttl"),
        ({"delay": 1e-9, "ttl": 1e-9}, ValueError, "delay must be less than ttl"),
    ],
)
@pytest.mark.parametrize("push", PUSHES.values(), ids=PUSHES)
def test_a_time_that_makes_no_sense_is_refused(store, push, options, error, words):
    """And nothing is pushed."""
    with pytest.raises(error, match=words):
        push(store, **options)
    assert store.keys() == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"timeout": 5}, ValueError, "need max_len"),
        ({"timeout": 0}, ValueError, "need max_len"),
        ({"timeout": math.inf}, ValueError, "need max_len"),
        ({"context": sqlspace.Context()}, ValueError, "need max_len"),
        ({"timeout": -1}, ValueError, "timeout"),
        ({"timeout": "5"}, TypeError, "timeout"),
        ({"context": 5}, TypeError, "context"),
        ({"timeout": -1, "max_len": 5}, ValueError, "timeout"),
        ({"timeout": math.nan, "max_len": 5}, ValueError, "timeout"),
        ({"context": 5, "max_len": 5}, TypeError, "context"),
        ({"max_len": 0}, ValueError, "max_len must be at least 1"),
        ({"max_len": -5}, ValueError, "max_len"),
        ({"max_len": 1.0}, TypeError, "max_len"),
        ({"max_len": True}, TypeError, "max_len"),
        ({"dedupe": ""}, ValueError, "dedupe"),
        ({"dedupe": "a\0"}, ValueError, "dedupe"),
        ({"dedupe": "k" * 1025}, ValueError, "dedupe"),
        ({"dedupe": b"k"}, TypeError, "dedupe"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(store, options, error, words):
    """A wait for room needs to know what is full; a dedupe has the rules of a key."""
    with pytest.raises(error, match=words):
        store.push("k", b"1", **options)
    assert store.keys() == []


def test_the_longest_and_the_shortest_times_neither_overflow_nor_vanish(store, clock):
    """1,000 years at most; a microsecond at least."""
    seq = store.push("k", b"1", ttl=1e300, delay=1e-300)
    assert store.get("k", seq).state == "delayed"
    assert store.get("k", seq).expires_at == clock.at(1000 * YEAR_SECONDS)
    clock.go(0.000001)
    claimed = store.claim("k", 0, lease=1e300)
    assert claimed.deadline == clock.at(1000 * YEAR_SECONDS)
    claimed.nack(1e300)
    assert store.get("k", seq).due_at == clock.at(1000 * YEAR_SECONDS)


# -- dedupe


def test_a_second_push_of_the_same_name_adds_nothing(store):
    """It returns the seq of the first; names belong to their keys; None is no name."""
    seq = store.push("k", b"1", dedupe="a")
    assert store.push("k", b"2", dedupe="a") == seq
    other = store.push("other", b"3", dedupe="a")
    named = store.push("k", b"4", dedupe="b")
    assert len({seq, other, named}) == 3
    assert store.push("k", b"5") != store.push("k", b"5")
    assert [payload for payload, _ in states(store)] == [b"1", b"4", b"5", b"5"]


@pytest.mark.parametrize("whole", [False, True], ids=["push", "transaction's push"])
def test_a_known_name_is_made_durable_before_its_push_returns(path, whole):
    """A store without sync may have pushed it: a commit of this one's own takes it to the disk."""
    with sqlspace.open(path, sync=False) as other, sqlspace.open(path) as store:
        seq = other.push("k", b"1", dedupe="a")
        store.push("k", b"2")  # whatever a first write does besides
        commits = []
        store._database._session.connection.set_wal_hook(lambda *_: commits.append(None) or 0)
        found = (
            together(store, "push", b"3", dedupe="a")
            if whole
            else store.push("k", b"3", dedupe="a")
        )
        assert found == seq
        assert len(commits) == 1


ENDS = {
    "pulled": lambda store: store.pull("k"),
    "pulled with others": lambda store: store.pull_many("k", 5),
    "acked": lambda store: store.claim("k").ack(),
    "dead": lambda store: store.claim("k", max_attempts=1).nack(),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_name_is_known_as_long_as_the_history_has_it(path, end):
    """Live, leased, delayed, taken, acked, dead; and forgotten when the tombstone is."""
    with sqlspace.open(path, sync=False, history=3) as store:
        seq = store.push("k", b"1", dedupe="a")
        end(store)
        for _ in range(2):
            assert store.push("k", b"again", dedupe="a") == seq
            store.push("other", b"x")
            store.pull("other")
        assert store.len("k") == 0
        store.push("other", b"x")
        store.pull("other")
        new = store.push("k", b"again", dedupe="a")
        assert new > seq
        assert store.push("k", b"again", dedupe="a") == new


@pytest.mark.parametrize("history", [0, None])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_history_of_none_remembers_no_name_and_one_of_all_every_name(path, end, history):
    """Pruned or not: what is beyond the history isn't in it."""
    with sqlspace.open(path, sync=False, history=history) as store:
        seq = store.push("k", b"1", dedupe="a")
        end(store)
        for _ in range(30):
            store.push("other", b"x")
            store.pull("other")
        assert (store.push("k", b"2", dedupe="a") == seq) == (history is None)


@pytest.mark.parametrize("history", [0, 10])
def test_a_name_of_what_has_expired_is_in_the_history(path, clock, history):
    """Swept or not, and however much else has expired before it."""
    with sqlspace.open(path, sync=False, history=history) as store:
        store.push_many("other", [b"x"] * 2500, ttl=4)
        seq = store.push("k", b"1", dedupe="a", ttl=5)
        clock.go(5)
        again = store.push("k", b"2", dedupe="a")
        assert (again == seq) == (history == 10)
        assert store.len("k") == (0 if history else 1)


@pytest.mark.parametrize("history", [0, 10])
def test_a_name_of_what_has_died_is_in_the_history(path, clock, history):
    """Moved to the dead letters yet or not."""
    with sqlspace.open(path, sync=False, history=history) as store:
        seq = store.push("k", b"1", dedupe="a")
        store.claim("k", lease=5, max_attempts=1)
        clock.go(5)
        again = store.push("k", b"2", dedupe="a")
        assert (again == seq) == (history == 10)
        assert store.len("k") == (0 if history else 1)
        assert store.len("k/dead") == 1


def test_a_lease_and_a_delay_keep_a_name(store, clock):
    """As long as the entry lives, in whatever state; also through its coming back."""
    seq = store.push("k", b"1", dedupe="a", delay=5)
    assert store.push("k", b"2", dedupe="a") == seq
    clock.go(5)
    claimed = store.claim("k")
    assert store.push("k", b"2", dedupe="a") == seq
    claimed.nack(5)
    assert store.push("k", b"2", dedupe="a") == seq
    clock.go(5)
    assert store.pull("k") == b"1"
    assert store.push("k", b"2", dedupe="a") == seq


@pytest.mark.parametrize("verb", ["put", "clear", "compact"])
def test_put_clear_and_compact_forget_names(store, verb):
    """Of what lives, and of what was taken; of their own key only, but for compact."""
    store.push("k", b"taken", dedupe="taken")
    store.push("other", b"taken", dedupe="taken")
    store.pull("k")
    store.pull("other")
    store.push("k", b"live", dedupe="live")
    getattr(store, verb)(*{"put": ("k", b"new"), "clear": ("k",), "compact": ()}[verb])
    before = store.len("k")
    store.push("k", b"again", dedupe="taken")
    assert store.len("k") == before + 1
    store.push("k", b"again", dedupe="live")
    assert store.len("k") == before + (1 if verb == "compact" else 2)
    store.push("other", b"again", dedupe="taken")
    assert store.len("other") == (1 if verb == "compact" else 0)


def test_names_are_one_with_those_of_a_push_in_the_callers_own_transaction(path):
    """push_on and push see each other's, live and taken."""
    with sqlspace.open(path, sync=False) as store:
        seq = store.push("k", b"1", dedupe="a")
        database = apsw.Connection(path)
        assert sqlspace.push_on(database, "k", b"2", dedupe="a") == seq
        other = sqlspace.push_on(database, "k", b"3", dedupe="b")
        assert store.push("k", b"4", dedupe="b") == other
        store.pull_many("k", 5)
        assert sqlspace.push_on(database, "k", b"2", dedupe="a") == seq
        assert store.push("k", b"4", dedupe="b") == other
        database.close()
        assert store.len("k") == 0


def test_a_known_name_needs_no_room(store):
    """It adds nothing, so it waits for nothing."""
    seq = store.push("k", b"1", dedupe="a", max_len=1)
    assert store.push("k", b"2", dedupe="a", max_len=1, timeout=0) == seq
    with pytest.raises(DeadlineError):
        store.push("k", b"2", dedupe="b", max_len=1, timeout=0)
    assert together(store, "push", b"2", dedupe="a", max_len=1) == seq


def test_eight_threads_that_push_one_name_add_one_entry(store):
    """All of them get its seq."""
    seqs = []

    def push():
        seqs.extend([store.push("k", b"x", dedupe=f"{n}") for n in range(20)])

    threads = [threading.Thread(target=push) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seqs) == sorted([entry.seq for entry in store.entries("k")] * 8)
    assert store.len("k") == 20


# -- max_len


def test_a_push_waits_for_room_no_longer_than_it_was_told(store):
    """0 looks exactly once; nothing was pushed."""
    store.push("k", b"1", max_len=1)
    for timeout in (0, 0.01):
        with pytest.raises(DeadlineError):
            store.push("k", b"2", max_len=1, timeout=timeout)
    with pytest.raises(DeadlineError):
        store.push("k", b"2", max_len=1, context=sqlspace.Context(0.01))
    context = sqlspace.Context()
    context.cancel()
    with pytest.raises(CanceledError):
        store.push("k", b"2", max_len=1, context=context)
    with pytest.raises(CanceledError):
        store.push("roomy", b"2", max_len=1, context=context)
    assert states(store) == [(b"1", "ready")]
    store.push("k", b"2", max_len=2, timeout=0)
    store.push("k", b"3")
    assert store.len("k") == 3


def test_max_len_counts_what_len_counts(store, clock):
    """Ready, delayed and leased; not the expired, not the dead."""
    store.push("k", b"1", delay=100)
    store.push("k", b"2")
    store.claim("k", lease=50)
    store.push("k", b"3", ttl=20)
    with pytest.raises(DeadlineError):
        store.push("k", b"4", max_len=3, timeout=0)
    clock.go(20)
    store.push("k", b"4", max_len=3, timeout=0)
    store.claim("k", lease=5, max_attempts=1)
    with pytest.raises(DeadlineError):
        store.push("k", b"5", max_len=3, timeout=0)
    clock.go(5)
    store.push("k", b"5", max_len=3, timeout=0)
    assert store.len("k") == 3


def transact_ack(store):
    claimed = store.claim("k")
    with store.transaction() as transaction:
        transaction.ack(claimed)


ROOM = {
    "pull": lambda store: store.pull("k"),
    "pullp": lambda store: store.pullp("k"),
    "pull_many": lambda store: store.pull_many("k", 5),
    "pull_any": lambda store: store.pull_any(["k"]),
    "ack": lambda store: store.claim("k").ack(),
    "ack_many": lambda store: store.ack_many(store.claim_many("k", 1)),
    "death": lambda store: store.claim("k", max_attempts=1).nack(),
    "clear": lambda store: store.clear("k"),
    "remove": lambda store: store.remove("k", 1),
    "transaction": lambda store: together(store, "pullp"),
    "transaction's clear": lambda store: together(store, "clear"),
    "transaction's remove": lambda store: together(store, "remove", 1),
    "transaction's ack": transact_ack,
    "space": lambda store: store.space(loads=bytes).inp("k"),
}


@pytest.mark.usefixtures("_only_rings")
@pytest.mark.parametrize("make", ROOM.values(), ids=ROOM)
def test_a_push_that_waits_is_woken_by_whatever_makes_room(store, make):
    """Each verb that lets an entry leave its key."""
    makes_room(store, make)


def test_a_push_that_waits_is_woken_when_a_last_lease_runs_out(store):
    """Nobody rings for it, whoever claimed: the watch looks in time."""
    makes_room(store, lambda store: store.claim("k", lease=0.05, max_attempts=1))


def makes_room(store, make):
    store.push("k", b"1")
    context = sqlspace.Context(60)
    seqs = []
    thread = threading.Thread(
        target=lambda: seqs.append(store.push("k", b"2", max_len=1, context=context))
    )
    thread.start()
    awaited(store)
    make(store)
    thread.join(LOOK_AGAIN_SECONDS / 2)  # sooner than it would look by itself
    assert not thread.is_alive()
    assert [entry.seq for entry in store.entries("k")] == seqs


ROOM_OF_K = room_token("k")


def awaited(store, number=1, token=ROOM_OF_K):
    """Wait until so many threads wait for room under k, or for its being empty."""
    bell = store._database.bell
    eventually(
        lambda: sum(len(kind.get(token, ())) for kind in (bell._takers, bell._readers)) == number,
        f"a wait for {token!a}",
    )


@pytest.mark.usefixtures("_only_rings")
@pytest.mark.parametrize("whole", [False, True], ids=["put", "transaction's put"])
def test_a_put_makes_room_if_it_replaces_several(store, whole):
    """It leaves one, so who waits for room for a second is woken."""
    store.push_many("k", [b"1", b"2"])
    thread = threading.Thread(target=lambda: store.push("k", b"4", max_len=2, timeout=60))
    thread.start()
    awaited(store)
    if whole:
        together(store, "put", b"3")
    else:
        store.put("k", b"3")
    thread.join(LOOK_AGAIN_SECONDS / 2)
    assert not thread.is_alive()
    assert states(store) == [(b"3", "ready"), (b"4", "ready")]


def transact_nack(store, claimed):
    with store.transaction() as transaction:
        transaction.nack(claimed)


COMING = {
    "push": lambda store, _: store.push("k", b"1"),
    "push with a name": lambda store, _: store.push("k", b"1", dedupe="a"),
    "push with a limit": lambda store, _: store.push("k", b"1", max_len=9),
    "push_many": lambda store, _: store.push_many("k", [b"1"]),
    "put": lambda store, _: store.put("k", b"1"),
    "nack": lambda _, claimed: claimed.nack(),
    "requeue": lambda store, _: store.requeue("k"),
    "transaction": lambda store, _: together(store, "push", b"1"),
    "transaction's push_many": lambda store, _: together(store, "push_many", [b"1"]),
    "transaction's put": lambda store, _: together(store, "put", b"1"),
    "transaction's nack": transact_nack,
    "space": lambda store, _: store.space(dumps=bytes).out("k", b"1"),
}


@pytest.mark.usefixtures("_only_rings")
@pytest.mark.parametrize("make", COMING.values(), ids=COMING)
def test_a_pull_that_waits_is_woken_by_whatever_brings_an_entry(store, make):
    """Each verb after which an entry is ready."""
    store.push("k", b"1")
    claimed = store.claim("k")
    store.push("k/dead", b"1")
    taken = []
    thread = threading.Thread(target=lambda: taken.append(store.pull("k", 60)))
    thread.start()
    awaited(store, token="k")
    make(store, claimed)
    thread.join(LOOK_AGAIN_SECONDS / 2)
    assert not thread.is_alive()
    assert taken == [b"1"]


def test_a_push_that_waits_is_woken_by_an_expiry_and_by_close(path):
    """Nobody rings for the one; the other ends every wait."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"1", ttl=0.05)
        store.push("k", b"2", max_len=1, timeout=60)
        errors = []

        def push():
            try:
                store.push("k", b"3", max_len=1)
            except sqlspace.ClosedError as error:
                errors.append(error)

        thread = threading.Thread(target=push)
        thread.start()
        awaited(store)
    thread.join()
    assert len(errors) == 1


def test_many_that_wait_for_room_all_get_in_and_never_overfill(store):
    """Eight push through a key that holds three; one takes."""
    fullest, errors = [], []

    def push(name):
        try:
            for number in range(20):
                store.push("k", b"%d %d" % (name, number), max_len=3, timeout=60)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    taken = []
    for _ in range(160):
        fullest.append(store.len("k"))
        taken.append(store.pull("k", 60))
    for thread in threads:
        thread.join()
    assert errors == []
    assert max(fullest) <= 3
    assert sorted(taken) == sorted(b"%d %d" % (i, n) for i in range(8) for n in range(20))
    assert store._database.bell._takers == {}


@pytest.mark.usefixtures("_only_rings")
def test_who_waits_for_dead_letters_is_woken_by_a_death(store):
    """Whoever caused it rings for where it stands now."""
    store.push("k", b"1")
    claimed = store.claim("k", max_attempts=1)
    thread = threading.Thread(target=store.pull, args=("k/dead", 60))
    thread.start()
    awaited(store, token="k/dead")
    claimed.nack()
    thread.join(LOOK_AGAIN_SECONDS / 2)
    assert not thread.is_alive()


INTERRUPTED = """
import functools, random, sqlspace

random.seed(int(argv[1]))
store = sqlspace.open(argv[0], sync=False)
hits = 0

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
for number in range(600):
    pushed = store.push_many("k", [b"x", b"x"])
    full = number % 3 == 0  # then it waits until it is interrupted
    options = dict(max_len=2 if full else 9, dedupe=str(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0006))
        pushed.extend(map(functools.partial(store.push, **options), ("k",), (b"x",)))
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert [entry.seq for entry in store.entries("k")] == pushed, number
    store.clear("k")
    assert not store._database._session.connection.in_transaction
assert store._database.bell._takers == {}
store.close()
tell(hits)
"""


def test_an_interrupted_push_with_options_added_nothing(path, child):
    """Ctrl-C at any moment, while it looks, waits or commits."""
    process = child(INTERRUPTED, path, 5)
    assert int(process.told()) > 200
    process.finish()


def test_an_interrupted_push_leaves_what_was_pushed_under_its_name_before(store):
    """What it returns is not what it added, so there is nothing to take back."""
    seq = store.push("k", b"1", dedupe="a")
    context = sqlspace.Context()  # which the wait must leave when it has found something

    def push():
        return store.push("k", b"2", dedupe="a", max_len=9, context=context)

    for step, *_ in every_step():
        _, struck = interrupted(push, 3 * step)
        assert [entry.seq for entry in store.entries("k")] == [seq], step
        if not struck:
            return


def test_a_push_that_is_done_again_is_undone_by_its_new_seq(store):
    """That of the first time, which was rolled back, is another's by then."""
    connection = store._database._session.connection
    push = Push("k", b"mine")
    connection.execute("BEGIN")
    push.step(connection)
    connection.execute("ROLLBACK")
    push.retract()
    other = store.push("k", b"another's")

    class CutOff:
        execute = connection.execute  # and no more: Ctrl-C strikes just behind it

    with pytest.raises(AttributeError):
        push.step(CutOff)
    push.undo(connection)
    assert [entry.seq for entry in store.entries("k")] == [other]


# -- a clock that jumps


@pytest.mark.parametrize("years", [-30, -1, 1, 30])
def test_a_clock_that_jumps_by_years_makes_nothing_stick(store, clock, years):
    """Lease, delay, nack's delay and ttl: each is over, after a jump forwards and backwards."""
    lasting = store.push("k", b"lasting")
    leased = store.claim("k", lease=60)
    store.push("delayed", b"1", delay=60)
    store.push("nacked", b"1")
    store.claim("nacked").nack(60)
    store.push("live", b"1", ttl=60)
    store.push("last", b"1")
    store.claim("last", lease=60, max_attempts=1)
    clock.go(years * YEAR_SECONDS)
    assert [store.peek(key) for key in ("k", "delayed", "nacked")] == [b"lasting", b"1", b"1"]
    assert store.len("live") == 0
    keys = ["delayed", "k", "last/dead", "nacked"]
    assert store.keys() == keys
    assert [entry.state for key in keys for entry in store.entries(key)] == ["ready"] * 4
    with pytest.raises(LeaseError):
        leased.ack()
    second = store.claim("k", 0)
    assert second.seq == lasting
    with pytest.raises(LeaseError):
        leased.ack()
    second.ack()
    assert outcomes(store) == [(lasting, "acked")]
    assert store.pull("delayed", 0) == store.claim("nacked", 0).payload == b"1"
    assert store.pull_many("last/dead", 2) == [b"1"]
    store.push_many("other", [b"x"] * 70)
    store.claim_many("live", 1)
    store.clear("live")
    assert outcomes(store, "live") == [(4, "expired")]


def test_a_clock_that_is_set_back_a_little_changes_nothing(store, clock):
    """By a minute, or by the length itself: ends are believed until twice that, and a minute."""
    store.push("delayed", b"1", delay=600)
    store.push("live", b"1", ttl=600)
    store.push("k", b"1")
    leased = store.claim("k", lease=600)
    clock.go(-660)
    assert store.peek("delayed") is store.peek("k") is None
    assert store.peek("live") == b"1"
    assert store.len("live") == store.len("delayed") == store.len("k") == 1
    leased.extend(600)
    leased.ack()
    clock.go(-0.000001)
    assert store.peek("delayed") == b"1"
    assert store.len("live") == 0


def test_work_goes_on_after_a_jump_forwards_and_back(store, clock):
    """What was pushed in the wrong year is taken in the right one."""
    clock.go(50 * YEAR_SECONDS)
    store.push("k", b"1", ttl=60)
    store.push("k", b"2", delay=60)
    store.push("k", b"3")
    claimed = store.claim("k", lease=60)
    clock.go(-50 * YEAR_SECONDS)
    assert claimed.payload == b"1"
    assert store.pull_many("k", 9) == [b"2", b"3"]
    assert store.keys() == []


# -- what it costs


class Steps:
    """Counts the steps of SQLite's virtual machine, and the rows that changed, of one store."""

    def __init__(self, store):
        session = store._database._session
        self.connection = session.connection
        self.steps = 0
        for connection in (session.connection, session.open_reader(store._database.options)):
            connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, self.count)

    def count(self, event):
        self.steps += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    def of(self, call):
        """Steps and changed rows."""
        self.steps, before = 0, self.connection.total_changes()
        call()
        return self.steps, self.connection.total_changes() - before


def test_a_hundred_thousand_delayed_entries_in_front_cost_a_pull_nothing(tmp_path, clock):
    """Counted, not timed."""
    costs = []
    for delayed in (10, 100_000):
        with sqlspace.open(tmp_path / f"{delayed}.db", sync=False) as store:
            store.push_many("k", [b"x"] * delayed, delay=1000)
            store.push_many("k", [b"%d" % number for number in range(12)])
            count = Steps(store)
            costs.append(
                [
                    count.of(call)[0]
                    for call in (
                        lambda: store.peek("k"),
                        lambda: store.pull("k", 0),
                        lambda: store.pullp("k"),
                        lambda: store.pull_many("k", 2),
                        lambda: store.pull_any(["none", "k"], 0),
                        lambda: store.claim("k", 0).nack(),
                        lambda: store.claimp("k", ordered=True).nack(),
                        lambda: store.wait("k", 0),
                        lambda: store.push("k", b"x", delay=5),
                    )
                ]
            )
    for small, large in zip(*costs, strict=True):
        assert large <= small * 1.2 + 20, costs


def test_what_is_due_all_at_once_is_caught_up_with_in_bounded_steps(tmp_path, clock):
    """No pull moves more than a thousand rows and a few, and the order is that of the seqs."""
    with sqlspace.open(tmp_path / "queue.db", sync=False, history=0) as store:
        number = 10_000
        store.push_many("k", [b"%d" % n for n in range(number)], delay=1000)
        clock.go(1000)
        count = Steps(store)
        taken = []
        for _ in range(number):
            _, changed = count.of(lambda: taken.append(store.pull("k", 0)))
            assert changed <= ageing.BATCH_ROWS + 300  # and what is pruned
        assert taken == [b"%d" % n for n in range(number)]


@pytest.mark.parametrize("verb", ["pull", "pull_many", "claim", "claim_many"])
def test_an_entry_that_is_due_stands_before_later_ones_however_many_came_due_before_it(
    store, clock, verb
):
    """Its place is its seq: not that of the time at which it came due."""
    store.push_many("k", [b"held"] * 1100, delay=5000)
    store.push("k", b"first", delay=1000)
    store.push_many("k", [b"early"] * 1100, delay=10)
    clock.go(1000)
    taken = {
        "pull": lambda: store.pull("k", 0),
        "pull_many": lambda: store.pull_many("k", 1)[0],
        "claim": lambda: store.claim("k", 0).payload,
        "claim_many": lambda: store.claim_many("k", 1)[0].payload,
    }[verb]()
    assert taken == b"first"


def test_what_is_due_behind_many_that_are_not_stands_before_what_lapsed_behind_it(store, clock):
    """Of those that wait the first are looked at; nothing behind them is taken for seen."""
    store.push_many("k", [b"later"] * ageing.BATCH_ROWS, delay=5000)
    store.push("k", b"first", delay=10)
    store.push_many("k", [b"x"] * (ageing.BATCH_ROWS + 100))
    store.claim_many("k", ageing.BATCH_ROWS + 100, lease=5)
    clock.go(20)
    assert store.pull("k") == b"first"


def test_what_a_clock_that_was_set_back_has_expired_is_swept_away_too(store, clock):
    """Its time to live lies further ahead than it is long."""
    seq = store.push("k", b"1", ttl=10)
    clock.go(-10_000)
    store.push_many("other", [b"x"])
    assert outcomes(store) == [(seq, "expired")]


def test_many_at_once_are_taken_in_order_however_they_came_due(store, clock):
    """Due in the opposite order of their seqs; leased, nacked and pushed with a delay."""
    number = 3000
    with store.transaction() as transaction:
        for n in range(number):
            transaction.push("k", b"%d" % n, delay=number - n)
    clock.go(number)
    assert store.pull_many("k", 1500) == [b"%d" % n for n in range(1500)]
    assert [each.payload for each in store.claim_many("k", 2000)] == [
        b"%d" % n for n in range(1500, number)
    ]


def test_the_views_of_the_file_say_the_same_in_plain_sql(path):
    """By the clock of the shell that asks, whatever the states in the rows are."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"1", ttl=1e-6)
        store.push("k", b"2", delay=1e-6)
        store.push("k", b"3", delay=1000)
        store.push("k", b"4")
        store.claim("k", 5, lease=1e-6, max_attempts=1)
        store.wait("k/dead", 60)
        wanted = [
            ("k", "delayed", b"3"),
            ("k", "ready", b"4"),
            ("k/dead", "ready", b"2"),
        ]
        live = "SELECT key, state, payload FROM sqlspace_live ORDER BY key, state"
        # SQL's clock counts milliseconds, and may be one behind.
        eventually(lambda: rows(path, live) == wanted, "the same in SQL")
        counts = rows(path, "SELECT key, ready, leased, delayed FROM sqlspace_keys ORDER BY key")
    assert counts == [("k", 1, 0, 1), ("k/dead", 1, 0, 0)]
