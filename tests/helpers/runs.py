"""Two stores at work on one file of a recorded disk, and what their callers were told.

What a run does is drawn from its name, down to SQLite's own random numbers, so the same name makes
the same writes again.
"""

import contextlib
import itertools
import logging
import os
import random
import secrets
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import apsw
import pytest
from disks import OwnSyncs, Recorder

import sqlspace
from sqlspace import clock, schema

__all__ = [
    "ANY",
    "MEMORY",
    "SOUND",
    "VERBS",
    "Deed",
    "Fact",
    "Member",
    "Plant",
    "Run",
    "Violation",
    "likeliest",
    "live_rows",
]

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
BEGIN = 1_800_000_000_000_000
SECOND = 1_000_000
KEYS = ("a", "b", "c")
VERBS = (
    *("push",) * 6,
    *("push_many", "pull_many", "transaction", "claim", "ack", "crowd") * 2,
    *("put", "clear", "remove", "pullp", "pullp", "pull_any", "nack", "extend", "requeue"),
    *("compact", "another", "later"),
)
ANY = b"any"  # a token that nobody was told
SELECT_LIVE = """
SELECT payload, seq, key, state, token, deadline FROM sqlspace_entries WHERE state < 3
"""
SELECT_DEDUPE = "SELECT seq, key, dedupe FROM sqlspace_entries WHERE seq = ?"


class Violation(Exception):
    """The promise is broken."""


@dataclass(frozen=True)
class Fact:
    """A live entry, as its callers know it; times in microseconds."""

    seq: int | None  # None: it moved, and nobody was told where to
    key: str
    token: bytes | None = None  # whose lease it is
    lease_end: int = 0
    due: int = 0
    expires: int | None = None
    dies: bool = False  # when this lease is over

    def has_expired(self, now):
        return self.expires is not None and self.expires <= now

    def is_leased(self, now):
        return self.token is not None and self.lease_end > now

    def is_sure(self, now):
        """Whether it certainly stands where it is said to."""
        if self.seq is None or self.is_leased(now):
            return self.seq is not None
        return not self.has_expired(now) and not (self.token is not None and self.dies)

    def is_ready(self, now):
        """Whether it can certainly be taken."""
        return self.is_sure(now) and not self.is_leased(now) and self.due <= now

    def fits(self, row, now):
        """Whether the file says the same."""
        if self.has_expired(now) and not self.is_leased(now):
            return True  # tidied away, or not yet
        if row is None:
            return False
        seq, key, state, token, _ = row
        if self.dies and not self.is_leased(now):
            return True  # moved to the dead letters, or not yet
        if (self.seq is not None and seq != self.seq) or key != self.key:
            return False
        if self.token is None:
            return token is None
        return not self.is_leased(now) or (state == 2 and self.token in (token, ANY))

    def as_in(self, row):
        """With what nobody was told."""
        if row is None:
            return self
        seq, _, state, token, deadline = row
        if self.token is None or state != 2:
            return replace(self, seq=seq)
        return replace(self, seq=seq, token=token, lease_end=deadline)


class Deed(NamedTuple):
    """A call, from the event before which it began to that before which it returned.

    Attributes:
        effects: What it did to entries, by their payloads: the fact before, and after; None: gone.
        alone: Whether no other was under way, so that the file's state behind it is known.
        raised: Whether it returned nothing, but raised.
        might: What it might have done as well, as long as it is under way.
        most: If not None: to so many entries at the most, whichever they are.
    """

    name: str
    begin: int
    end: int
    now: int
    effects: dict
    alone: bool = True
    raised: bool = False
    might: dict = {}  # noqa: RUF012  # never changed
    most: int | None = None

    def is_whole(self, fits):
        """Whether all of it was done, or nothing; `fits`: whether an entry is as a fact says."""
        if self.most is not None:
            return sum(not fits(p, before) for p, (before, _) in self.might.items()) <= self.most
        return any(
            all(
                fits(payload, facts[done])
                for payload, facts in (self.might or self.effects).items()
            )
            for done in (False, True)
        )


class Plant(NamedTuple):
    """What makes a run break its promise, to see that it is found.

    Attributes:
        sync: As for `sqlspace.open`; None: as the seed says.
        deaf: Whether the disk ignores syncs.
        patch: Called with the run and a MonkeyPatch before it begins.
        opened: Called with each store.
        verbs: What is drawn from.
        deeds: How many there are in a run, and in one that goes on after a power cut.
    """

    sync: object = None
    deaf: bool = False
    opened: object = lambda store: None
    verbs: tuple = VERBS
    deeds: tuple = (40, 12)
    patch: object = lambda run, patch: None


SOUND = Plant()


def likeliest(facts, row):
    """Of facts that all fit a row, the one that it tells of."""
    for fact in facts:
        if fact is not None and fact.token is not None and row is not None and row[2] == 2:
            return fact.as_in(row)
    return facts[-1] and facts[-1].as_in(row)


def live_rows(connection):
    """By their payloads: seq, key, state, token, deadline."""
    return {row[0]: row[1:] for row in connection.execute(SELECT_LIVE)}


@contextlib.contextmanager
def seeded(dice):
    """SQLite draws its random numbers, the salts of the -wal, from these dice."""

    class Dice(apsw.VFS):
        def xRandomness(self, number):
            return dice.randbytes(number)

    for migration in schema.migrations():
        schema._expected(migration.version)  # kept after the first time, which throws dice as well
    vfs = Dice("dice", "unix", makedefault=True)
    apsw.randomness(0)
    apsw.randomness(1)  # takes its seed
    vfs.unregister()
    yield
    apsw.randomness(0)


class Run:
    """Two stores at work on one file.

    Args:
        name: Seeds all that it does.
        files: What is on the disk when it begins.
        facts: What the callers know of it.
        top: The highest seq that anybody was told.
        now: What the clock says.
        plant: What is wrong with it.
    """

    def __init__(self, name, files, facts, top=0, now=BEGIN, plant=SOUND):
        self.name = name
        self.files = files
        self.before = dict(facts)
        self.facts = dict(facts)
        self.top = self.top_before = top
        self.began = self.now = now
        self.plant = plant
        self.deeds = []
        self.random = random.Random(name)
        self.dice = random.Random(name)  # those of SQLite, and of the tokens
        self.stores = {}
        self.first = not files  # the file isn't there yet
        self.number = itertools.count()
        self.deliveries = []
        self.members = []  # of the last crowd

    def __call__(self):
        """Do it all, and leave nothing."""
        with self:
            for verb in self.script():
                self.step(verb)
            while self.stores:
                self.do("close", self.stores.popitem()[1].close, lambda _: {})

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY))
            self.path = os.path.join(folder, "queue.db")
            for end, data in self.files.items():
                with open(self.path + end, "wb") as file:
                    file.write(data)
            self.recorder = Recorder(self.path, f"recorder of {folder}")
            stack.callback(self.recorder.unregister)
            self.recorder.now = lambda: self.now
            self.recorder.before = self.disk
            self.events = self.recorder.events
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(logging.getLogger("sqlspace"), "disabled", True)  # it tells of the dead
            patch.setattr(clock, "now", lambda: self.now)
            patch.setattr(os, "urandom", self.dice.randbytes)
            patch.setattr(secrets, "token_hex", lambda number: self.dice.randbytes(number).hex())
            self.own_syncs = OwnSyncs(self.recorder)
            self.own_syncs.patch(patch)
            stack.enter_context(seeded(self.dice))
            self.plant.patch(self, patch)
            stack.callback(self.close)
            self.begin()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.stack.close()

    def begin(self):
        """Open the first store."""
        self.choose()
        self.do("open", self.open, lambda _: {})

    def choose(self):
        """How the stores are opened, and how many there are."""
        self.sync = self.plant.sync
        if self.sync is None:
            self.sync = self.random.choice((True, "group"))
        self.history = self.random.choice((0, 3, 1000, None))
        self.checkpoint = self.random.choice((8, 30, 1000))
        self.keep = self.random.random() < 0.3  # both stores stay open

    def script(self):
        """The verbs, one after the other."""
        for _ in range(self.plant.deeds[not self.first]):
            yield self.random.choice(self.plant.verbs)

    def disk(self, event):
        """Called before each event; what it raises has failed."""

    def close(self):
        for store in self.stores.values():
            with contextlib.suppress(sqlspace.SpaceError):
                store.close()

    def step(self, verb):
        """One of VERBS."""
        self.now += 1000
        getattr(self, verb)()

    def open(self):
        name = next(each for each in ("store 0", "store 1") if each not in self.stores)
        store = sqlspace.open(
            self.path,
            sync=self.sync,
            history=self.history,
            busy_timeout=60.0,  # a crowd on a busy machine
            vfs=self.recorder.name,
        )
        self.stores[name] = store
        self.own_syncs.opened(store._database._session.wal_descriptor)
        store._database._session.connection.wal_autocheckpoint(self.checkpoint)
        self.plant.opened(store)

    # -- what is told

    def do(self, name, call, effects, might=dict, most=None):
        """Make a call; `effects` says what its answer means for the entries.

        `might` and `most` say what it may have done if it raises, as `Deed` has it.
        """
        begin = len(self.events)
        value = call()
        self.tell(Deed(name, begin, len(self.events), self.now, self.changes(effects(value))))

    def changes(self, after):
        return {payload: (self.facts.get(payload), fact) for payload, fact in after.items()}

    def tell(self, deed):
        self.deeds.append(deed)
        for payload, (_, after) in deed.effects.items():
            self.facts[payload] = after

    def ensure(self, holds, text):
        if not holds:
            raise Violation(f"{text} (call {len(self.deeds)} of {self.name})")

    # -- what is drawn

    @property
    def store(self):
        return self.stores[self.random.choice(sorted(self.stores))]

    def key(self):
        return self.random.choice(KEYS)

    def payload(self):
        size = self.random.choice((0, 0, 0, 40, 700, 9000))
        return f"{self.name}:{next(self.number)}".encode() + b"." * size

    def live(self, key):
        return {p: f for p, f in self.facts.items() if f is not None and f.key == key}

    def cleared(self, key):
        """What becomes of a key's entries: gone, but for the dead, which move."""
        return {
            payload: None
            for payload, fact in self.live(key).items()
            if not fact.dies or fact.is_leased(self.now)
        }

    # -- verbs

    def push(self):
        self.push_by(self.store)

    def push_by(self, store, effects=None):
        """By a store or a transaction; `effects` collects what the latter has done."""
        key, payload = self.key(), self.payload()
        ttl = self.random.choice((None, None, None, 50.0, 5000.0))
        delay = self.random.choice((None, None, None, 20.0))
        dedupe = self.random.choice((None, None, None, "x", "y"))
        headers = self.random.choice((None, {"name": "value"}))

        def after(seq):
            if seq <= self.top and dedupe is not None and self.is_same(seq, key, dedupe):
                return {}
            self.grow(seq)
            return {payload: fact(seq)}

        def fact(seq):
            due = self.now + int(delay * SECOND) if delay else 0
            expires = self.now + int(ttl * SECOND) if ttl else None
            return Fact(seq, key, due=due, expires=expires)

        def call():
            return store.push(key, payload, ttl=ttl, delay=delay, dedupe=dedupe, headers=headers)

        if effects is None:
            self.do("push", call, after, lambda: {payload: fact(None)})
        else:
            effects.update(after(call()))

    def is_same(self, *wanted):
        """Whether an earlier push has asked for the same."""
        connections = [each._database._session.connection for each in self.stores.values()]
        connections.sort(key=lambda each: each.in_transaction)
        with self.undisturbed():
            return connections[-1].execute(SELECT_DEDUPE, wanted[:1]).fetchall() == [wanted]

    def undisturbed(self):
        """While the run itself looks."""
        return contextlib.nullcontext()

    def grow(self, *seqs):
        for seq in seqs:
            self.ensure(seq > self.top, f"seq {seq} is used again, {self.top} was the last")
            self.top = seq

    def push_many(self):
        key, payloads = self.key(), [self.payload() for _ in range(self.random.randint(1, 6))]

        def after(seqs):
            self.grow(*seqs)
            return {p: Fact(seq, key) for p, seq in zip(payloads, seqs, strict=True)}

        might = dict.fromkeys(payloads, Fact(None, key))
        self.do("push_many", lambda: self.store.push_many(key, payloads), after, lambda: might)

    def put(self):
        key, payload = self.key(), self.payload()

        def fact(seq):
            return self.cleared(key) | {payload: Fact(seq, key)}

        def after(seq):
            self.grow(seq)
            return fact(seq)

        self.do("put", lambda: self.store.put(key, payload), after, lambda: fact(None))

    def clear(self):
        key = self.key()
        gone = self.cleared(key)
        self.do("clear", lambda: self.store.clear(key), lambda _: gone, lambda: gone)

    def remove(self):
        if known := [f for f in self.facts.values() if f is not None and f.seq is not None]:
            fact = self.random.choice(known)
            gone = {p: None for p, f in self.facts.items() if f == fact}

            def after(did):
                self.ensure(did or not fact.is_sure(self.now), f"{fact} could not be removed")
                return gone if did else {}

            self.do("remove", lambda: self.store.remove(fact.key, fact.seq), after, lambda: gone)

    def taken(self, keys, payloads, before=()):
        """What was taken from one of these keys was there, and was the first; but for `before`."""
        for payload in payloads:
            fact = self.facts.get(payload)
            self.ensure(fact is not None, f"{payload[:40]!r} was taken, and isn't there")
            earlier = [
                f
                for p, f in self.facts.items()
                if f is not None
                and f.key == fact.key
                and f.is_ready(self.now)
                and fact.seq
                and f.seq < fact.seq
                and p not in payloads
                and p not in before
            ]
            self.ensure(not earlier, f"{payload[:40]!r} overtook {earlier}")
        if not payloads:
            left = [f for f in self.facts.values() if f and f.key in keys and f.is_ready(self.now)]
            self.ensure(not left, f"nothing was found, and {left} are there")

    def any_of(self, *keys):
        """That each of their entries is gone."""
        return {p: None for key in keys for p in self.live(key)}

    def gone(self, keys, payloads):
        payloads = [each for each in payloads if each is not None]
        self.taken(keys, payloads)
        return dict.fromkeys(payloads)

    def pullp(self):
        key = self.key()
        self.do(
            "pullp",
            lambda: self.store.pullp(key),
            lambda payload: self.gone((key,), [payload]),
            lambda: self.any_of(key),
            most=1,
        )

    def pull_any(self):
        keys = self.random.sample(KEYS, 2)

        def call():
            try:
                return self.store.pull_any(keys, timeout=0)[1]
            except sqlspace.DeadlineError:
                return None

        self.do(
            "pull_any", call, lambda p: self.gone(keys, [p]), lambda: self.any_of(*keys), most=1
        )

    def pull_many(self):
        key, limit = self.key(), self.random.randint(1, 5)
        self.do(
            "pull_many",
            lambda: self.store.pull_many(key, limit),
            lambda payloads: self.gone((key,), payloads),
            lambda: self.any_of(key),
            most=limit,
        )

    def claim(self, last=False):
        key, number = self.key(), self.random.choice((1, 1, 3))
        lease = self.random.choice((10.0, 1e6))
        last = self.random.random() < 0.2 or last

        def leased(payload, token, **seq):
            end = self.now + int(lease * SECOND)
            return replace(self.facts[payload], token=token, lease_end=end, dies=last, **seq)

        def after(found):
            self.taken((key,), [each.payload for each in found])
            self.deliveries += found
            return {
                each.payload: leased(each.payload, each._grant.token, seq=each.seq)
                for each in found
            }

        def call():
            return self.store.claim_many(key, number, lease=lease, max_attempts=1 if last else None)

        def might():
            return {payload: leased(payload, ANY) for payload in self.live(key)}

        self.do("claim", call, after, might, most=number)

    def settle(self, name, call, after):
        """Whoever holds the lease may, and nobody else."""
        if not self.deliveries:
            return
        delivery = self.random.choice(self.deliveries)
        fact = self.facts.get(delivery.payload)
        holds = (
            fact is not None and fact.is_leased(self.now) and fact.token == delivery._grant.token
        )

        def attempt():
            try:
                call(delivery)
            except sqlspace.LeaseError:
                return False
            return True

        def might():
            return {delivery.payload: after(fact)} if holds else {}

        def effects(did):
            self.ensure(did == holds, f"{name}: {'done' if did else 'refused'}, and {fact} says no")
            if name != "extend":
                self.deliveries.remove(delivery)
            return might()

        self.do(name, attempt, effects, might)

    def ack(self):
        self.settle("ack", lambda delivery: delivery.ack(), lambda _: None)

    def nack(self):
        delay = self.random.choice((0.0, 0.0, 15.0))

        def after(fact):
            if fact.has_expired(self.now):
                return None
            if fact.dies:
                return Fact(None, fact.key + "/dead")
            due = self.now + int(delay * SECOND)
            return replace(fact, token=None, lease_end=0, due=due if delay else 0)

        self.settle("nack", lambda delivery: delivery.nack(delay), after)

    def extend(self):
        end = self.now + 60 * SECOND
        self.settle("extend", lambda d: d.extend(60.0), lambda fact: replace(fact, lease_end=end))

    def transaction(self):
        fails = self.random.random() < 0.3
        effects = {}

        def call():
            store = self.store
            with contextlib.suppress(_OnPurpose), store.transaction() as together:
                for _ in range(self.random.randint(1, 4)):
                    payload = None
                    if self.random.random() < 0.3:
                        payload = together.pullp(key := self.key())
                        if payload is not None and payload not in effects:
                            self.taken((key,), [payload], effects)
                    if payload is not None:
                        effects[payload] = None
                    else:
                        self.push_by(together, effects)
                mine = [d for d in self.deliveries if d._store is store]
                if mine and self.random.random() < 0.5:
                    delivery = self.random.choice(mine)
                    with contextlib.suppress(sqlspace.LeaseError):
                        together.ack(delivery)
                        effects[delivery.payload] = None
                if fails:
                    raise _OnPurpose

        top = self.top
        done = {} if fails else effects
        self.do("transaction", call, lambda _: done, lambda: done)
        if fails:  # nobody was told of its seqs for good
            self.top = top

    def requeue(self):
        key = self.key()
        dead = [
            payload
            for payload, fact in self.live(key).items()
            if payload not in self.cleared(key) and not fact.has_expired(self.now)
        ]
        back = dict.fromkeys([*self.live(f"{key}/dead"), *dead], Fact(None, key))
        self.do("requeue", lambda: self.store.requeue(key), lambda _: back, lambda: back)

    def compact(self):
        self.do("compact", self.store.compact, lambda _: {})

    def another(self):
        """The second store comes, or one goes; the last takes the -wal with it."""
        if len(self.stores) < 2 and (self.keep or self.random.random() < 0.5):
            self.do("open", self.open, lambda _: {})
        elif not self.keep:
            _, store = self.stores.popitem()
            self.deliveries = [each for each in self.deliveries if each._store is not store]
            self.do("close", store.close, lambda _: {})
            if not self.stores:
                self.do("open", self.open, lambda _: {})

    def later(self):
        """Time goes by: what was delayed is ready, what has a time to live expires, leases end."""
        self.now += self.random.choice((1, 12, 60, 6000)) * SECOND

    def crowd(self):
        """Threads join while one commits, and share the next commit."""
        store = self.store
        committer = store._database._committer
        me = threading.get_ident()
        told = threading.Event()  # of the first one's answer; what the others do comes after it
        members = []

        def come():
            keys = self.random.sample(KEYS, 3)
            for number in range(self.random.randint(2, 5)):
                payload = self.payload() if number < 3 else None
                member = Member(store, keys[number % 3], payload, self.events)
                members.append(member)
                joined = len(committer.joined)
                member.start()
                while len(committer.joined) == joined and member.is_alive():
                    time.sleep(0)

        def before(event):
            if threading.get_ident() != me:
                told.wait(60)
            elif event.kind == "sync" and event.end == "-wal" and not members:
                come()
            self.disk(event)

        self.members = members
        self.recorder.before = before
        try:
            self.push_by(store)
        finally:
            self.recorder.before = self.disk
            told.set()
            for member in members:
                member.join(60)
        for member in members:
            if member.error is not None:
                self.refuse(member)
                continue
            if member.payload is None:
                after = self.gone((member.key,), [member.answer]) if member.answer else {}
            else:
                self.grow(member.answer)
                after = {member.payload: Fact(member.answer, member.key)}
            effects = self.changes(after)
            self.tell(Deed("crowd", member.began, member.ended, self.now, effects, alone=False))

    def refuse(self, member):
        """Its call has raised."""
        raise member.error


class Member(threading.Thread):
    """Of a crowd: it pushes or, without a payload, pulls."""

    def __init__(self, store, key, payload, events):
        super().__init__(daemon=True)
        self.store, self.key, self.payload, self.events = store, key, payload, events
        self.answer = self.ended = self.error = None

    def run(self):
        self.began = len(self.events)
        try:
            if self.payload is None:
                self.answer = self.store.pullp(self.key)
            else:
                self.answer = self.store.push(self.key, self.payload)
        except Exception as error:
            self.error = error
        self.ended = len(self.events)


class _OnPurpose(Exception):
    """What rolls a transaction back."""
