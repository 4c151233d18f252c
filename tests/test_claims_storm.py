"""Claims in a storm: workers killed and frozen all the while, and every rule of leases kept."""

import pytest
from claims_proof import ACKED, DEAD, FOLLOW, Evidence, Row, Rule, judge
from claims_storm import run

import sqlspace
from sqlspace import ageing, clock

# -- the proof itself: it counts for something only if a fault would have failed it

RULES = {
    "plain": Rule(ordered=False, max_attempts=None),
    "tries": Rule(ordered=False, max_attempts=2),
    "turn": Rule(ordered=True, max_attempts=None),
}
MS = 1_000_000


class Forger:
    """What a few workers, that kept every rule, would have left."""

    def __init__(self):
        self.now = 1000 * MS
        self.logs = [["wall 5"] for _ in range(3)]
        self.rows = {}
        self.pushed = {}
        self.taken = 0

    def push(self, *seqs, key="plain"):
        for seq in seqs:
            self.pushed[seq] = (key, f"payload-{seq}")
            self.rows[seq] = Row(seq, key, 0, 0, None, None, f"payload-{seq}", None)

    def tick(self, ms=1):
        self.now += ms * MS
        return self.now

    def claim(self, worker, seq, *, lease=100, cut=False):
        """Claim it; its token."""
        row = self.rows[seq]
        attempts = row.attempts + 1
        token = f"t{seq}x{attempts}"
        self.rows[seq] = row._replace(attempts=attempts, token=token)
        log = self.logs[worker]
        log.append(f"B {self.tick()} claim 1 {row.key}")
        if not cut:
            payload = self.pushed[seq][1]
            deadline = self.now + lease * MS
            log.append(f"E {self.tick()} claim {token} {seq} {attempts} {deadline} {payload}")
        return token

    def settle(self, worker, way, seq, token, *, result="ok", delay=0, cut=False, follow=0):
        """Log that; what it does to the row is for the caller."""
        log = self.logs[worker]
        log.append(f"B {self.tick()} {way} {delay * MS} {token}")
        if not cut:
            end = self.tick()
            deadline = end - 100 * MS if result == "lost" else end + 50 * MS
            log.append(f"E {end} {way} {result} {follow} {deadline}")

    def entomb(self, seq, state):
        self.taken += 1
        row = self.rows[seq]
        self.rows[seq] = row._replace(state=state, payload=None, headers=None, taken_no=self.taken)

    def bury(self, seq, letter):
        row = self.rows[seq]
        headers = f'{{"sqlspace-seq":"{seq}","sqlspace-attempts":"{row.attempts}"}}'
        self.rows[letter] = Row(
            letter, f"{row.key}/dead", 0, 0, None, None, self.pushed[seq][1], headers
        )
        self.entomb(seq, DEAD)

    def evidence(self):
        return Evidence(RULES, self.pushed, self.logs, list(self.rows.values()))


def forged():
    """Each rule is at work in it, and kept."""
    it = Forger()
    it.push(1, 2, 3, 4)
    it.push(5, 6, key="tries")
    it.push(7, 8, 9, key="turn")
    # 1: acked at once.
    it.settle(0, "ack", 1, it.claim(0, 1))
    it.entomb(1, ACKED)
    # 2: nacked with a delay, then acked together with a follow-up.
    it.settle(0, "nack", 2, it.claim(0, 2), delay=10)
    it.tick(20)
    it.settle(1, "tx", 2, it.claim(1, 2), follow=10)
    it.entomb(2, ACKED)
    it.rows[10] = Row(10, FOLLOW, 0, 0, None, None, "2", None)
    # 3: claimed and frozen past the lease; the next one acks, and the first is told.
    late = it.claim(0, 3)
    it.tick(200)
    it.settle(1, "ack", 3, it.claim(1, 3))
    it.settle(0, "ack", 3, late, result="lost")
    it.entomb(3, ACKED)
    # 4: a claim, and later an ack, cut off by kills.
    it.claim(2, 4, cut=True)
    it.logs.append(["wall 7"])
    it.tick(200)
    it.settle(3, "ack", 4, it.claim(3, 4), cut=True)
    it.entomb(4, ACKED)
    # 5: dead after two failures; 6: acked at its last attempt.
    for _ in range(2):
        it.settle(0, "nack", 5, it.claim(0, 5))
    it.bury(5, 11)
    it.settle(1, "undone", 6, it.claim(1, 6))
    it.settle(1, "nack", 6, "t6x1")
    it.settle(1, "ack", 6, it.claim(1, 6))
    it.entomb(6, ACKED)
    # 7 to 9: in turn, by different workers, one of them after a lapse.
    it.settle(0, "ack", 7, it.claim(0, 7))
    it.entomb(7, ACKED)
    it.claim(1, 8)
    it.tick(200)
    it.settle(0, "nack", 8, it.claim(0, 8), delay=10)
    it.tick(20)
    it.settle(0, "ack", 8, it.claim(0, 8))
    it.entomb(8, ACKED)
    it.settle(1, "ack", 9, it.claim(1, 9))
    it.entomb(9, ACKED)
    return it


def test_what_kept_the_rules_is_not_complained_of():
    """The forged evidence, from which each planted fault starts, is clean."""
    problems, counts = judge(forged().evidence())
    assert problems == []
    assert counts["acks"] == 8
    assert counts["dead"] == 1
    assert counts["lease errors"] == 1
    assert counts["undecided claims"] == 1
    assert counts["undecided settlings"] == 1


def leave(it):
    it.rows[1] = it.rows[1]._replace(state=0)


def drop(it):
    del it.rows[1]


def ack_twice(it):
    it.settle(0, "ack", 3, "t3x1")


def swallow_the_lapse(it):
    """It was frozen past its lease, another acked, and yet it is told that it did."""
    log = it.logs[0]
    at = next(n for n, line in enumerate(log) if " ack lost" in line)
    log[at] = log[at].replace("lost", "ok")


def settle_after_the_lapse(it):
    log = it.logs[1]
    at = next(n for n, line in enumerate(log) if "t3x2" in line and " ack " in line)
    words = log[at + 1].split()
    words[5] = str(int(log[at].split()[1]) - 50 * MS)
    log[at + 1] = " ".join(words)


def lose_without_a_lapse(it):
    log = it.logs[0]
    at = next(n for n, line in enumerate(log) if " ack lost" in line)
    words = log[at].split()
    words[5] = str(int(words[1]) + 50 * MS)
    log[at] = " ".join(words)


def deliver_after_the_ack(it):
    it.claim(2, 1)


def undo_an_ack(it):
    """It was acked, and its row tells of another lease."""
    it.claim(2, 1)
    it.settle(2, "ack", 1, "t1x2")


def lease_a_leased_one(it):
    log = it.logs[1]
    at = next(n for n, line in enumerate(log) if " t3x2 3 " in line)
    early = int(next(line for line in it.logs[0] if " t3x1 3 " in line).split()[1]) + MS
    for n in (at - 1, at):
        words = log[n].split()
        log[n] = " ".join([words[0], str(early + n), *words[2:]])


def count_wrong(it):
    it.rows[1] = it.rows[1]._replace(attempts=4)


def repeat_an_attempt(it):
    log = it.logs[1]
    at = next(n for n, line in enumerate(log) if " t3x2 3 2 " in line)
    log[at] = log[at].replace("t3x2 3 2", "t3x2 3 1")


def ack_out_of_turn(it):
    it.rows[7], it.rows[9] = (
        it.rows[7]._replace(taken_no=it.rows[9].taken_no),
        it.rows[9]._replace(taken_no=it.rows[7].taken_no),
    )


def lease_two_of_a_turn(it):
    it.push(12, 13, key="turn")
    one, two = it.claim(0, 12), it.claim(1, 13)
    it.tick(20)
    it.settle(0, "ack", 12, one)
    it.entomb(12, ACKED)
    it.settle(1, "ack", 13, two)
    it.entomb(13, ACKED)


def lease_in_a_delay(it):
    it.push(12, 13, key="turn")
    it.settle(0, "nack", 12, it.claim(0, 12), delay=1000)
    it.tick(10)
    it.settle(0, "ack", 13, it.claim(0, 13))
    it.tick(2000)
    it.settle(0, "ack", 12, it.claim(0, 12))
    it.entomb(12, ACKED)
    it.entomb(13, ACKED)


def lease_before_a_delay_is_over(it):
    it.push(12)
    it.settle(0, "nack", 12, it.claim(0, 12), delay=1000)
    it.settle(0, "ack", 12, it.claim(0, 12))
    it.entomb(12, ACKED)


def die_too_early(it):
    it.push(12, key="tries")
    it.settle(0, "nack", 12, it.claim(0, 12))
    it.bury(12, 13)


def live_too_long(it):
    it.push(12, key="tries")
    for _ in range(2):
        it.settle(0, "nack", 12, it.claim(0, 12))
    it.settle(0, "ack", 12, it.claim(0, 12))
    it.entomb(12, ACKED)


def die_after_an_ack(it):
    it.push(12, key="tries")
    it.settle(0, "nack", 12, it.claim(0, 12))
    it.settle(0, "ack", 12, it.claim(0, 12))
    it.bury(12, 13)


def lose_a_letter(it):
    del it.rows[11]


def write_a_letter_twice(it):
    it.rows[12] = it.rows[11]._replace(seq=12)


def write_a_letter_of_the_living(it):
    it.push(12, key="tries")
    it.settle(0, "ack", 12, it.claim(0, 12))
    it.bury(12, 13)
    it.rows[12] = it.rows[12]._replace(state=ACKED)


def alter_a_letter(it):
    it.rows[11] = it.rows[11]._replace(payload="another")


def lose_a_follow_up(it):
    del it.rows[10]


def follow_twice(it):
    it.rows[12] = it.rows[10]._replace(seq=12)


def follow_what_was_undone(it):
    it.rows[12] = Row(12, FOLLOW, 0, 0, None, None, "6", None)


def reuse_a_seq(it):
    it.push(12)
    it.settle(0, "tx", 12, it.claim(0, 12), follow=1)
    it.entomb(12, ACKED)


def come_from_nowhere(it):
    it.rows[12] = Row(12, "plain", 0, 0, None, None, "payload-12", None)


def deliver_what_nobody_pushed(it):
    it.push(12)
    it.claim(0, 12)
    del it.pushed[12]
    del it.rows[12]


def alter(it):
    it.pushed[1] = ("plain", "another")


def number_wrong(it):
    it.rows[1] = it.rows[1]._replace(taken_no=100)


def fail(it):
    it.logs[0].append("error 'Traceback'")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (leave, "entry 1: neither acked nor dead"),
        (drop, "entry 1: neither acked nor dead"),
        (ack_twice, "entry 3: acked 2 times"),
        (swallow_the_lapse, "entry 3: acked 2 times"),
        (swallow_the_lapse, "entry 3: ack after the lease was over"),
        (settle_after_the_lapse, "entry 3: ack after the lease was over"),
        (lose_without_a_lapse, "LeaseError before the lease was over"),
        (deliver_after_the_ack, "entry 1: delivered again after its ack"),
        (undo_an_ack, "entry 1: acked 2 times"),
        (undo_an_ack, "entry 1: delivered again after its ack"),
        (lease_a_leased_one, "entry 3: leased again while it was leased"),
        (count_wrong, "plain: 4 attempts that nobody made, or 1 at most"),
        (count_wrong, "entry 1: its last attempt was not the one that was acked"),
        (repeat_an_attempt, "entry 3: attempts do not grow by one"),
        (ack_out_of_turn, "turn: not settled in order"),
        (lease_two_of_a_turn, "turn: entry 13 was leased beside another"),
        (lease_in_a_delay, "turn: entry 13 was leased beside another"),
        (lease_in_a_delay, "turn: entry 13 was leased out of its turn"),
        (lease_before_a_delay_is_over, "entry 12: leased again while it was leased"),
        (die_too_early, "entry 12: dead after 1 attempts of 2"),
        (live_too_long, "entry 12: acked at attempt 3 of 2"),
        (die_after_an_ack, "entry 12: dead after its ack"),
        (lose_a_letter, "entry 5: dead, and its letter is missing"),
        (write_a_letter_twice, "entry 5: two dead letters"),
        (write_a_letter_of_the_living, "entry 12: a dead letter that should not be"),
        (alter_a_letter, "entry 5: a dead letter that should not be"),
        (lose_a_follow_up, "entry 2: acked in a transaction whose push is missing"),
        (follow_twice, "entry 2: 2 follow-ups"),
        (follow_what_was_undone, "entry 6: a follow-up, though no transaction acked it"),
        (reuse_a_seq, "seq 1 was given 2 times"),
        (come_from_nowhere, "entry 12 is from nowhere"),
        (deliver_what_nobody_pushed, "entry 12: delivered, and never pushed"),
        (alter, "entry 1: delivered altered"),
        (number_wrong, "the takings are not numbered one by one"),
        (fail, "a worker failed"),
    ],
)
def test_the_proof_finds_a_planted_fault(spoil, words):
    """Each rule, broken in what the workers would have left, is named."""
    it = forged()
    spoil(it)
    problems, _ = judge(it.evidence())
    assert any(words in problem for problem in problems), problems


def test_damage_to_the_file_is_a_problem():
    """What SQLite says of the file counts, whatever the logs say."""
    evidence = forged().evidence()
    evidence.integrity = "row 7 missing from index"
    assert judge(evidence)[0] == ["integrity_check: row 7 missing from index"]


# -- the storm


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


@pytest.mark.once
def test_claims_keep_their_rules_in_a_storm(tmp_path):
    """Eight workers, killed and frozen at random: each entry acked once, or dead as it must be."""
    problems, counts = run(str(tmp_path), seconds=12, processes=8, entries=10_000, seed=4)
    assert problems == []
    assert counts["acks"] + counts["dead"] == counts["entries"]
    assert counts["claims"] > counts["entries"]
    for name in ("dead", "follow-ups", "nacks", "kills", "freezes", "undecided claims"):
        assert counts[name] > 0, name
