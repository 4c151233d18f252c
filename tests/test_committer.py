"""Many operations, one commit: who leads, who follows, and what each is told."""

import contextlib
import fcntl
import functools
import itertools
import os
import threading

import apsw
import pytest
from children import PATIENCE_SECONDS, eventually

import sqlspace
from sqlspace import committer, database
from sqlspace.committer import Work
from sqlspace.errors import (
    DeadlineError,
    DecodeError,
    FullError,
    LeaseError,
    StoreError,
    UndecidedError,
)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path, sync=False) as opened:
        opened.clear("k")  # the commit before the first write is done
        yield opened


class Call:
    """A call in a thread of its own, and how it ended."""

    def __init__(self, function, *arguments, **options):
        self.function = functools.partial(function, *arguments, **options)
        self.value = self.error = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error

    def runs(self):
        return self.thread.is_alive()

    def end(self):
        self.thread.join(PATIENCE_SECONDS)
        assert not self.runs(), "it hangs"
        return self

    def result(self):
        self.end()
        if self.error is not None:
            raise self.error
        return self.value


def committer_of(store):
    return store._database._committer


def queued(store, number):
    """Wait until so many are in the queue."""
    eventually(lambda: len(committer_of(store)._queue) == number, f"a queue of {number}")


@contextlib.contextmanager
def standing(store, *, step=None):
    """Somebody stands inside its own commit; the others queue, until the event that is yielded."""
    inside, go = threading.Event(), threading.Event()

    def stand(connection):
        inside.set()
        assert go.wait(PATIENCE_SECONDS)
        return () if step is None else step(connection)

    leader = Call(store._database.transact, stand)
    try:
        assert inside.wait(PATIENCE_SECONDS)
        yield go
    finally:
        go.set()
        leader.result()


def in_one_batch(store, *functions):
    """Have these called while somebody stands inside; they are in the queue in this order."""
    calls = []
    before = len(committer_of(store)._queue)
    with standing(store):
        for number, function in enumerate(functions, before + 1):
            calls.append(Call(function))
            queued(store, number)
    return [call.end() for call in calls]


@contextlib.contextmanager
def counted(store):
    """How many commits there are meanwhile: the list gets one item each."""
    commits = []
    connection = store._database._session.connection
    connection.set_commit_hook(lambda: commits.append(None) is not None)
    try:
        yield commits
    finally:
        connection.set_commit_hook(None)


def payloads(store, key="k"):
    return [entry.payload for entry in store.entries(key)]


def is_free(store):
    """Whether another process could go through the turnstile."""
    descriptor = os.open(store.path + "-wal", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def check_at_rest(store):
    """Nothing is held, nobody is in the queue, and the next one gets in."""
    found = committer_of(store)
    assert not found.lock.locked()
    assert found.leader is None
    assert not (found.joined or found._queue or found.carried or found.waiting or found._lent)
    assert not store._database._session.connection.in_transaction
    assert is_free(store)
    store.push("at rest", b"x")
    assert store.pullp("at rest") == b"x"


# -- one commit


def every_verb(store):
    """One call of each verb that writes, with what it returns; prepared to find its entry."""
    for key in ("pullp", "pull", "any", "claimp", "claim", "put", "clear", "remove", "full"):
        store.push(key, key.encode())
    for key in ("many", "claims"):
        store.push_many(key, [b"1", b"2"])
    first = store.push("dedupe", b"1", dedupe="d")
    for key in ("ack", "nack", "extend", "acks"):
        store.push(key, b"1")
    ack, nack, extend, acks = (store.claimp(key) for key in ("ack", "nack", "extend", "acks"))
    (removed,) = [entry.seq for entry in store.entries("remove")]

    def value(delivery):
        return delivery.payload

    return {
        "push": (lambda: store.push("new", b"x") > first, True),
        "push, delayed": (lambda: store.push("late", b"x", delay=60, ttl=99) > first, True),
        "push, known": (lambda: store.push("dedupe", b"2", dedupe="d"), first),
        "push, unknown": (lambda: store.push("dedupe", b"3", dedupe="e") > first, True),
        "push, with room": (lambda: store.push("full", b"x", max_len=2) > first, True),
        "push_many": (lambda: len(store.push_many("several", [b"1", b"2"])), 2),
        "put": (lambda: store.put("put", b"2") > first, True),
        "pullp": (lambda: store.pullp("pullp"), b"pullp"),
        "pull": (lambda: store.pull("pull", 60), b"pull"),
        "pull_any": (lambda: store.pull_any(["none", "any"], 60), ("any", b"any")),
        "pull_many": (lambda: store.pull_many("many", 2), [b"1", b"2"]),
        "claimp": (lambda: value(store.claimp("claimp")), b"claimp"),
        "claim, ordered": (lambda: value(store.claim("claim", 60, ordered=True)), b"claim"),
        "claim_many": (lambda: list(map(value, store.claim_many("claims", 9))), [b"1", b"2"]),
        "ack": (ack.ack, None),
        "nack": (nack.nack, None),
        "extend": (lambda: extend.extend(99), None),
        "ack_many": (lambda: store.ack_many([acks]), None),
        "clear": (lambda: store.clear("clear"), 1),
        "remove": (lambda: store.remove("remove", removed), True),
        "requeue": (lambda: store.requeue("nothing"), 0),
    }


def test_all_who_wait_for_the_writer_share_one_commit(store):
    """Whatever their verbs: one commit of the one who stood inside, and one of all others."""
    verbs = every_verb(store)
    with counted(store) as commits:
        calls = in_one_batch(store, *(function for function, _ in verbs.values()))
    assert [call.result() for call in calls] == [wanted for _, wanted in verbs.values()]
    assert len(commits) == 2
    assert (store.len("pullp"), store.len("ack"), store.len("nack")) == (0, 0, 1)
    assert (payloads(store, "put"), payloads(store, "new")) == ([b"2"], [b"x"])
    check_at_rest(store)


def test_an_operation_that_is_alone_is_one_commit_and_starts_no_thread(store):
    """No verb costs more for the committer's sake."""
    verbs = every_verb(store)
    threads = threading.active_count()
    for name, (function, wanted) in verbs.items():
        with counted(store) as commits:
            assert function() == wanted
        assert len(commits) == 1, name
        assert committer_of(store)._helper is None
    assert threading.active_count() == threads
    check_at_rest(store)


def test_a_batch_is_bounded(store, monkeypatch):
    """What joins beyond that is committed next; nobody's wait is without end."""
    monkeypatch.setattr(committer, "BATCH_OPERATIONS", 3)
    with counted(store) as commits:
        pushes = [lambda n=n: store.push("k", b"%d" % n) for n in range(7)]
        seqs = [call.result() for call in in_one_batch(store, *pushes)]
    assert len(commits) == 1 + 3
    assert seqs == [entry.seq for entry in store.entries("k")]
    check_at_rest(store)


def test_a_threads_operations_keep_their_order_and_seqs_grow(store):
    """Each call returns before the thread makes its next one, whoever carries them out."""

    def push(name):
        return [(store.push("k", b"%d %d" % (name, n)), b"%d %d" % (name, n)) for n in range(50)]

    found = [call.result() for call in [Call(push, name) for name in range(8)]]
    for mine in found:
        assert mine == sorted(mine)
    entries = [(entry.seq, entry.payload) for entry in store.entries("k")]
    assert entries == sorted(itertools.chain.from_iterable(found))


# -- results come after the commit

ANSWERED = {
    "push": lambda store: store.push("k", b"x"),
    "a push that is known": lambda store: store.push("d", b"x", dedupe="d"),
    "pullp": lambda store: store.pullp("p"),
    "claimp": lambda store: store.claimp("c"),
    "put": lambda store: store.put("k", b"x"),
}


def prepare(store):
    store.push("d", b"x", dedupe="d")
    store.push("p", b"x")
    store.push("c", b"x")


@pytest.mark.parametrize("verb", ANSWERED)
def test_nobody_is_answered_before_the_commit(store, path, verb):
    """The leader stands right before it: no call has returned, and nobody else sees a thing."""
    prepare(store)
    before, go = threading.Event(), threading.Event()
    commits = itertools.count()

    def stand():
        if next(commits) == 1:  # not of who stands inside
            before.set()
            assert go.wait(PATIENCE_SECONDS)
        return False

    connection = store._database._session.connection
    with contextlib.closing(apsw.Connection(path)) as other:
        with standing(store):
            connection.set_commit_hook(stand)
            first = Call(store.push, "first", b"x")
            queued(store, 1)
            call = Call(ANSWERED[verb], store)
            queued(store, 2)
        known = list(other.execute("SELECT seq, state FROM sqlspace_entries"))
        assert before.wait(PATIENCE_SECONDS)
        assert first.runs()
        assert call.runs()
        assert list(other.execute("SELECT seq, state FROM sqlspace_entries")) == known
        go.set()
        first.result()
        call.result()
        assert list(other.execute("SELECT seq, state FROM sqlspace_entries")) != known
    connection.set_commit_hook(None)
    check_at_rest(store)


@pytest.mark.parametrize("verb", ANSWERED)
@pytest.mark.parametrize("follows", [False, True])
def test_with_group_nobody_is_answered_before_the_sync(path, monkeypatch, verb, follows):
    """It is committed, and others may write, but the call returns when it is on the disk."""
    with sqlspace.open(path, sync="group") as store:
        prepare(store)
        syncing, go = threading.Event(), threading.Event()
        syncs = itertools.count()
        sync = database.sync

        def stand(descriptor):
            if next(syncs) == int(follows):  # not of who stands inside
                syncing.set()
                assert go.wait(PATIENCE_SECONDS)
            sync(descriptor)

        monkeypatch.setattr(database, "sync", stand)
        if follows:
            calls = []
            with standing(store):
                for function in (lambda store: store.push("first", b"x"), ANSWERED[verb]):
                    calls.append(Call(function, store))
                    queued(store, len(calls))
        else:
            calls = [Call(ANSWERED[verb], store)]
        assert syncing.wait(PATIENCE_SECONDS)
        assert is_free(store)
        with sqlspace.open(path, sync=False) as other:
            other.push("meanwhile", b"x")
        assert all(call.runs() for call in calls)
        go.set()
        for call in calls:
            call.result()
        check_at_rest(store)


# -- one's failure is its own


def lost_lease(store):
    store.push("lost", b"x")
    delivery = store.claim("lost")
    store.clear("lost")
    return delivery.ack


def full_key(store):
    store.push("full", b"x")
    return lambda: store.push("full", b"y", max_len=1, timeout=0)


def unreadable(store):
    store.push("bad", b"{")
    return lambda: store.space().inp("bad")


def too_big(store):
    store._database._session.connection.limit(apsw.SQLITE_LIMIT_LENGTH, 5000)
    return lambda: store.push("big", b"x" * 6000)


INSERT = "INSERT INTO sqlspace_entries (key, payload, pushed_at) VALUES (?, ?, 0)"


def constraint(store):
    operation = Work(lambda connection: connection.execute(INSERT, (None, b"x")) and ())
    operation.whole = False
    return lambda: store._database.write(operation)


def half_way(store):
    def step(connection):
        connection.execute(INSERT, ("half", b"x"))
        raise ZeroDivisionError

    return lambda: store._database.transact(step)


REFUSED = {
    "a lost lease": (lost_lease, LeaseError),
    "a full key": (full_key, DeadlineError),
    "what the codec can't read": (unreadable, DecodeError),
    "too big for SQLite": (too_big, StoreError),
    "a constraint": (constraint, StoreError),
    "half-way": (half_way, ZeroDivisionError),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused_fails_alone(store, why, place):
    """At the head of a batch (there it leads), in its middle, at its end; the others are done."""
    prepare, kind = REFUSED[why]
    functions = [lambda: store.push("k", b"x"), lambda: store.push("k", b"y")]
    functions.insert(place, prepare(store))
    with counted(store) as commits:
        calls = in_one_batch(store, *functions)
    refused = calls.pop(place)
    with pytest.raises(kind):
        refused.result()
    if kind is StoreError:
        assert isinstance(refused.error.__cause__, apsw.Error)
    assert [call.result() for call in calls] == [entry.seq for entry in store.entries("k")]
    assert payloads(store) == [b"x", b"y"]
    assert len(commits) == 2 or kind is DecodeError  # the bad head was buried
    assert store.len("half") == store.len("big") == 0
    assert store.len("full") == (why == "a full key")
    check_at_rest(store)


def test_an_operation_that_breaks_the_transaction_fails_and_the_others_are_done_once(store):
    """SQLite rolls all back on some errors: the others are carried out once more, and only once."""
    runs = []

    def breaks(connection):
        runs.append(None)
        connection.execute(INSERT, ("broken", b"x"))
        connection.execute("ROLLBACK")
        raise apsw.FullError("SQLite's own")

    store.push("p", b"x")
    calls = in_one_batch(
        store,
        lambda: store.push("k", b"1"),  # it leads
        lambda: store.pullp("p"),
        lambda: store._database.transact(breaks),
        lambda: store.push("k", b"2"),
        lost_lease(store),
    )
    assert isinstance(calls[2].error, FullError)
    assert isinstance(calls[4].error, LeaseError)
    assert calls[1].result() == b"x"
    entries = [(entry.seq, entry.payload) for entry in store.entries("k")]
    assert sorted(entries) == sorted([(calls[0].result(), b"1"), (calls[3].result(), b"2")])
    assert len(runs) == 1
    assert (store.len("broken"), store.len("p")) == (0, 0)
    check_at_rest(store)


# -- a commit that fails


class Faults:
    """What the disk does to the -wal: the next so many syncs, or writes, fail."""

    syncs = writes = 0


class File(apsw.VFSFile):
    def __init__(self, name, flags):
        super().__init__("unix", name, flags)
        self.fails = bool(flags[1] & apsw.SQLITE_OPEN_WAL)

    def xSync(self, flags):
        if self.fails and Faults.syncs:
            Faults.syncs -= 1
            raise apsw.IOError("a bad disk")
        return super().xSync(flags)

    def xWrite(self, data, offset):
        if self.fails and Faults.writes:
            Faults.writes -= 1
            raise apsw.FullError("a full disk")
        return super().xWrite(data, offset)


class Failing(apsw.VFS):
    def __init__(self):
        super().__init__("failing", "unix")

    def xOpen(self, name, flags):
        return File(name, flags)


@pytest.fixture
def failing(path):
    vfs = Failing()
    try:
        with sqlspace.open(path, vfs="failing", busy_timeout=5) as opened:
            opened.push("p", b"x")
            yield opened
            Faults.syncs = Faults.writes = 0
    finally:
        Faults.syncs = Faults.writes = 0
        vfs.unregister()


def boots(path):
    with contextlib.closing(apsw.Connection(path)) as other:
        return other.execute("SELECT boots FROM sqlspace_schema WHERE version = 1").get


def fail_in_one_batch(store, **faults):
    delivery = store.claimp("leased")
    calls = []
    with standing(store):
        for function in (
            lambda: store.push("k", b"0"),
            lambda: store.pullp("p"),
            lambda: store.put("k", b"2"),
            delivery.ack,
        ):
            calls.append(Call(function))
            queued(store, len(calls))
        connection = store._database._session.connection
        commits = itertools.count()

        def arm():
            if next(commits) == 1:  # not of who stands inside
                for name, number in faults.items():
                    setattr(Faults, name, number)
            return False

        connection.set_commit_hook(arm)
    for call in calls:
        call.end()
    with contextlib.suppress(apsw.Error):
        connection.set_commit_hook(None)
    return calls, delivery


@pytest.mark.parametrize(("fault", "kind"), [("syncs", StoreError), ("writes", FullError)])
def test_a_commit_that_fails_fails_all_in_it_and_nothing_of_it_stands(failing, path, fault, kind):
    """Each is told by an error of its own; one more commit makes certain that it did not happen."""
    failing.push("leased", b"x")
    before = boots(path)
    calls, delivery = fail_in_one_batch(failing, **{fault: 1})
    errors = [call.error for call in calls]
    assert {type(error) for error in errors} == {kind}
    assert len(set(map(id, errors))) == len(errors)
    assert all(isinstance(error.__cause__, apsw.Error) for error in errors)
    assert boots(path) == before + (fault == "syncs")
    assert (payloads(failing), payloads(failing, "p")) == ([], [b"x"])
    assert list(failing.history("p")) == []
    delivery.ack()
    assert failing.pullp("p") == b"x"
    check_at_rest(failing)


def test_a_commit_that_fails_and_the_next_one_as_well_is_undecided_for_all(failing, path):
    """Nobody knows: every call says so, and every later one."""
    failing.push("leased", b"x")
    calls, _ = fail_in_one_batch(failing, syncs=2)
    assert {type(call.error) for call in calls} == {UndecidedError}
    assert len({id(call.error) for call in calls}) == len(calls)
    for verb in (lambda: failing.push("k", b"x"), lambda: failing.len("k"), failing.transaction):
        with pytest.raises(UndecidedError), contextlib.ExitStack() as stack:
            found = verb()
            if hasattr(found, "__enter__"):
                stack.enter_context(found)
    found = committer_of(failing)
    assert not (found.lock.locked() or found._queue or found.carried or found.joined)
    assert is_free(failing)
