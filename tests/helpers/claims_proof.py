"""What a storm of claims has left, and whether it proves that every rule of leases was kept.

The evidence: what was pushed, one log for each worker, and the rows of the file. A log has one line
for the beginning and one for the end of each operation, with the time on CLOCK_MONOTONIC, which is
one for all processes. An operation with a beginning and no end was cut off by a kill, and may or
may not have happened: the only one that is allowed to be unclear.

The lines, words parted by blanks:

    wall OFFSET                        the wall clock less the monotonic one, when the log began
    B TIME claim LIMIT KEY             claims up to so many
    E TIME claim TOKEN SEQ ATTEMPTS DEADLINE PAYLOAD, …   these; the lease's end on this clock
    B TIME WAY DELAY TOKEN …           settles; WAY: ack, nack, tx (with a follow-up), undone
    E TIME WAY RESULT FOLLOW DEADLINE …   RESULT: ok, lost (LeaseError); each lease's end as known
    error TEXT                         what should never be

Everything here takes O(n log n).
"""

import bisect
import itertools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import NamedTuple

ACKED, DEAD = 4, 6  # states of a row
FOLLOW = "follow"
SLACK_NS = 5_000_000  # the wall clock is slewed, and read beside the monotonic one


class Rule(NamedTuple):
    """How the entries of a key are claimed, by everybody."""

    ordered: bool
    max_attempts: int | None


class Row(NamedTuple):
    """Of sqlspace_entries; token as hex."""

    seq: int
    key: str
    state: int
    attempts: int
    token: str | None
    taken_no: int | None
    payload: str | None
    headers: str | None


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
    """Of one or several leases; `ended` is None if a kill cut it off."""

    way: str
    delay: int
    tokens: list
    began: int
    ended: int | None = None
    result: str | None = None
    follow: int = 0
    deadlines: list = field(default_factory=list)


@dataclass
class Evidence:
    """All there is to judge by."""

    rules: dict  # by key
    pushed: dict  # by seq: key, payload
    logs: list  # of lists of lines
    rows: list
    integrity: str = "ok"


class Judge:
    """Reads the evidence; `problems` is empty if all rules were kept."""

    def __init__(self, evidence):
        self.problems = []
        self.rules, self.pushed = evidence.rules, evidence.pushed
        self.claims = {}  # by token
        self.settlings = []
        self.undecided = []  # claims: (limit, key)
        self.offsets = []
        if evidence.integrity != "ok":
            self.say(f"integrity_check: {evidence.integrity}")
        for log in evidence.logs:
            self.read(log)
        spread = max(self.offsets) - min(self.offsets) if self.offsets else 0
        self.slack = SLACK_NS + spread
        self.rows = {row.seq: row for row in evidence.rows}
        if len(self.rows) != len(evidence.rows):
            self.say("a seq stands twice in the file")
        self.of_entry = defaultdict(list)  # claims, by attempts
        for claim in sorted(self.claims.values(), key=lambda each: each.attempts):
            self.of_entry[claim.seq].append(claim)
        self.of_token = defaultdict(list)  # settlings, as they came
        for settling in self.settlings:
            for token in settling.tokens:
                self.of_token[token].append(settling)
        self.held = {token: self.held_until(claim) for token, claim in self.claims.items()}
        for step in (
            self.judge_settlings,
            self.judge_entries,
            self.judge_undecided_claims,
            self.judge_follow_ups,
            self.judge_dead_letters,
            self.judge_places,
            self.judge_order,
        ):
            step()

    def say(self, problem):
        self.problems.append(problem)

    # -- reading

    def read(self, log):
        begun = None
        for line in log:
            words = line.split()
            if words[0] == "wall":
                self.offsets.append(int(words[1]))
            elif words[0] == "error":
                self.say(f"a worker failed: {line}")
            elif words[0] == "B":
                begun = words
            else:
                self.read_end(begun, words)
                begun = None
        if begun is not None:
            self.read_end(begun, None)

    def read_end(self, begun, ended):
        began, way = int(begun[1]), begun[2]
        if way == "claim":
            limit, key = int(begun[3]), begun[4]
            if ended is None:
                self.undecided.append((limit, key))
                return
            found = " ".join(ended[3:]).split(",") if ended[3:] else []
            if len(found) > limit:
                self.say(f"{len(found)} entries were claimed instead of {limit}")
            for each in found:
                token, seq, attempts, deadline, payload = each.split()
                if token in self.claims:
                    self.say(f"entry {seq}: a token was given twice")
                self.claims[token] = Claim(
                    *(token, int(seq), key, int(attempts), payload),
                    *(began, int(ended[1]), int(deadline)),
                )
            return
        settling = Settling(way, int(begun[3]), begun[4:], began)
        if ended is not None:
            settling.ended, settling.result = int(ended[1]), ended[3]
            settling.follow = int(ended[4])
            settling.deadlines = [int(each) for each in ended[5:]]
        self.settlings.append(settling)

    # -- leases

    def held_until(self, claim):
        """Until when the lease, or its nack's delay, certainly lasted, as far as the logs prove."""
        for settling in self.of_token[claim.token]:
            if settling.way == "undone" or settling.result == "lost":
                continue
            if settling.result is None:
                return min(claim.deadline, settling.began)
            rule = self.rules.get(claim.key)
            last = rule is not None and claim.attempts == rule.max_attempts
            return settling.began + (0 if last else settling.delay)
        return claim.deadline

    def ended_by(self, token, *results):
        """The settlings of a lease that may have ended it."""
        return [
            each for each in self.of_token[token] if each.way != "undone" and each.result in results
        ]

    def judge_settlings(self):
        """A LeaseError is explained by a lease whose time was over; and no other settling was."""
        for settling in self.settlings:
            seqs = [self.claims[token].seq for token in settling.tokens]
            if settling.result == "lost" and min(settling.deadlines) > settling.ended + self.slack:
                self.say(f"entries {seqs}: LeaseError before the lease was over")
            if settling.result == "ok":
                for seq, deadline in zip(seqs, settling.deadlines, strict=True):
                    if settling.began > deadline + self.slack:
                        self.say(f"entry {seq}: {settling.way} after the lease was over")

    def judge_entries(self):
        for seq, (key, payload) in self.pushed.items():
            claims = self.of_entry.get(seq, [])
            self.judge_leases(seq, claims)
            self.judge_end(seq, key, claims)
            for claim in claims:
                if (claim.key, claim.payload) != (key, payload):
                    self.say(f"entry {seq}: delivered altered")
        for seq in self.of_entry:
            if seq not in self.pushed:
                self.say(f"entry {seq}: delivered, and never pushed")

    def judge_leases(self, seq, claims):
        """Attempts grow by one, and no lease begins while the one before it is held."""
        numbers = [claim.attempts for claim in claims]
        row = self.rows.get(seq)
        last = row.attempts if row is not None else 0
        if len(set(numbers)) != len(numbers) or (numbers and numbers[0] < 1):
            self.say(f"entry {seq}: attempts do not grow by one: {numbers}")
        if numbers and numbers[-1] > last:
            self.say(f"entry {seq}: {numbers[-1]} attempts, of which the file counts {last}")
        for earlier, later in itertools.pairwise(claims):
            if later.ended < self.held[earlier.token] - self.slack:
                self.say(f"entry {seq}: leased again while it was leased")
        acks = [
            (claim, settling)
            for claim in claims
            for settling in self.ended_by(claim.token, "ok")
            if settling.way in ("ack", "tx")
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
        if row is None or row.key != key or row.state not in (ACKED, DEAD):
            self.say(f"entry {seq}: neither acked nor dead at the end, but {row}")
            return
        if row.payload is not None:
            self.say(f"entry {seq}: a tombstone with a payload")
        ways = ("ack", "tx")
        acks = {
            claim.token
            for claim in claims
            for each in self.ended_by(claim.token, "ok")
            if each.way in ways
        }
        limit = self.rules[key].max_attempts
        if row.state == DEAD:
            if acks:
                self.say(f"entry {seq}: dead after its ack")
            if row.attempts != limit:
                self.say(f"entry {seq}: dead after {row.attempts} attempts of {limit}")
            return
        if limit is not None and row.attempts > limit:
            self.say(f"entry {seq}: acked at attempt {row.attempts} of {limit}")
        tokens = acks or {
            claim.token
            for claim in claims
            for each in self.ended_by(claim.token, None)
            if each.way in ways
        }
        if row.token not in tokens:
            self.say(f"entry {seq}: acked by another lease than the logs have it")
        elif self.claims[row.token].attempts != row.attempts:
            self.say(f"entry {seq}: its last attempt was not the one that was acked")

    def judge_undecided_claims(self):
        """An attempt that no log knows was made by a claim that a kill cut off."""
        unknown = Counter()
        for seq, (key, _) in self.pushed.items():
            if seq in self.rows:
                unknown[key] += max(0, self.rows[seq].attempts - len(self.of_entry.get(seq, ())))
        explained = Counter()
        for limit, key in self.undecided:
            explained[key] += limit
        for key, number in unknown.items():
            if number > explained[key]:
                self.say(f"{key}: {number} attempts that nobody made, or {explained[key]} at most")

    # -- what comes of them

    def judge_follow_ups(self):
        """One for each entry that was acked together with a push of it, and no other."""
        found = defaultdict(list)
        for row in self.rows.values():
            if row.key == FOLLOW:
                found[int(row.payload)].append(row.seq)
        for origin, seqs in found.items():
            if len(seqs) > 1:
                self.say(f"entry {origin}: {len(seqs)} follow-ups")
            row = self.rows.get(origin)
            ways = [each.way for each in self.of_token.get(row.token, ())] if row else []
            if row is None or row.state != ACKED or "tx" not in ways:
                self.say(f"entry {origin}: a follow-up, though no transaction acked it")
        for settling in self.settlings:
            if settling.way != "tx" or settling.result == "lost":
                continue
            (token,) = settling.tokens
            origin = self.claims[token].seq
            row = self.rows.get(origin)
            if row is not None and row.state == ACKED and row.token == token:
                if not found[origin]:
                    self.say(f"entry {origin}: acked in a transaction whose push is missing")
                elif settling.result == "ok" and found[origin] != [settling.follow]:
                    self.say(f"entry {origin}: its follow-up has another seq than was returned")

    def judge_dead_letters(self):
        """One for each that is dead, and no other, with where it came from and what it held."""
        found = {}
        for row in self.rows.values():
            if not row.key.endswith("/dead"):
                continue
            headers = json.loads(row.headers or "{}")
            origin = int(headers.get("sqlspace-seq", 0))
            source = self.rows.get(origin)
            if origin in found:
                self.say(f"entry {origin}: two dead letters")
            found[origin] = row
            if (
                origin not in self.pushed
                or source is None
                or source.state != DEAD
                or row.key != f"{source.key}/dead"
                or row.payload != self.pushed[origin][1]
                or headers.get("sqlspace-attempts") != str(source.attempts)
            ):
                self.say(f"entry {origin}: a dead letter that should not be: {row}")
        for seq in self.pushed:
            row = self.rows.get(seq)
            if row is not None and row.state == DEAD and seq not in found:
                self.say(f"entry {seq}: dead, and its letter is missing")

    def judge_places(self):
        """Every seq is of one entry, and every taking has its number."""
        given = list(self.pushed)
        given += [each.follow for each in self.settlings if each.way == "tx" and each.follow]
        for seq, number in Counter(given).items():
            if number > 1:
                self.say(f"seq {seq} was given {number} times")
        for row in self.rows.values():
            known = row.seq in self.pushed or row.key == FOLLOW or row.key.endswith("/dead")
            if not known:
                self.say(f"entry {row.seq} is from nowhere: {row}")
        numbers = sorted(row.taken_no for row in self.rows.values() if row.taken_no is not None)
        if numbers != list(range(1, len(numbers) + 1)):
            self.say("the takings are not numbered one by one")

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
            if latest is not None and claim.ended < latest:
                self.say(f"{key}: entry {claim.seq} was leased beside another")
            if until > claim.ended:
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


def judge(evidence):
    """The problems, none if all rules were kept, and what there was to judge."""
    judged = Judge(evidence)
    results = Counter((each.way, each.result) for each in judged.settlings)
    counts = {
        "entries": len(judged.pushed),
        "claims": len(judged.claims),
        "undecided claims": len(judged.undecided),
        "acks": sum(row.state == ACKED for row in judged.rows.values()),
        "dead": sum(row.state == DEAD for row in judged.rows.values()),
        "follow-ups": sum(row.key == FOLLOW for row in judged.rows.values()),
        "nacks": results["nack", "ok"],
        "lease errors": sum(n for (_, result), n in results.items() if result == "lost"),
        "undecided settlings": sum(n for (_, result), n in results.items() if result is None),
    }
    return judged.problems, counts


__all__ = ["ACKED", "DEAD", "FOLLOW", "Evidence", "Row", "Rule", "judge", "replace"]
