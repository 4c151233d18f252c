"""Leases: what was claimed is settled by the one who holds it, or comes back."""

import contextlib
import gc
import os
import threading
import time

import pytest
from children import eventually
from clocks import install

import sqlspace
from sqlspace import DeadlineError, LeaseError, ageing, dead_letters, entries
from sqlspace import clock as clocks


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path, sync=False) as opened:
        yield opened
    no_thread_is_left()


@pytest.fixture
def clock(monkeypatch):
    return install(monkeypatch)


def outcomes(store, key="k"):
    return [(stone.seq, stone.outcome) for stone in store.history(key)]


def states(store, key="k"):
    return [(entry.payload, entry.state) for entry in store.entries(key)]


def no_thread_is_left():
    """The renewals' thread ends after the last block, though not at that moment."""
    eventually(
        lambda: not any(each.name == "sqlspace-renewals" for each in threading.enumerate()),
        "the end of the renewals' thread",
    )


@pytest.fixture(autouse=True)
def _threads_end():
    yield
    no_thread_is_left()


# -- claiming


def test_a_claim_tells_all_of_its_entry(store, clock):
    """key, seq, payload, headers, attempts, and when its lease ends."""
    seq = store.push("k", b"work", headers={"a": "b"})
    clock.go(5)
    claimed = store.claim("k", lease=7)
    assert (claimed.key, claimed.seq, claimed.payload) == ("k", seq, b"work")
    assert (claimed.headers, claimed.attempts) == ({"a": "b"}, 1)
    assert claimed.deadline == clock.at(7)
    assert claimed.lost is False
    [entry] = store.entries("k")
    assert (entry.state, entry.deadline, entry.attempts) == ("leased", claimed.deadline, 1)
    assert f"{seq} of 'k', attempt 1" in repr(claimed)


def test_a_lease_lasts_thirty_seconds_unless_told_otherwise(store, clock):
    """For each verb that claims."""
    store.push_many("k", [b"1", b"2", b"3"])
    claimed = [store.claim("k"), store.claimp("k"), *store.claim_many("k", 1)]
    assert {each.deadline for each in claimed} == {clock.at(30)}


def test_what_is_claimed_is_nobody_elses(store):
    """Leased entries are out of the sight of all that take, and of peek; they still count."""
    store.push("k", b"1")
    claimed = store.claim("k")
    assert store.claimp("k") is None
    assert store.claim_many("k", 5) == []
    assert store.pullp("k") is None
    assert store.pull_many("k", 5) == []
    assert store.peek("k") is None
    for wait in (store.pull, store.claim, store.wait, store.wait_empty):
        with pytest.raises(DeadlineError):
            wait("k", 0)
    with pytest.raises(DeadlineError):
        store.pull_any(["k"], 0)
    assert store.len("k") == 1
    assert store.keys() == ["k"]
    assert store.get("k", claimed.seq).state == "leased"
    assert (store.stats().keys["k"].leased, store.stats().keys["k"].ready) == (1, 0)
    claimed.ack()
    store.wait_empty("k", 0)


def test_a_claim_waits_and_ends_as_every_wait_does(store):
    """Deadline, context; and it has leased nothing then."""
    with pytest.raises(DeadlineError):
        store.claim("k", 0.01)
    context = sqlspace.Context()
    context.cancel()
    store.push("k", b"1")
    with pytest.raises(sqlspace.CanceledError):
        store.claim("k", context=context)
    assert states(store) == [(b"1", "ready")]


def test_a_claim_that_waits_gets_what_is_pushed_and_what_is_given_back(store):
    """A nack wakes as a push does."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.claim("k", 60))) for _ in "ab"]
    threads[0].start()
    store.push("k", b"1")
    threads[0].join()
    threads[1].start()
    found[0].nack()
    threads[1].join()
    assert [(each.payload, each.attempts) for each in found] == [(b"1", 1), (b"1", 2)]


def test_a_claim_that_waits_gets_what_comes_due_and_what_lapses(store):
    """Nobody rings for what the clock does."""
    store.push("k", b"1", delay=0.05)
    first = store.claim("k", 60, lease=0.05)
    second = store.claim("k", 60)
    assert (first.seq, second.attempts) == (second.seq, 2)
    assert first.lost


def test_the_first_listed_key_that_has_one_ready_is_claimed(store):
    """claim, claimp, claim_many and consume go by the order of the keys."""
    store.push_many("late", [b"l1", b"l2", b"l3"])
    store.push_many("first", [b"f1", b"f2"])
    keys = ["none", "first", "late"]
    assert store.claim(keys).payload == b"f1"
    assert [each.payload for each in store.claim_many(iter(keys), 2)] == [b"f2", b"l1"]
    assert store.claimp(tuple(keys)).payload == b"l2"
    assert next(store.consume(keys)).payload == b"l3"
    assert store.claimp(keys) is None


def test_claim_many_leases_up_to_its_limit_in_order(store):
    """Fewer, or none, if there aren't so many; each with its own lease."""
    seqs = store.push_many("k", [b"1", b"2", b"3"])
    claimed = store.claim_many("k", 2, lease=9)
    assert [each.seq for each in claimed] == seqs[:2]
    assert [each.seq for each in store.claim_many("k", 10**30)] == seqs[2:]
    assert store.claim_many("k", 1) == []
    claimed[1].nack()
    claimed[0].ack()
    assert states(store) == [(b"2", "ready"), (b"3", "leased")]


def test_consume_yields_one_after_the_other_until_its_context_ends(store):
    """The settling is the with inside the loop."""
    store.push_many("k", [b"1", b"2", b"3"])
    context = sqlspace.Context()
    seen = []
    for each in store.consume("k", context=context):
        with each:
            seen.append(each.payload)
            assert states(store)[0] == (each.payload, "leased")
            if len(seen) == 3:
                context.cancel()
    assert seen == [b"1", b"2", b"3"]
    assert store.len("k") == 0
    assert [outcome for _, outcome in outcomes(store)] == ["acked"] * 3


def test_consume_ends_when_the_store_is_closed_and_when_its_time_is_over(path):
    """Both are ends, not errors."""
    with sqlspace.open(path, sync=False) as store:
        assert list(store.consume("k", context=sqlspace.Context(0.01))) == []
        ended = []
        thread = threading.Thread(target=lambda: ended.append(list(store.consume("k"))))
        thread.start()
    thread.join()
    assert ended == [[]]
    assert list(store.consume("k")) == []


def test_misuse_of_consume_is_told_at_the_call(store):
    """And not at the first step of the loop."""
    with pytest.raises(ValueError, match="lease"):
        store.consume("k", lease=0)
    with pytest.raises(TypeError, match="context"):
        store.consume("k", context=5)


# -- settling


def test_an_ack_leaves_a_tombstone(store):
    """Outcome acked, and the entry is gone."""
    seq = store.push("k", b"1")
    claimed = store.claim("k")
    claimed.ack()
    assert outcomes(store) == [(seq, "acked")]
    assert store.len("k") == 0
    assert store.claimp("k") is None
    assert claimed.lost is False
    assert "settled" in repr(claimed)


def test_a_nack_gives_the_entry_back_to_its_old_place(store):
    """Its seq is its place: before what was pushed after it."""
    store.push_many("k", [b"1", b"2"])
    claimed = store.claim("k")
    claimed.nack()
    assert states(store) == [(b"1", "ready"), (b"2", "ready")]
    again = store.claim("k")
    assert (again.payload, again.attempts) == (b"1", 2)
    assert outcomes(store) == []


def test_a_nack_with_a_delay_gives_it_back_later(store, clock):
    """Delayed until then, and then at its old place."""
    store.push_many("k", [b"1", b"2"])
    store.claim("k").nack(delay=10)
    assert states(store) == [(b"1", "delayed"), (b"2", "ready")]
    assert store.get("k", 1).due_at == clock.at(10)
    assert store.peek("k") == b"2"
    assert store.stats().keys["k"].delayed == 1
    clock.go(9.999999)
    assert store.peek("k") == b"2"
    clock.go(0.000001)
    assert store.peek("k") == b"1"
    assert states(store) == [(b"1", "ready"), (b"2", "ready")]
    assert [each.payload for each in store.claim_many("k", 2)] == [b"1", b"2"]


def test_a_lapsed_lease_gives_it_back_to_its_old_place(store, clock):
    """Every look says so at the very moment, whether or not somebody took anything since."""
    store.push_many("k", [b"1", b"2"])
    claimed = store.claim("k", lease=10)
    clock.go(9.999999)
    assert (store.peek("k"), claimed.lost) == (b"2", False)
    clock.go(0.000001)
    assert claimed.lost is True
    assert store.peek("k") == b"1"
    assert store.get("k", 1).state == "ready"
    assert store.get("k", 1).deadline is None
    assert store.stats().keys["k"].ready == 2
    store.wait("k", 0)
    again = store.claim("k")
    assert (again.payload, again.attempts) == (b"1", 2)


@pytest.mark.parametrize("verb", ["pull", "pullp", "pull_many", "pull_any"])
def test_what_comes_back_is_pulled_at_its_old_place(store, clock, verb):
    """Lapsed, nacked with a delay, and pushed with one: in the order of their seqs."""
    store.push("k", b"1", delay=5)
    store.push_many("k", [b"2", b"3", b"4"])
    store.claim("k", lease=5)
    store.claim("k").nack(5)
    take = {
        "pull": lambda: store.pull("k", 0),
        "pullp": lambda: store.pullp("k"),
        "pull_many": lambda: store.pull_many("k", 1)[0],
        "pull_any": lambda: store.pull_any(["none", "k"], 0)[1],
    }[verb]
    store.push("k", b"5")
    assert take() == b"4"
    clock.go(5)
    assert [take() for _ in range(4)] == [b"1", b"2", b"3", b"5"]


def test_an_extended_lease_ends_that_long_from_now(store, clock):
    """Sooner or later than it would have."""
    store.push("k", b"1")
    claimed = store.claim("k", lease=10)
    clock.go(6)
    claimed.extend(20)
    assert claimed.deadline == store.get("k", 1).deadline == clock.at(20)
    clock.go(19)
    assert store.peek("k") is None
    claimed.extend(0.5)
    assert claimed.deadline == clock.at(0.5)
    clock.go(0.5)
    assert store.peek("k") == b"1"
    with pytest.raises(LeaseError):
        claimed.extend(20)


SETTLINGS = {
    "ack": lambda each: each.ack(),
    "nack": lambda each: each.nack(),
    "nack later": lambda each: each.nack(5),
    "extend": lambda each: each.extend(5),
}


def lapse(store, claimed, clock):
    clock.go(30)


def take_over(store, claimed, clock):
    clock.go(30)
    assert store.claim("k").seq == claimed.seq


def take_over_and_finish(store, claimed, clock):
    take_over(store, claimed, clock)
    clock.go(30)
    store.claim("k").ack()


def die(store, claimed, clock):
    clock.go(30)
    store.claim("k", max_attempts=1).nack()


LOSSES = {
    "acked": lambda store, claimed, clock: claimed.ack(),
    "nacked": lambda store, claimed, clock: claimed.nack(),
    "nacked with a delay": lambda store, claimed, clock: claimed.nack(9),
    "lapsed": lapse,
    "taken over": take_over,
    "finished by another": take_over_and_finish,
    "dead": die,
    "put": lambda store, claimed, clock: store.put("k", b"new"),
    "clear": lambda store, claimed, clock: store.clear("k"),
    "remove": lambda store, claimed, clock: store.remove("k", claimed.seq),
    "ack_many": lambda store, claimed, clock: store.ack_many([claimed]),
}


def picture(store):
    return [(list(store.entries(key)), outcomes(store, key)) for key in ("k", "k/dead", "other")]


@pytest.mark.parametrize("settle", SETTLINGS.values(), ids=SETTLINGS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_lease_that_is_gone_settles_nothing(store, clock, loss, settle):
    """LeaseError, every time that it is tried; nothing changes, whoever has the entry now."""
    store.push("k", b"1")
    claimed = store.claim("k", lease=30)
    loss(store, claimed, clock)
    before = picture(store)
    for _ in range(2):
        with pytest.raises(LeaseError) as caught:
            settle(claimed)
        assert f"entry {claimed.seq} of 'k'" in str(caught.value)
        with pytest.raises(LeaseError):
            store.ack_many([claimed])
    assert picture(store) == before


@pytest.mark.parametrize("loss", ["lapsed", "taken over", "put", "clear", "remove"])
def test_a_loss_that_was_met_is_told_by_the_delivery(store, clock, loss):
    """`lost` is what a long block asks, to stop early."""
    store.push("k", b"1")
    claimed = store.claim("k", lease=30)
    assert not claimed.lost
    LOSSES[loss](store, claimed, clock)
    with pytest.raises(LeaseError):
        claimed.extend(3)
    assert claimed.lost
    assert "lost" in repr(claimed)


def test_a_lease_that_a_clock_set_back_has_ended_is_lost(store, clock):
    """What the file no longer believes, the delivery doesn't either."""
    store.push("k", b"1")
    claimed = store.claim("k", lease=30)
    clock.go(-10_000)
    assert store.peek("k") == b"1"
    assert claimed.lost
    with pytest.raises(LeaseError):
        claimed.ack()


def test_ack_many_acks_all_or_none(store, clock):
    """One that is lost keeps all of them from being acked."""
    seqs = store.push_many("k", [b"1", b"2", b"3", b"4"])
    claimed = store.claim_many("k", 4)
    store.remove("k", seqs[3])
    with pytest.raises(LeaseError, match=f"entry {seqs[3]} "):
        store.ack_many(claimed)
    assert outcomes(store) == []
    assert [state for _, state in states(store)] == ["leased"] * 3
    store.ack_many(iter(claimed[:2]))
    with pytest.raises(LeaseError, match=f"entry {seqs[0]} .* settled"):
        store.ack_many([claimed[2], claimed[0]])
    claimed[2].ack()
    store.ack_many([])
    assert outcomes(store) == [(seq, "acked") for seq in seqs[:3]]


def test_ack_many_of_one_delivery_twice_acks_none(store):
    """It can be settled once."""
    store.push("k", b"1")
    claimed = store.claim("k")
    with pytest.raises(LeaseError):
        store.ack_many([claimed, claimed])
    assert states(store) == [(b"1", "leased")]
    claimed.ack()


def test_a_delivery_of_another_store_is_refused(store, tmp_path):
    """A ValueError, and nothing is acked; not even one of the store's own."""
    store.push("k", b"1")
    with sqlspace.open(tmp_path / "other.db", sync=False) as other:
        other.push("k", b"2")
        foreign = other.claim("k")
        with pytest.raises(ValueError, match="another store"):
            store.ack_many([store.claim("k"), foreign])
        foreign.ack()
    assert states(store) == [(b"1", "leased")]


def test_a_settling_that_comes_second_leaves_the_first_as_it_is(store):
    """Two threads settle one delivery: the later one gets LeaseError, and changes nothing."""
    store.push("k", b"1")
    errors = []

    def nack():
        try:
            claimed.nack()
        except LeaseError as error:
            errors.append(str(error))

    second = threading.Thread(target=nack)
    with store.claim("k") as claimed:
        with store.transaction() as together:
            second.start()  # and waits, if it gets so far, for this one's end
            together.ack(claimed)
        second.join()
        assert repr(claimed).startswith("<settled")
    assert len(errors) == 1
    assert "settled already" in errors[0]
    assert outcomes(store) == [(claimed.seq, "acked")]


# -- the block


def test_a_block_acks_at_its_end(store):
    """Leased while it runs, acked when it is over."""
    store.push("k", b"1")
    with store.claim("k") as claimed:
        assert states(store) == [(b"1", "leased")]
    assert outcomes(store) == [(claimed.seq, "acked")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_block_that_an_exception_leaves_nacks(store, error):
    """Whatever the exception is, it comes through, and the entry is ready at once."""
    store.push_many("k", [b"1", b"2"])
    with pytest.raises(error, match="mine"), store.claim("k"):
        raise error("mine")
    assert states(store) == [(b"1", "ready"), (b"2", "ready")]
    assert store.claim("k").attempts == 2


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("settle", "left"),
    [
        (lambda claimed: claimed.ack(), []),
        (lambda claimed: claimed.nack(), ["ready"]),
        (lambda claimed: claimed.nack(9), ["delayed"]),
    ],
    ids=["ack", "nack", "nack later"],
)
def test_after_an_explicit_settling_the_end_of_the_block_does_nothing(store, settle, left, fails):
    """Neither by its end nor by an exception."""
    store.push("k", b"1")
    with contextlib.suppress(LookupError), store.claim("k") as claimed:
        settle(claimed)
        if fails:
            raise LookupError
    assert [state for _, state in states(store)] == left
    assert len(outcomes(store)) == (not left)


@pytest.mark.parametrize("loss", ["lapsed", "taken over", "put", "clear", "remove"])
def test_the_end_of_a_block_whose_lease_is_lost_raises(store, clock, loss):
    """The work may be done twice, and whoever did it must know."""
    store.push("k", b"1")
    with pytest.raises(LeaseError), store.claim("k", lease=30) as claimed:
        LOSSES[loss](store, claimed, clock)
    assert not any(outcome == "acked" for _, outcome in outcomes(store))


@pytest.mark.parametrize("loss", ["lapsed", "taken over"])
def test_a_block_of_a_lost_lease_does_not_begin(store, clock, loss):
    """Another may be at the same work already."""
    store.push("k", b"1")
    claimed = store.claim("k", lease=30)
    LOSSES[loss](store, claimed, clock)
    with pytest.raises(LeaseError), claimed:
        pytest.fail("the work has begun")


def close(store, claimed):
    store.close()


def lose(store, claimed):
    store.clear("k")


@pytest.mark.parametrize("deed", [close, lose])
def test_a_nack_that_fails_never_hides_the_exception_of_the_block(path, caplog, deed):
    """It is told by the log instead."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"1")
        with pytest.raises(LookupError, match="mine"), store.claim("k") as claimed:
            deed(store, claimed)
            raise LookupError("mine")
    assert "could not be given back" in caplog.text


def test_a_nack_that_a_transaction_forbids_does_not_hide_the_exception_either(store, caplog):
    """A delivery's block inside a transaction of the same store: the caller's error comes out."""
    store.push("k", b"1")
    claimed = store.claim("k")
    with pytest.raises(LookupError, match="mine"), store.transaction(), claimed:
        raise LookupError("mine")
    assert "could not be given back" in caplog.text


def test_a_block_that_could_not_give_back_is_renewed_no_more(store, clock):
    """So the entry comes back when the lease is over."""
    store.push("k", b"1")
    claimed = store.claim("k", lease=30)
    with pytest.raises(LookupError), store.transaction(), claimed:
        raise LookupError
    assert claimed not in store._renewals._due
    clock.go(30)
    assert states(store) == [(b"1", "ready")]


def test_a_store_that_is_closed_inside_a_block_leaves_the_lease_as_it_is(path, clock):
    """The end of the block says so, and when the lease is over the entry is there again."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"1")
        with pytest.raises(sqlspace.ClosedError), store.claim("k", lease=30):
            store.close()
    with sqlspace.open(path, sync=False) as store:
        assert states(store) == [(b"1", "leased")]
        clock.go(30)
        assert store.claim("k").attempts == 2


# -- renewing


def test_a_block_renews_its_lease_again_and_again(store, clock):
    """It runs ten times as long as its lease, and nobody else gets the entry meanwhile."""
    store.push("k", b"1")
    with store.claim("k", lease=0.3) as claimed:
        for _ in range(30):
            clock.go(0.1)
            wanted = clock.at(0.3)
            eventually(lambda wanted=wanted: claimed.deadline == wanted, "a renewal")
            eventually(lambda wanted=wanted: store.get("k", 1).deadline == wanted, "its commit")
            assert store.claimp("k") is None
    assert outcomes(store) == [(1, "acked")]


def test_a_lease_is_renewed_at_a_third_of_its_length(store, clock):
    """Counted from the claim: one that has lain about before its block is renewed sooner."""
    store.push_many("k", [b"1", b"2", b"3"])
    for lain, wanted in ((0, 100), (60, 40), (250, 0)):
        claimed = store.claim("k", lease=300)
        clock.go(lain)
        before = time.monotonic()
        store._renewals.add(claimed)
        due = store._renewals._due[claimed]
        assert before + wanted <= due <= time.monotonic() + wanted
        store._renewals.discard(claimed)


def test_an_extended_lease_is_renewed_by_its_new_length(store, clock):
    """Inside a block, extend changes what the renewals go by."""
    store.push("k", b"1")
    with store.claim("k", lease=9000) as claimed:
        claimed.extend(0.3)
        clock.go(0.1)
        eventually(lambda: claimed.deadline == clock.at(0.3), "a renewal")


def test_many_blocks_are_renewed_by_one_thread_which_ends_with_the_last(store, clock):
    """And begins with the first."""
    store.push_many("k", [b"x"] * 5)
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        claimed = [stack.enter_context(store.claim("k", lease=0.3)) for _ in range(5)]
        for _ in range(3):
            clock.go(0.1)
            wanted = clock.at(0.3)
            eventually(
                lambda wanted=wanted: {each.deadline for each in claimed} == {wanted}, "renewals"
            )
            assert threading.active_count() == before + 1
    no_thread_is_left()
    store.push("k", b"again")
    with store.claim("k", lease=0.3) as again:
        clock.go(0.1)
        eventually(lambda: again.deadline == clock.at(0.3), "a renewal")


def test_a_claim_outside_of_a_block_is_not_renewed(store, clock):
    """Only a block says that somebody is at work."""
    store.push_many("k", [b"1", b"2"])
    claimed = store.claim("k", lease=0.3)
    with store.claim("k", lease=0.3) as other:
        clock.go(0.1)
        eventually(lambda: other.deadline == clock.at(0.3), "a renewal")
        assert claimed.deadline == clock.at(0.2)


def test_a_lease_of_a_thousand_years_keeps_no_other_from_being_renewed(store, clock):
    """It lasts longer than any thread may sleep."""
    store.push_many("k", [b"1", b"2"])
    with store.claim("k", lease=1e12), store.claim("k", lease=0.3) as short:
        for _ in range(3):
            clock.go(0.1)
            wanted = clock.at(0.3)
            eventually(lambda wanted=wanted: short.deadline == wanted, "a renewal")


def test_the_thread_survives_a_lease_that_is_longer_than_a_thread_may_sleep(store):
    """Alone: its first sleep is the one that is too long."""
    store.push("k", b"1")
    with store.claim("k", lease=1e12):
        renewals = store._renewals
        eventually(lambda: renewals._changed._waiters, "the thread's sleep")
        assert renewals._thread.is_alive()


def test_a_renewal_that_fails_is_tried_again(store, clock, monkeypatch, caplog):
    """The file was busy, or the disk was full: the lease has two thirds left."""
    failures = [sqlspace.BusyError("others have it")] * 3
    transact = store._database.transact

    def failing(*arguments, **options):
        if threading.current_thread().name == "sqlspace-renewals" and failures:
            raise failures.pop()
        return transact(*arguments, **options)

    monkeypatch.setattr(store._database, "transact", failing)
    store.push("k", b"1")
    with store.claim("k", lease=0.3) as claimed:
        clock.go(0.1)
        eventually(lambda: claimed.deadline == clock.at(0.3), "a renewal")
    assert failures == []
    assert "others have it" in caplog.text


def test_a_lease_that_is_lost_in_its_block_is_told_and_renewed_no_more(store, clock, caplog):
    """The others of the same moment are renewed all the same."""
    store.push_many("k", [b"1", b"2"])
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(store.claim("k", lease=0.3))
        stack.enter_context(pytest.raises(LeaseError))
        gone = stack.enter_context(store.claim("k", lease=0.3))
        store.remove("k", gone.seq)
        clock.go(0.1)
        eventually(lambda: gone.lost, "the loss")
        eventually(lambda: kept.deadline == clock.at(0.3), "a renewal")
        eventually(lambda: list(store._renewals._due) == [kept], "the end of its renewals")
    assert f"lease of entry {gone.seq} " in caplog.text
    assert outcomes(store) == [(kept.seq, "acked")]


def test_an_ack_of_many_in_their_blocks_makes_no_renewal_complain(store, clock, caplog):
    """What is settled is not lost, however the renewals' moment falls."""
    transact, twice = store._database.transact, []

    def and_renew(*arguments, **options):
        transact(*arguments, **options)
        if not twice:
            twice.append(True)
            store._renewals._renew(list(claimed))

    store.push_many("k", [b"1", b"2"])
    claimed = store.claim_many("k", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store._database, "transact", and_renew)
        store.ack_many(claimed)
    assert [each.lost for each in claimed] == [False, False]
    assert caplog.text == ""


def test_a_store_that_is_forgotten_lives_as_long_as_its_deliveries(path):
    """Who works on an entry needs no store to ack it; afterwards the store warns as always."""
    store = sqlspace.open(path, sync=False)
    store.push("k", b"1")
    claimed = store.claim("k", lease=1.0)  # the thread comes round soon, and ends
    del store
    gc.collect()
    with claimed:
        pass
    no_thread_is_left()
    with pytest.warns(ResourceWarning, match="unclosed"):
        del claimed
        gc.collect()
    with sqlspace.open(path, sync=False) as store:
        assert outcomes(store) == [(1, "acked")]


def test_a_block_that_is_forgotten_is_renewed_no_more(store, clock):
    """Nobody is at work any more: the entry comes back, and the thread ends."""
    store.push("k", b"1")
    claimed = [store.claim("k", lease=0.3)]
    claimed[0].__enter__()
    clock.go(0.1)
    eventually(lambda: claimed[0].deadline == clock.at(0.3), "a renewal")
    claimed.clear()
    no_thread_is_left()
    clock.go(0.3)
    assert store.claim("k").attempts == 2


# -- dead letters


def test_an_ack_that_is_undone_after_a_compact_left_all_as_it_was(store, path):
    """Its tombstone was deleted meanwhile, or, being the highest row, laid bare."""
    store.push_many("k", [b"1", b"2"], ttl=1000)
    claimed = store.claim_many("k", 2, lease=100, max_attempts=3)
    before = list(store.entries("k"))
    for each in claimed:
        each.ack()
    with sqlspace.open(path, sync=False) as other:
        other.compact()
    connection = store._database._session.connection
    for each in claimed:
        entries.unack(connection, each._grant)
    assert list(store.entries("k")) == before
    for each in claimed:
        assert entries.extend(connection, each.seq, each._grant.token, clocks.now(), 1)


def test_an_extension_that_fails_leaves_the_end_as_it_was(store, clock):
    """A delivery tells, and is renewed by, the end that stands in the file."""
    store.push("k", b"1")
    claimed = store.claim("k", lease=30)
    connection = store._database._session.connection
    connection.set_commit_hook(lambda: True)
    with pytest.raises(sqlspace.StoreError):
        claimed.extend(3000)
    connection.set_commit_hook(None)
    assert claimed.deadline == clock.at(30) == store.get("k", claimed.seq).deadline


@pytest.mark.parametrize(
    "settle",
    [
        lambda store, claimed: claimed.ack(),
        lambda store, claimed: claimed.nack(),
        lambda store, claimed: store.ack_many([claimed]),
    ],
    ids=["ack", "nack", "ack_many"],
)
def test_a_settling_whose_commit_fails_can_be_said_again(store, settle):
    """It didn't happen, so the delivery is not settled."""
    store.push("k", b"1")
    claimed = store.claim("k", lease=30)
    connection = store._database._session.connection
    connection.set_commit_hook(lambda: True)
    with pytest.raises(sqlspace.StoreError):
        settle(store, claimed)
    connection.set_commit_hook(None)
    assert states(store) == [(b"1", "leased")]
    settle(store, claimed)
    assert states(store) != [(b"1", "leased")]


def test_a_nack_of_the_last_attempt_makes_a_dead_letter(store, clock, caplog):
    """A tombstone here, a new entry with its origin in the headers there."""
    seq = store.push("k", b"1", headers={"a": "b"}, ttl=1000)
    pushed_at = clock.seconds
    store.claim("k", max_attempts=2).nack()
    assert states(store) == [(b"1", "ready")]
    clock.go(1)
    store.claim("k", max_attempts=2).nack(delay=50)
    assert states(store) == []
    assert outcomes(store) == [(seq, "dead")]
    [letter] = store.entries("k/dead")
    assert letter.seq > seq
    assert (letter.payload, letter.state, letter.attempts) == (b"1", "ready", 0)
    assert (letter.expires_at, letter.pushed_at) == (None, clock.seconds)
    assert letter.headers == {
        "a": "b",
        "sqlspace-key": "k",
        "sqlspace-seq": str(seq),
        "sqlspace-pushed-at": f"{pushed_at:.6f}",
        "sqlspace-attempts": "2",
        "sqlspace-reason": "attempts",
    }
    assert "is dead after 2 attempts" in caplog.text


LOOKS = {
    "len": lambda store: store.len("k/dead") == 1,
    "keys": lambda store: store.keys() == ["k/dead"],
    "stats": lambda store: store.stats().keys["k/dead"].ready == 1,
    "stats of the key": lambda store: store.stats().keys["k"].dead == 1,
    "entries": lambda store: [each.payload for each in store.entries("k/dead")] == [b"1"],
    "get": lambda store: store.get("k/dead", 2).payload == b"1",
    "peek": lambda store: store.peek("k/dead") == b"1",
    "wait": lambda store: store.wait("k/dead", 0) is None,
    "wait_empty": lambda store: store.wait_empty("k", 0) is None,
    "pull": lambda store: store.pull("k/dead", 0) == b"1",
    "pullp": lambda store: store.pullp("k/dead") == b"1",
    "pull_many": lambda store: store.pull_many("k/dead", 5) == [b"1"],
    "pull_any": lambda store: store.pull_any(["k", "k/dead"], 0) == ("k/dead", b"1"),
    "claim": lambda store: store.claim("k/dead", 0).payload == b"1",
    "claimp": lambda store: store.claimp(["k", "k/dead"]).payload == b"1",
    "claim_many": lambda store: len(store.claim_many("k/dead", 5)) == 1,
    "clear": lambda store: store.clear("k/dead") == 1,
    "remove": lambda store: store.remove("k", 1) is False,
    "len of the key": lambda store: store.len("k") == 0,
    "peek of the key": lambda store: store.peek("k") is None,
    "get of the key": lambda store: store.get("k", 1) is None,
    "entries of the key": lambda store: list(store.entries("k")) == [],
    "clear of the key": lambda store: store.clear("k") == 0,
    "requeue": lambda store: store.requeue("k") == 1,
    "the transaction's len": lambda store: in_transaction(store, lambda it: it.len("k/dead")) == 1,
    "the transaction's peek": lambda store: (
        in_transaction(store, lambda it: it.peek("k/dead")) == b"1"
    ),
    "the transaction's pull": lambda store: (
        in_transaction(store, lambda it: it.pullp("k/dead")) == b"1"
    ),
    "the transaction's clear": lambda store: (
        in_transaction(store, lambda it: it.clear("k/dead")) == 1
    ),
}


def in_transaction(store, look):
    with store.transaction() as together:
        return look(together)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_lapse_of_the_last_attempt_is_a_dead_letter_for_whoever_looks_first(store, clock, look):
    """The row decides: it needs no taking verb that comes by before."""
    store.push("k", b"1")
    store.claim("k", lease=10, max_attempts=1)
    clock.go(10)
    assert look(store)


def test_a_lapse_of_the_last_attempt_leaves_what_a_nack_leaves(store, clock):
    """A tombstone, and a dead letter; while the lease holds there is neither."""
    store.push("k", b"1")
    store.claim("k", lease=10, max_attempts=1)
    clock.go(9)
    assert store.keys() == ["k"]
    assert store.stats().keys["k"].leased == 1
    clock.go(1)
    assert store.keys() == ["k/dead"]
    assert outcomes(store) == [(1, "dead")]
    assert store.get("k/dead", 2).headers["sqlspace-attempts"] == "1"
    assert store.claimp("k") is None


def test_the_number_of_the_last_claim_counts(store, clock):
    """Each claim writes its own; attempts that are above it already make it the last."""
    store.push("k", b"1")
    store.claim("k", max_attempts=1, lease=5).extend(50)
    clock.go(50)
    assert store.len("k/dead") == 1
    store.requeue("k")
    for _ in range(5):
        store.claim("k").nack()
    claimed = store.claim("k", max_attempts=2)
    assert claimed.attempts == 6
    clock.go(30)
    assert store.keys() == ["k/dead"]
    store.requeue("k")
    store.claim("k", max_attempts=2).nack()
    store.claim("k").nack()
    assert store.keys() == ["k"]
    assert store.claim("k", max_attempts=10**40).attempts == 3


def test_an_ack_of_the_last_attempt_is_an_ack(store):
    """Dead is only what came to nothing."""
    store.push("k", b"1")
    store.claim("k", max_attempts=1).ack()
    assert outcomes(store) == [(1, "acked")]
    assert store.keys() == []


@pytest.mark.parametrize("verb", ["claim", "claimp", "claim_many", "consume"])
def test_max_attempts_needs_a_key_that_leaves_room_for_its_dead_letters(store, verb):
    """KEY/dead must be a key; without max_attempts any key will do."""
    longest = "k" * (1024 - len("/dead"))
    extra = (1,) if verb == "claim_many" else ()
    store.push_many(longest, [b"1"])
    store.push_many(longest + "k", [b"2"])
    for keys in (longest + "k", ["k", longest + "k"]):
        with pytest.raises(ValueError, match=r"max_attempts .* at most 1,019 bytes"):
            getattr(store, verb)(keys, *extra, max_attempts=1)
    assert getattr(store, verb)(longest + "k", *extra)
    store.claim(longest, max_attempts=1).nack()
    assert store.len(longest + "/dead") == 1


def test_claim_many_writes_its_attempts_too(store, clock):
    """Each entry for itself."""
    store.push_many("k", [b"1", b"2", b"3"])
    claimed = store.claim_many("k", 3, lease=5, max_attempts=1)
    claimed[0].ack()
    claimed[1].nack()
    clock.go(5)
    assert [each.payload for each in store.entries("k/dead")] == [b"2", b"3"]


def test_requeue_moves_the_dead_letters_back_with_their_own_headers(store, clock):
    """As new entries, without attempts, at the end of where they came from; how many."""
    store.push_many("k", [b"1", b"2"])
    store.push("k", b"3", headers={"a": "b"})
    for each in store.claim_many("k", 3, max_attempts=1):
        each.nack()
    store.push("k", b"new")
    assert store.requeue("k") == 3
    assert store.requeue("k") == 0
    found = list(store.entries("k"))
    assert [each.payload for each in found] == [b"new", b"1", b"2", b"3"]
    assert [each.headers for each in found] == [{}, {}, {}, {"a": "b"}]
    assert {each.attempts for each in found} == {0}
    assert store.keys() == ["k"]


def test_requeue_takes_thousands_and_leaves_what_is_claimed(store):
    """All that stand ready; a letter that somebody reads stays his."""
    store.push_many("k/dead", [b"%d" % number for number in range(2500)])
    reading = store.claim("k/dead")
    assert store.requeue("k") == 2499
    assert store.len("k") == 2499
    assert states(store, "k/dead") == [(b"0", "leased")]
    reading.ack()


def test_a_dead_letter_with_an_origin_that_is_no_key_goes_back_to_the_key_asked_for(store):
    """Headers are the caller's: nothing of them may put an entry where nobody finds it."""
    for wrong in ("", "a\0b", "k" * 1025, "k/dead"):
        store.push("k/dead", wrong[:9].encode(), headers={"sqlspace-key": wrong})
    assert store.requeue("k") == 4
    assert store.len("k") == 4


def test_a_dead_letter_may_die_too(store):
    """It is an entry as any other, under a key as any other."""
    store.push("k", b"1")
    store.claim("k", max_attempts=1).nack()
    store.claim("k/dead", max_attempts=1).nack()
    assert store.keys() == ["k/dead/dead"]
    assert store.requeue("k/dead") == 1
    assert store.requeue("k") == 1
    assert store.pull("k", 0) == b"1"


# -- in order


def test_an_ordered_claim_waits_for_what_is_leased_before_it(store):
    """It binds those who say it: pull and a plain claim go on."""
    store.push_many("k", [b"1", b"2", b"3", b"4"])
    first = store.claimp("k", ordered=True)
    assert store.claimp("k", ordered=True) is None
    with pytest.raises(DeadlineError):
        store.claim("k", 0.01, ordered=True)
    assert store.claimp("k").payload == b"2"
    assert store.pullp("k") == b"3"
    first.ack()
    assert store.claimp("k", ordered=True) is None  # 2 is held still


@pytest.mark.parametrize("end", ["ack", "lapse", "remove", "nack"])
def test_an_ordered_claim_goes_on_when_what_was_before_it_is_settled(store, clock, end):
    """Acked or removed: the next one. Back again: that one."""
    store.push_many("k", [b"1", b"2"])
    first = store.claim("k", ordered=True, lease=10)
    {
        "ack": first.ack,
        "lapse": lambda: clock.go(10),
        "remove": lambda: store.remove("k", first.seq),
        "nack": first.nack,
    }[end]()
    wanted = b"2" if end in ("ack", "remove") else b"1"
    assert store.claimp("k", ordered=True).payload == wanted
    assert store.claimp("k", ordered=True) is None


def test_an_ordered_claim_waits_out_a_nacks_delay_but_not_a_pushs(store, clock):
    """What failed is tried again first; what is to come later isn't waited for."""
    store.push("k", b"later", delay=100)
    store.push_many("k", [b"1", b"2"])
    claimed = store.claimp("k", ordered=True)
    assert claimed.payload == b"1"
    claimed.nack(10)
    assert store.claimp("k", ordered=True) is None
    assert store.peek("k") == b"2"
    clock.go(10)
    again = store.claimp("k", ordered=True)
    assert (again.payload, again.attempts) == (b"1", 2)
    again.ack()
    assert store.claimp("k", ordered=True).payload == b"2"
    clock.go(90)
    assert store.claimp("k", ordered=True).payload == b"later"  # nothing before it is held


def test_of_many_that_have_died_none_comes_back(store, clock):
    """More than are moved in one step: the others are no less dead."""
    store.push_many("k", [b"dead"] * (2 * dead_letters.BURY_ROWS))
    store.claim_many("k", 2 * dead_letters.BURY_ROWS, lease=1, max_attempts=1)
    clock.go(2)
    assert store.pullp("k") is None
    assert store.pull_many("k", 10) == []


def test_an_ordered_claim_is_not_held_up_by_the_many_that_have_died(store, clock):
    """More than are moved in one step: those that still stand there are no leases any more."""
    store.push_many("k", [b"dead"] * (2 * dead_letters.BURY_ROWS))
    last = store.push("k", b"last")
    store.claim_many("k", 2 * dead_letters.BURY_ROWS, lease=1, max_attempts=1)
    clock.go(2)
    assert store.claimp("k", ordered=True).seq == last


def test_an_ordered_claim_of_several_keys_takes_the_first_that_is_not_blocked(store):
    """Order is a matter of each key."""
    store.push_many("a", [b"a1", b"a2"])
    store.push_many("b", [b"b1", b"b2"])
    assert store.claimp(["a", "b"], ordered=True).payload == b"a1"
    assert store.claimp(["a", "b"], ordered=True).payload == b"b1"
    assert store.claimp(["a", "b"], ordered=True) is None


def test_an_ordered_claim_that_waits_is_woken_by_the_settling(store):
    """By the ack of what was before it; by a nack for that one."""
    store.push_many("k", [b"1", b"2"])
    for settle, wanted in (("nack", b"1"), ("ack", b"2")):
        first = store.claim("k", ordered=True)
        found = []
        thread = threading.Thread(
            target=lambda found=found: found.append(store.claim("k", 60, ordered=True))
        )
        thread.start()
        getattr(first, settle)()
        thread.join()
        assert found[0].payload == wanted
        found[0].nack()


# -- time to live


def test_a_time_to_live_does_not_run_out_during_a_lease(store, clock):
    """The entry counts as long as it is leased, and its ack works."""
    seq = store.push("k", b"1", ttl=10)
    claimed = store.claim("k", lease=50)
    clock.go(20)
    assert (store.len("k"), store.get("k", seq).state) == (1, "leased")
    store.push_many("other", [b"x"] * 200)  # sweeps
    claimed.ack()
    assert outcomes(store) == [(seq, "acked")]


@pytest.mark.parametrize("max_attempts", [None, 1])
@pytest.mark.parametrize("delay", [0, 5])
def test_a_nack_after_its_time_expires_it(store, clock, max_attempts, delay):
    """Nobody wants it any more, not even as a dead letter."""
    seq = store.push("k", b"1", ttl=10)
    claimed = store.claim("k", lease=50, max_attempts=max_attempts)
    clock.go(10)
    claimed.nack(delay)
    assert outcomes(store) == [(seq, "expired")]
    assert store.keys() == []


@pytest.mark.parametrize("look", ["len", "keys", "entries", "peek", "claimp"])
def test_a_lease_that_lapses_after_its_time_expires_it(store, clock, look):
    """For whoever looks first."""
    seq = store.push("k", b"1", ttl=10)
    store.claim("k", lease=50, max_attempts=1)
    clock.go(50)
    found = {
        "len": lambda: store.len("k") + store.len("k/dead"),
        "keys": store.keys,
        "entries": lambda: [*store.entries("k"), *store.entries("k/dead")],
        "peek": lambda: store.peek("k") or store.peek("k/dead"),
        "claimp": lambda: store.claimp(["k", "k/dead"]),
    }[look]()
    assert not found
    store.clear("k")
    assert outcomes(store) == [(seq, "expired")]


def test_what_dies_before_its_time_is_over_is_dead_however_late_that_is_seen(store, clock):
    """A dead letter has no time to live."""
    store.push("k", b"1", ttl=60)
    store.claim("k", lease=50, max_attempts=1)
    clock.go(1000)
    assert store.keys() == ["k/dead"]
    assert outcomes(store) == [(1, "dead")]


# -- what fails in the middle


INTERRUPTED = """
import collections, contextlib, random, signal, sys, sqlspace

verb, seed, history = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
random.seed(seed)
store = sqlspace.open(sys.argv[1], sync=False, history=history)
hits = rounds = 0
problems = []

armed = False  # the signal may reach the renewals' thread, and this one long afterwards

def interrupt(*_):
    if armed:
        raise KeyboardInterrupt

def states():
    return collections.Counter(entry.state for entry in store.entries("k"))

def ready(number):
    store.clear("k")
    store.push_many("k", [b"x"] * number)

def claims():
    return store.claim_many("k", 4)

signal.signal(signal.SIGALRM, interrupt)
while rounds < int(sys.argv[5]):
    rounds += 1
    if rounds % 50 == 1:
        ready(0)
    store.clear("k")
    store.push_many("k", [b"x"] * 4)
    got, done = [], []
    held = [] if verb.startswith("claim") or verb == "with" else claims()
    armed = True
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0004))
        if verb == "claim":
            got.extend(map(store.claim, ("k",), (5,)))
        elif verb == "claimp":
            got.extend(map(store.claimp, ("k",)))
        elif verb == "claim_many":
            got.extend(*map(store.claim_many, ("k",), (3,)))
        elif verb == "ack":
            done.extend(map(sqlspace.Delivery.ack, held[:1]))
        elif verb == "nack":
            done.extend(map(sqlspace.Delivery.nack, held[:1]))
        elif verb == "ack_many":
            done.extend(map(store.ack_many, (held[:3],)))
        else:
            with store.claim("k"):
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        armed = False
    except KeyboardInterrupt:
        armed = False
        hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    found = states()
    if verb.startswith("claim"):
        if found != collections.Counter(ready=4 - len(got), leased=len(got)):
            problems.append((rounds, len(got), dict(found)))
        for each in got:
            each.nack()
        if got and states() != {"ready": 4}:
            problems.append((rounds, "unsettled", dict(states())))
    elif verb in ("ack", "ack_many"):
        number = 0 if not done else 1 if verb == "ack" else 3
        if found != collections.Counter(leased=4 - number):
            problems.append((rounds, number, dict(found)))
        for each in held:  # those that the interrupt kept from it can be settled still
            try:
                each.ack()
            except sqlspace.LeaseError:
                if not (done and each in held[:number]):
                    problems.append((rounds, "gone", each))
    elif verb == "nack":
        if done and found != {"leased": 3, "ready": 1}:
            problems.append((rounds, dict(found)))
        if found not in ({"leased": 3, "ready": 1}, {"leased": 4}):
            problems.append((rounds, dict(found)))
    else:
        if sum(found.values()) not in (3, 4) or found["leased"] > 1:
            problems.append((rounds, dict(found)))
    assert not store._database._session.connection.in_transaction
store.clear("k")
store.push("after", b"works")
with store.claim("after", 5) as claimed:
    assert claimed.payload == b"works"
assert store.len("after") == 0
store.close()
print(hits, problems[:5])
"""


@pytest.mark.parametrize("history", [0, 100])
@pytest.mark.parametrize(
    "verb", ["claim", "claimp", "claim_many", "ack", "ack_many", "nack", "with"]
)
def test_an_interrupted_claim_leased_nothing_and_an_interrupted_ack_did_nothing(
    path, child, verb, history
):
    """Ctrl-C at any moment: nothing is lost, nothing is doubled, and the store goes on.

    A nack may have happened, as it says; the end of a block likewise.
    """
    process = child(INTERRUPTED, path, verb, 7, history, 500)
    hits, _, problems = process.told().partition(" ")
    assert problems == "[]"
    assert int(hits) > 20
    process.finish()


@pytest.mark.parametrize("verb", ["pullp", "push", "ack"])
def test_an_interrupt_of_the_sweeping_that_follows_a_verb_undoes_the_verb(
    store, clock, monkeypatch, verb
):
    """Now and then a verb sweeps what has expired, in a transaction after its own commit."""
    store.push("other", b"x", ttl=5)
    seqs = store.push_many("k", [b"x"] * 64)
    last = seqs[-2]
    assert last % 64 == 0
    claimed = None
    if verb == "ack":
        claimed = next(each for each in store.claim_many("k", 99) if each.seq == last)
    elif verb == "pullp":
        store.pull_many("k", 62)
    else:
        store.push_many("k", [b"x"] * (63 - seqs[-1] % 64))
    clock.go(5)
    before = states(store)
    expire = ageing.expire

    def interrupted(*arguments):
        expire(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ageing, "expire", interrupted)
        with pytest.raises(KeyboardInterrupt):
            {
                "pullp": lambda: store.pullp("k"),
                "push": lambda: store.push("k", b"new"),
                "ack": lambda: sqlspace.Delivery.ack(claimed),
            }[verb]()
    assert states(store) == before
    if verb == "ack":
        claimed.ack()


def test_a_child_that_was_forked_in_a_block_renews_nothing(store, clock):
    """The lease is the parent's: the child has no thread, and leaves the row alone."""
    store.push("k", b"1")
    with store.claim("k", lease=0.3) as claimed:
        wakes, woken = os.pipe()
        pid = os.fork()
        if not pid:
            code = 1
            with contextlib.suppress(BaseException):
                os.read(wakes, 1)
                alone = threading.active_count() == 1
                none = not store._renewals._due and store._renewals._thread is None
                store.push("k", b"2")  # the store itself opens anew
                with store.claim("k", lease=30):
                    pass
                code = 0 if alone and none else 2
            os._exit(code)
        for _ in range(3):
            clock.go(0.1)
            eventually(lambda: claimed.deadline == clock.at(0.3), "the parent's renewal")
        os.write(woken, b"!")
        assert os.waitpid(pid, 0)[1] == 0
        os.close(wakes)
        os.close(woken)
    assert [outcome for _, outcome in sorted(outcomes(store))] == ["acked", "acked"]


AT_EXIT = """
store = sqlspace.open(argv[0], sync=False)
store.push_many("k", [b"x"] * 8)
inside = threading.Semaphore(0)

def work():
    with store.claim("k", lease=0.1 if argv[1] == "renewing" else 30):
        inside.release()
        time.sleep(1000)

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
for _ in range(4):
    inside.acquire()
if argv[1] == "renewing":
    eventually(lambda: max(e.deadline or 0 for e in store.entries("k")) > time.time() + 0.05)
if argv[1] == "closed":
    store.close()
tell("over")
"""


@pytest.mark.parametrize("how", ["open", "renewing", "closed"])
def test_an_interpreter_ends_while_daemon_threads_are_inside_of_blocks(path, child, how):
    """Exit code 0, no hang, nothing on stderr but that the store wasn't closed."""
    process = child(AT_EXIT, path, how)
    process.expect("over")
    assert process._process.wait(60) == 0, process.errors()
    assert "Fatal" not in process.errors()
    with sqlspace.open(path, sync=False) as store:
        assert store.len("k") == 8
