"""What many workers did at once, and whether it proves that every rule of a queue was kept.

The evidence: a log for each thread of each worker, and what the file holds at the end. A log has
one record for the beginning and one for the end of each operation, with the time on
CLOCK_MONOTONIC, which is one for all processes. An operation with a beginning and no end was cut
off by a kill, and may or may not have happened: the only one that is allowed to be unclear.

Every payload is pushed once, and so names its entry. Where there are seqs, they are the witness of
the order; where there are none (`Local`), it is the time: what was pushed after another push had
returned stands behind it.

The records, in a file one JSON array a line:

    ["wall", OFFSET]               the wall clock less the monotonic one, when the log began
    ["B", TIME, WHAT, GIVEN…]      an operation begins
    ["N", NOTE]                    noted in front of its commit
    ["E", TIME, RESULT]            it has returned
    ["R", TIME, ERROR]             it was refused: nothing changed
    ["X", TIME]                    the process was dead by then
    ["error", TEXT]                what should never be

    WHAT     GIVEN                                     RESULT
    push     KEY [PAYLOAD…] {delay ttl dedupe}         [SEQ…]; null where it isn't told
    put      KEY PAYLOAD                               SEQ, or null
    take     [KEY…] LIMIT                              [[KEY PAYLOAD]…]
    peek     [KEY…]                                    the same
    clear    KEY                                       how many
    move     FROM TO PAYLOAD; note: what was taken     SEQ; or null: there was nothing
    unmove   the same, rolled back on purpose          null
    compact                                            null
    and those of claims: `leases`

Everything here takes O(n log n).
"""

import itertools
import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import apsw
import leases
import queues
from queues import NEVER

import sqlspace

__all__ = ["Evidence", "Row", "do", "judge", "parsed", "remains"]

SLACK_NS = 5_000_000  # the wall clock is slewed, and read beside the monotonic one
SELECT_ROWS = """
SELECT seq, key, state, attempts, lower(hex(token)), taken_no, CAST(payload AS TEXT), headers
  FROM sqlspace_entries
"""


class Row(NamedTuple):
    """Of sqlspace_entries; token as hex."""

    seq: int
    key: str
    state: int
    attempts: int = 0
    token: str | None = None
    taken_no: int | None = None
    payload: str | None = None
    headers: str | None = None


@dataclass
class Evidence:
    """All there is to judge by.

    Attributes:
        logs: Lists of records.
        rows: Of the file, after the drain; None: there is none.
        integrity: What SQLite says of it.
        rules: By key, of the keys that are claimed; see `leases`.
        forgets: Whether tombstones may be missing.
    """

    logs: list
    rows: list | None = None
    integrity: str = "ok"
    rules: dict = field(default_factory=dict)
    forgets: bool = False


class Op(NamedTuple):
    """An operation.

    Attributes:
        ended: If it was cut off, when its process was certainly dead.
        done: False: it was refused, and nothing changed. None: it was cut off.
    """

    what: str
    given: list
    began: int
    ended: float
    done: bool | None
    result: Any
    note: Any


class Look(NamedTuple):
    """That an entry was seen at the head of its key."""

    entry: "Entry"
    began: float
    ended: float
    takes: bool


class Entry:
    """One payload, and what became of it."""

    __slots__ = (
        *("key", "payload", "began", "ended", "seq", "done", "delay", "ttl", "dedupe"),
        *("takes", "claims", "live", "first"),
    )

    def __init__(self, op, key, payload, seq=None, delay=0, ttl=None, dedupe=None):
        self.key, self.payload, self.seq = key, payload, seq
        self.began, self.ended, self.done = op.began, op.ended if op.done else NEVER, op.done
        self.delay, self.ttl, self.dedupe = delay, ttl, dedupe
        self.takes = []
        self.claims = []
        self.live = False  # at the end
        self.first = None  # before that time nobody can have touched it; None: somebody may have

    @property
    def seen(self):
        return bool(self.takes or self.claims or self.live)

    @property
    def ready(self):
        """When it certainly stood ready."""
        return self.ended + (self.delay + SLACK_NS if self.delay else 0)


def do(write, step, what, *given, result=lambda found: found, refused=(sqlspace.BusyError,)):
    """Log an operation while it is done; what it returns, None if it was refused.

    Args:
        write: Is called with each record.
        step: Does it.
        what: It is, as are those that follow.
        given: To it.
        result: Of what the step returned, for the log.
        refused: The errors that are right here.
    """
    write(["B", time.monotonic_ns(), what, *given])
    try:
        found = step()
    except refused as error:
        write(["R", time.monotonic_ns(), type(error).__name__])
        return None
    write(["E", time.monotonic_ns(), result(found)])
    return found


def parsed(text):
    """The records of a log's file; one that was cut off in the middle of a line is none."""
    for line in text.split("\n"):
        if line:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def remains(path):
    """What a file holds, and what SQLite says of it: rows and integrity."""
    connection = apsw.Connection(path, apsw.SQLITE_OPEN_READONLY)
    try:
        rows = [Row(*row) for row in connection.execute(SELECT_ROWS)]
        return rows, connection.pragma("integrity_check")
    finally:
        connection.close()


class Judge:
    """Reads the evidence; `problems` is empty if all rules were kept."""

    def __init__(self, evidence):
        self.problems = []
        self.evidence = evidence
        self.offsets = []
        self.ops = defaultdict(list)
        if evidence.integrity != "ok":
            self.say(f"integrity_check: {evidence.integrity}")
        for log in evidence.logs:
            for op in self.read(log):
                self.ops[op.what].append(op)
        spread = max(self.offsets) - min(self.offsets) if self.offsets else 0
        self.slack = SLACK_NS + spread
        self.entries = {}  # by payload
        self.cuts = defaultdict(list)  # takes that were cut off, by key
        self.looks = defaultdict(list)  # by key
        self.empties = defaultdict(list)  # by key: when nothing was found there
        self.collect()
        self.by_seq = queues.Queues(self).by_seq
        self.leases = leases.Leases(self)

    def say(self, problem):
        self.problems.append(problem)

    # -- reading

    def read(self, log):
        """The operations of a log."""
        begun, note = None, None
        for kind, *words in log:
            if kind == "wall":
                self.offsets.append(words[0])
            elif kind == "error":
                self.say(f"a worker failed: {words[0]}")
            elif kind == "N":
                note = words[0]
            elif kind == "B":
                begun, note = words, None
            elif begun is not None:  # X too, which may stand behind what was whole
                began, what, *given = begun
                done = {"E": True, "R": False, "X": None}[kind]
                result = words[1] if kind == "E" else None
                yield Op(what, given, began, words[0], done, result, note)
                begun = None
        if begun is not None:
            began, what, *given = begun
            yield Op(what, given, began, NEVER, None, None, note)

    def collect(self):
        for op in self.ops["push"]:
            key, payloads, options = op.given
            seqs = op.result if op.done else itertools.repeat(None)
            for payload, seq in zip(payloads, seqs, strict=bool(op.done)):
                self.add(Entry(op, key, payload, seq, **options))
        for op in self.ops["put"]:
            self.add(Entry(op, *op.given, op.result))
        for row in self.evidence.rows or ():
            entry = self.entries.get(row.payload)
            if row.state < 3 and entry is not None and entry.key == row.key:
                self.found_live(entry, row)
            if row.key.endswith("/dead") and row.state < 3:
                self.number_dead(entry, row)
        self.collect_moves()
        for op in self.ops["take"]:
            keys, limit = op.given
            if op.done is None:
                for key in keys:
                    self.cuts[key] += [(op.began, op.ended)] * limit
            elif op.done:
                self.see(op, keys, op.result, takes=True)
                self.bound(op)
        for op in self.ops["peek"]:
            if op.done:
                self.see(op, op.given[0], op.result, takes=False)
        for op in self.ops["claim"]:
            if op.done:
                self.see_claims(op)
        for entry in self.entries.values():
            self.decide_first(entry)
        for op in self.ops["push"]:
            mates = [self.entries[payload] for payload in op.given[1]]
            if op.done is None and any(mate.seen for mate in mates):
                for mate in mates:  # all or none
                    mate.done = True

    def add(self, entry):
        if entry.payload in self.entries:
            self.say(f"{entry.payload}: pushed twice, so it can't be judged")
        self.entries[entry.payload] = entry

    def found_live(self, entry, row):
        if entry.live:
            self.say(f"{entry.payload}: stands twice in the file")
        entry.live = True
        self.number(entry, row.seq)

    def number_dead(self, entry, row):
        """Its letter tells the seq of one whose push was cut off."""
        origin = json.loads(row.headers or "{}").get("sqlspace-seq")
        if entry is not None and origin and row.key == f"{entry.key}/dead":
            self.number(entry, int(origin))

    def number(self, entry, seq):
        """Its seq was told by somebody else than its push."""
        if entry.seq is None:
            entry.seq = seq
        elif entry.seq != seq and entry.dedupe is None:
            self.say(f"{entry.payload}: its seq was {entry.seq}, and is {seq}")

    def collect_moves(self):
        """Each took one and pushed another in one transaction: both are there, or neither."""
        standing = {row.payload for row in self.evidence.rows or () if row.state < 3}
        for op in self.ops["move"] + self.ops["unmove"]:
            source, target, payload = op.given
            done = op.done
            if op.what == "unmove" or op.note is None:
                done = False
            elif done is None:
                done = payload in standing
            op = op._replace(done=done)  # noqa: PLW2901  # what became clear
            entry = Entry(op, target, payload, op.result)
            self.add(entry)
            if done:
                self.see(op, [source], [(source, op.note)], takes=True)
            elif payload in standing:
                self.say(f"{payload}: is there, though its transaction was rolled back")
        for row in self.evidence.rows or ():
            entry = self.entries.get(row.payload)
            if row.state < 3 and entry is not None and entry.key == row.key and not entry.live:
                self.found_live(entry, row)

    def see(self, op, keys, found, *, takes):
        """Something was at the head of a key, or nothing."""
        for key, payload in found:
            entry = self.entry(key, payload)
            if entry is not None:
                self.looks[key].append(Look(entry, op.began, op.ended, takes))
                if takes:
                    entry.takes.append(op)
        self.pass_by(op, keys, [key for key, _ in found])

    def pass_by(self, op, keys, found):
        """Of several keys, the first that has something counts: the ones before have nothing."""
        for key in itertools.takewhile(lambda key: key not in found[:1], keys):
            self.empties[key].append((op.began, op.ended))

    def entry(self, key, payload):
        entry = self.entries.get(payload)
        if entry is None or entry.key != key:
            self.say(f"{key}: {payload} came out, and was never pushed there")
            return None
        return entry

    def see_claims(self, op):
        keys, _ = op.given
        self.bound(op)
        for _, seq, attempts, _, key, payload in op.result:
            entry = self.entry(key, payload)
            if entry is not None:
                entry.claims.append((attempts, op))
                self.number(entry, seq)
                self.looks[key].append(Look(entry, op.began, op.ended, takes=False))
        in_turn = any(
            key in self.evidence.rules and self.evidence.rules[key].ordered for key in keys
        )
        if not in_turn:
            self.pass_by(op, keys, [each[4] for each in op.result])

    def bound(self, op):
        keys, limit = op.given
        if len(op.result) > limit:
            self.say(f"{keys}: a {op.what} gave {len(op.result)} instead of {limit}")

    def decide_first(self, entry):
        if entry.claims:
            attempts, op = min(entry.claims, key=lambda claim: claim[0])
            entry.first = op.began if attempts == 1 else None
        elif entry.takes:
            entry.first = min(op.began for op in entry.takes)
        elif entry.live and entry.key not in self.evidence.rules:
            entry.first = NEVER


def judge(evidence):
    """The problems, none if all rules were kept, and what there was to judge."""
    judged = Judge(evidence)
    counts = Counter(judged.leases.counts())
    for what, ops in judged.ops.items():
        counts["operations"] += len(ops)
        counts[what] += len(ops)
        counts["refused"] += sum(op.done is False for op in ops)
        counts["cut off"] += sum(op.done is None for op in ops)
    counts["entries"] = sum(entry.seen for entry in judged.entries.values())
    return judged.problems, counts
