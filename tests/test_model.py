"""Store against a model of plain lists: whatever is done in whatever order, both say the same."""

import contextlib
import itertools
import os
import shutil
import tempfile

import apsw
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import sqlspace

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

KEYS = ("a", "b", "b/dead", "ключ")
keys = st.sampled_from(KEYS)
key_lists = st.lists(keys, min_size=1, max_size=4)
names = st.sampled_from(("first", "second"))
payloads = st.one_of(
    st.binary(max_size=12), st.binary(min_size=1, max_size=3).map(lambda b: b * 2000)
)
headers = st.one_of(
    st.none(), st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)
)
limits = st.sampled_from((0, 1, 2, 5, 40, None))
INFINITY = 1 << 60


class Model(RuleBasedStateMachine):
    """Two stores on one file, and what the file must hold."""

    @initialize(history=limits)
    def begin(self, history):
        self.folder = tempfile.mkdtemp(dir=MEMORY)
        self.path = os.path.join(self.folder, "queue.db")
        self.live = {key: [] for key in KEYS}  # entries: (seq, payload, headers)
        self.taken = []  # tombstones: (seq, key), in the order of taking
        # So many of the last ones were within every limit ever since they were taken. Of those
        # before them any may be gone, also if the store with the smaller limit is closed by now.
        self.certain = 0
        self.pushed_at = {}  # seq to time, from the entry
        self.last = 0  # the highest seq that was ever given
        self.copies = itertools.count()
        self.stores = {}
        self.limits = {}
        self.open("first", history)

    def open(self, name, history):
        self.stores[name] = sqlspace.open(self.path, sync=False, history=history)
        self.limits[name] = INFINITY if history is None else history
        self.trim()

    def teardown(self):
        if not hasattr(self, "folder"):
            return
        try:
            check = apsw.Connection(self.path, apsw.SQLITE_OPEN_READONLY)
            try:
                assert check.pragma("integrity_check") == "ok"
            finally:
                check.close()
        finally:
            for store in self.stores.values():
                store.close()
            assert not os.path.exists(self.path + "-wal"), "the last to close leaves one file"
            shutil.rmtree(self.folder)

    # -- the model's side

    def limit(self):
        return min(self.limits.values())

    def trim(self):
        self.certain = min(self.certain, self.limit())

    def store(self, name):
        """Of this name, or, if that is closed, the other."""
        return self.stores.get(name) or next(iter(self.stores.values()))

    def pushed(self, key, seq, payload, headers=None):
        assert seq > self.last, "a seq grows over the whole file and is never used twice"
        self.last = seq
        self.live[key].append((seq, payload, headers or {}))

    def take(self, key):
        seq, payload, _ = self.live[key].pop(0)
        self.taken.append((seq, key))
        self.certain += 1
        self.trim()
        return payload

    # -- adding

    @rule(name=names, key=keys, payload=payloads, headers=headers)
    def push(self, name, key, payload, headers):
        seq = self.store(name).push(key, payload, headers=headers)
        self.pushed(key, seq, payload, headers)

    @rule(name=names, key=keys, some=st.lists(st.binary(max_size=5), max_size=100))
    def push_many(self, name, key, some):
        seqs = self.store(name).push_many(key, some)
        assert len(seqs) == len(some)
        for seq, payload in zip(seqs, some, strict=True):
            self.pushed(key, seq, payload)

    @rule(name=names, key=keys, payload=payloads)
    def put(self, name, key, payload):
        seq = self.store(name).put(key, payload)
        self.live[key].clear()
        self.pushed(key, seq, payload)

    @rule(key=keys, payload=payloads)
    def push_in_sql(self, key, payload):
        """Another application's connection, through the view."""
        other = apsw.Connection(self.path)
        try:
            sql = "INSERT INTO sqlspace_outbox (key, payload) VALUES (?, ?)"
            other.execute(sql, (key, payload))
            (seq,) = other.execute("SELECT max(seq) FROM sqlspace_entries").fetchone()
        finally:
            other.close()
        self.pushed(key, seq, payload)

    # -- taking

    @rule(name=names, key=keys)
    def pullp(self, name, key):
        found = self.store(name).pullp(key)
        assert found == (self.take(key) if self.live[key] else None)

    @rule(name=names, key=keys)
    def pull(self, name, key):
        if self.live[key]:
            assert self.store(name).pull(key, timeout=0) == self.take(key)
        else:
            with pytest.raises(sqlspace.DeadlineError):
                self.store(name).pull(key, timeout=0)

    @rule(name=names, listed=key_lists)
    def pull_any(self, name, listed):
        ready = next((key for key in listed if self.live[key]), None)
        if ready is None:
            with pytest.raises(sqlspace.DeadlineError):
                self.store(name).pull_any(listed, timeout=0)
        else:
            assert self.store(name).pull_any(listed, timeout=0) == (ready, self.take(ready))

    @rule(name=names, key=keys, limit=st.integers(1, 120))
    def pull_many(self, name, key, limit):
        found = self.store(name).pull_many(key, limit)
        assert found == [self.take(key) for _ in range(min(limit, len(self.live[key])))]

    @rule(name=names, key=keys, number=st.integers(1, 80))
    def pull_one_by_one(self, name, key, number):
        store = self.store(name)
        for _ in range(min(number, len(self.live[key]))):
            assert store.pullp(key) == self.take(key)

    @rule(name=names, key=keys, index=st.integers(0, 5), from_end=st.booleans())
    def remove(self, name, key, index, from_end):
        if index < len(self.live[key]):
            seq, _, _ = self.live[key].pop(-1 - index if from_end else index)
            assert self.store(name).remove(key, seq) is True
            assert self.store(name).remove(key, seq) is False
        else:
            assert self.store(name).remove(key, self.last + 1 + index) is False

    @rule(name=names, key=keys, index=st.integers(0, 5))
    def remove_in_vain(self, name, key, index):
        """Neither another key's entry, nor one that was taken."""
        seqs = [seq for other in KEYS if other != key for seq, _, _ in self.live[other]]
        seqs += [seq for seq, _ in self.taken[::-1]]
        if index < len(seqs):
            assert self.store(name).remove(key, seqs[index]) is False
            assert self.store(name).get(key, seqs[index]) is None

    @rule(name=names, key=keys)
    def clear(self, name, key):
        assert self.store(name).clear(key) == len(self.live[key])
        self.live[key].clear()

    # -- looking

    @rule(name=names, key=keys)
    def peek(self, name, key):
        assert self.store(name).peek(key) == (self.live[key][0][1] if self.live[key] else None)

    @rule(name=names, key=keys)
    def wait(self, name, key):
        """Both waits look once, and take nothing."""
        store = self.store(name)
        for verb, met in ((store.wait, self.live[key]), (store.wait_empty, not self.live[key])):
            with contextlib.nullcontext() if met else pytest.raises(sqlspace.DeadlineError):
                verb(key, timeout=0)

    @rule(name=names, key=keys)
    def entries(self, name, key):
        store = self.store(name)
        found = list(store.entries(key))
        assert [(entry.seq, entry.payload, entry.headers) for entry in found] == self.live[key]
        for entry in found:
            assert (entry.key, entry.state, entry.attempts) == (key, "ready", 0)
            assert (entry.due_at, entry.expires_at, entry.deadline) == (None, None, None)
            assert self.pushed_at.setdefault(entry.seq, entry.pushed_at) == entry.pushed_at
        for entry in found[:3]:
            assert store.get(key, entry.seq) == entry

    @rule(name=names)
    def history(self, name):
        self.compare_history(self.store(name), self.limit())

    def compare_history(self, store, limit):
        certain = self.taken[len(self.taken) - self.certain :]
        possible = self.taken[max(0, len(self.taken) - limit) :]
        number = 0
        for key in KEYS:
            found = list(store.history(key))
            number += len(found)
            seqs = [tombstone.seq for tombstone in found]
            must = [seq for seq, name in certain if name == key]
            assert seqs[len(seqs) - len(must) :] == must
            may = iter([seq for seq, name in possible if name == key])
            assert all(seq in may for seq in seqs), "others than the last, or in another order"
            for tombstone in found:
                assert (tombstone.key, tombstone.outcome) == (key, "taken")
                known = self.pushed_at.get(tombstone.seq, tombstone.pushed_at)
                assert tombstone.pushed_at == known
        return number

    @rule(name=names)
    def stats(self, name):
        store = self.store(name)
        stats = store.stats()
        live = {key: entries for key, entries in self.live.items() if entries}
        assert set(stats.keys) - {"b"} == set(live) - {"b"}
        assert ("b" in stats.keys) == ("b" in live or "b/dead" in live)
        for key, found in stats.keys.items():
            entries = self.live[key]
            assert (found.ready, found.leased, found.delayed) == (len(entries), 0, 0)
            assert found.bytes == sum(len(payload) for _, payload, _ in entries)
            assert found.dead == (len(self.live["b/dead"]) if key == "b" else 0)
            assert found.oldest_age >= 0
        assert stats.tombstones == self.compare_history(store, self.limit())
        assert stats.file_bytes % stats.page_bytes == 0
        assert stats.file_bytes == os.path.getsize(self.path)

    @invariant()
    def all_stores_say_the_same(self):
        live = sorted(key for key, entries in self.live.items() if entries)
        for store in self.stores.values():
            assert store.keys() == live
            for key in KEYS:
                assert store.len(key) == len(self.live[key])

    # -- upkeep

    @rule(name=names)
    def compact(self, name):
        found = self.store(name).compact()
        assert found.bytes_after == os.path.getsize(self.path)
        self.taken.clear()
        self.certain = 0

    @rule(name=names, payload=payloads)
    def backup(self, name, payload):
        """The copy holds the same, and goes on by itself."""
        path = os.path.join(self.folder, f"copy-{next(self.copies)}.db")
        self.store(name).backup(path)
        with pytest.raises(sqlspace.StoreError):
            self.store(name).backup(path)
        with sqlspace.open(path, sync=False, history=None) as copy:
            for key in KEYS:
                found = [(each.seq, each.payload, each.headers) for each in copy.entries(key)]
                assert found == self.live[key]
            self.compare_history(copy, INFINITY)
            assert copy.push("a", payload) > self.last

    @rule(name=names, history=limits)
    def reopen(self, name, history):
        if name in self.stores:
            self.stores.pop(name).close()
            del self.limits[name]
        self.open(name, history)

    @precondition(lambda self: len(self.stores) == 2)
    @rule(name=names)
    def close(self, name):
        self.stores.pop(name).close()
        del self.limits[name]


Model.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(900)  # 20 s, and when it fails, minutes to find the shortest failure
class TestStoreDoesWhatTheModelDoes(Model.TestCase):
    """Any sequence of verbs, over two stores on one file and over reopening, is the model's."""
