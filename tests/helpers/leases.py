"""What workers did with leases, and whether every rule of them was kept; a part of `history`.

    WHAT             GIVEN              RESULT
    claim            [KEY…] LIMIT       [[TOKEN SEQ ATTEMPTS DEADLINE KEY PAYLOAD]…]
    ack nack         DELAY [TOKEN…]     [ok, 0, DEADLINE…]
    tx               the same           [ok, SEQ, DEADLINE…], with a push to FOLLOW in one commit
    undone           the same           the same as tx, rolled back on purpose
    extend           LEASE [TOKEN…]     [ok, 0, DEADLINE…]

Deadlines are on the clock of the logs, in nanoseconds, each as the worker knew it at the end. In
place of ok stands lost for a LeaseError, and no if nothing changed for whatever reason.
"""

import bisect
import itertools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["ACKED", "DEAD", "FOLLOW", "Leases", "Rule", "is_made"]

ACKED, DEAD = 4, 6  # states of a row
FOLLOW = "follow"
WAYS = ("ack", "nack", "tx", "undone", "extend")
ACKS = ("ack", "tx")


class Rule(NamedTuple):
    """How the entries of a key are claimed, by everybody."""

    ordered: bool
    max_attempts: int | None


@dataclass(frozen=True)
class Claim:
    token: str
    seq: int
    key: str
    attempts: int
    payload: str
    began: int
    ended: int
    deadline: int


@dataclass
class Settling:
    """Of one or several leases; `result` is None if a kill cut it off."""

    way: str
    delay: int  # of an extension, its length
    tokens: list
    began: int
    ended: int
    result: str | None = None
    follow: int = 0
    deadlines: list = field(default_factory=list)


def is_made(key):
    """Whether nobody pushes to it, as an operation of its own."""
    return key == FOLLOW or key.endswith("/dead")


def follow_up(seq, token):
    """The payload of what is pushed together with an ack."""
    return f"{seq}:{token}"


class Leases:
    """Judges what the history has collected."""

    def __init__(self, history):
        self.say, self.slack = history.say, history.slack
        self.rules, self.forgets = history.evidence.rules, history.evidence.forgets
        rows = history.evidence.rows or ()
        self.rows = {row.seq: row for row in rows}
        self.pushed = {
            seq: (entry.key, entry.payload)
            for seq, entry in history.by_seq.items()
            if entry.key in self.rules
        }
        self.standing = {row.payload: row for row in rows if row.key == FOLLOW}
        self.claims = {}  # by token
        self.undecided = []  # claims: (limit, keys)
        for op in history.ops["claim"]:
            self.read_claim(op)
        self.settlings = sorted(
            (self.read_settling(op) for way in WAYS for op in history.ops[way]),
            key=lambda each: each.began,
        )
        self.of_entry = defaultdict(list)  # claims, by attempts
        for claim in sorted(self.claims.values(), key=lambda each: each.attempts):
            self.of_entry[claim.seq].append(claim)
        self.of_token = defaultdict(list)  # settlings, as they came
        for settling in self.settlings:
            for token in settling.tokens:
                self.of_token[token].append(settling)
        self.held = {token: self.held_until(claim) for token, claim in self.claims.items()}
        self.letters = {row.seq: row for row in rows if row.key.endswith("/dead")}
        for step in (
            self.judge_settlings,
            self.judge_dead_letters,
            self.judge_entries,
            self.judge_undecided_claims,
            self.judge_follow_ups,
            self.judge_order,
        ):
            step()

    def counts(self):
        """What there was to judge."""
        results = Counter((each.way, each.result) for each in self.settlings)
        return {
            "leased": len(self.claims),
            "undecided claims": len(self.undecided),
            "acks": sum(
                n for (way, result), n in results.items() if way in ACKS and result == "ok"
            ),
            "dead": len(self.letters),
            "follow-ups": len(self.standing),
            "nacks": results["nack", "ok"],
            "lease errors": sum(n for (_, result), n in results.items() if result == "lost"),
            "undecided settlings": sum(n for (_, result), n in results.items() if result is None),
        }

    # -- reading

    def read_claim(self, op):
        keys, limit = op.given
        if op.done is None:
            self.undecided.append((limit, keys))
        for token, seq, attempts, deadline, key, payload in op.result or ():
            if token in self.claims:
                self.say(f"entry {seq}: a token was given twice")
            self.claims[token] = Claim(
                token, seq, key, attempts, payload, op.began, op.ended, deadline
            )

    def read_settling(self, op):
        delay, tokens = op.given
        settling = Settling(op.what, delay, tokens, op.began, op.ended)
        if op.done is False:
            settling.result = "no"
        elif op.done:
            settling.result, settling.follow, *settling.deadlines = op.result
        elif op.what == "undone":
            settling.result = "no"
        elif op.what == "tx":  # what was pushed with it tells whether it happened
            (token,) = tokens
            row = self.standing.get(follow_up(self.claims[token].seq, token))
            settling.result = "no" if row is None else "ok"
            settling.follow = 0 if row is None else row.seq
        return settling

    # -- leases

    def held_until(self, claim):
        """Until when the lease, or its nack's delay, certainly lasted, as far as the logs prove."""
        deadline = claim.deadline
        for settling in self.of_token[claim.token]:
            if settling.way == "undone" or settling.result in ("lost", "no"):
                continue
            if settling.way == "extend":
                new = settling.began + settling.delay
                deadline = new if settling.result else min(deadline, new)
            elif settling.result is None:
                return min(deadline, settling.began)
            else:
                rule = self.rules.get(claim.key)
                last = rule is not None and claim.attempts == rule.max_attempts
                return settling.began + (0 if last else settling.delay)
        return deadline

    def acked_by(self, token, result):
        """The acks of a lease, with this result."""
        return [each for each in self.of_token[token] if each.way in ACKS and each.result == result]

    def judge_settlings(self):
        """A LeaseError is explained by a lease whose time was over; and no other settling was."""
        for settling in self.settlings:
            seqs = [self.claims[token].seq for token in settling.tokens]
            if settling.result == "lost" and min(settling.deadlines) > settling.ended + self.slack:
                self.say(f"entries {seqs}: LeaseError before the lease was over")
            if settling.result == "ok":
                for seq, deadline in zip(seqs, settling.deadlines, strict=False):
                    if settling.began > deadline + self.slack:
                        self.say(f"entry {seq}: {settling.way} after the lease was over")

    def judge_entries(self):
        for seq, (key, _) in self.pushed.items():
            claims = self.of_entry.get(seq, [])
            self.judge_leases(seq, claims)
            self.judge_end(seq, key, claims)

    def judge_leases(self, seq, claims):
        """Attempts grow by one, and no lease begins while the one before it is held."""
        numbers = [claim.attempts for claim in claims]
        row = self.rows.get(seq)
        last = row.attempts if row is not None else max(numbers, default=0)
        if len(set(numbers)) != len(numbers) or (numbers and numbers[0] < 1):
            self.say(f"entry {seq}: attempts do not grow by one: {numbers}")
        if numbers and numbers[-1] > last:
            self.say(f"entry {seq}: {numbers[-1]} attempts, of which the file counts {last}")
        for earlier, later in itertools.pairwise(claims):
            if later.ended < self.held[earlier.token] - self.slack:
                self.say(f"entry {seq}: leased again while it was leased")
        acks = [
            (claim, settling) for claim in claims for settling in self.acked_by(claim.token, "ok")
        ]
        if len(acks) > 1:
            self.say(f"entry {seq}: acked {len(acks)} times")
        for acked, settling in acks:
            for claim in claims:
                if claim.began > settling.ended or claim.attempts > acked.attempts:
                    self.say(f"entry {seq}: delivered again after its ack")

    def judge_end(self, seq, key, claims):
        """One tombstone each: acked by a lease that was, or dead after its last attempt."""
        row = self.rows.get(seq)
        acks = self.tokens_of(claims, "ok")
        undecided = self.tokens_of(claims, None)
        if row is None and self.forgets and (acks or undecided or seq in self.buried):
            if acks and seq in self.buried:
                self.say(f"entry {seq}: dead after its ack")
            return
        if row is None or row.key != key or row.state not in (ACKED, DEAD):
            self.say(f"entry {seq}: neither acked nor dead at the end, but {row}")
            return
        limit = self.rules[key].max_attempts
        if row.state == DEAD:
            if acks:
                self.say(f"entry {seq}: dead after its ack")
            if row.attempts != limit:
                self.say(f"entry {seq}: dead after {row.attempts} attempts of {limit}")
            return
        if limit is not None and row.attempts > limit:
            self.say(f"entry {seq}: acked at attempt {row.attempts} of {limit}")
        if row.token not in (acks or undecided):
            self.say(f"entry {seq}: acked by another lease than the logs have it")
        elif self.claims[row.token].attempts != row.attempts:
            self.say(f"entry {seq}: its last attempt was not the one that was acked")

    def tokens_of(self, claims, result):
        return {claim.token for claim in claims if self.acked_by(claim.token, result)}

    def judge_undecided_claims(self):
        """An attempt that no log knows was made by a claim that a kill cut off."""
        unknown = Counter()
        for seq, (key, _) in self.pushed.items():
            claims = self.of_entry.get(seq, ())
            counted = max((claim.attempts for claim in claims), default=0)
            if seq in self.rows:
                counted = self.rows[seq].attempts
            unknown[key] += max(0, counted - len(claims))
        explained = Counter()
        for limit, keys in self.undecided:
            for key in keys:
                explained[key] += limit
        for key, number in unknown.items():
            if number > explained[key]:
                self.say(f"{key}: {number} attempts that nobody made, or {explained[key]} at most")

    # -- what comes of them

    def judge_follow_ups(self):
        """One for each entry that was acked together with a push of it, and no other."""
        known = {}
        for settling in self.settlings:
            if settling.way == "tx" and settling.result == "ok":
                (token,) = settling.tokens
                payload = follow_up(self.claims[token].seq, token)
                known[payload] = settling
                row = self.standing.get(payload)
                if row is None:
                    self.say(f"{payload}: acked in a transaction whose push is missing")
                elif row.seq != settling.follow:
                    self.say(f"{payload}: its follow-up has another seq than was returned")
        rows = [row for row in self.rows.values() if row.key == FOLLOW]
        for row in rows:
            if row.payload not in known:
                self.say(f"{row.payload}: a follow-up, though no transaction acked it")
            elif self.standing[row.payload] is not row:
                self.say(f"{row.payload}: two follow-ups")

    def judge_dead_letters(self):
        """One for each that is dead, and no other, with where it came from and what it held."""
        self.buried = {}
        for row in self.letters.values():
            headers = json.loads(row.headers or "{}")
            origin = int(headers.get("sqlspace-seq", 0))
            source = self.rows.get(origin)
            key, payload = self.pushed.get(origin, ("", ""))
            if origin in self.buried:
                self.say(f"entry {origin}: two dead letters")
            self.buried[origin] = row
            limit = self.rules[key].max_attempts if key else None
            if (
                row.key != f"{key}/dead"
                or row.payload != payload
                or headers.get("sqlspace-attempts") != str(limit)
                or (source is None and not self.forgets)
                or (source is not None and source.state != DEAD)
            ):
                self.say(f"entry {origin}: a dead letter that should not be: {row}")
        for seq in self.pushed:
            row = self.rows.get(seq)
            if row is not None and row.state == DEAD and seq not in self.buried:
                self.say(f"entry {seq}: dead, and its letter is missing")

    # -- in order

    def judge_order(self):
        taken = defaultdict(list)
        for row in self.rows.values():
            if row.taken_no is not None and row.key in self.rules and self.rules[row.key].ordered:
                taken[row.key].append((row.taken_no, row.seq))
        for key, numbers in taken.items():
            seqs = [seq for _, seq in sorted(numbers)]
            if seqs != sorted(seqs):
                self.say(f"{key}: not settled in order")
        claims = defaultdict(list)
        for claim in self.claims.values():
            if claim.key in self.rules and self.rules[claim.key].ordered:
                claims[claim.key].append(claim)
        for key, found in claims.items():
            self.judge_turns(key, sorted(found, key=lambda each: each.ended))

    def judge_turns(self, key, claims):
        """Never two leases of a key at once, nor one while a nack's delay lasts."""
        latest = None
        held = []  # from when to when the key was certainly held, and by what
        for claim in claims:
            until = self.held[claim.token] - self.slack
            if until > claim.ended:  # else it was told of it too late
                if latest is not None and claim.ended < latest:
                    self.say(f"{key}: entry {claim.seq} was leased beside another")
                latest = until if latest is None else max(latest, until)
                held.append((claim.ended, until))
        starts = [start for start, _ in held]
        ends, furthest = [], 0
        for _, end in held:
            furthest = max(furthest, end)
            ends.append(furthest)
        for claim in claims:
            before = bisect.bisect_left(starts, claim.began)
            if before and ends[before - 1] > claim.ended:
                self.say(f"{key}: entry {claim.seq} was leased out of its turn")
