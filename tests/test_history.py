"""The judge of storms: it finds each fault that is planted in a history, and none in clean ones."""

import json

import pytest
from history import Evidence, Row, judge
from leases import ACKED, DEAD, FOLLOW, Rule, follow_up

RULES = {
    "plain": Rule(ordered=False, max_attempts=None),
    "tries": Rule(ordered=False, max_attempts=2),
    "turn": Rule(ordered=True, max_attempts=None),
}
MS = 1_000_000
TAKEN, EXPIRED = 3, 5


class Forger:
    """What a few workers, that kept every rule, would have left."""

    def __init__(self):
        self.now = 1000 * MS
        self.logs = [[["wall", 5]] for _ in range(4)]
        self.rows = {}
        self.taken = 0
        self.forgets = False

    def tick(self, ms=1):
        self.now += ms * MS
        return self.now

    def begin(self, worker, what, *given):
        self.logs[worker].append(["B", self.tick(), what, *given])

    def end(self, worker, result, kind="E"):
        self.logs[worker].append([kind, self.tick(), result])

    def cut(self, worker):
        """Its process is dead; another one is its heir."""
        self.logs[worker].append(["X", self.tick()])
        self.logs[worker] += [["wall", 7]]

    # -- queues

    def push(self, *seqs, key="plain", worker=3, **options):
        """One operation; without seqs in the file if `options` say it was cut off."""
        self.begin(worker, "push", key, [f"p{seq}" for seq in seqs], options)
        self.end(worker, list(seqs))
        for seq in seqs:
            self.rows[seq] = Row(seq, key, 0, payload=f"p{seq}")

    def take(self, worker, *seqs, key="queue", keys=None):
        self.begin(worker, "take", keys or [key], max(1, len(seqs)))
        self.end(worker, [[key, f"p{seq}"] for seq in seqs])
        for seq in seqs:
            self.entomb(seq, TAKEN)

    def peek(self, worker, *seqs, key="queue"):
        self.begin(worker, "peek", [key])
        self.end(worker, [[key, f"p{seq}"] for seq in seqs])

    def clear(self, worker, *seqs, key):
        self.begin(worker, "clear", key)
        self.end(worker, len(seqs))
        for seq in seqs:
            del self.rows[seq]

    def put(self, worker, seq, *instead):
        self.begin(worker, "put", "put", f"p{seq}")
        self.end(worker, seq)
        self.rows[seq] = Row(seq, "put", 0, payload=f"p{seq}")
        for each in instead:
            del self.rows[each]

    def move(self, worker, taken, seq, *, undone=False, cut=False):
        self.begin(worker, "unmove" if undone else "move", "queue", "moved", f"p{seq}")
        self.logs[worker].append(["N", f"p{taken}"])
        if cut:
            self.cut(worker)
        else:
            self.end(worker, None if undone else seq)
        if not undone:
            self.entomb(taken, TAKEN)
            self.rows[seq] = Row(seq, "moved", 0, payload=f"p{seq}")

    # -- leases

    def claim(self, worker, seq, *, lease=100, cut=False):
        """Claim it; its token."""
        row = self.rows[seq]
        attempts = row.attempts + 1
        token = f"t{seq}x{attempts}"
        self.rows[seq] = row._replace(attempts=attempts, token=token)
        self.begin(worker, "claim", [row.key], 1)
        if cut:
            self.cut(worker)
        else:
            deadline = self.now + lease * MS
            self.end(worker, [[token, seq, attempts, deadline, row.key, f"p{seq}"]])
        return token

    def settle(self, worker, way, token, *, result="ok", delay=0, cut=False, follow=0):
        """Log that; what it does to the row is for the caller."""
        self.begin(worker, way, delay * MS, [token])
        if cut:
            self.cut(worker)
        else:
            deadline = self.now + (50 * MS if result == "ok" else -100 * MS)
            self.end(worker, [result, follow, deadline])

    def entomb(self, seq, state):
        self.taken += 1
        self.rows[seq] = self.rows[seq]._replace(
            state=state, payload=None, headers=None, taken_no=self.taken
        )

    def bury(self, seq, letter):
        row = self.rows[seq]
        headers = f'{{"sqlspace-seq":"{seq}","sqlspace-attempts":"{row.attempts}"}}'
        self.rows[letter] = Row(letter, f"{row.key}/dead", 0, payload=f"p{seq}", headers=headers)
        self.entomb(seq, DEAD)

    def follow(self, seq, origin, token):
        self.rows[seq] = Row(seq, FOLLOW, 0, payload=follow_up(origin, token))

    def ack(self, worker, seq):
        self.settle(worker, "ack", self.claim(worker, seq))
        self.entomb(seq, ACKED)

    # -- for those who spoil it

    def record(self, worker, kind, what, payload=""):
        """The one that matches, as a list that can be changed."""
        begun = None
        for record in self.logs[worker]:
            if record[0] == "B":
                begun = record
            elif begun is not None and begun[2] == what and payload in repr((begun, record)):
                return begun if kind == "B" else record
        raise LookupError

    def evidence(self):
        return Evidence(self.logs, list(self.rows.values()), rules=RULES, forgets=self.forgets)

    def problems(self):
        return judge(self.evidence())[0]


def forged():
    """Each rule is at work in it, and kept."""
    it = Forger()
    it.push(1, 2, 3, 4)
    it.push(5, 6, key="tries")
    it.push(7, 8, 9, key="turn")
    # 1: acked at once.
    it.ack(0, 1)
    # 2: nacked with a delay, then acked together with a follow-up.
    it.settle(0, "nack", it.claim(0, 2), delay=10)
    it.tick(20)
    it.settle(1, "tx", it.claim(1, 2), follow=10)
    it.entomb(2, ACKED)
    it.follow(10, 2, "t2x2")
    # 3: claimed and frozen past the lease; the next one acks, and the first is told.
    late = it.claim(0, 3)
    it.tick(200)
    it.settle(1, "ack", it.claim(1, 3))
    it.settle(0, "ack", late, result="lost")
    it.entomb(3, ACKED)
    # 4: a claim, and later an ack, cut off by kills.
    it.claim(2, 4, cut=True)
    it.tick(200)
    it.settle(2, "ack", it.claim(2, 4), cut=True)
    it.entomb(4, ACKED)
    # 5: dead after two failures; 6: acked at its last attempt.
    for _ in range(2):
        it.settle(0, "nack", it.claim(0, 5))
    it.bury(5, 11)
    it.settle(1, "undone", it.claim(1, 6))
    it.settle(1, "nack", "t6x1")
    it.ack(1, 6)
    # 7 to 9: in turn, by different workers, one of them after a lapse.
    it.ack(0, 7)
    it.claim(1, 8)
    it.tick(200)
    it.settle(0, "nack", it.claim(0, 8), delay=10)
    it.tick(20)
    it.ack(0, 8)
    it.ack(1, 9)
    # 17: leased by one who was frozen then, and only told of it while another holds 18.
    it.push(17, 18, key="turn")
    it.begin(2, "claim", ["turn"], 1)
    late = it.now + 100 * MS
    it.tick(300)
    it.rows[17] = it.rows[17]._replace(attempts=1)
    it.ack(0, 17)
    token = it.claim(1, 18)
    it.end(2, [["t17x1", 17, 1, late, "turn", "p17"]])
    it.tick(50)
    it.settle(1, "ack", token)
    it.entomb(18, ACKED)
    # 20 to 29: pulled, one of them by somebody who was killed; two moved, one by a dead one.
    it.push(*range(20, 26), key="queue")
    it.peek(0, 20)
    it.take(0, 20, keys=["others", "queue"])
    it.take(1, 21)
    it.begin(2, "take", ["queue"], 1)
    it.cut(2)
    it.entomb(22, TAKEN)
    it.take(0, 23)
    it.move(0, 24, 28, undone=True)
    it.move(0, 24, 26)
    it.move(2, 25, 27, cut=True)
    it.take(1)
    # 30 to 34: cleared and pulled; 35 to 37: replaced and pulled.
    it.push(30, 31, key="wiped")
    it.clear(0, 30, 31, key="wiped")
    it.push(32, key="wiped")
    it.take(1, 32, key="wiped")
    it.put(0, 35)
    it.put(1, 36, 35)
    it.take(2, 36, key="put")
    # 40: with a delay; 41: with a time to live, which is over.
    it.push(40, key="timed", delay=10 * MS)
    it.push(41, key="timed", ttl=10 * MS)
    it.tick(30)
    it.take(0, 40, key="timed")
    it.entomb(41, EXPIRED)
    # 50: let in once.
    it.push(50, key="once", dedupe="d")
    it.begin(0, "push", "once", ["again"], {"dedupe": "d"})
    it.end(0, [50])
    # What was refused, and what was cut off.
    it.begin(0, "push", "queue", ["refused"], {})
    it.end(0, "BusyError", "R")
    it.begin(2, "push", "queue", ["cut"], {})
    it.cut(2)
    return it


def test_what_kept_the_rules_is_not_complained_of():
    """The forged evidence, from which each planted fault starts, is clean."""
    problems, counts = judge(forged().evidence())
    assert problems == []
    assert counts["acks"] == 9
    assert counts["dead"] == 1
    assert counts["lease errors"] == 1
    assert counts["undecided claims"] == 1
    assert counts["undecided settlings"] == 1
    assert counts["refused"] == 1


def test_a_kill_explains_the_loss_of_what_was_told_no_seq():
    """Also one that came too early for the others that are missing."""
    it = forged()
    lose_what_was_told_no_seq(it)
    it.begin(2, "take", ["queue"], 1)
    it.cut(2)
    it.push(60, key="queue")
    it.begin(1, "take", ["queue"], 1)
    it.cut(1)
    it.entomb(60, TAKEN)
    assert it.problems() == []


def test_tombstones_that_were_compacted_away_are_not_missed():
    """With what is left, and the logs, every rule is still judged."""
    it = forged()
    it.forgets = True
    it.rows = {seq: row for seq, row in it.rows.items() if row.state < 3}
    assert it.problems() == []
    del it.rows[11]
    assert it.problems() == ["entry 5: neither acked nor dead at the end, but None"]


# -- faults of leases


def leave(it):
    it.rows[1] = it.rows[1]._replace(state=0, payload="p1")


def drop(it):
    del it.rows[1]


def ack_twice(it):
    it.settle(0, "ack", "t3x1")


def swallow_the_lapse(it):
    """It was frozen past its lease, another acked, and yet it is told that it did."""
    it.record(0, "E", "ack", "lost")[2][0] = "ok"


def settle_after_the_lapse(it):
    began = it.record(1, "B", "ack", "t3x2")[1]
    it.record(1, "E", "ack", "t3x2")[2][2] = began - 50 * MS


def settle_an_extended_one_after_the_lapse(it):
    it.push(12)
    token = it.claim(0, 12)
    it.settle(0, "extend", token, delay=10)
    it.tick(20)
    it.ack(1, 12)
    it.settle(0, "ack", token)


def lose_without_a_lapse(it):
    end = it.record(0, "E", "ack", "lost")
    end[2][2] = end[1] + 50 * MS


def deliver_after_the_ack(it):
    it.claim(2, 1)


def undo_an_ack(it):
    """It was acked, and its row tells of another lease."""
    it.settle(2, "ack", it.claim(2, 1))


def ack_for_another(it):
    it.rows[1] = it.rows[1]._replace(token="t3x1")


def lease_a_leased_one(it):
    early = it.record(0, "E", "claim", "t3x1")[1]
    for number, kind in enumerate("BE", 1):
        it.record(1, kind, "claim", "t3x2")[1] = early + number


def lease_an_extended_one(it):
    it.push(12)
    token = it.claim(0, 12)
    it.settle(0, "extend", token, delay=1000)
    it.tick(300)
    it.ack(1, 12)


def count_wrong(it):
    it.rows[1] = it.rows[1]._replace(attempts=4)


def repeat_an_attempt(it):
    it.record(1, "E", "claim", "t3x2")[2][0][2] = 1


def give_a_token_twice(it):
    it.logs[1] = json.loads(json.dumps(it.logs[1]).replace("t3x2", "t3x1"))


def claim_more_than_asked(it):
    found = it.record(1, "E", "claim", "t3x2")[2]
    found.append(["another", 1, 9, it.now, "plain", "p1"])


def ack_out_of_turn(it):
    it.rows[7], it.rows[9] = (
        it.rows[7]._replace(taken_no=it.rows[9].taken_no),
        it.rows[9]._replace(taken_no=it.rows[7].taken_no),
    )


def lease_two_of_a_turn(it):
    it.push(12, 13, key="turn")
    one, two = it.claim(0, 12), it.claim(1, 13)
    it.tick(20)
    it.settle(0, "ack", one)
    it.entomb(12, ACKED)
    it.settle(1, "ack", two)
    it.entomb(13, ACKED)


def lease_in_a_delay(it):
    it.push(12, 13, key="turn")
    it.settle(0, "nack", it.claim(0, 12), delay=1000)
    it.tick(10)
    it.ack(0, 13)
    it.tick(2000)
    it.ack(0, 12)


def lease_before_a_delay_is_over(it):
    it.push(12)
    it.settle(0, "nack", it.claim(0, 12), delay=1000)
    it.ack(0, 12)


def die_too_early(it):
    it.push(12, key="tries")
    it.settle(0, "nack", it.claim(0, 12))
    it.bury(12, 13)


def live_too_long(it):
    it.push(12, key="tries")
    for _ in range(2):
        it.settle(0, "nack", it.claim(0, 12))
    it.ack(0, 12)


def die_after_an_ack(it):
    it.push(12, key="tries")
    it.settle(0, "nack", it.claim(0, 12))
    it.settle(0, "ack", it.claim(0, 12))
    it.bury(12, 13)


def lose_a_letter(it):
    del it.rows[11]


def write_a_letter_twice(it):
    it.rows[12] = it.rows[11]._replace(seq=12)


def write_a_letter_of_the_living(it):
    it.push(12, key="tries")
    it.settle(0, "ack", it.claim(0, 12))
    it.bury(12, 13)
    it.rows[12] = it.rows[12]._replace(state=ACKED)


def alter_a_letter(it):
    it.rows[11] = it.rows[11]._replace(payload="another")


def lose_a_follow_up(it):
    del it.rows[10]


def follow_twice(it):
    it.rows[12] = it.rows[10]._replace(seq=12)


def follow_what_was_undone(it):
    it.follow(12, 6, "t6x1")


def follow_by_another_seq(it):
    it.rows[12] = it.rows.pop(10)._replace(seq=12)


def follow_with_a_used_seq(it):
    it.push(12)
    it.settle(0, "tx", it.claim(0, 12), follow=1)
    it.entomb(12, ACKED)


def pass_over_one_to_claim(it):
    it.push(12, 13)
    it.ack(0, 13)
    it.ack(0, 12)


# -- faults of queues


def come_from_nowhere(it):
    it.rows[12] = Row(12, "queue", 0, payload="invented")


def invent(it):
    it.begin(0, "take", ["queue"], 1)
    it.end(0, [["queue", "invented"]])


def take_elsewhere(it):
    it.push(60, key="queue")
    it.take(0, 60, key="others")


def take_twice(it):
    it.begin(0, "take", ["queue"], 1)
    it.end(0, [["queue", "p21"]])


def resurrect(it):
    it.rows[21] = it.rows[21]._replace(state=0, payload="p21")


def see_again(it):
    it.peek(0, 21)


def double(it):
    it.push(60, key="queue")
    it.rows[61] = it.rows[60]._replace(seq=61)


def lose(it):
    it.push(60, 61, key="queue")
    it.take(0, 61)
    it.entomb(60, TAKEN)


def lose_what_was_told_no_seq(it):
    """As a push through the view is, by another library."""
    it.begin(3, "push", "queue", ["nameless"], {})
    it.end(3, [None])


def lose_more_than_a_kill_explains(it):
    it.push(60, 61, 62, key="queue")
    it.begin(2, "take", ["queue"], 1)
    it.cut(2)
    for seq in (60, 61):
        it.entomb(seq, TAKEN)
    it.take(0, 62)


def lose_before_the_kill(it):
    """One was killed in a take, but not when this one was at the head."""
    it.push(60, 61, key="queue")
    it.entomb(60, TAKEN)
    it.take(0, 61)
    it.begin(2, "take", ["queue"], 1)
    it.cut(2)


def lose_a_part_of_a_batch(it):
    it.begin(2, "push", "queue", ["one", "two"], {})
    it.cut(2)
    it.begin(0, "take", ["queue"], 1)
    it.end(0, [["queue", "two"]])


def refuse_and_do_it(it):
    it.begin(0, "take", ["queue"], 1)
    it.end(0, [["queue", "refused"]])


def take_before_the_push(it):
    it.push(60, key="queue")
    it.take(0, 60)
    it.logs[0].insert(1, ["B", 5, "take", ["queue"], 1])
    it.logs[0].insert(2, ["E", 6, [["queue", "p60"]]])
    del it.logs[0][-2:]


def pass_over(it):
    it.push(60, 61, key="queue")
    it.take(0, 61)
    it.take(0, 60)


def peek_past(it):
    it.push(60, 61, key="queue")
    it.peek(0, 61)
    it.take(0, 60, 61)


def take_together_out_of_order(it):
    it.push(60, 61, key="queue")
    it.take(0, 61, 60)


def take_in_another_order_than_the_file_says(it):
    it.push(60, 61, key="queue")
    it.take(0, 60, 61)
    it.rows[60], it.rows[61] = (
        it.rows[60]._replace(taken_no=it.rows[61].taken_no),
        it.rows[61]._replace(taken_no=it.rows[60].taken_no),
    )


def pass_over_by_time(it):
    """Nobody knows the seq of what was taken first; but when it was pushed."""
    it.push(60, key="queue")
    it.begin(2, "push", "queue", ["later"], {})
    it.cut(2)
    it.begin(0, "take", ["queue"], 1)
    it.end(0, [["queue", "later"]])
    it.take(0, 60)


def find_nothing(it):
    it.push(60, key="queue")
    it.take(0)
    it.take(0, 60)


def find_nothing_to_claim(it):
    it.push(12)
    it.begin(0, "claim", ["plain"], 1)
    it.end(0, [])
    it.ack(0, 12)


def prefer_the_second_key(it):
    it.push(60, key="others")
    it.push(61, key="queue")
    it.take(0, 61, keys=["others", "queue"])
    it.take(0, 60, key="others")


def prefer_the_second_key_to_claim(it):
    it.push(12)
    it.push(13, key="tries")
    it.ack(0, 13)
    it.record(0, "B", "claim", "p13")[3] = ["plain", "tries"]
    it.ack(0, 12)


def take_more_than_asked(it):
    it.push(60, 61, key="queue")
    it.take(0, 60, 61)
    it.record(0, "B", "take", "p60")[4] = 1


def give_a_seq_twice(it):
    it.push(60, key="queue")
    it.take(0, 60)
    it.begin(0, "push", "queue", ["another"], {})
    it.end(0, [60])


def give_a_smaller_seq(it):
    it.push(61, key="queue")
    it.push(60, key="others")


def change_a_seq(it):
    it.push(60, key="queue")
    it.rows[61] = it.rows.pop(60)._replace(seq=61)


def stand_elsewhere(it):
    it.rows[21] = it.rows[21]._replace(key="others")


def survive_a_clear(it):
    it.begin(0, "take", ["wiped"], 1)
    it.end(0, [["wiped", "p31"]])


def survive_a_put(it):
    it.begin(0, "take", ["put"], 1)
    it.end(0, [["put", "p35"]])


def count_what_was_cleared_wrong(it):
    it.record(0, "E", "clear")[2] = 3


def let_two_in(it):
    it.push(60, key="once", dedupe="d")


def let_two_in_after_the_history(it):
    """It may forget: but not what was never taken."""
    it.forgets = True
    let_two_in(it)


def tell_another_seq(it):
    it.record(0, "E", "push", "again")[2] = [49]


def lose_all_of_an_id(it):
    del it.rows[50]


def take_too_early(it):
    it.push(60, key="timed", delay=100 * MS)
    it.take(0, 60, key="timed")


def take_too_late(it):
    it.push(60, key="timed", ttl=10 * MS)
    it.tick(100)
    it.take(0, 60, key="timed")


def expire_without_reason(it):
    it.rows[21] = it.rows[21]._replace(state=EXPIRED)


def do_half_a_move(it):
    """Its push is missing, what it took is gone."""
    del it.rows[26]


def do_the_other_half(it):
    """What it pushed is there, and another has what it took."""
    it.begin(0, "take", ["queue"], 1)
    it.end(0, [["queue", "p25"]])


def do_half_of_a_cut_one(it):
    del it.rows[27]


def do_what_was_undone(it):
    it.rows[28] = Row(28, "moved", 0, payload="p28")


def number_wrong(it):
    it.rows[1] = it.rows[1]._replace(taken_no=100)


def keep_a_payload(it):
    it.rows[21] = it.rows[21]._replace(payload="p21")


def fail(it):
    it.logs[0].append(["error", "Traceback"])


FAULTS = [
    (leave, "entry 1: neither acked nor dead"),
    (drop, "entry 1: neither acked nor dead"),
    (ack_twice, "entry 3: acked 2 times"),
    (swallow_the_lapse, "entry 3: acked 2 times"),
    (swallow_the_lapse, "entry 3: ack after the lease was over"),
    (settle_after_the_lapse, "entry 3: ack after the lease was over"),
    (settle_an_extended_one_after_the_lapse, "entry 12: acked 2 times"),
    (lose_without_a_lapse, "LeaseError before the lease was over"),
    (deliver_after_the_ack, "entry 1: delivered again after its ack"),
    (undo_an_ack, "entry 1: acked 2 times"),
    (undo_an_ack, "entry 1: delivered again after its ack"),
    (ack_for_another, "entry 1: acked by another lease"),
    (lease_a_leased_one, "entry 3: leased again while it was leased"),
    (lease_an_extended_one, "entry 12: leased again while it was leased"),
    (count_wrong, "plain: 4 attempts that nobody made, or 1 at most"),
    (count_wrong, "entry 1: its last attempt was not the one that was acked"),
    (repeat_an_attempt, "entry 3: attempts do not grow by one"),
    (give_a_token_twice, "entry 3: a token was given twice"),
    (claim_more_than_asked, "a claim gave 2 instead of 1"),
    (take_more_than_asked, "a take gave 2 instead of 1"),
    (prefer_the_second_key_to_claim, "plain: nothing was found there, and p12 was"),
    (ack_out_of_turn, "turn: not settled in order"),
    (lease_two_of_a_turn, "turn: entry 13 was leased beside another"),
    (lease_in_a_delay, "turn: entry 13 was leased out of its turn"),
    (lease_before_a_delay_is_over, "entry 12: leased again while it was leased"),
    (die_too_early, "entry 12: dead after 1 attempts of 2"),
    (live_too_long, "entry 12: acked at attempt 3 of 2"),
    (die_after_an_ack, "entry 12: dead after its ack"),
    (lose_a_letter, "entry 5: dead, and its letter is missing"),
    (write_a_letter_twice, "entry 5: two dead letters"),
    (write_a_letter_of_the_living, "entry 12: a dead letter that should not be"),
    (alter_a_letter, "entry 5: a dead letter that should not be"),
    (lose_a_follow_up, "2:t2x2: acked in a transaction whose push is missing"),
    (follow_twice, "2:t2x2: two follow-ups"),
    (follow_what_was_undone, "6:t6x1: a follow-up, though no transaction acked it"),
    (follow_by_another_seq, "2:t2x2: its follow-up has another seq"),
    (follow_with_a_used_seq, "seq 1 was given 2 times"),
    (pass_over_one_to_claim, "plain: p13 came out before p12"),
    (come_from_nowhere, "entry 12 is from nowhere"),
    (invent, "queue: invented came out, and was never pushed there"),
    (take_elsewhere, "others: p60 came out, and was never pushed there"),
    (take_twice, "p21: taken 2 times"),
    (resurrect, "p21: taken, and still in the file"),
    (see_again, "p21: seen again after it was taken"),
    (double, "p60: stands twice in the file"),
    (pass_over, "queue: p61 came out before p60"),
    (lose, "queue: p60 is lost"),
    (lose_what_was_told_no_seq, "queue: nameless is lost, and its seq was never told"),
    (lose_more_than_a_kill_explains, "queue: p61 is lost"),
    (lose_before_the_kill, "queue: p60 is lost"),
    (lose_a_part_of_a_batch, "queue: one is lost"),
    (refuse_and_do_it, "refused: is there, though its push was refused"),
    (take_before_the_push, "p60: came out before it was pushed"),
    (peek_past, "queue: p61 came out before p60"),
    (take_together_out_of_order, "taken together, with the seqs [61, 60]"),
    (take_in_another_order_than_the_file_says, "queue: not taken in order, as the file has it"),
    (pass_over_by_time, "queue: later came out before p60"),
    (find_nothing, "queue: nothing was found there, and p60 was"),
    (find_nothing_to_claim, "plain: nothing was found there, and p12 was"),
    (prefer_the_second_key, "others: nothing was found there, and p60 was"),
    (give_a_seq_twice, "seq 60 was given 2 times"),
    (give_a_smaller_seq, "others: seq 60 was given after 61"),
    (change_a_seq, "p60: its seq was 60, and is 61"),
    (stand_elsewhere, "entry 21: pushed to queue, and stands in others"),
    (survive_a_clear, "wiped: p31 came out after a clear"),
    (survive_a_put, "put: p35 came out after a put"),
    (count_what_was_cleared_wrong, "wiped: 4 were taken or cleared, of 3"),
    (let_two_in, "once: d let in p50 and p60"),
    (let_two_in_after_the_history, "once: d let in p50 and p60"),
    (tell_another_seq, "once: d was told"),
    (lose_all_of_an_id, "once: again is lost"),
    (take_too_early, "p60: taken before its delay was over"),
    (take_too_late, "p60: taken after its time to live"),
    (expire_without_reason, "p21: has expired, and has no time to live"),
    (do_half_a_move, "moved: p26 is lost"),
    (do_the_other_half, "p25: taken 2 times"),
    (do_half_of_a_cut_one, "queue: p25 is lost"),
    (do_what_was_undone, "p28: is there, though its transaction was rolled back"),
    (number_wrong, "the takings are not numbered one by one"),
    (keep_a_payload, "entry 21: a tombstone with a payload"),
    (fail, "a worker failed"),
]


@pytest.mark.parametrize(("spoil", "words"), FAULTS)
def test_the_judge_finds_a_planted_fault(spoil, words):
    """Each rule, broken in what the workers would have left, is named."""
    it = forged()
    spoil(it)
    problems = it.problems()
    assert any(words in problem for problem in problems), problems


def test_damage_to_the_file_is_a_problem():
    """What SQLite says of the file counts, whatever the logs say."""
    evidence = forged().evidence()
    evidence.integrity = "row 7 missing from index"
    assert judge(evidence)[0] == ["integrity_check: row 7 missing from index"]
