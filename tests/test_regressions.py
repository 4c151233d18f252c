"""Failures that the model has found, each in the few steps that show it."""

import contextlib

import pytest

import sqlspace
import sqlspace.clock

SECOND = 1_000_000


class Clock:
    """Stands still until it is moved."""

    def __init__(self):
        self.micros = 1_800_000_000 * SECOND

    def now(self):
        return self.micros

    def move(self, seconds):
        self.micros += round(seconds * SECOND)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sqlspace.clock, "now", clock.now)
    return clock


@pytest.fixture
def store(tmp_path, clock):
    with sqlspace.open(tmp_path / "queue.db", sync=False) as store:
        yield store


def kill(store, clock, key):
    """Have the head of `key` die by the clock; nothing has moved it yet."""
    store.claim(key, 0, lease=1, max_attempts=1)
    clock.move(1)


def test_a_lease_that_a_clock_far_behind_has_ended_is_lost(store, clock):
    """`lost` says what the row says: an end further ahead than twice its length and a minute."""
    store.push("a", b"1")
    delivery = store.claim("a", 0, lease=1)
    clock.move(-61)
    assert delivery.lost is False
    clock.move(-0.000001)
    assert delivery.lost is True
    with pytest.raises(sqlspace.LeaseError):
        delivery.ack()


@pytest.mark.parametrize("held", ["delay", "lease"])
def test_what_the_codec_cannot_read_is_buried_also_when_it_has_just_come_due(store, clock, held):
    """The look that finds it rolls back what had made it ready; it is ready all the same."""
    if held == "delay":
        seq = store.push("a", b"{", delay=1)
    else:
        seq = store.push("a", b"{")
        store.claim("a", 0, lease=1)
    store.push("a", b"2")
    clock.move(1)
    space = store.space()
    with pytest.raises(sqlspace.DecodeError) as caught:
        space.inp("a")
    assert (caught.value.seq, caught.value.payload) == (seq, b"{")
    assert [entry.payload for entry in store.entries("a/dead")] == [b"{"]
    assert space.inp("a") == 2


def test_a_dead_letter_that_cannot_be_read_is_where_the_error_says(store, clock):
    """Also if the very look that finds it has moved it there."""
    store.push("a", b"{")
    kill(store, clock, "a")
    with pytest.raises(sqlspace.DecodeError) as caught:
        store.space().inp("a/dead")
    assert [stone.seq for stone in store.history("a/dead")] == [caught.value.seq]
    assert [entry.payload for entry in store.entries("a/dead/dead")] == [b"{"]


def test_what_has_expired_holds_up_no_ordered_claim(store, clock):
    """An entry that a nack holds back blocks the others for as long as it lives, no longer."""
    store.push("a", b"1", ttl=5)
    store.push("a", b"2")
    store.claim("a", 0, ordered=True).nack(60)
    assert store.claimp("a", ordered=True) is None
    clock.move(5)
    assert store.claim("a", 0, ordered=True).payload == b"2"


def test_max_len_counts_the_dead_letters_that_have_not_moved_yet(store, clock):
    """It compares what `len` says."""
    store.push("a", b"1")
    kill(store, clock, "a")
    with pytest.raises(sqlspace.DeadlineError):
        store.push("a/dead", b"2", max_len=1, timeout=0)
    with store.transaction() as together, pytest.raises(sqlspace.DeadlineError):
        together.push("a/dead", b"2", max_len=1)
    assert [entry.payload for entry in store.entries("a/dead")] == [b"1"]


@pytest.mark.parametrize("looked", [False, True])
def test_without_a_history_the_dedupe_of_what_is_dead_is_forgotten(tmp_path, clock, looked):
    """Whether somebody has looked at the dead letters meanwhile or not."""
    with sqlspace.open(tmp_path / "short.db", sync=False, history=0) as store:
        first = store.push("a", b"1", dedupe="x")
        kill(store, clock, "a")
        if looked:
            assert store.len("a/dead") == 1
        assert store.push("a", b"2", dedupe="x") > first
        assert store.len("a") == 1


@pytest.mark.parametrize("origin", ["", "no\0key", "k" * 1025])
def test_a_dead_letter_whose_origin_is_no_key_is_requeued_where_the_caller_says(store, origin):
    """Under a key that nobody can name it would be lost."""
    store.push("a/dead", b"1", headers={"sqlspace-key": origin})
    assert store.requeue("a") == 1
    assert store.pull("a", 0) == b"1"


def test_an_ack_that_is_said_twice_loses_no_lease(store):
    """It is a LeaseError; but nobody else has the entry, and if all is rolled back, we do."""
    store.push("a", b"1")
    delivery = store.claim("a", 0)
    with pytest.raises(sqlspace.LeaseError):
        store.ack_many([delivery, delivery])
    assert delivery.lost is False
    with contextlib.suppress(ZeroDivisionError), store.transaction() as together:
        together.ack(delivery)
        for settle in (together.ack, together.nack):
            with pytest.raises(sqlspace.LeaseError):
                settle(delivery)
        raise ZeroDivisionError
    assert delivery.lost is False
    delivery.ack()
    assert delivery.lost is False
