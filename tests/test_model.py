"""Store against a model of plain lists: whatever is done in whatever order, both say the same.

What must be said stands in `helpers/model.py`; here are the verbs, and the clock that both go by.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
import tempfile

import apsw
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model import DEAD, MINUTE, Entry, Model, is_over

import sqlspace
import sqlspace.clock

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
INFINITY = 1 << 60
SECOND = 1_000_000
YEAR = 31_557_600 * SECOND
BEGIN = 1_800_000_000 * SECOND

KEYS = ("a", "a/dead", "b", "ключ")
# Dead letters go to these, too; they are looked at and taken like all others.
LOOKED = (*KEYS, "a/dead/dead", "b/dead", "ключ/dead")

# How many examples, and then not the same ones in every run.
EXAMPLES = os.environ.get("SQLSPACE_EXAMPLES")

names = st.sampled_from(("first", "second"))
keys = st.sampled_from(("a", "a", "a", "a/dead", *KEYS))
looked = st.one_of(keys, st.sampled_from(LOOKED))
key_lists = st.lists(looked, min_size=1, max_size=4)
payloads = st.one_of(
    st.binary(max_size=12),
    st.binary(min_size=1, max_size=3).map(lambda b: b * 2000),
    st.sampled_from((b"1", b"[]", b"null")),
)
values = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.booleans()))
headers = st.one_of(
    st.none(), st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
)
limits = st.sampled_from((0, 1, 2, 5, 40, None))
# Durations in microseconds; few of them, so that ends meet.
TTLS = (SECOND, 5 * SECOND, MINUTE, 3600 * SECOND)
DELAYS = (1, SECOND // 2, 4 * SECOND, 30 * SECOND, 600 * SECOND)
LEASES = (1, SECOND, 5 * SECOND, 30 * SECOND, 3600 * SECOND)
ttls = st.one_of(st.none(), st.sampled_from(TTLS))
delays = st.one_of(st.just(0), st.sampled_from(DELAYS))
leases = st.sampled_from(LEASES)
attempts = st.sampled_from((None, 1, 2))
dedupes = st.one_of(st.none(), st.sampled_from(("x", "y")))
max_lens = st.one_of(st.none(), st.integers(1, 4))
indexes = st.integers(0, 5)
steps = st.sampled_from((1, SECOND // 2, SECOND, 4 * SECOND, MINUTE, 3600 * SECOND, YEAR))
jumps = st.sampled_from((-1, -SECOND, -5 * SECOND, -70 * SECOND, -7200 * SECOND, -YEAR, -10 * YEAR))
besides = st.sampled_from((0, -1, 1))

# Verbs that a store and a transaction have, and what they are given.
pushes = st.tuples(st.just("push"), keys, payloads, ttls, delays, dedupes, headers, max_lens)
others = st.one_of(
    st.tuples(st.just("push_many"), keys, st.lists(payloads, max_size=3), ttls, delays),
    st.tuples(st.just("pull_many"), looked, st.integers(1, 4)),
    st.tuples(st.just("remove"), looked, indexes, st.booleans()),
    st.tuples(st.sampled_from(("pullp", "peek", "len")), looked),
    st.one_of(
        st.tuples(st.just("put"), looked, payloads, ttls), st.tuples(st.just("clear"), looked)
    ),
)
settlings = st.tuples(st.sampled_from(("ack", "nack")), indexes, delays)
crowds = st.one_of(
    st.tuples(st.just("push_many"), keys, st.lists(st.binary(max_size=5), max_size=100)),
    st.tuples(st.just("pull_many"), looked, st.integers(1, 120)),
    st.tuples(st.just("pull_one_by_one"), looked, st.integers(1, 80)),
)
looks = st.sampled_from(("wait", "entries", "get", "remove_in_vain", "history", "stats", "keys"))
upkeeps = st.one_of(
    st.tuples(st.just("push_in_sql"), keys, payloads),
    st.tuples(st.sampled_from(("compact", "close")), names),
    st.tuples(st.just("backup"), names, payloads),
    st.tuples(st.just("reopen"), names, limits),
)


class OwnError(Exception):
    """What ends a transaction that must not have been."""


def seconds(micros):
    return None if micros is None else micros / 1e6


def refused(*, by, unless):
    """It is refused, unless it must not be."""
    return contextlib.nullcontext() if unless else pytest.raises(by)


has_entries = precondition(lambda self: self.model.all())
has_deliveries = precondition(lambda self: self.deliveries)


class Machine(RuleBasedStateMachine):
    """Two stores on one file, and what the file must hold."""

    @initialize(history=limits)
    def begin(self, history):
        self.folder = tempfile.mkdtemp(dir=MEMORY)
        self.path = os.path.join(self.folder, "queue.db")
        self.model = Model(BEGIN, {key: [] for key in LOOKED})
        self.clock = pytest.MonkeyPatch()
        self.clock.setattr(sqlspace.clock, "now", lambda: self.model.now)
        self.clock.setattr(logging.getLogger("sqlspace"), "disabled", True)  # it tells of the dead
        self.deliveries = []  # (delivery, the store's name, our token)
        self.tokens = itertools.count(1)
        self.copies = itertools.count()
        self.stores = {}
        self.limits = {}
        self.reader = None
        self.open("first", history)

    def open(self, name, history):
        self.stores[name] = sqlspace.open(self.path, sync=False, history=history)
        self.limits[name] = INFINITY if history is None else history
        self.set_limit()

    def set_limit(self):
        self.model.limit = min(self.limits.values(), default=INFINITY)
        self.model.trim()

    def shut(self, name):
        """Its deliveries can't be settled any more; their leases go on."""
        self.stop_reading()  # else the last store to close would not be the last
        self.stores.pop(name).close()
        del self.limits[name]
        for delivery, store, _ in self.deliveries:
            if store == name:
                with pytest.raises(sqlspace.ClosedError):
                    delivery.ack()
        self.deliveries = [each for each in self.deliveries if each[1] != name]

    def teardown(self):
        if not hasattr(self, "folder"):
            return
        self.stop_reading()
        try:
            check = apsw.Connection(self.path, apsw.SQLITE_OPEN_READONLY)
            try:
                assert check.pragma("integrity_check") == "ok"
            finally:
                check.close()
        finally:
            for store in self.stores.values():
                store.close()
            self.clock.undo()
            assert not os.path.exists(self.path + "-wal"), "the last to close leaves one file"
            shutil.rmtree(self.folder)

    # -- what the file says

    def stop_reading(self):
        if self.reader is not None:
            self.reader.close()
            self.reader = None

    def learn(self):
        if self.reader is None:
            self.reader = apsw.Connection(self.path, apsw.SQLITE_OPEN_READONLY)
        sql = """
        SELECT seq, key, state, until_at, pushed_at, taken_no, headers FROM sqlspace_entries
         WHERE state < 7 ORDER BY seq
        """
        rows = self.reader.execute(sql).fetchall()
        self.model.learn([(*row[:6], json.loads(row[6] or "{}")) for row in rows])

    def store(self, name, *looked):
        """Of this name, or, if that is closed, the other.

        Args:
            name: Of the store.
            looked: The keys that the verb to come looks at. If more than one entry has died that
                will stand under one of them, their order is open: then they move now, and we see.
        """
        store = self.stores.get(name) or next(iter(self.stores.values()))
        for key in looked:
            if len(self.model.dying(key)) > 1:
                store.len(key)
                self.learn()
        return store

    # -- the clock

    def move_clock(self, to):
        if abs(to - BEGIN) < 50 * YEAR:
            self.learn()
            self.model.now = to

    @has_entries
    @rule(to=st.one_of(steps, st.tuples(indexes, besides)))
    def time_passes(self, to):
        """By a step, or until one of the next ends, or just before it, or just after."""
        if isinstance(to, int):
            self.move_clock(self.model.now + to)
        else:
            ends = [end + to[1] for end in self.model.edges() if end + to[1] > self.model.now]
            self.move_clock(ends[to[0] % len(ends)] if ends else self.model.now)

    @has_entries
    @rule(to=st.one_of(jumps, st.tuples(indexes, besides)))
    def clock_jumps_back(self, to):
        if isinstance(to, int):
            self.move_clock(self.model.now + to)
        else:
            ends = [end + to[1] for end in self.model.edges() if end + to[1] < self.model.now]
            self.move_clock(ends[-1 - to[0] % len(ends)] if ends else self.model.now)

    # -- verbs that a transaction has, too: `to` is a store or a transaction

    def do_push(self, to, key, payload, ttl, delay, dedupe, headers, max_len):
        if ttl is not None and delay >= ttl:
            with pytest.raises(ValueError, match="less than ttl"):
                to.push(key, payload, ttl=seconds(ttl), delay=seconds(delay), dedupe=dedupe)
            return
        same = {None} if dedupe is None else self.model.same(key, dedupe)
        full = max_len is not None and self.model.count(key) >= max_len
        wait = {"timeout": 0} if max_len is not None and to in self.stores.values() else {}
        try:
            seq = to.push(
                key,
                payload,
                ttl=seconds(ttl),
                delay=seconds(delay),
                dedupe=dedupe,
                headers=headers,
                max_len=max_len,
                **wait,
            )
        except sqlspace.DeadlineError:
            assert full
            assert None in same
            return
        if seq in same:
            return
        assert None in same
        assert not full
        self.pushed(key, seq, payload, ttl, delay, headers, dedupe)

    def pushed(self, key, seq, payload, ttl=None, delay=0, headers=None, dedupe=None):
        now = self.model.now
        entry = Entry(seq, key, payload, headers or {}, now, ttl, dedupe)
        entry.delay(now, delay)
        self.model.push(entry)

    def do_push_many(self, to, key, some, ttl=None, delay=0):
        if ttl is not None and delay >= ttl:
            with pytest.raises(ValueError, match="less than ttl"):
                to.push_many(key, some, ttl=seconds(ttl), delay=seconds(delay))
            return
        seqs = to.push_many(key, some, ttl=seconds(ttl), delay=seconds(delay))
        for seq, payload in zip(seqs, some, strict=True):
            self.pushed(key, seq, payload, ttl, delay)

    def do_put(self, to, key, payload, ttl):
        seq = to.put(key, payload, ttl=seconds(ttl))
        self.model.clear(key)
        self.pushed(key, seq, payload, ttl)

    def do_pull_many(self, to, key, limit):
        assert to.pull_many(key, limit) == self.model.pull(key, limit)

    def do_pullp(self, to, key):
        assert [to.pullp(key)] == (self.model.pull(key) or [None])

    def do_pull_one_by_one(self, to, key, number):
        while number and self.model.ready(key, 1):
            self.do_pullp(to, key)
            number -= 1

    def do_remove(self, to, key, index, from_end):
        """An entry that is there, in whatever state; or one that isn't."""
        queue = [entry for entry in self.model.queues[key] if entry.seq is not None]
        if index < len(queue):
            seq = queue[-1 - index if from_end else index].seq
            assert to.remove(key, seq) is self.model.remove(key, seq)
            assert to.remove(key, seq) is False
        else:
            assert to.remove(key, self.model.last + 1000 + index) is False

    def do_clear(self, to, key):
        assert to.clear(key) == self.model.clear(key)

    def do_peek(self, to, key):
        ready = self.model.ready(key, 1)
        assert to.peek(key) == (ready[0].payload if ready else None)

    def do_len(self, to, key):
        assert to.len(key) == self.model.count(key)

    # -- adding and taking

    @rule(name=names, deed=pushes)
    def push(self, name, deed):
        self.do(name, deed)

    @rule(name=names, deed=others)
    def verb(self, name, deed):
        self.do(name, deed)

    @rule(name=names, deed=crowds)
    def verb_with_many(self, name, deed):
        self.do(name, deed)

    def do(self, name, deed):
        verb, key, *given = deed
        to = self.store(name) if verb == "push_many" else self.store(name, key)
        getattr(self, f"do_{verb}")(to, key, *given)

    @has_entries
    @rule(name=names, listed=st.one_of(looked, key_lists))
    def pull(self, name, listed):
        """Or pull_any; both look once."""
        each = [listed] if isinstance(listed, str) else listed
        store = self.store(name, *each)
        ready = next((key for key in each if self.model.ready(key, 1)), None)
        with refused(by=sqlspace.DeadlineError, unless=ready):
            if isinstance(listed, str):
                found = (listed, store.pull(listed, timeout=0))
            else:
                found = store.pull_any(listed, timeout=0)
            assert found == (ready, *self.model.pull(ready))

    # -- leasing

    def delivered(self, delivery, name, store, entry, lease, max_attempts):
        token = next(self.tokens)
        if entry.seq is None:
            entry.seq = delivery.seq
        self.model.lease(entry, token, lease, max_attempts)
        assert (delivery.key, delivery.seq) == (entry.key, entry.seq)
        assert (delivery.payload, delivery.headers) == (entry.payload, entry.headers)
        assert delivery.attempts == entry.attempts
        assert delivery.deadline == (self.model.now + lease) / 1e6
        assert delivery.lost is False
        name = name if store is self.stores.get(name) else next(iter(self.stores))
        self.deliveries.append((delivery, name, token))
        del self.deliveries[:-6]  # so that those which hold are often met

    @has_entries
    @rule(
        name=names,
        listed=st.one_of(keys, st.lists(keys, min_size=1, max_size=3)),
        lease=leases,
        max_attempts=attempts,
        ordered=st.booleans(),
        waiting=st.booleans(),
    )
    def claim(self, name, listed, lease, max_attempts, ordered, waiting):
        each = [listed] if isinstance(listed, str) else listed
        store = self.store(name, *each)
        heads = (self.model.claimable(key, ordered) for key in each)
        head = next((entry for entry in heads if entry is not None), None)
        how = {"lease": seconds(lease), "max_attempts": max_attempts, "ordered": ordered}
        if not waiting:
            delivery = store.claimp(listed, **how)
            assert (delivery is None) == (head is None)
        else:
            with refused(by=sqlspace.DeadlineError, unless=head):
                delivery = store.claim(listed, timeout=0, **how)
        if head is not None:
            self.delivered(delivery, name, store, head, lease, max_attempts)

    @has_entries
    @rule(
        name=names,
        listed=st.one_of(keys, key_lists),
        limit=st.integers(1, 30),
        lease=leases,
        max_attempts=attempts,
    )
    def claim_many(self, name, listed, limit, lease, max_attempts):
        each = [listed] if isinstance(listed, str) else list(dict.fromkeys(listed))
        if not set(each) <= set(KEYS):
            max_attempts = None  # or there were no end of keys
        store = self.store(name, *each)
        heads = []
        for key in each:
            if len(heads) < limit:
                heads += self.model.ready(key, limit - len(heads))
        found = store.claim_many(listed, limit, lease=seconds(lease), max_attempts=max_attempts)
        for delivery, head in zip(found, heads, strict=True):
            self.delivered(delivery, name, store, head, lease, max_attempts)

    # -- settling

    def chosen(self, index, name=None):
        """One of the deliveries of a store, of all if None, the latest first; or None."""
        ours = [each for each in self.deliveries[::-1] if name is None or each[1] == name]
        if not ours:
            return None
        delivery, _, token = ours[index % len(ours)]
        grant = self.model.grants[token]
        if not grant.failed:
            over = is_over(grant.end, grant.length, self.model.now)
            assert delivery.lost == (over and not grant.settled)
        return delivery, token

    @contextlib.contextmanager
    def settling(self, tokens):
        """LeaseError if one of them is settled or lost."""
        held = [self.model.leased(token) is not None for token in tokens]
        with refused(by=sqlspace.LeaseError, unless=all(held)):
            yield
        for token, holds in zip(tokens, held, strict=True):
            if not holds:  # also those before which another was refused; that is coarse enough
                self.model.grants[token].failed = True

    @has_deliveries
    @rule(
        index=indexes, verb=st.sampled_from(("ack", "nack", "extend")), delay=delays, lease=leases
    )
    def settle(self, index, verb, delay, lease):
        if chosen := self.chosen(index):
            delivery, token = chosen
            with self.settling([token]):
                if verb == "ack":
                    delivery.ack()
                    self.model.ack(token)
                elif verb == "nack":
                    delivery.nack(seconds(delay))
                    self.model.nack(token, delay)
                else:
                    delivery.extend(seconds(lease))
                    self.model.extend(token, lease)
                    assert delivery.deadline == (self.model.now + lease) / 1e6

    @rule(
        name=names,
        deed=pushes,
        lease=leases,
        max_attempts=attempts,
        ordered=st.booleans(),
        to=st.one_of(steps, st.tuples(indexes, besides)),
        verb=st.sampled_from(("nack", "ack", "extend", None)),
        delay=delays,
    )
    def work(self, name, deed, lease, max_attempts, ordered, to, verb, delay):
        """What mostly follows each other, for chance alone seldom gets so far."""
        self.push(name, deed)
        self.claim(name, deed[1], lease, max_attempts, ordered, waiting=False)
        self.learn()
        self.time_passes(to)
        if verb is not None and self.deliveries:
            self.settle(0, verb, delay, lease)

    @has_deliveries
    @rule(name=names, some=st.sets(indexes, max_size=4))
    def ack_many(self, name, some):
        """All of them, or none."""
        if name in self.stores:
            chosen = {self.chosen(index, name) for index in some} - {None}
            tokens = [token for _, token in chosen]
            with self.settling(tokens):
                self.stores[name].ack_many(delivery for delivery, _ in chosen)
                for token in tokens:
                    self.model.ack(token)

    @rule(name=names, key=keys)
    def requeue(self, name, key):
        store = self.store(name, key + DEAD)
        assert store.requeue(key) == self.model.requeue(key)

    # -- together

    @rule(
        name=names,
        several=st.lists(st.one_of(pushes, others, settlings), max_size=6),
        commit=st.booleans(),
    )
    def transaction(self, name, several, commit):
        """All of it, or nothing; and each verb sees what those before it did."""
        looked = [deed[1] for deed in several if isinstance(deed[1], str)]
        store = self.store(name, *looked)
        if len(several) > 1 and any(map(self.model.dying, LOOKED)):
            store.keys()  # the verbs in between might move them, or might not
            self.learn()
        name = name if name in self.stores else next(iter(self.stores))
        before = self.model.copy()
        with contextlib.suppress(OwnError), store.transaction() as together:
            with pytest.raises(ValueError, match="transaction"):
                store.len("a")
            for verb, *given in several:
                if verb in {"ack", "nack"}:
                    self.settle_together(together, name, verb, *given)
                else:
                    getattr(self, f"do_{verb}")(together, *given)
            if not commit:
                raise OwnError
        if not commit:
            failed = {token for token, grant in self.model.grants.items() if grant.failed}
            self.model = before
            for token in failed:
                self.model.grants[token].failed = True

    def settle_together(self, together, name, verb, index, delay):
        ours = [each for each in self.deliveries[::-1] if each[1] == name]
        if not ours:
            return
        delivery, _, token = ours[index % len(ours)]
        with self.settling([token]):
            if verb == "ack":
                together.ack(delivery)
                self.model.ack(token)
            else:
                together.nack(delivery, seconds(delay))
                self.model.nack(token, delay)

    # -- the Space over it, with JSON

    @rule(
        name=names,
        key=keys,
        value=values,
        ttl=ttls,
        verb=st.sampled_from(("out", "in_", "inp", "rd", "rdp")),
    )
    def space(self, name, key, value, ttl, verb):
        if verb == "out":
            self.out(name, key, value, ttl)
        else:
            self.get_value(name, key, verb)

    def out(self, name, key, value, ttl):
        self.store(name).space().out(key, value, ttl=seconds(ttl))
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        self.pushed(key, None, text.encode(), ttl)

    def get_value(self, name, key, verb):
        """Decoded first, then taken; what can't be decoded goes to the dead letters, once taken."""
        space = self.store(name, key).space()
        absent = object()
        ready = self.model.ready(key, 1)
        taking, waiting = verb in {"in_", "inp"}, verb in {"in_", "rd"}
        try:
            expected = json.loads(ready[0].payload.decode()) if ready else absent
        except (ValueError, RecursionError):  # the latter of thousands of brackets
            with pytest.raises(sqlspace.DecodeError) as caught:
                getattr(space, verb)(key, 0)
            head = ready[0]
            assert (caught.value.key, caught.value.payload) == (key, head.payload)
            assert head.seq in {None, caught.value.seq}
            head.seq = caught.value.seq
            if taking:
                self.model.die(head, "unreadable")
            return
        with refused(by=sqlspace.DeadlineError, unless=ready or not waiting):
            found = getattr(space, verb)(key, 0 if waiting else absent)
            assert found == expected
        if ready and taking:
            self.model.pull(key)

    # -- looking

    @rule(
        name=names,
        key=looked,
        index=indexes,
        look=st.sampled_from(
            ("wait", "entries", "get", "remove_in_vain", "history", "stats", "keys")
        ),
    )
    def look(self, name, key, index, look):
        if look in {"wait", "entries"}:
            getattr(self, look)(name, key)
        elif look in {"get", "remove_in_vain"}:
            getattr(self, look)(name, key, index)
        else:
            getattr(self, look)(name)

    def wait(self, name, key):
        """Both waits look once, and take nothing."""
        store = self.store(name, key)
        # What is dead and not moved yet counts; the first of the two need not move it.
        ready = any(entry.state(self.model.now) == "ready" for entry in self.model.queues[key])
        with refused(by=sqlspace.DeadlineError, unless=ready or self.model.dying(key)):
            store.wait(key, timeout=0)
        live = self.model.live(key)
        with refused(by=sqlspace.DeadlineError, unless=not live):
            store.wait_empty(key, timeout=0)

    def compare_entries(self, store, key):
        """All that an entry tells."""
        now = self.model.now
        found = list(store.entries(key))
        for entry, model in zip(found, self.model.live(key), strict=True):
            assert model.seq in {None, entry.seq}
            state = model.state(now)
            assert (entry.key, entry.state, entry.attempts) == (key, state, model.attempts)
            assert (entry.payload, entry.headers) == (model.payload, model.headers)
            assert model.pushed_at is None or entry.pushed_at == model.pushed_at / 1e6
            assert entry.expires_at == seconds(model.expires_at)
            assert entry.due_at == (model.hold.end / 1e6 if state == "delayed" else None)
            assert entry.deadline == (model.hold.end / 1e6 if state == "leased" else None)
        return found

    def entries(self, name, key):
        store = self.store(name, key)
        for entry in self.compare_entries(store, key)[:3]:
            assert store.get(key, entry.seq) == entry

    def get(self, name, key, index):
        """Also of what has expired, or is dead and stands elsewhere."""
        queue = self.model.queues[key]
        if index < len(queue):
            model = queue[index]
            found = self.store(name, key).get(key, model.seq)
            assert (found is not None) == model.is_live(self.model.now)
            self.model.visit(key)

    def remove_in_vain(self, name, key, index):
        """Neither another key's entry, nor one that was taken."""
        seqs = [entry.seq for entry in self.model.all() if entry.key != key]
        seqs += [stone.seq for stone in self.model.taken[::-1] if stone.seq is not None]
        if index < len(seqs):
            store = self.store(name, key)
            self.model.visit(key)
            assert store.remove(key, seqs[index]) is False
            assert store.get(key, seqs[index]) is None

    def history(self, name):
        store = self.store(name)
        self.learn()
        self.compare_history(store, self.model.limit)

    def compare_history(self, store, limit):
        taken = self.model.taken
        certain = taken[len(taken) - self.model.certain :]
        possible = taken[max(0, len(taken) - limit) :]
        number = 0
        for key in LOOKED:
            found = list(store.history(key))
            number += len(found)
            must = [stone for stone in certain if stone.key == key]
            assert [stone.seq for stone in found[len(found) - len(must) :]] == [
                stone.seq for stone in must
            ]
            may = iter(stone for stone in possible if stone.key == key)
            for stone in found:
                model = next((each for each in may if each.seq == stone.seq), None)
                assert model is not None, "others than the last, or in another order"
                assert (stone.key, stone.outcome) == (key, model.outcome)
                assert stone.pushed_at == model.pushed_at / 1e6
                assert stone.taken_at == model.taken_at / 1e6
        return number

    def stats(self, name):
        store = self.store(name, *LOOKED)
        now = self.model.now
        stats = store.stats()
        live = {key: self.model.live(key) for key in LOOKED}
        self.learn()
        expected = {key for key, entries in live.items() if entries}
        expected |= {key.removesuffix(DEAD) for key in expected}
        assert list(stats.keys) == sorted(expected)
        for key, found in stats.keys.items():
            states = [entry.state(now) for entry in live[key]]
            assert (found.ready, found.leased, found.delayed) == tuple(
                map(states.count, ("ready", "leased", "delayed"))
            )
            assert found.bytes == sum(len(entry.payload) for entry in live[key])
            assert found.dead == len(live.get(key + DEAD, ()))
            oldest = min((entry.pushed_at for entry in live[key]), default=now)
            assert found.oldest_age == max(0, now - oldest) / 1e6
        assert stats.tombstones == self.compare_history(store, self.model.limit)
        assert stats.file_bytes % stats.page_bytes == 0
        assert stats.file_bytes == os.path.getsize(self.path)

    def keys(self, name):
        store = self.store(name, *LOOKED)
        assert store.keys() == sorted(key for key in LOOKED if self.model.live(key))

    @invariant()
    def all_stores_say_the_same(self):
        """Of dead letters only when a rule asks for them: to ask moves them."""
        if not hasattr(self, "model"):
            return
        self.learn()
        for store in self.stores.values():
            for key in KEYS:
                if not key.endswith(DEAD):
                    self.do_len(store, key)
                    self.do_peek(store, key)
                    self.compare_entries(store, key)
        for index in range(len(self.deliveries)):
            self.chosen(index)

    # -- upkeep

    @rule(deed=upkeeps)
    def upkeep(self, deed):
        verb, *given = deed
        getattr(self, verb)(*given)

    def push_in_sql(self, key, payload):
        """Another application's connection, through the view; its clock isn't ours."""
        other = apsw.Connection(self.path)
        try:
            sql = "INSERT INTO sqlspace_outbox (key, payload) VALUES (?, ?)"
            other.execute(sql, (key, payload))
            (seq,) = other.execute("SELECT max(seq) FROM sqlspace_entries").fetchone()
        finally:
            other.close()
        self.model.push(Entry(seq, key, payload, {}, None))

    def compact(self, name):
        found = self.store(name).compact()
        assert found.bytes_after == os.path.getsize(self.path)
        self.model.compact()

    def backup(self, name, payload):
        """The copy holds the same, and goes on by itself."""
        path = os.path.join(self.folder, f"copy-{next(self.copies)}.db")
        store = self.store(name, *LOOKED)
        store.keys()  # what is dead moves in both, then
        self.learn()
        store.backup(path)
        with pytest.raises(sqlspace.StoreError):
            store.backup(path)
        with sqlspace.open(path, sync=False, history=None) as copy:
            for key in LOOKED:
                self.compare_entries(copy, key)
            self.compare_history(copy, INFINITY)
            assert copy.push("a", payload) > self.model.last

    def reopen(self, name, history):
        if name in self.stores:
            self.shut(name)
        self.open(name, history)

    def close(self, name):
        if len(self.stores) < 2:
            return
        self.shut(name)
        self.set_limit()


Machine.TestCase.settings = settings(
    max_examples=int(EXAMPLES or 500),
    stateful_step_count=50,
    deadline=None,
    derandomize=EXAMPLES is None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(0 if EXAMPLES else 900)  # when it fails, minutes to find the shortest failure
class TestStoreDoesWhatTheModelDoes(Machine.TestCase):
    """Any sequence of verbs, over two stores on one file, any clock and reopening, is the model's.

    SQLSPACE_EXAMPLES=2000 in the environment tries so many new ones instead of the usual ones.
    """
