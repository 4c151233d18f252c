"""The verbs of a Store, one process, one file."""

import gc
import json
import os
import pathlib
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
from interrupts import every_step, interrupted

import sqlspace
from sqlspace import browsing, upkeep
from sqlspace.taking import Grab
from sqlspace.waiting import MISSING


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path, sync=False) as opened:
        yield opened


def rows(path, sql):
    """What another process reads with the plain SQL of its own SQLite."""
    code = (
        "import sqlite3, sys, json; c = sqlite3.connect(sys.argv[1]); "
        "c.execute('PRAGMA wal_autocheckpoint=0'); print(json.dumps(c.execute(sys.argv[2])"
        ".fetchall())); c.commit()"
    )
    done = subprocess.run([sys.executable, "-c", code, path, sql], capture_output=True, check=True)
    return [tuple(row) for row in json.loads(done.stdout)]


# -- pushing and taking


def test_entries_of_a_key_come_out_in_the_order_they_were_pushed(store):
    """FIFO per key, whatever else is pushed in between."""
    for number in range(10):
        store.push("a", b"a%d" % number)
        store.push("b", b"b%d" % number)
    assert [store.pull("a") for _ in range(10)] == [b"a%d" % n for n in range(10)]
    assert store.pull_many("b", 4) == [b"b%d" % n for n in range(4)]
    assert store.pull_any(["a", "b"]) == ("b", b"b4")


def test_the_first_listed_key_that_has_an_entry_wins(store):
    """pull_any follows the order of its keys, not that of the pushes."""
    store.push("late", b"1")
    store.push("first", b"2")
    assert store.pull_any(["none", "first", "late"]) == ("first", b"2")
    assert store.pull_any(["none", "first", "late"]) == ("late", b"1")


def test_seqs_grow_and_push_many_returns_those_of_its_payloads_in_order(store):
    """A seq names one entry for ever."""
    first = store.push("a", b"0")
    seqs = store.push_many("a", [b"1", b"2", b"3"])
    assert seqs == [first + 1, first + 2, first + 3]
    assert [store.get("a", seq).payload for seq in seqs] == [b"1", b"2", b"3"]
    assert store.push_many("a", []) == []


def test_a_payload_is_any_bytes_and_comes_back_as_bytes(store):
    """Empty, binary, large; copied at the call."""
    buffer = bytearray(range(256))
    payloads = [b"", bytes(256), os.urandom(3_000_000), memoryview(b"abcdef")[::2], buffer]
    wanted = [bytes(payload) for payload in payloads]
    for payload in payloads:
        store.push("a", payload)
    buffer[:] = bytes(256)
    assert store.pull_many("a", 99) == wanted


def test_headers_are_kept_with_the_entry(store):
    """As they were given, in any script; without them there are none."""
    headers = {"type": "text", "naïve ключ": '"quoted" \n \u0000'}
    seq = store.push("a", b"x", headers=headers)
    assert store.get("a", seq).headers == headers
    assert store.get("a", store.push("a", b"y")).headers == {}


def test_put_leaves_one_entry_and_no_tombstone(store):
    """All that was under the key is replaced; others' entries aren't."""
    store.push_many("a", [b"1", b"2"])
    store.push("b", b"3")
    seq = store.put("a", b"new")
    assert [(entry.seq, entry.payload) for entry in store.entries("a")] == [(seq, b"new")]
    assert store.len("b") == 1
    assert list(store.history("a")) == []


def test_clear_and_remove_delete_without_a_tombstone_and_say_what_was_there(store):
    """They tell how many there were, and whether it was."""
    seqs = store.push_many("a", [b"1", b"2", b"3"])
    assert store.remove("a", seqs[1]) is True
    assert store.remove("a", seqs[1]) is False
    assert store.remove("b", seqs[0]) is False
    assert store.remove("a", 10**400) is False
    assert store.clear("a") == 2
    assert store.clear("a") == 0
    assert store.keys() == []
    assert list(store.history("a")) == []


@pytest.mark.parametrize("verb", ["clear", "remove", "compact", "pull", "put"])
def test_the_highest_seq_is_not_used_again_when_its_entry_is_gone(path, verb):
    """Also not after a reopening: SQLite gives out max(rowid) + 1, so that row stays, bare."""
    with sqlspace.open(path, sync=False, history=0) as store:
        last = store.push_many("a", [b"1", b"2"])[-1]
        if verb == "clear":
            store.clear("a")
        elif verb == "remove":
            store.remove("a", last)
        elif verb == "put":
            last = store.put("a", b"3")
            store.clear("a")
        else:
            store.pull_many("a", 2)
        store.compact()
    with sqlspace.open(path, sync=False) as store:
        assert store.push("a", b"4") == last + 1
        assert [entry.payload for entry in store.entries("a")][-1:] == [b"4"]


# -- looking


def test_a_look_changes_nothing_and_tells_all(store):
    """peek, len, keys, get, entries, stats."""
    assert store.peek("a") is None
    assert store.len("a") == 0
    first, second = store.push("a", b"1"), store.push("b", b"22", headers={"x": "y"})
    for _ in range(2):
        assert store.peek("a") == b"1"
        assert store.keys() == ["a", "b"]
        assert store.get("a", second) is None
        [entry] = store.entries("b")
        assert (entry.seq, entry.key, entry.payload) == (second, "b", b"22")
        assert (entry.state, entry.attempts, entry.deadline) == ("ready", 0, None)
    stats = store.stats()
    assert {key: (found.ready, found.bytes) for key, found in stats.keys.items()} == {
        "a": (1, 1),
        "b": (1, 2),
    }
    assert store.get("a", first).pushed_at <= store.get("b", second).pushed_at


def test_keys_are_sorted_by_code_point_and_any_legal_key_is_found_again(store):
    """Of 1 to 1,024 bytes in UTF-8."""
    keys = ["z", "ä", "a" * 1024, "é" * 512, "𝄞", "a b", "A", "\x01", "a/b", "\U0010ffff"]
    for key in keys:
        store.push(key, key.encode())
    assert store.keys() == sorted(keys)
    assert [store.pull(key) for key in keys] == [key.encode() for key in keys]


def test_entries_are_read_in_batches_bounded_in_bytes(store, monkeypatch):
    """Nothing stays open between two of them: entries pushed meanwhile appear."""
    monkeypatch.setattr(browsing, "_BATCH_BYTES", 10)
    store.push_many("a", [b"x" * 6] * 5)
    found = store.entries("a")
    next(found)
    store.push("a", b"last")
    assert [entry.payload for entry in found] == [b"x" * 6] * 4 + [b"last"]


def test_the_dead_letters_of_a_key_are_counted_with_it(store):
    """KEY/dead is where they stand."""
    store.push("a/dead", b"1")
    assert store.stats().keys["a"].dead == 1
    assert store.stats().keys["a/dead"].ready == 1


# -- history


def test_what_was_taken_stays_in_the_history_in_the_order_of_taking(store):
    """A tombstone tells when it came and when it went."""
    seqs = store.push_many("a", [b"1", b"2", b"3"])
    other = store.push("b", b"4")
    store.pull("b")
    store.pull_many("a", 2)
    store.pull("a")
    assert [stone.seq for stone in store.history("a")] == seqs
    [stone] = store.history("b")
    assert (stone.seq, stone.outcome) == (other, "taken")
    assert stone.pushed_at <= stone.taken_at
    assert store.stats().tombstones == 4


@pytest.mark.parametrize("history", [0, 1, 5, 64, 200, None])
def test_the_history_holds_so_many_tombstones_of_the_whole_file_and_no_more(path, history):
    """0 none, None all."""
    with sqlspace.open(path, sync=False, history=history) as store:
        for number in range(150):
            store.push(f"key{number % 2}", b"x")
            store.pull(f"key{number % 2}")
        kept = [*store.history("key0"), *store.history("key1")]
        wanted = 150 if history is None else min(history, 150)
        assert len(kept) == wanted == store.stats().tombstones
        assert sorted(stone.seq for stone in kept) == list(range(151 - wanted, 151))
    [(stones,)] = rows(path, "SELECT count(*) FROM sqlspace_tombstones")
    assert wanted <= stones <= wanted + upkeep.PRUNE_EVERY + 1


def test_what_is_taken_at_once_is_counted_one_by_one(path):
    """Each has a place of its own in the history, behind what was taken before."""
    with sqlspace.open(path, sync=False, history=2) as store:
        seqs = store.push_many("a", [b"1", b"2", b"3"])
        store.pull("a")
        store.pull_many("a", 2)
        assert [stone.seq for stone in store.history("a")] == seqs[1:]


def test_the_smallest_history_of_all_open_stores_wins_while_it_is_open(path):
    """And no longer: when it is closed, the other's counts again."""
    with sqlspace.open(path, sync=False, history=100) as large:
        with sqlspace.open(path, sync=False, history=7):
            for _ in range(80):
                large.push("a", b"x")
                large.pull("a")
            assert len(list(large.history("a"))) == 7
        for _ in range(64):
            large.push("a", b"x")
            large.pull("a")
        assert len(list(large.history("a"))) > 64


# -- the file's size


def test_a_store_that_is_pushed_and_pulled_at_a_bounded_depth_stays_bounded(path):
    """Pages of what was taken are used again, without compact; so are those of the history."""
    with sqlspace.open(path, sync=False, history=100) as store:
        sizes = []
        for _ in range(6):
            for number in range(400):
                store.push("a", b"x" * 1000)
                if number % 10 == 9:
                    store.pull_many("a", 10)
            sizes.append(store.stats())
        assert sizes[-1].file_bytes <= sizes[1].file_bytes
        assert max(size.wal_bytes for size in sizes) < 9 << 20


def test_puts_clears_and_removes_leave_nothing_behind(path):
    """The bare row that keeps the highest seq is one row, not one for each time."""
    with sqlspace.open(path, sync=False) as store:
        for _ in range(20):
            store.put("a", b"1")
            store.push("b", b"2")
            store.clear("b")
            store.remove("b", store.push("b", b"3"))
    assert rows(path, "SELECT count(*) FROM sqlspace_entries") == [(2,)]


def test_compact_gives_pages_back_and_keeps_what_is_live(path):
    """Tombstones go, entries and seqs stay, the -wal is cut to nothing."""
    with sqlspace.open(path, sync=False) as store:
        seqs = store.push_many("a", [b"x" * 1000] * 3000)
        store.pull_many("a", 2900)
        done = store.compact()
        assert done.bytes_after < done.bytes_before / 10
        assert os.path.getsize(path + "-wal") == 0
        assert list(store.history("a")) == []
        assert [entry.seq for entry in store.entries("a")] == seqs[2900:]
        assert store.push("a", b"new") == seqs[-1] + 1


def test_compact_is_safe_while_others_work(path):
    """Two processes push and take all the while; nothing is lost, nothing is doubled."""
    worker = textwrap.dedent(
        """
        import sys, sqlspace
        with sqlspace.open(sys.argv[1], sync=False) as store:
            for number in range(800):
                store.push(sys.argv[2], b"%d" % number)
                if number % 2:
                    assert store.pull(sys.argv[2]) == b"%d" % (number // 2)
        """
    )
    with sqlspace.open(path, sync=False) as store:
        store.push_many("other", [b"x" * 100] * 1000)
        workers = [
            subprocess.Popen([sys.executable, "-c", worker, path, name]) for name in ("a", "b")
        ]
        compactions = 0
        while any(process.poll() is None for process in workers):
            store.compact()
            compactions += 1
        assert [process.returncode for process in workers] == [0, 0]
        assert compactions
        for name in ("a", "b"):
            assert store.pull_many(name, 9999) == [b"%d" % n for n in range(400, 800)]
        assert store.len("other") == 1000
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def test_compact_never_rewrites_a_file_with_others_tables(tmp_path):
    """VACUUM would renumber the rows of a table without a key of its own."""
    path = str(tmp_path / "app.db")
    rows(path, "CREATE TABLE notes (text)")
    for text in "abc":
        rows(path, f"INSERT INTO notes VALUES ('{text}')")
    rows(path, "DELETE FROM notes WHERE text = 'a'")
    with sqlspace.open(path, sync=False, embed=True) as store:
        store.push("a", b"x" * 10_000)
        store.pull("a")
        store.compact()
    assert rows(path, "SELECT rowid, text FROM notes") == [(2, "b"), (3, "c")]


def test_a_backup_is_a_store_of_its_own(store, tmp_path):
    """Consistent, complete, made while the original is open; it overwrites nothing."""
    store.push_many("a", [b"1", b"2"])
    copy = tmp_path / "copy.db"
    store.backup(copy)
    store.pull("a")
    with sqlspace.open(copy) as opened:
        assert opened.pull_many("a", 9) == [b"1", b"2"]
    before = copy.read_bytes()
    with pytest.raises(sqlspace.StoreError, match=r"copy\.db"):
        store.backup(copy)
    assert copy.read_bytes() == before
    with pytest.raises(sqlspace.StoreError):
        store.backup(tmp_path / "missing" / "copy.db")


# -- closing, sharing


def test_a_backup_that_fails_leaves_no_file(store, path, monkeypatch):
    """Half a copy would be taken for a whole one, and stand in the next one's way."""
    store.push("a", b"1")

    def failing(_):
        raise sqlspace.FullError("no room left on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(store._database, "backup", failing)
        with pytest.raises(sqlspace.FullError):
            store.backup(path + ".copy")
    assert not os.path.exists(path + ".copy")
    store.backup(path + ".copy")


def test_a_closed_store_refuses_every_verb_and_closes_again(path):
    """Even though entries remain."""
    store = sqlspace.open(path)
    store.push_many("a", [b"1", b"2"])
    claimed = store.claim("a")
    store.close()
    store.close()
    assert list(store.consume("a")) == []  # which is how it ends
    for call in (
        lambda: store.push("a", b"1"),
        lambda: store.push("a", b"1", ttl=5, delay=1),
        lambda: store.push("a", b"1", dedupe="d"),
        lambda: store.push("a", b"1", max_len=5),
        lambda: store.push_many("a", [b"1"]),
        lambda: store.push_many("a", []),
        lambda: store.put("a", b"1"),
        lambda: store.pull("a", 0),
        lambda: store.pull("a"),
        lambda: store.pull_any(["a"]),
        lambda: store.pullp("a"),
        lambda: store.pull_many("a", 1),
        lambda: store.remove("a", 1),
        lambda: store.clear("a"),
        lambda: store.claim("a", 0),
        lambda: store.claim("a", ordered=True),
        lambda: store.claimp("a"),
        lambda: store.claim_many("a", 1),
        claimed.ack,
        claimed.nack,
        lambda: claimed.extend(5),
        lambda: store.ack_many([claimed]),
        lambda: store.requeue("a"),
        lambda: store.transaction().__enter__(),
        lambda: store.space().inp("a"),
        lambda: store.wait("a"),
        lambda: store.wait_empty("a"),
        lambda: store.peek("a"),
        lambda: store.len("a"),
        store.keys,
        lambda: store.get("a", 1),
        lambda: store.entries("a"),
        lambda: store.history("a"),
        store.stats,
        store.compact,
        lambda: store.backup(path + "-copy"),
    ):
        with pytest.raises(sqlspace.ClosedError):
            call()
    assert not os.path.exists(path + "-copy")


def test_a_store_that_is_forgotten_warns_and_closes(path):
    """ResourceWarning, as for a file."""
    store = sqlspace.open(path)
    store.push("a", b"1")
    with pytest.warns(ResourceWarning, match=r"unclosed.*queue\.db"):
        del store
        gc.collect()
    with sqlspace.open(path) as store:
        assert store.pull("a") == b"1"


def test_a_store_can_be_pickled_with_all_its_options(path):
    """It opens where it is unpickled."""
    options = {"sync": False, "history": 3, "mode": 0o640, "busy_timeout": 1.5}
    with sqlspace.open(path, **options) as store:
        store.push("a", b"1")
        with pickle.loads(pickle.dumps(store)) as other:
            assert (other.path, other.sync) == (store.path, False)
            assert other._database.options == store._database.options
            assert other.pull("a") == b"1"


def test_any_number_of_threads_may_use_one_store(path):
    """Eight push, eight take: each entry once, in order for each who pushed."""
    taken = []
    errors = []

    def work(body):
        def guarded():
            try:
                body()
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=guarded)

    with sqlspace.open(path, sync=False) as store:

        def push(name):
            return lambda: [store.push("a", b"%d %d" % (name, n)) for n in range(100)]

        def take():
            taken.extend([store.pull("a", timeout=60) for _ in range(100)])

        threads = [work(push(name)) for name in range(8)] + [work(take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert sorted(taken) == sorted(b"%d %d" % (i, n) for i in range(8) for n in range(100))
        stones = list(store.history("a"))
        assert [stone.seq for stone in stones] == sorted(stone.seq for stone in stones)
        assert store._database._session.bell._takers == {}


# -- what fails in the middle


INTERRUPTED = """
import collections, random, signal, sys, sqlspace

verb, seed = sys.argv[2], int(sys.argv[3])
random.seed(seed)
store = sqlspace.open(sys.argv[1], sync=False, history=None)
pushed = {f"{n}".encode() for n in range(600)}
taken, hits, more = [], 0, []

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
verbs = {
    "pullp": lambda: taken.extend(map(store.pullp, ("k",))),
    "pull": lambda: taken.extend(map(store.pull, ("k",), (5,))),
    "pull_many": lambda: taken.extend(*map(store.pull_many, ("k",), (3,))),
    "push": lambda: more.extend(map(store.push, ("new",), (b"x",))),
    "push_many": lambda: more.extend(*map(store.push_many, ("new",), ([b"x", b"y"],))),
}
store.push_many("k", sorted(pushed))
for _ in range(400 if "pull" in verb else 800):
    if verb in ("pullp", "pull", "pull_many") and store.len("k") < 10:
        break
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0003))
        verbs[verb]()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        hits += 1
left = [entry.payload for entry in store.entries("k")]
problems = [p for p, n in collections.Counter(taken + left).items() if n > 1 or p not in pushed]
problems += sorted(pushed - set(taken) - set(left))
problems += sorted(set(more) ^ {entry.seq for entry in store.entries("new")})
assert not store._database._session.connection.in_transaction
store.push("after", b"works")
assert store.pull("after", 5) == b"works"
store.close()
print(hits, problems)
"""


@pytest.mark.parametrize("verb", ["pullp", "pull", "pull_many", "push", "push_many"])
def test_an_interrupted_call_did_nothing(path, verb):
    """Ctrl-C at any moment of a verb: what was taken is put back, what was added is taken back.

    The entry is returned or in the store, never lost and never doubled.
    """
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, path, verb, "7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    hits, _, problems = done.stdout.strip().partition(" ")
    assert int(hits) > 20
    assert problems == "[]"


def test_a_full_disk_is_one_clear_error_and_nothing_changes(path, tmp_path):
    """FullError; the entries that were there stay, and what is small still fits or is refused."""
    code = textwrap.dedent(
        """
        import resource, signal, sys, sqlspace
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with sqlspace.open(sys.argv[1]) as store:
            store.push("a", b"kept")
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
            try:
                store.push("a", b"x" * 1_000_000)
            except sqlspace.StoreError as error:
                print(type(error).__name__)
            assert store.len("a") == 1
            assert [entry.payload for entry in store.entries("a")] == [b"kept"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            assert store.pull("a") == b"kept"
            store.push("a", b"again")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"FullError", "StoreError"}
    with sqlspace.open(path) as store:
        assert store.pull_many("a", 9) == [b"again"]


def test_opening_and_closing_leaves_no_descriptor_and_no_thread(path):
    """A process may open and close stores for years."""
    for _ in range(3):
        sqlspace.open(path).close()
    with sqlspace.open(path) as store, pytest.raises(sqlspace.DeadlineError):
        store.pull("a", 0.01)
    before = len(os.listdir("/proc/self/fd") if os.path.exists("/proc") else [])
    threads = threading.active_count()
    for _ in range(5):
        with sqlspace.open(path) as store:
            store.push("a", b"1")
            store.peek("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()
    assert len(os.listdir("/proc/self/fd") if os.path.exists("/proc") else []) == before
    assert threading.active_count() == threads
    assert not pathlib.Path(path + "-wal").exists()


def test_putting_back_twice_does_not_double_what_others_took_meanwhile(store, path):
    """What an interrupt cuts off is said again: the second time must change nothing."""
    seq = store.push("a", b"1")
    grab = Grab(store._database, ["a"])
    assert grab.run()
    grab.restore()
    with sqlspace.open(path, sync=False) as other:
        assert other.pull("a") == b"1"
    grab.restore()
    assert store.pullp("a") is None
    assert [stone.seq for stone in store.history("a")] == [seq]


def test_a_wait_that_an_interrupt_ends_has_taken_nothing(store):
    """Ctrl-C at every third instruction, from the look to the return."""
    context = sqlspace.Context()  # which the wait must leave when it has found something
    for step, *_ in every_step():
        store.push("a", b"1")
        found, struck = interrupted(lambda: store.pull_any(["a"], context=context), 3 * step)
        assert store.pull_many("a", 2) == ([b"1"] if found is MISSING else []), step
        if not struck:
            return


def test_what_is_put_back_after_a_compact_is_all_there(store, path):
    """The tombstone was deleted meanwhile, or, being the highest row, laid bare."""
    store.push("a", b"1", headers={"x": "y"}, ttl=1000)
    store.push("a", b"2", headers={"x": "y"}, ttl=1000)
    before = list(store.entries("a"))
    grabs = [Grab(store._database, ["a"]) for _ in range(2)]
    assert all(grab.run() for grab in grabs)
    with sqlspace.open(path, sync=False) as other:
        other.compact()
    for grab in grabs:
        grab.restore()
    assert list(store.entries("a")) == before


def test_a_pull_that_others_outran_gives_nothing_back(store, path):
    """It saw the head, and another took that first: it is not its own to put back."""
    store.push("a", b"1")
    with sqlspace.open(path, sync=False) as other:
        turnstile = store._database._session.turnstile
        enter = turnstile.try_enter

        def late():
            turnstile.try_enter = enter
            assert other.pull("a") == b"1"
            return enter()

        turnstile.try_enter = late
        grab = Grab(store._database, ["a"])
        assert not grab.run()
    store.push("b", b"2")  # a change, which is none of the pull's
    grab.restore()
    assert store.len("a") == 0


HANDLER = """
import signal, sys, sqlspace

path, deed = sys.argv[1:]
store = sqlspace.open(path, sync=False)
hits = []

def handler(*_):
    try:
        if deed == "push":
            hits.append(store.push("handler", b"x"))
        else:
            store.close()
            hits.append(None)
    except ValueError as error:
        assert "handler" in str(error)
        hits.append(None)

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0007 if deed == "push" else 0.02)
mine = 0
try:
    while len(hits) < (200 if deed == "push" else 20):
        store.push("main", b"x")
        mine += 1
except sqlspace.ClosedError:
    assert deed == "close"
signal.setitimer(signal.ITIMER_REAL, 0)
store.close()
with sqlspace.open(path) as store:
    pushed = len([hit for hit in hits if hit]) if deed == "push" else 0
    print(store.len("main") == mine, store.len("handler") == pushed)
"""


@pytest.mark.parametrize("deed", ["push", "close"])
def test_a_signals_handler_in_the_middle_of_a_call_blocks_nobody(path, deed):
    """It is refused, or, if it closes the store, that is done when the call ends."""
    done = subprocess.run(
        [sys.executable, "-c", HANDLER, path, deed], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
