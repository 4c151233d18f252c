"""What the seed says, statement by statement, for Local and for Store.

Each docstring is the statement that is defended, in the words of `seed.txt` where it has some.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import sqlspace
from sqlspace import CanceledError, ClosedError, Context, DeadlineError, Local, Space, Store
from sqlspace.waiting import Vigil, Waiter, wait

LIMIT_SECONDS = 60.0  # for what must come; nothing waits so long unless it is broken
CONSUMERS = 8
ENTRIES_EACH = 200


class LocalQueue:
    """A Local, under the names that the tests of both use. Its values are bytes, as a Store's."""

    def __init__(self, _path: str) -> None:
        self.it = Local()
        self.add, self.take, self.probe = self.it.out, self.it.in_, self.it.inp
        self.peek, self.len, self.close = self.it.rdp, self.it.len, self.it.close
        self.read = self.it.rd


class StoreQueue:
    """A Store, likewise; where the seed has no blocking read, it is the wait and the peek."""

    def __init__(self, path: str) -> None:
        self.it = sqlspace.open(path, sync=False)
        self.add, self.take, self.probe = self.it.push, self.it.pull, self.it.pullp
        self.peek, self.len, self.close = self.it.peek, self.it.len, self.it.close

    def read(
        self, key: str, timeout: float | None = None, *, context: Context | None = None
    ) -> bytes | None:
        self.it.wait(key, timeout, context=context)
        return self.it.peek(key)


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "queue.db")


@pytest.fixture(params=[LocalQueue, StoreQueue], ids=["Local", "Store"])
def queue(request, path):
    queue = request.param(path)
    yield queue
    queue.close()


class Call(threading.Thread):
    """A verb in a thread of its own."""

    def __init__(self, verb: Callable[..., Any], *args: Any, **bounds: Any) -> None:
        super().__init__(daemon=True)
        self._call = lambda: verb(*args, **bounds)
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(LIMIT_SECONDS)
        assert not self.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._value


@pytest.fixture
def block(monkeypatch) -> Callable[..., Call]:
    """Begin a call in a thread of its own, and return when it is about to sleep."""
    parked = threading.Semaphore(0)

    def watched(vigil: Vigil, *bounds: Any, **rest: Any) -> Any:
        park = vigil.park

        def noted(waiter: Waiter, seconds: float) -> Any:
            parked.release()
            return park(waiter, seconds)

        vigil.park = noted
        return wait(vigil, *bounds, **rest)

    # No wait looks again by itself, so that a lost wake-up isn't healed.
    monkeypatch.setattr("sqlspace.waiting.LOOK_AGAIN_SECONDS", 3600.0)
    for module in ("local", "taking", "store"):
        monkeypatch.setattr(f"sqlspace.{module}.wait", watched)

    def block(verb: Callable[..., Any], *args: Any, **bounds: Any) -> Call:
        call = Call(verb, *args, **bounds)
        assert parked.acquire(timeout=LIMIT_SECONDS)
        return call

    return block


def drain(store: Store, key: str) -> list[bytes]:
    return store.pull_many(key, 1_000_000)


# -- both


def test_an_entry_is_taken_once_and_is_gone(queue):
    """Out writes an entry under a key, In takes (removes and returns) one entry."""
    queue.add("k", b"entry")
    assert queue.take("k") == b"entry"
    assert queue.len("k") == 0
    assert queue.probe("k") is None


def test_a_key_is_a_queue(queue):
    """A key holds a FIFO bag, so a key is a queue."""
    for number in range(50):
        queue.add("a", b"a%d" % number)
        queue.add("b", b"b%d" % number)
    assert [queue.take("a") for _ in range(50)] == [b"a%d" % number for number in range(50)]
    assert [queue.probe("b") for _ in range(50)] == [b"b%d" % number for number in range(50)]


def test_taking_blocks_until_an_entry_is_available(queue, block):
    """In blocks until an entry is available under key, then removes and returns it."""
    taker = block(queue.take, "k")
    queue.add("other", b"not this")
    assert taker.is_alive()
    queue.add("k", b"came")
    assert taker.result() == b"came"
    assert (queue.len("k"), queue.len("other")) == (0, 1)


def test_reading_does_not_remove(queue):
    """Rd returns the head entry without removing it, so the same entry can be read by several."""
    queue.add("k", b"head")
    queue.add("k", b"next")
    readers = [Call(queue.read, "k") for _ in range(4)]
    assert [reader.result() for reader in readers] == [b"head"] * 4
    assert (queue.peek("k"), queue.len("k")) == (b"head", 2)
    assert [queue.take("k"), queue.take("k")] == [b"head", b"next"]


def test_reading_blocks_too(queue, block):
    """Rd is like In: it waits until an entry is there."""
    reader = block(queue.read, "k")
    queue.add("k", b"came")
    assert reader.result() == b"came"
    assert queue.len("k") == 1


def test_probes_never_block(queue):
    """Inp and Rdp are the non-blocking forms: ok is false if no entry is present."""
    assert (queue.probe("k"), queue.peek("k")) == (None, None)
    queue.add("k", b"")
    assert (queue.peek("k"), queue.probe("k"), queue.probe("k")) == (b"", b"", None)


def test_len_reports_how_many_entries_are_queued(queue):
    """Len reports how many entries are queued under key."""
    for number in range(3):
        assert queue.len("k") == number
        queue.add("k", b"")
    queue.take("k")
    assert (queue.len("k"), queue.len("other")) == (2, 0)


@pytest.mark.parametrize("bound", [{"timeout": 0}, {"timeout": 0.01}, {"context": 0.01}])
@pytest.mark.parametrize("verb", ["take", "read"])
def test_a_wait_is_bounded(queue, verb, bound):
    """Blocking calls take a context, so waits are bounded: its deadline passes, it ends."""
    if "context" in bound:
        bound = {"context": Context(bound["context"])}
    with pytest.raises(DeadlineError) as raised:
        getattr(queue, verb)("k", **bound)
    assert isinstance(raised.value, TimeoutError)
    queue.add("k", b"later")
    assert queue.probe("k") == b"later"


@pytest.mark.parametrize("verb", ["take", "read"])
def test_a_wait_is_cancelable(queue, block, verb):
    """Blocking calls take a context, so waits are cancelable; nothing was taken."""
    context = Context()
    calls = [block(getattr(queue, verb), "k", context=context) for _ in range(2)]
    context.cancel()
    for call in calls:
        with pytest.raises(CanceledError):
            call.result()
    queue.add("k", b"later")
    assert queue.probe("k") == b"later"


@pytest.mark.parametrize("verb", ["take", "read"])
def test_close_unblocks_all_waiters(queue, block, verb):
    """Close marks the space closed and unblocks all waiters with ErrClosed."""
    calls = [block(getattr(queue, verb), key) for key in ("a", "a", "b")]
    queue.close()
    for call in calls:
        with pytest.raises(ClosedError):
            call.result()


def test_close_is_idempotent(queue):
    """Close: it is idempotent."""
    for _ in range(3):
        assert queue.close() is None


@pytest.mark.parametrize("verb", ["take", "read"])
def test_blocking_operations_on_a_closed_space_raise(queue, verb):
    """ErrClosed is returned by blocking operations on a closed space, even if entries remain."""
    queue.add("k", b"remains")
    queue.close()
    for key in ("k", "empty"):
        for bound in ({}, {"timeout": 0}, {"context": Context()}):
            with pytest.raises(ClosedError):
                getattr(queue, verb)(key, **bound)


def test_eight_consumers_take_200_entries_each_once(queue):
    """Implementations must be safe for concurrent use: each of 1,600 entries is taken once."""

    def consume() -> list[int]:
        return [int(queue.take("jobs")) for _ in range(ENTRIES_EACH)]

    def produce(first: int) -> None:
        for number in range(first, CONSUMERS * ENTRIES_EACH, 2):
            queue.add("jobs", b"%d" % number)

    consumers = [Call(consume) for _ in range(CONSUMERS)]
    producers = [Call(produce, first) for first in (0, 1)]
    for producer in producers:
        producer.result()
    shares = [consumer.result() for consumer in consumers]
    assert sorted(number for share in shares for number in share) == list(
        range(CONSUMERS * ENTRIES_EACH)
    )
    assert queue.len("jobs") == 0
    for share in shares:  # each consumer sees each producer's entries in their order
        for first in (0, 1):
            of_one = [number for number in share if number % 2 == first]
            assert of_one == sorted(of_one)


def test_a_wait_needs_no_thread_of_its_own(queue, block):
    """A waiter is woken without any per-call goroutine."""
    before = threading.active_count()
    takers = [block(queue.take, "k") for _ in range(4)]
    assert threading.active_count() == before + len(takers)
    for _ in takers:
        queue.add("k", b"")
    assert [taker.result() for taker in takers] == [b""] * 4


def test_a_rendezvous_of_request_and_response(queue):
    """Queues, work hand-off, request/response rendezvous across components."""

    def serve() -> None:
        for _ in range(20):
            queue.add("replies", queue.take("requests") + b"!")

    server = Call(serve)
    for number in range(20):
        queue.add("requests", b"%d" % number)
        assert queue.take("replies") == b"%d!" % number
    server.result()


# -- Local


def test_local_implements_space_and_store_is_a_sibling(path):
    """Local implements Space; Store is a sibling of Space rather than an implementation of it."""
    assert isinstance(Local(), Space)
    with sqlspace.open(path) as store:
        assert not isinstance(store, Space)


def test_out_after_close_is_a_no_op_for_local():
    """Out writes value under key. After the space is closed it is a no-op; the probes answer."""
    space = Local()
    space.out("k", 1)
    space.close()
    assert space.out("k", 2) is None
    assert (space.len("k"), space.rdp("k"), space.inp("k"), space.inp("k")) == (1, 1, 1, None)


def test_local_shares_its_values_and_a_store_copies_them(path):
    """Local hands out the very object; what a Store was given is bytes of its own."""
    for mutable in (bytearray(b"before"), memoryview(bytearray(b"before"))):
        space = Local()
        space.out("k", mutable)
        assert space.in_("k") is mutable
        with sqlspace.open(path, sync=False) as store:
            store.push("k", mutable)
            store.push_many("k", [mutable])
            store.put("other", mutable)
            mutable[:6] = b"after!"
            assert drain(store, "k") == [b"before"] * 2
            assert type(store.peek("other")) is bytes
            assert store.pull("other") == b"before"


def test_the_core_needs_no_distributed_backend():
    """A distributed backend doesn't make the core take on its dependency."""
    script = "import sqlspace, sys; print([m for m in sys.modules if m.split('.')[0] == 'nats'])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# -- Store


def test_open_creates_the_file_if_needed_and_replays_it(path):
    """Open opens (creating if needed) the store at path, and rebuilds the queue state."""
    assert not os.path.exists(path)
    with sqlspace.open(path) as store:
        seqs = [store.push(key, b"%d" % number) for number, key in enumerate("abab")]
        assert store.pull("a") == b"0"
    for _ in range(2):
        with sqlspace.open(path) as store:
            assert store.keys() == ["a", "b"]
            assert [entry.seq for entry in store.entries("b")] == [seqs[1], seqs[3]]
            assert (store.peek("a"), store.peek("b"), store.len("b")) == (b"2", b"1", 2)
    with sqlspace.open(path) as store:
        assert (drain(store, "a"), drain(store, "b")) == ([b"2"], [b"1", b"3"])


def test_messages_survive_a_crash_and_a_delivered_one_never_comes_back(path):
    """It must hold messages over a restart; a crash never resurrects a delivered entry."""
    script = """
import os, signal, sys, sqlspace
store = sqlspace.open(sys.argv[1])
print(*[store.push("k", b"%d" % number) for number in range(4)])
print(store.pull("k").decode(), store.pullp("k").decode(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    seqs, taken = (line.split() for line in done.stdout.splitlines())
    assert taken == ["0", "1"]
    with sqlspace.open(path) as store:
        assert [str(entry.seq) for entry in store.entries("k")] == seqs[2:]
        assert drain(store, "k") == [b"2", b"3"]


def test_a_torn_tail_of_the_log_is_tolerated(path, tmp_path):
    """Backed by a crash-safe log that replays on open: whatever is cut off, a prefix is intact."""
    states = [[]]
    with sqlspace.open(path) as store:
        for number in range(12):
            if number % 4 == 3:
                store.pull("k")
                states.append(states[-1][1:])
            else:
                payload = b"%d" % number * (3000 if number == 5 else 1)
                store.push("k", payload)
                states.append([*states[-1], payload])
        # By another process: closing one of these files here would drop SQLite's locks.
        copy = tmp_path / "copy"
        copy.mkdir()
        subprocess.run(["cp", path, f"{path}-wal", copy], check=True)
    database, wal = ((copy / f"queue.db{suffix}").read_bytes() for suffix in ("", "-wal"))
    frame = 24 + 4096
    frames = (len(wal) - 32) // frame
    assert frames > len(states)
    ends = [32 + frame * number for number in range(frames + 1)]
    cuts = {0, 1, 31, *(end + some for end in ends for some in (-1, 0, 1, 23, 24, 1500))}
    reached = []
    for cut in sorted(cut for cut in cuts if cut <= len(wal)):
        torn = tmp_path / f"torn-{cut}"
        torn.mkdir()
        (torn / "queue.db").write_bytes(database)
        (torn / "queue.db-wal").write_bytes(wal[:cut])
        with sqlspace.open(torn / "queue.db", sync=False) as store:
            left = [entry.payload for entry in store.entries("k")]
            reached.append(states.index(left, reached[-1] if reached else 0))
            seq = store.push("k", b"goes on")  # and it can be worked with
            assert [*left, b"goes on"] == [entry.payload for entry in store.entries("k")]
            assert seq == max(entry.seq for entry in store.entries("k"))
    assert set(reached) == set(range(len(states)))


def test_compact_keeps_the_rest_and_shrinks_the_file(path):
    """Compact rewrites the log with only the live entries, discarding what was taken."""
    with sqlspace.open(path, sync=False) as store:
        for number in range(200):
            store.push(f"key {number % 2}", b"%d" % number + bytes(5000))
        store.compact()
        full = os.stat(path).st_size + os.stat(f"{path}-wal").st_size
        taken = [store.pull("key 0") for _ in range(100)]
        assert len(list(store.history("key 0"))) == len(taken)
        kept = list(store.entries("key 1"))
        store.compact()
        assert os.stat(path).st_size + os.stat(f"{path}-wal").st_size < full * 0.6
        assert list(store.entries("key 1")) == kept
        assert list(store.history("key 0")) == []
    with sqlspace.open(path) as store:
        assert list(store.entries("key 1")) == kept


def test_sequence_numbers_are_preserved_by_compact_and_never_used_again(path):
    """Sequence numbers are preserved, so it is safe to call at any time."""
    with sqlspace.open(path, sync=False) as store:
        seqs = [store.push("k", b"") for _ in range(5)]
        store.pull("k")
        store.compact()
        assert [entry.seq for entry in store.entries("k")] == seqs[1:]
        drain(store, "k")
        store.compact()
        store.compact()
    with sqlspace.open(path, sync=False) as store:
        store.compact()
        assert store.push("k", b"") > seqs[-1]


def test_compact_may_be_called_while_others_wait_and_work(path, block):
    """Compact is safe to call at any time: no waiter is lost, no entry, no order."""
    with sqlspace.open(path, sync=False) as store, sqlspace.open(path, sync=False) as other:
        waiting = block(other.pull, "late")

        def work() -> list[int]:
            for number in range(100):
                other.push("k", b"%d" % number)
            return [int(other.pull("k")) for _ in range(100)]

        working = Call(work)
        compactions = 0
        while working.is_alive() or not compactions:
            store.compact()
            compactions += 1
        assert working.result() == list(range(100))
        store.push("late", b"came")
        assert waiting.result() == b"came"


def test_sync_is_on_by_default(path):
    """WithSync: default true."""
    with sqlspace.open(path) as store:
        assert store.sync is True
    with sqlspace.open(path, sync=False) as store:
        assert store.sync is False
        assert store._database._session.connection.pragma("synchronous") == 1  # NORMAL
    with sqlspace.open(path, sync=True) as store:
        assert store._database._session.connection.pragma("synchronous") == 2  # FULL


USES: dict[str, Callable[[Store, str], object]] = {
    "push": lambda store, _: store.push("k", b""),
    "push_many": lambda store, _: store.push_many("k", [b""]),
    "push_many of nothing": lambda store, _: store.push_many("k", []),
    "put": lambda store, _: store.put("k", b""),
    "pull": lambda store, _: store.pull("k"),
    "pull without waiting": lambda store, _: store.pull("k", 0),
    "pull_any": lambda store, _: store.pull_any(["k"]),
    "pullp": lambda store, _: store.pullp("k"),
    "pull_many": lambda store, _: store.pull_many("k", 1),
    "wait": lambda store, _: store.wait("k"),
    "wait_empty": lambda store, _: store.wait_empty("k"),
    "peek": lambda store, _: store.peek("k"),
    "len": lambda store, _: store.len("k"),
    "keys": lambda store, _: store.keys(),
    "get": lambda store, _: store.get("k", 1),
    "remove": lambda store, _: store.remove("k", 1),
    "clear": lambda store, _: store.clear("k"),
    "push with a name": lambda store, _: store.push("k", b"", dedupe="d"),
    "push with room": lambda store, _: store.push("k", b"", max_len=1),
    "claim": lambda store, _: store.claim("k"),
    "claim in order": lambda store, _: store.claim("k", 0, ordered=True),
    "claimp": lambda store, _: store.claimp("k"),
    "claim_many": lambda store, _: store.claim_many("k", 1),
    "ack_many": lambda store, _: store.ack_many([]),
    "requeue": lambda store, _: store.requeue("k"),
    "transaction": lambda store, _: store.transaction().__enter__(),
    "space": lambda store, _: store.space().out("k", 1),
    "entries": lambda store, _: store.entries("k"),
    "history": lambda store, _: store.history("k"),
    "stats": lambda store, _: store.stats(),
    "compact": lambda store, _: store.compact(),
    "backup": lambda store, path: store.backup(f"{path}.copy"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_closed_store_refuses_every_verb(path, use):
    """Store's API returns errors: after close it is ErrClosed, for each verb."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"remains")
        canceled = Context()
        canceled.cancel()
    with pytest.raises(ClosedError):
        use(store, path)
    with pytest.raises(ClosedError):
        store.pull("k", 0, context=canceled)
    assert sorted(os.listdir(os.path.dirname(path))) == ["queue.db", "queue.db-reserve"]
    with sqlspace.open(path, sync=False) as store:
        assert drain(store, "k") == [b"remains"]
