"""What a store must say: the life of an entry, by plain lists and a clock.

`Entry` is a row, and `Entry.state` the one place where the clock decides. `Model` has the verbs;
each does what the contract says of it, and nothing here waits, commits or looks at a file.

While the clock stands still, all is certain, whoever has looked or not. What has come due or to its
end meanwhile may have been carried out by any verb, though: a lease that is over may have been
taken out of its row, what has expired may be a tombstone, and what has died may have moved. None of
that makes a difference until the clock jumps back. So `Model.learn` reads from the file what was
carried out, before the clock moves: it must be what the clock has decided, and nothing else.
"""

import copy
from dataclasses import dataclass, field, replace

from sqlspace import dead_letters

MINUTE = 60_000_000
DEAD = "/dead"


def is_over(end, length, now):
    """Whether what ends then is over; also if a clock that has jumped back since has set it."""
    return end <= now or end - now > 2 * length + MINUTE


@dataclass(frozen=True)
class Hold:
    """What keeps an entry from being taken."""

    kind: str  # "delay" of its push, "nack" with a delay, or "lease"
    end: int
    length: int
    token: int | None = None  # whose lease it is

    def is_over(self, now):
        return is_over(self.end, self.length, now)


@dataclass
class Entry:
    """A row. Times and durations in microseconds."""

    seq: int | None  # None: it is in the file, and `learn` will tell
    key: str
    payload: bytes
    headers: dict
    pushed_at: int | None  # None: likewise
    ttl: int | None = None
    dedupe: str | None = None
    hold: Hold | None = None
    attempts: int = 0
    max_attempts: int | None = None

    def delay(self, now, length):
        """Hold it back, from its push on."""
        if length:
            self.hold = Hold("delay", now + length, length)

    @property
    def expires_at(self):
        return None if self.ttl is None else self.pushed_at + self.ttl

    @property
    def is_last(self):
        """Whether it is, or was, leased for the last time."""
        return (
            self.hold is not None
            and self.hold.kind == "lease"
            and self.max_attempts is not None
            and self.attempts >= self.max_attempts
        )

    def has_outlived(self, now):
        """Whether its time to live is over, lease or not."""
        return self.ttl is not None and is_over(self.expires_at, self.ttl, now)

    def state(self, now):
        """What it is: by its row and the time, and nothing else."""
        held = self.hold is not None and not self.hold.is_over(now)
        if held and self.hold.kind == "lease":
            return "leased"  # its time to live doesn't run out meanwhile
        if self.is_last and (not self.has_outlived(now) or self.expires_at > self.hold.end):
            return "dead"  # and will stand under KEY/dead
        if self.has_outlived(now):
            return "expired"
        return "delayed" if held else "ready"

    def is_live(self, now):
        return self.state(now) in {"ready", "delayed", "leased"}

    def edges(self):
        """The times at which the clock decides something about it."""
        ends = [] if self.hold is None else [(self.hold.end, self.hold.length)]
        if self.ttl is not None:
            ends.append((self.expires_at, self.ttl))
        return {time for end, length in ends for time in (end, end - 2 * length - MINUTE)}


@dataclass
class Tombstone:
    """What is left of an entry."""

    seq: int | None
    key: str
    outcome: str
    pushed_at: int
    taken_at: int
    dedupe: str | None = None


@dataclass
class Grant:
    """What a worker holds."""

    seq: int
    key: str
    end: int
    length: int
    settled: bool = False
    failed: bool = False  # it was refused once, and remembers


@dataclass
class Model:
    """One file, and the time."""

    now: int
    queues: dict  # key to its entries, by their place
    last: int = 0  # the highest seq ever given
    learned: int = 0  # as it was when the file was last read
    taken: list = field(default_factory=list)  # tombstones, in the order of taking
    fresh: int = 0  # so many of them have come since the file was last read
    # So many of the last tombstones were within every limit ever since they were taken. Of those
    # before them any may be gone, also if the store with the smaller limit is closed by now.
    certain: int = 0
    limit: int = 0
    grants: dict = field(default_factory=dict)  # token to Grant

    def copy(self):
        return copy.deepcopy(self)

    # -- looking

    def live(self, key):
        """What `entries` shows; of dead letters also those that had to be moved for that."""
        self.visit(key)
        return [entry for entry in self.queues[key] if entry.is_live(self.now)]

    def count(self, key):
        """What `len` says; it doesn't matter whether the dead letters have moved yet."""
        live = sum(entry.is_live(self.now) for entry in self.queues[key])
        return live + len(self.dying(key))

    def ready(self, key, number=None):
        """The first that can be taken, in order; all if None.

        Dead letters that haven't moved yet come last, so whoever finds enough before them may leave
        them where they are.
        """
        found = [entry for entry in self.queues[key] if entry.state(self.now) == "ready"]
        if self.dying(key) and (number is None or len(found) < number):
            self.visit(key)
            return self.ready(key, number)
        return found[:number]

    def dying(self, key):
        """What is dead and not moved yet, of those that will stand under `key`."""
        source = self.queues.get(key.removesuffix(DEAD), ()) if key.endswith(DEAD) else ()
        return [entry for entry in source if entry.state(self.now) == "dead"]

    def visit(self, key):
        """Whoever looks at dead letters moves them there first: then they have their place."""
        for entry in self.dying(key):
            self.die(entry, "attempts")

    def all(self):
        return [entry for queue in self.queues.values() for entry in queue]

    def edges(self):
        return sorted({time for entry in self.all() for time in entry.edges()})

    # -- adding

    def push(self, entry):
        """Behind all others."""
        if entry.seq is not None:
            assert entry.seq > self.last, "a seq grows over the whole file, and is never used twice"
            self.last = entry.seq
        self.queues[entry.key].append(entry)

    def same(self, key, dedupe):
        """Which answers are right for a push with this dedupe: some seqs, and None for a new one.

        An entry that lives, or is dead and still in its place, or in the history, is the answer.
        """
        for entry in self.queues[key]:
            if entry.dedupe == dedupe:
                if entry.is_live(self.now):
                    return {entry.seq}
                # It is a tombstone, or becomes one now, together with all others that have come to
                # their end; some that were taken in this transaction may have come after it.
                gone = sum(not each.is_live(self.now) for each in self.all()) + self.fresh
                if self.limit == 0:
                    return {None}
                return {entry.seq} if self.limit >= gone else {entry.seq, None}
        for back, stone in enumerate(reversed(self.taken), 1):
            if (stone.key, stone.dedupe) == (key, dedupe):
                # Others that expire now may push it out of the history.
                gone = sum(each.state(self.now) in {"expired", "dead"} for each in self.all())
                answers = set()
                if back <= self.limit:
                    answers.add(stone.seq)
                if back > min(self.certain, self.limit - gone):
                    answers.add(None)
                return answers
        return {None}

    def put(self, entry):
        """In place of all that is there; what is dead already isn't there any more."""
        self.clear(entry.key)
        self.push(entry)

    # -- taking

    def bury(self, entry, outcome):
        """It leaves a tombstone."""
        self.queues[entry.key].remove(entry)
        self.taken.append(
            Tombstone(entry.seq, entry.key, outcome, entry.pushed_at, self.now, entry.dedupe)
        )
        self.fresh += 1
        self.certain += 1
        self.trim()

    def trim(self):
        self.certain = min(self.certain, self.limit)

    def pull(self, key, number=1):
        """The payloads."""
        found = self.ready(key, number)
        for entry in found:
            self.bury(entry, "taken")
        return [entry.payload for entry in found]

    def remove(self, key, seq):
        """One live entry, whatever holds it; no tombstone."""
        for entry in self.queues[key]:
            if entry.seq == seq and entry.is_live(self.now):
                self.queues[key].remove(entry)
                return True
        return False

    def clear(self, key):
        """All live entries; no tombstones, and no dedupe is remembered."""
        live = self.live(key)
        for entry in live:
            self.queues[key].remove(entry)
        for each in [*self.queues[key], *(stone for stone in self.taken if stone.key == key)]:
            each.dedupe = None
        return len(live)

    # -- leasing

    def claimable(self, key, ordered):
        """The head, unless the claim is an ordered one, and an earlier entry is still under way."""
        ready = self.ready(key, 1)
        if not ready:
            return None
        for entry in self.queues[key]:
            if entry is ready[0]:
                break
            under_way = entry.hold is not None and entry.hold.kind in {"lease", "nack"}
            if ordered and under_way and entry.state(self.now) in {"leased", "delayed"}:
                return None
        return ready[0]

    def lease(self, entry, token, length, max_attempts):
        """This claim counts, and its max_attempts is the one that counts."""
        entry.hold = Hold("lease", self.now + length, length, token)
        entry.attempts += 1
        entry.max_attempts = max_attempts
        self.grants[token] = Grant(entry.seq, entry.key, entry.hold.end, length)

    def leased(self, token):
        """The entry, if that lease still holds; None: settling is a LeaseError."""
        if self.grants[token].settled:
            return None
        for entry in self.queues[self.grants[token].key]:
            if entry.hold is not None and entry.hold.token == token:
                return entry if entry.state(self.now) == "leased" else None
        return None

    def ack(self, token):
        self.bury(self.leased(token), "acked")
        self.grants[token].settled = True

    def nack(self, token, delay):
        """Back to its place; or expired; or, after the last attempt, dead."""
        entry = self.leased(token)
        self.grants[token].settled = True
        if entry.has_outlived(self.now):
            self.bury(entry, "expired")
        elif entry.is_last:
            self.die(entry, "attempts")
        else:
            entry.hold = Hold("nack", self.now + delay, delay) if delay else None

    def extend(self, token, length):
        """From now on."""
        entry = self.leased(token)
        entry.hold = Hold("lease", self.now + length, length, token)
        grant = self.grants[token]
        self.grants[token] = replace(grant, end=entry.hold.end, length=length)

    # -- dying

    def die(self, entry, reason):
        """A tombstone here, and under KEY/dead a new entry that tells where it comes from."""
        self.bury(entry, "dead")
        origin = {
            dead_letters.ORIGIN_KEY: entry.key,
            dead_letters.ORIGIN_SEQ: str(entry.seq),
            dead_letters.ORIGIN_PUSHED_AT: f"{entry.pushed_at / 1e6:.6f}",
            dead_letters.ORIGIN_ATTEMPTS: str(entry.attempts),
            dead_letters.ORIGIN_REASON: reason,
        }
        headers = {**entry.headers, **origin}
        self.push(Entry(None, entry.key + DEAD, entry.payload, headers, self.now))

    def requeue(self, key):
        """The dead letters that are ready go to the end of the key that they came from."""
        found = self.ready(key + DEAD)
        for entry in found:
            self.bury(entry, "taken")
            target = entry.headers.get(dead_letters.ORIGIN_KEY, key)
            headers = {
                name: text
                for name, text in entry.headers.items()
                if not name.startswith("sqlspace-")
            }
            self.push(Entry(None, target, entry.payload, headers, self.now))
        return len(found)

    def compact(self):
        """The history is empty, and so is what it knew of dedupes."""
        self.taken.clear()
        self.certain = self.fresh = 0

    # -- learning what was carried out

    def learn(self, rows):
        """See in the file what was carried out of what the clock has decided, and check the rest.

        Args:
            rows: All rows by seq: seq, key, state, until_at, pushed_at, taken_no, headers as dict.
        """
        live = {row[0]: row for row in rows if row[2] < 3}
        stones = {row[0]: row for row in rows if row[2] >= 3}
        new = self.taken[len(self.taken) - self.fresh :]
        self._learn_what_is_gone(live, stones)
        self._learn_seqs(live, stones)
        for key, queue in self.queues.items():
            queue.sort(key=lambda entry: entry.seq)
            seqs = [seq for seq, row in live.items() if row[1] == key]
            assert [entry.seq for entry in queue] == seqs, key
        for entry in self.all():
            self._learn_hold(entry, live[entry.seq])
        number = {seq: row[5] for seq, row in stones.items()}
        # What was taken by hand; for what the clock has taken may come before it or behind it.
        by_hand = [stone.seq for stone in new if stone.outcome != "dead"]
        numbers = [number[seq] for seq in by_hand if seq in number]
        assert numbers == sorted(numbers), "taken in another order"
        new = self.taken[len(self.taken) - self.fresh :]
        # Those that aren't in the file are beyond the history: they were taken before the others.
        new.sort(key=lambda stone: number.get(stone.seq, 0))
        self.taken[len(self.taken) - self.fresh :] = new
        self.fresh = 0
        self.last = self.learned = max([self.last, *live, *stones])

    def _learn_what_is_gone(self, live, stones):
        outcomes = {5: "expired", 6: "dead"}
        for entry in self.all():
            if entry.seq is None or entry.seq in live:
                continue
            state = entry.state(self.now)
            assert state in {"expired", "dead"}, f"nobody took {entry}"
            if entry.seq in stones:  # and not beyond the history already
                assert outcomes.get(stones[entry.seq][2]) == state, entry
            if state == "dead":
                self.die(entry, "attempts")
            else:
                self.bury(entry, "expired")

    def _learn_seqs(self, live, stones):
        def origin(headers):
            return headers.get(dead_letters.ORIGIN_KEY), headers.get(dead_letters.ORIGIN_SEQ)

        for key, queue in self.queues.items():
            known = {entry.seq for entry in queue}
            new = [seq for seq, row in live.items() if row[1] == key and seq not in known]
            letters = {origin(live[seq][6]): seq for seq in new}
            unknown = [entry for entry in queue if entry.seq is None]
            for entry in unknown:
                if dead_letters.ORIGIN_SEQ in entry.headers:
                    entry.seq = letters[origin(entry.headers)]
                    new.remove(entry.seq)
            others = [entry for entry in unknown if entry.seq is None]  # requeued, in this order
            assert len(others) == len(new), key
            for entry, seq in zip(others, new, strict=True):
                entry.seq = seq
            for entry in unknown:
                assert entry.seq > self.learned, "a seq is never used twice"
                assert entry.headers == live[entry.seq][6]
            # Moved and taken by the same verb.
            known = {stone.seq for stone in self.taken}
            unknown = [stone for stone in self.taken if stone.seq is None and stone.key == key]
            gone = sorted(
                (row[5], seq)
                for seq, row in stones.items()
                if row[1] == key and seq > self.learned and seq not in known
            )
            for stone, (_, seq) in zip(reversed(unknown), reversed(gone), strict=False):
                stone.seq = seq

    def _learn_hold(self, entry, row):
        until, pushed_at = row[3:5]
        if entry.pushed_at is None:
            entry.pushed_at = pushed_at
        assert entry.pushed_at == pushed_at
        if entry.hold is None or until is not None:
            assert until == (None if entry.hold is None else entry.hold.end), entry
        else:
            assert entry.hold.is_over(self.now), f"let go before its time: {entry}"
            assert not entry.is_last, f"let go, though it is dead: {entry}"
            entry.hold = None
