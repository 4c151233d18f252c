"""Claims, and what others do between their looks and their leases; storms have found it."""

import sqlspace
from sqlspace import ageing, clock
from sqlspace.entries import Lease
from sqlspace.taking import Claim


def test_a_claim_counts_the_attempts_that_others_made_while_it_waited(tmp_path):
    """A head that was claimed and given back between the look and the lease is another head."""
    path = str(tmp_path / "queue.db")
    with sqlspace.open(path, sync=False) as store, sqlspace.open(path, sync=False) as other:
        seq = store.push("k", b"x")
        turnstile = store._database._session.turnstile
        enter = turnstile.try_enter

        def late():
            turnstile.try_enter = enter
            other.claim("k", 0).nack()
            return enter()

        turnstile.try_enter = late
        delivery = store.claim("k", 0, max_attempts=2)
        assert (delivery.seq, delivery.attempts) == (seq, 2)
        delivery.nack()
        assert store.len("k/dead") == 1


def test_a_lease_begins_when_it_is_given_and_not_when_it_is_asked_for(tmp_path, monkeypatch):
    """However long a claim waits for its turn to write, its lease has its whole length."""
    with sqlspace.open(tmp_path / "queue.db", sync=False) as store:
        store.push("k", b"x")
        turnstile = store._database._session.turnstile
        enter = turnstile.try_enter
        begins = clock.now() + 60_000_000

        def late():
            monkeypatch.setattr(clock, "now", lambda: begins)
            return enter()

        turnstile.try_enter = late
        delivery = store.claim("k", 0, lease=10.0)
        assert delivery.deadline == begins / 1e6 + 10.0
        assert not delivery.lost


def test_what_comes_back_during_a_claim_in_order_is_not_passed_over(tmp_path, monkeypatch):
    """A lease that runs out between two looks of one claim: what stands behind it stays there."""
    with sqlspace.open(tmp_path / "queue.db", sync=False) as store:
        now = clock.now()
        monkeypatch.setattr(clock, "now", lambda: now)
        first = store.push("k", b"1")
        store.push("k", b"2", delay=1.0)
        store.claim("k", 0, lease=10.0)
        now += 2_000_000
        catch_up = ageing.catch_up

        def slow(*words):
            nonlocal now
            tokens = catch_up(*words)
            now += 20_000_000
            return tokens

        monkeypatch.setattr(ageing, "catch_up", slow)
        delivery = store.claimp("k", ordered=True)
        assert delivery is None or delivery.seq == first
        delivery = delivery or store.claimp("k", ordered=True)
        assert delivery.seq == first


def test_a_claim_in_order_does_not_pass_over_what_is_leased_while_it_waits(tmp_path, monkeypatch):
    """An earlier one was not due at the look, and is leased to another at the lease."""
    path = str(tmp_path / "queue.db")
    with sqlspace.open(path, sync=False) as store, sqlspace.open(path, sync=False) as other:
        now = clock.now()
        monkeypatch.setattr(clock, "now", lambda: now)
        first = store.push("k", b"1", delay=1.0)
        store.push("k", b"2")
        turnstile = store._database._session.turnstile
        enter = turnstile.try_enter

        def late():
            nonlocal now
            turnstile.try_enter = enter
            now += 2_000_000
            assert other.claim("k", 0).seq == first
            return enter()

        turnstile.try_enter = late
        assert store.claimp("k", ordered=True) is None


def test_what_an_interrupt_undoes_too_late_is_not_the_lease_of_another(tmp_path, monkeypatch):
    """An undoing may have to wait, until the lease is over and the entry claimed again."""
    path = str(tmp_path / "queue.db")
    with sqlspace.open(path, sync=False) as store, sqlspace.open(path, sync=False) as other:
        now = clock.now()
        monkeypatch.setattr(clock, "now", lambda: now)
        store.push("k", b"x")
        claim = Claim(store._database, ["k"], Lease(1_000_000, None), lambda grant: grant)
        assert claim.run()
        now += 2_000_000
        delivery = other.claim("k", 0, lease=10.0)
        claim.restore()
        delivery.ack()
