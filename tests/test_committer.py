"""Many operations, one commit: who leads, who follows, and what each is told."""

import collections
import contextlib
import errno
import fcntl
import functools
import itertools
import os
import pickle
import signal
import threading
import traceback

import apsw
import pytest
from children import PATIENCE_SECONDS, eventually
from interrupts import interrupted

import sqlspace
from sqlspace import commits, committer, taking
from sqlspace.committer import Committer, Work
from sqlspace.errors import (
    BusyError,
    ClosedError,
    DeadlineError,
    DecodeError,
    FullError,
    LeaseError,
    MovedError,
    StoreError,
    UndecidedError,
)
from sqlspace.waiting import LOOK_AGAIN_SECONDS, MISSING, Waiter


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
    eventually(lambda: len(committer_of(store).queue) == number, f"a queue of {number}")


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
    before = len(committer_of(store).queue)
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
    assert not (found.joined or found.queue or found.carried or found.waiting or found._lent)
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


@pytest.mark.usefixtures("_only_rings")
def test_what_is_committed_together_wakes_who_waits_for_it(store):
    """Each for what it has added, as if it were alone."""
    waiting = [Call(store.pull, key) for key in ("j", "k")]
    eventually(lambda: set(store._database.bell._takers) == {"j", "k"}, "two waits")
    in_one_batch(store, lambda: store.push("j", b"1"), lambda: store.push("k", b"2"))
    for each, wanted in zip(waiting, (b"1", b"2"), strict=True):
        each.thread.join(LOOK_AGAIN_SECONDS / 2)  # sooner than it would look by itself
        assert each.value == wanted


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
        sync = commits.sync

        def stand(descriptor):
            if next(syncs) == int(follows):  # not of who stands inside
                syncing.set()
                assert go.wait(PATIENCE_SECONDS)
            sync(descriptor)

        monkeypatch.setattr(commits, "sync", stand)
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


@pytest.mark.parametrize("together", [False, True])
def test_a_pull_that_fails_behind_its_one_statement_has_taken_nothing(store, monkeypatch, together):
    """To ask for whom else there is something left may fail, as any read; the entry is back."""
    store.push("p", b"x")
    waiter = Waiter()

    def failing(*_):
        raise apsw.SQLError("a look")

    monkeypatch.setattr(taking.Grab, "_passed_on", failing)
    grab = taking.Grab(store._database, ["p"], waiter)
    if together:
        other, pull = in_one_batch(store, lambda: store.push("k", b"x"), grab.run)
        assert other.result()
    else:
        pull = Call(grab.run)
    with pytest.raises(StoreError):
        pull.result()
    assert payloads(store, "p") == [b"x"]
    assert list(store.history("p")) == []
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
        lambda: store._database.transact(breaks, adds=0),
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


def test_who_is_handed_back_by_the_helper_goes_on(path, child):
    """It waits for no helper any more: it may lead."""

    def breaks(connection):
        connection.execute("ROLLBACK")
        raise apsw.FullError("SQLite's own")

    with sqlspace.open(path, sync=False, busy_timeout=5) as store:
        store.push("k", b"0")
        calls = []
        with shut(store, child):
            for function in (
                lambda: store.push("k", b"1"),
                lambda: store._database.transact(breaks, adds=0),
                lambda: store.push("k", b"2"),
            ):
                calls.append(Call(function))
                queued(store, len(calls))
        with pytest.raises(FullError):
            calls[1].result()
        seqs = [calls[0].result(), calls[2].result()]
        found = {entry.seq: entry.payload for entry in store.entries("k")}
        assert [found[seq] for seq in seqs] == [b"1", b"2"]
        check_at_rest(store)


# -- a commit that fails


@pytest.mark.parametrize("whole", [False, True], ids=["push", "transaction"])
def test_before_the_first_write_there_is_a_commit_of_its_own(path, whole):
    """It decides what a power cut has left of a write that was refused before."""
    with sqlspace.open(path, sync=False) as store:
        for wanted in (2, 1):
            with counted(store) as commits:
                if whole:
                    with store.transaction() as together:
                        together.push("k", b"x")
                else:
                    store.push("k", b"x")
            assert len(commits) == wanted


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


def test_a_commit_that_fails_fails_all_in_it_and_nothing_of_it_stands(failing, path):
    """Each is told by an error of its own; one more commit makes certain that it did not happen."""
    failing.push("leased", b"x")
    before = boots(path)
    calls, delivery = fail_in_one_batch(failing, syncs=1)
    errors = [call.error for call in calls]
    assert {type(error) for error in errors} == {StoreError}
    assert len(set(map(id, errors))) == len(errors)
    assert all(isinstance(error.__cause__, apsw.Error) for error in errors)
    assert boots(path) == before + 1
    assert (payloads(failing), payloads(failing, "p")) == ([], [b"x"])
    assert list(failing.history("p")) == []
    delivery.ack()
    assert failing.pullp("p") == b"x"
    check_at_rest(failing)


def test_on_a_full_disk_what_takes_is_done_and_what_pushes_is_refused(failing, path):
    """For the former the reserve is given back, and all of them are committed once more."""
    failing.push("leased", b"x")
    before = boots(path)
    calls, delivery = fail_in_one_batch(failing, writes=1)
    for call in (calls[0], calls[2]):
        assert isinstance(call.error, FullError)
        assert isinstance(call.error.__cause__, apsw.FullError)
    assert calls[0].error is not calls[2].error
    assert (calls[1].result(), calls[3].result()) == (b"x", None)
    assert boots(path) == before
    assert (payloads(failing), payloads(failing, "p")) == ([], [])
    with pytest.raises(LeaseError):
        delivery.ack()
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
    assert not (found.lock.locked() or found.queue or found.carried or found.joined)
    assert is_free(failing)


# -- Ctrl-C


def state(store):
    """All entries but those of the others."""
    return sorted(
        (key, entry.payload, entry.state, entry.attempts)
        for key in store.keys()  # noqa: SIM118
        if key != "other"
        for entry in store.entries(key)
    )


def push(store):
    return lambda: store.push("k", b"x")


def push_known(store):
    store.push("k", b"x", dedupe="d")
    return lambda: store.push("k", b"y", dedupe="e")


def pullp(store):
    store.push("k", b"x")
    return lambda: store.pullp("k")


def pull(store):
    store.push("k", b"x")
    return lambda: store.pull("k", 60)


def pull_many(store):
    store.push_many("k", [b"x", b"y"])
    return lambda: store.pull_many("k", 2)


def claimp(store):
    store.push("k", b"x")
    return lambda: store.claimp("k", lease=600)


def ack(store):
    return claimp(store)().ack


def transaction(store):
    store.push("k", b"x")

    def call():
        with store.transaction() as together:
            together.push("new", b"x")
            together.pullp("k")

    return call


INTERRUPTED = {
    each.__name__: each
    for each in (push, push_known, pullp, pull, pull_many, claimp, ack, transaction)
}


def forget(store):
    for key in store.keys():  # noqa: SIM118
        store.clear(key)


class Crowd:
    """Those who are in the queue while the main thread leads, or follows."""

    def __init__(self, store):
        self.store = store
        self.calls = []

    def join(self, number):
        for _ in range(number):
            self.calls.append(Call(self.store.push, "other", b"x"))

    def check(self):
        """Each is done, once."""
        seqs = sorted(call.result() for call in self.calls)
        assert seqs == [entry.seq for entry in self.store.entries("other")]


def strike_leading(store, monkeypatch, call, *steps, **options):
    """Interrupt a call that leads two others, who join when it has the lock."""
    crowd, paused = Crowd(store), []
    enter = Committer.enter
    main = threading.get_ident(), os.getpid()

    def entering(self, turnstile, operation):
        if (threading.get_ident(), os.getpid()) == main and not crowd.calls:
            paused.append(None)
            crowd.join(2)
            eventually(
                lambda: len(self.queue) == 2 or store._database.closed or os.getpid() != main[1]
            )
            paused.clear()
        return enter(self, turnstile, operation)

    with monkeypatch.context() as patch:
        patch.setattr(Committer, "enter", entering)
        found = interrupted(call, *steps, paused=paused, **options)
    return *found, crowd


def strike_following(store, monkeypatch, call, *steps, deed=None, **options):
    """Interrupt a call that is carried by another, who was there before."""
    crowd, paused = Crowd(store), []
    park = Committer._park
    main = threading.get_ident()

    def parking(self, operation):
        if threading.get_ident() == main:
            paused.append(None)
            go.set()
            paused.clear()
        return park(self, operation)

    with monkeypatch.context() as patch, standing(store) as go:
        crowd.join(1)
        queued(store, 1)
        patch.setattr(Committer, "_park", parking)
        if deed is not None:  # which may wait for who stands inside

            def going(deed=deed):
                go.set()
                deed()

            options["deed"] = going
        found = interrupted(call, *steps, paused=paused, **options)
    return *found, crowd


def strike_alone(store, monkeypatch, call, *steps, **options):
    """Interrupt a call beside which there is none."""
    return *interrupted(call, *steps, **options), Crowd(store)


STRIKES = {"leads": strike_leading, "follows": strike_following, "alone": strike_alone}


def strike_anywhere(store, monkeypatch, verb, role, stride, gap=None, **options):
    """At every `stride`-th instruction of a call, once or twice: its call did nothing, or all."""
    prepare, strike = INTERRUPTED[verb], STRIKES[role]
    call = prepare(store)
    undone = state(store)
    call()
    done = state(store)
    for step in itertools.count(1 + len(verb), stride):
        forget(store)
        call = prepare(store)
        steps = (step,) if gap is None else (step, step + gap)
        value, struck, crowd = strike(store, monkeypatch, call, *steps, **options)
        crowd.check()
        found = state(store)
        if value is MISSING and verb != "transaction":
            assert found == undone, step
        else:
            assert found in ((undone, done) if value is MISSING else (done,)), step
        del call, value
        check_at_rest(store)
        if not struck:
            return


@pytest.mark.parametrize("gap", [None, 9, 23], ids=["once", "twice", "twice, later"])
@pytest.mark.parametrize("role", STRIKES)
@pytest.mark.parametrize("verb", INTERRUPTED)
def test_ctrl_c_anywhere_undoes_the_call_it_strikes_and_no_other(
    store, monkeypatch, verb, role, gap
):
    """Its call did nothing, the others' are done once, nobody hangs, and nothing stays held."""
    strike_anywhere(store, monkeypatch, verb, role, 7 if gap is None else 19, gap)


class Expired(BaseException):
    """As pytest's and gevent's timeouts, which no `except Exception` is to catch."""


@pytest.mark.parametrize("gap", [None, 15], ids=["once", "twice"])
@pytest.mark.parametrize("raises", [TimeoutError, Expired])
@pytest.mark.parametrize("role", STRIKES)
@pytest.mark.parametrize("verb", INTERRUPTED)
def test_whatever_a_signals_handler_raises_undoes_the_call_it_strikes_and_no_other(
    store, monkeypatch, verb, role, raises, gap
):
    """An alarm's TimeoutError is nobody's refusal: it is what Ctrl-C is."""
    strike_anywhere(store, monkeypatch, verb, role, 17, gap, raises=raises)


@contextlib.contextmanager
def struck_when(condition):
    """A signal reaches the main thread when the condition is met; yields what its handler sets."""
    struck = threading.Event()

    def deliver(*_):
        struck.set()
        raise KeyboardInterrupt

    def send():
        eventually(condition, "the moment to strike")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, deliver)
    sender = Call(send)
    try:
        yield struck
    finally:
        sender.result()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("verb", INTERRUPTED)
def test_ctrl_c_ends_the_wait_in_the_queue_at_once(store, verb):
    """While the leader still stands inside: the call did nothing, and never will."""
    call = INTERRUPTED[verb](store)
    undone = state(store)
    with standing(store) as go:
        with struck_when(lambda: committer_of(store).queue), pytest.raises(KeyboardInterrupt):
            call()
        assert not go.is_set()
        assert not committer_of(store).queue
    assert state(store) == undone
    check_at_rest(store)


@pytest.mark.parametrize("verb", [verb for verb in INTERRUPTED if verb != "transaction"])
def test_ctrl_c_while_another_carries_the_operation_takes_it_back(store, verb):
    """It can't be withdrawn any more: the call waits for the outcome, and undoes that."""
    call = INTERRUPTED[verb](store)
    undone = state(store)
    inside, go = threading.Event(), threading.Event()

    def stand(_):
        inside.set()
        assert go.wait(PATIENCE_SECONDS)
        return ()

    found = committer_of(store)
    with standing(store) as first:
        leader = Call(store._database.transact, stand)
        queued(store, 1)

        def is_carried():
            if len(found.queue) == 2:
                first.set()
            return inside.is_set()

        with struck_when(is_carried) as struck:
            after = Call(lambda: struck.wait(PATIENCE_SECONDS) and go.set())
            with pytest.raises(KeyboardInterrupt):
                call()
            after.result()
    leader.result()
    assert state(store) == undone
    check_at_rest(store)


def test_what_an_interrupt_undoes_has_all_its_time_for_it(path, child):
    """However late the leader's own time was: else a pull would be lost."""
    with sqlspace.open(path, sync=False, busy_timeout=60) as store:
        store.push("k", b"x")
        session = store._database._session
        grab = sqlspace.taking.Grab(store._database, ["k"])
        assert grab.run()
        session.patience.deadline = 0.0
        other = apsw.Connection(path)
        other.execute("BEGIN IMMEDIATE")
        undoing = Call(store._database.undo, grab)
        eventually(lambda: committer_of(store).leader, "the undoing")
        threading.Timer(0.05, other.execute, ["ROLLBACK"]).start()
        undoing.result()
        other.close()
        assert payloads(store) == [b"x"]
        check_at_rest(store)


# -- a signal's handler in the middle


@pytest.mark.parametrize("role", STRIKES)
@pytest.mark.parametrize("verb", ["push", "pullp", "transaction"])
def test_a_handler_that_closes_the_store_anywhere_waits_for_nobody(path, monkeypatch, verb, role):
    """Its call ends as if nothing were, or by ClosedError; then the store is closed indeed."""
    for step in itertools.count(1, 23):
        with sqlspace.open(path, sync=False) as store:
            forget(store)
            call = INTERRUPTED[verb](store)
            undone = state(store)
            value, struck = MISSING, []
            with contextlib.suppress(ClosedError):
                value, _, _ = STRIKES[role](
                    store, monkeypatch, call, step, deed=store.close, struck=struck
                )
            if struck:
                assert store._database._session is None, step
                eventually(lambda: not committer_of(store).queue, "the others' end")
        with sqlspace.open(path, sync=False) as store:
            assert value is not MISSING or state(store) == undone
        if not struck:
            return


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("role", STRIKES)
@pytest.mark.parametrize("verb", ["push", "pullp", "transaction"])
def test_a_handler_may_fork_anywhere(store, monkeypatch, verb, role):
    """Neither hangs; the child's call ends, or says that it was forked in the middle of it."""
    parent = os.getpid()
    for step in itertools.count(1, 31):
        forget(store)
        call = INTERRUPTED[verb](store)
        children = []

        def fork(children=children):
            pid = os.fork()
            if not pid:
                signal.alarm(int(PATIENCE_SECONDS))  # its default kills
            children.append(pid)

        try:
            value, struck, crowd = STRIKES[role](store, monkeypatch, call, step, deed=fork)
        except BaseException as error:
            if os.getpid() == parent:
                raise
            if not isinstance(error, StoreError):
                traceback.print_exc()
                os._exit(1)
        if os.getpid() != parent:
            os._exit(0)
        for pid in children:
            assert os.waitpid(pid, 0)[1] == 0, step
        assert value is not MISSING, step
        crowd.check()
        del call, value
        check_at_rest(store)
        if not struck:
            return


FORKED_IN_SQLITE = """
from sqlspace import session

store = sqlspace.open(argv[0], sync=False)
import apsw
other = apsw.Connection(argv[0])
other.execute("BEGIN IMMEDIATE")
parent, pids = os.getpid(), []

def fork(*_):
    pids.append(os.fork())
    if pids[0]:
        pids.append(os.waitpid(pids[0], 0)[1])
        other.execute("ROLLBACK")

signal.signal(signal.SIGALRM, fork)
whole = session._Patience.__call__

def wait(patience, calls):
    if calls == 1:
        signal.raise_signal(signal.SIGALRM)
    return whole(patience, calls)

session._Patience.__call__ = wait
if argv[1] == "push":
    store.push("k", b"x")
else:
    with store.transaction() as together:
        together.push("k", b"x")
if os.getpid() != parent:
    tell("the child went on")
    os._exit(1)
tell(os.waitstatus_to_exitcode(pids[1]) == os.EX_SOFTWARE, store.len("k"))
os._exit(0)
"""


@pytest.mark.parametrize("verb", ["push", "transaction"])
def test_a_child_that_is_forked_while_sqlite_waits_does_nothing_and_ends(path, child, verb):
    """It can't go back into a call of SQLite that is its parent's: it pushed, too, and hung."""
    process = child(FORKED_IN_SQLITE, path, verb)
    process.expect("True 1")
    assert "this child ends" in process.errors()


def test_a_fork_while_others_are_queued_leaves_the_child_a_store_of_its_own(path, child):
    """None of them is in the child; in the parent they go on."""
    process = child(FORKED, path)
    process.expect("child 1", "0", "parent 4")
    process.finish()


FORKED = """
store = sqlspace.open(argv[0], sync=False)
inside, go = threading.Event(), threading.Event()

def stand(_):
    inside.set()
    go.wait()
    return ()

threads = [threading.Thread(target=store._database.transact, args=(stand,))]
threads[0].start()
inside.wait()
for _ in range(3):
    threads.append(threading.Thread(target=store.push, args=("k", b"parent")))
    threads[-1].start()
queue = store._database._committer.queue
eventually(lambda: len(queue) == 3)
threading.Timer(0.05, go.set).start()  # a fork waits for who stands inside
pid = os.fork()
if not pid:
    assert not store._database._committer.queue
    store.push("child", b"x")
    tell("child", store.len("child"))
    store.close()
    os._exit(0)
tell(os.waitpid(pid, 0)[1])
for thread in threads:
    thread.join()
tell("parent", store.len("k") + store.len("child"))
store.close()
"""


# -- deadlines, and what ends a wait


FROZEN = """
store = sqlspace.open(argv[0], sync=False)
store.push("k", b"before")
store._database._session.turnstile.wait()
tell("inside")
hear()
store._database._session.turnstile.leave()
store.close()
"""


@contextlib.contextmanager
def shut(store, child):
    """Another process stands inside the turnstile; frozen."""
    frozen = child(FROZEN, store.path)
    frozen.expect("inside")
    frozen.stop()
    try:
        yield
    finally:
        frozen.send(signal.SIGCONT)
        frozen.tell("leave")
        frozen.finish()


WAYS = {
    "push": lambda store: store.push("k", b"x"),
    "pullp": lambda store: store.pullp("k"),
    "put": lambda store: store.put("k", b"x"),
    "transaction": lambda store: store.transaction().__enter__(),
}


@pytest.mark.parametrize("verb", WAYS)
def test_who_waits_beyond_its_time_leaves_the_queue_and_nothing_happened(path, verb):
    """Also if the leader stands still; the others' time is their own."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"0")
        before = state(store)
        with standing(store):
            patient = Call(store.push, "k", b"1")
            queued(store, 1)
            store._database._busy_timeout = 0.05
            with pytest.raises(BusyError):
                WAYS[verb](store)
            store._database._busy_timeout = 30.0
            assert len(committer_of(store).queue) == 1
            assert state(store) == before
        patient.result()
        assert payloads(store) == [b"0", b"1"]
        check_at_rest(store)


@pytest.mark.parametrize("verb", WAYS)
def test_who_waits_behind_a_frozen_process_leaves_in_time(path, child, verb):
    """The helper waits on at the turnstile; an empty key's pullp needs no lock, and returns."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"0")
        with shut(store, child):
            before = state(store)
            calls = [Call(store.push, "k", b"%d" % n) for n in (1, 2)]
            queued(store, 2)
            eventually(lambda: committer_of(store).waiting, "the helper")
            assert store.pullp("nothing there") is None
            store._database._busy_timeout = 0.05
            with pytest.raises(BusyError):
                WAYS[verb](store)
            store._database._busy_timeout = 30.0
            assert state(store) == before
        for call in calls:
            call.result()
        assert sorted(payloads(store)) == [b"0", b"1", b"2", b"before"]
        check_at_rest(store)


def test_a_close_wakes_those_in_the_queue(path, child):
    """They get ClosedError while the other process still is frozen, or another thread inside."""
    store = sqlspace.open(path, sync=False)
    store.push("k", b"0")
    with shut(store, child):
        calls = [Call(store.push, "k", b"x"), Call(store.transaction().__enter__)]
        queued(store, 2)
        store.close()
        for call in calls:
            with pytest.raises(ClosedError):
                call.result()
    store = sqlspace.open(path, sync=False)
    with standing(store) as go:
        calls = [Call(store.push, "k", b"x"), Call(store.transaction().__enter__)]
        queued(store, 2)
        closing = Call(store.close)
        for call in calls:
            with pytest.raises(ClosedError):
                call.result()
        assert closing.runs()
        go.set()
        closing.result()


def test_a_call_that_is_carried_is_not_told_that_the_store_is_closed(store):
    """Somebody has begun with it, and answers it: it may have happened by now."""
    found, operation = committer_of(store), Work(lambda _: ())
    store._database.closed = True
    found.carried = [operation]
    found._ensure_usable(operation)
    found.carried = []
    with pytest.raises(ClosedError):
        found._ensure_usable(operation)
    store._database.closed = False


def test_a_file_that_was_moved_wakes_all_with_moved_error(path):
    """Who finds out tells it to those whom it has carried, undecided; the queue is woken."""
    store = sqlspace.open(path, sync=False)
    store.push("p", b"x")
    moving = standing(store, step=lambda _: os.rename(path, path + ".moved") or ())
    with pytest.raises(MovedError), moving as go:
        calls = [Call(store.push, "k", b"x"), Call(store.transaction().__enter__)]
        queued(store, 2)
        go.set()
        for call in calls:
            with pytest.raises(MovedError):
                call.result()
    store.close()


def test_a_transaction_that_was_let_in_looks_whether_the_file_was_moved_meanwhile(path, child):
    """So its block doesn't begin, and nothing is undecided."""
    store = sqlspace.open(path, sync=False)
    store.push("k", b"0")
    with shut(store, child):
        call = Call(store.transaction().__enter__)
        queued(store, 1)
        os.rename(path, path + ".moved")
    with pytest.raises(MovedError):
        call.result()
    assert not call.error.undecided
    store.close()


def test_what_was_committed_into_a_moved_file_is_told_so(path):
    """A batch: each is told by an error of its own that it may have happened there."""
    store = sqlspace.open(path, sync=False)
    store.push("p", b"x")
    connection = store._database._session.connection
    commits = itertools.count()

    def move():
        if next(commits) == 1:
            os.rename(path, path + ".moved")
        return False

    with standing(store):
        connection.set_commit_hook(move)
        calls = [Call(store.push, "k", b"x"), Call(store.pullp, "p")]
        queued(store, 2)
    for call in calls:
        with pytest.raises(MovedError):
            call.result()
        assert call.error.undecided
    assert calls[0].error is not calls[1].error
    store.close()


# -- transactions


def test_others_queue_while_a_transaction_is_open_and_then_share_one_commit(store):
    """None of them is in it, and none is refused."""
    with counted(store) as commits:
        with store.transaction() as together:
            together.push("k", b"0")
            calls = [Call(store.push, "k", b"x") for _ in range(5)]
            queued(store, 5)
        for call in calls:
            call.result()
        assert len(commits) == 2
    assert payloads(store) == [b"0", *[b"x"] * 5]
    check_at_rest(store)


@contextlib.contextmanager
def steady(store, number):
    """So many threads that push all the time; yields a counter of each."""
    counts, over = [0] * number, threading.Event()

    def work(name):
        while not over.is_set():
            store.push("other", b"x")
            counts[name] += 1

    calls = [Call(work, name) for name in range(number)]
    try:
        eventually(lambda: all(counts), "the pushes")
        yield counts
    finally:
        over.set()
        for call in calls:
            call.result()
        assert store.len("other") == sum(counts)


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("sync", [True, False])
def test_nobody_leads_past_a_transaction_that_waits(path, monkeypatch, number, sync):
    """However fast others push: what had begun is carried out, and then it goes in."""
    begun = []
    enqueue = Committer.join

    def enqueueing(self, operation):
        enqueue(self, operation)
        if isinstance(operation, committer.Seizure) and not begun:
            begun.append(sum(counts))

    monkeypatch.setattr(Committer, "join", enqueueing)
    with sqlspace.open(path, sync=sync) as store:
        with steady(store, number) as counts:
            for _ in range(20):
                del begun[:]
                with store.transaction() as together:
                    passed = sum(counts) - (begun or [sum(counts)])[0]
                    together.push("k", b"x")
                assert passed <= 2 * number
        assert store.len("k") == 20
        check_at_rest(store)


def test_a_transaction_in_the_queue_is_carried_by_nobody(store, monkeypatch):
    """Who leads before it, with those behind it, leaves it there; it goes in by itself."""
    carried = []
    answer = Committer.answer

    def answering(self):
        carried.extend(self.carried)
        answer(self)

    monkeypatch.setattr(Committer, "answer", answering)

    def together():
        with store.transaction() as transaction:
            transaction.push("k", b"2")

    calls = in_one_batch(store, lambda: store.push("k", b"1"), together, lambda: store.pullp("p"))
    for call in calls:
        call.result()
    assert payloads(store) == [b"1", b"2"]
    assert len(carried) == 2
    assert not any(isinstance(each, committer.Seizure) for each in carried)
    check_at_rest(store)


def test_transactions_of_many_threads_take_turns(store):
    """One that is done at once wants another: it goes behind those who wait."""
    turns = []

    def work(name):
        for _ in range(20):
            with store.transaction() as together:
                together.push("k", b"%d" % name)
                turns.append(name)

    with standing(store):
        calls = [Call(work, name) for name in range(3)]
        queued(store, 3)
    for call in calls:
        call.result()
    assert all(len(set(turns[at : at + 3])) == 3 for at in range(0, 60, 3)), turns
    check_at_rest(store)


BUSY = """
store = sqlspace.open(argv[0], sync=False)
tell("ready")
hear()
over = threading.Event()
threading.Thread(target=lambda: hear() and over.set(), daemon=True).start()
number = 0
while not over.is_set():
    store.push(argv[1], b"x")
    number += 1
    if number == 1:
        tell("at work")
tell(number)
store.close()
"""


@contextlib.contextmanager
def at_work(path, child):
    """Another process that pushes all the time; what it pushed is there in the end."""
    process = child(BUSY, path, "elsewhere")
    process.expect("ready")
    process.tell("go")
    process.expect("at work")
    try:
        yield
    finally:
        process.tell("enough")
        number = int(process.told())
        process.finish()
    with sqlspace.open(path, sync=False) as store:
        assert store.len("elsewhere") == number


def test_threads_and_transactions_get_in_beside_another_process(path, child):
    """The helper lets them in; it ends when the store is closed."""
    with at_work(path, child):
        with sqlspace.open(path, sync=False) as store:
            with steady(store, 4):
                for number in range(20):
                    with store.transaction() as together:
                        together.push("k", b"%d" % number)
            helper = committer_of(store)._helper
            assert payloads(store) == [b"%d" % number for number in range(20)]
            eventually(lambda: not committer_of(store).waiting, "the helper's rest")
        if helper is not None:
            helper.join(PATIENCE_SECONDS)
            assert not helper.is_alive()


def test_the_helper_lets_in_the_transaction_that_is_first(path, child):
    """It waits at the turnstile; then nobody else enters until the transaction has ended."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"0")
        inside, go = threading.Event(), threading.Event()

        def together():
            with store.transaction() as transaction:
                inside.set()
                assert go.wait(PATIENCE_SECONDS)
                transaction.push("k", b"1")

        with shut(store, child):
            first = Call(together)
            queued(store, 1)
            second = Call(store.push, "k", b"2")
            queued(store, 2)
        assert inside.wait(PATIENCE_SECONDS)
        assert not is_free(store)
        assert second.runs()
        go.set()
        first.result()
        second.result()
        assert payloads(store) == [b"0", b"before", b"1", b"2"]
        committer_of(store)._helper.join(0)
        check_at_rest(store)


class Leaving(collections.deque):
    """A queue whose first leaves by itself, just before somebody else takes it out."""

    leave = None

    def remove(self, operation):
        leave, self.leave = self.leave, None
        if leave is not None:
            leave(operation)
        super().remove(operation)


def take_turns(store):
    """Have it take its turns from now on, though nobody has announced that it is not alone."""
    session = store._database._session
    session.identity.hears = session.marks.alone = False


def test_a_transaction_that_gives_up_when_it_is_let_in_leaves_nothing_shut(path):
    """It is out of the queue, or granted, and never both: else the turnstile stays shut."""
    with sqlspace.open(path, sync=False) as store:
        store.push("k", b"0")
        found = committer_of(store)
        found.queue = Leaving()
        holder = os.open(path + "-wal", os.O_RDONLY)
        take_turns(store)
        fcntl.flock(holder, fcntl.LOCK_EX)
        seizure = committer.Seizure()
        with found.lock:  # as its call has it
            assert not found.enter(store._database._session.turnstile, seizure)
        found.queue.leave = found._withdraw
        os.close(holder)
        eventually(lambda: not found.waiting and not found.lock.locked(), "the helper's end")
        assert not seizure.granted
        check_at_rest(store)


@pytest.mark.parametrize("why", ["its time", "a close"])
def test_a_transaction_that_was_let_in_too_late_goes_in_or_lets_go(path, monkeypatch, why):
    """It has been granted, and wakes with its time over, or the store closed."""
    store = sqlspace.open(path, sync=False)
    store.push("k", b"0")
    found = committer_of(store)
    grant = Committer._grant

    def granting(self):
        (seizure,) = self.queue
        seizure.deadline = 0.0
        store._database.closed = why == "a close"
        return grant(self)

    monkeypatch.setattr(Committer, "_grant", granting)
    take_turns(store)
    holder = os.open(path + "-wal", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def together():
        with store.transaction() as transaction:
            transaction.push("k", b"1")

    seizing = Call(together)
    queued(store, 1)
    os.close(holder)
    if why == "its time":
        seizing.result()
    else:
        with pytest.raises(ClosedError):
            seizing.result()
        store._database.closed = False
    assert not found.waiting
    check_at_rest(store)
    store.close()


# -- sync="group"


@pytest.fixture
def group(path):
    with sqlspace.open(path, sync="group") as opened:
        opened.clear("k")
        yield opened


def test_with_group_sqlite_syncs_nothing_of_a_commit_and_we_do(group, path, monkeypatch):
    """NORMAL, and one fdatasync of the -wal a batch; the attribute and a pickle say group."""
    syncs = []
    monkeypatch.setattr(commits, "sync", syncs.append)
    connection = group._database._session.connection
    assert connection.pragma("synchronous") == 1
    with pickle.loads(pickle.dumps(group)) as copy:
        assert group.sync == copy.sync == "group"
    group.push("k", b"x")
    assert syncs == [group._database._session.wal_descriptor]
    assert os.path.samestat(os.fstat(syncs[0]), os.stat(path + "-wal"))
    in_one_batch(group, *[lambda: group.push("k", b"x")] * 5)
    assert len(syncs) == 3
    with group.transaction() as together:
        together.push("k", b"x")
        assert len(syncs) == 3
    assert len(syncs) == 4
    assert group.pullp("nothing there") is None
    group.peek("k")
    assert len(syncs) == 4
    for sync, level in ((True, 2), (False, 1)):
        with sqlspace.open(path, sync=sync) as other:
            assert other._database._session.connection.pragma("synchronous") == level
            other.push("k", b"x")
    assert len(syncs) == 4


def test_a_transaction_of_group_lets_others_in_while_it_syncs(group, path, monkeypatch):
    """And is not over before that."""
    syncing, go = threading.Event(), threading.Event()

    def stand(_):
        syncing.set()
        assert go.wait(PATIENCE_SECONDS)

    def together():
        with group.transaction() as transaction:
            transaction.push("k", b"x")

    monkeypatch.setattr(commits, "sync", stand)
    call = Call(together)
    assert syncing.wait(PATIENCE_SECONDS)
    with sqlspace.open(path, sync=False) as other:
        other.push("k", b"y")
        assert payloads(other) == [b"x", b"y"]
    assert call.runs()
    go.set()
    call.result()


def broken(_):
    raise OSError(errno.EIO, "a bad disk")


@pytest.mark.parametrize("calls", [1, 3])
def test_after_a_sync_that_fails_the_wal_is_written_anew(group, path, monkeypatch, calls):
    """As it stands, and synced: the calls succeed."""
    written = []

    def pwrite(descriptor, data, offset):
        assert os.readlink(f"/proc/self/fd/{descriptor}") == path + "-wal"
        written.append((offset, data))
        return sound(descriptor, data, offset)

    group.push("k", b"x")
    sound = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(commits, "sync", broken)
    if calls == 1:
        group.push("k", b"x")
    else:
        for call in in_one_batch(group, *[lambda: group.push("k", b"x")] * calls):
            call.result()
    with open(path + "-wal", "rb") as file:
        assert file.read() == written[-1][1]
    assert payloads(group) == [b"x"] * (calls + 1)


@pytest.mark.parametrize("calls", [1, 3])
def test_a_sync_that_fails_twice_is_undecided_for_all(path, monkeypatch, calls):
    """Nobody knows, and the store can't be used."""
    with sqlspace.open(path, sync="group", busy_timeout=0.5) as store:
        store.push("k", b"x")
        monkeypatch.setattr(sqlspace.connection, "sync", broken)
        if calls == 1:
            monkeypatch.setattr(commits, "sync", broken)
            found = [Call(store.push, "k", b"x").end()]
        else:
            with standing(store, step=lambda _: monkeypatch.setattr(commits, "sync", once) or ()):
                syncs = itertools.count()

                def once(_):
                    if next(syncs):
                        broken(_)

                found = []
                for number in range(calls):
                    found.append(Call(store.push, "k", b"x"))
                    queued(store, number + 1)
            for call in found:
                call.end()
        assert {type(call.error) for call in found} == {UndecidedError}
        assert len({id(call.error) for call in found}) == calls
        assert all(isinstance(call.error.__cause__, OSError) for call in found)
        with pytest.raises(UndecidedError):
            store.push("k", b"x")


def test_without_a_wal_of_our_own_group_is_full(tmp_path):
    """SQLite syncs where we have nothing to sync."""
    vfs = Elsewhere(str(tmp_path))
    try:
        with sqlspace.open("/nowhere/queue.db", sync="group", vfs="elsewhere") as store:
            store.push("k", b"x")
            assert store._database._session.wal_descriptor is None
            assert store._database._session.connection.pragma("synchronous") == 2
            assert store.pull("k") == b"x"
    finally:
        vfs.unregister()


class Elsewhere(apsw.VFS):
    """Keeps its files in another directory than SQLite is told."""

    def __init__(self, directory):
        super().__init__("elsewhere", "unix")
        self._directory = directory

    def _place(self, name):
        return os.path.join(self._directory, os.path.basename(name))

    def xOpen(self, name, flags):
        place = name.filename() if isinstance(name, apsw.URIFilename) else name
        return apsw.VFSFile("unix", place and self._place(place), flags)

    def xFullPathname(self, name):
        return self._place(name)

    def xAccess(self, name, flags):
        return super().xAccess(self._place(name), flags)

    def xDelete(self, name, sync):
        super().xDelete(self._place(name), sync)


@pytest.mark.parametrize("sync", [1, 0, None, 2.0, "x", "GROUP", b"group", ["group"]])
def test_what_is_no_way_to_sync_is_refused_before_anything_is_touched(path, sync):
    """By its kind or its value."""
    with pytest.raises((TypeError, ValueError), match="sync must be True, False or 'group'"):
        sqlspace.open(path, sync=sync)
    assert not os.path.exists(path)


# -- all at once

HAMMER = """
import collections, random

sync = argv[1] == "True" or (argv[1] == "group" and "group")
store = sqlspace.open(argv[0], sync=sync, history=None)
store.push_many("pulls", [b"%d" % n for n in range(3000)])
store.push_many("claims", [b"%d" % n for n in range(3000)])
taken, pushed, errors, over = [], [], [], threading.Event()
hits = 0

def interrupt(*_):
    if armed:
        raise KeyboardInterrupt

def work(name, pulled, added):
    chance = random.Random(name)
    number = 0
    while not over.is_set():
        step(chance, b"%d %d" % (name, number), pulled, added)
        number += 1

def step(chance, payload, pulled, added):
    # What a call returns lands in the list in the same C call: else Ctrl-C gets in between.
    verb = chance.randrange(8)
    if verb < 2:
        added.extend(map(store.push, ("k",), (payload,)))
    elif verb == 2:
        added.extend(*map(store.push_many, ("k",), ([payload, payload],)))
    elif verb == 3:
        pulled.extend(map(store.pullp, ("pulls",)))
    elif verb == 4:
        pulled.extend(*map(store.pull_many, ("pulls",), (2,)))
    elif verb == 5:
        with store.transaction() as together:
            together.push("log", payload)
            together.push("log", payload)
    elif verb == 6:
        claimed = store.claimp("claims", lease=600)
        if claimed is not None:
            claimed.ack() if chance.randrange(2) else claimed.nack()
    else:
        store.push("once", payload, dedupe=str(chance.randrange(99)))

def guarded(*arguments):
    try:
        work(*arguments)
    except BaseException as error:
        errors.append(repr(error))

lists = [([], []) for _ in range(16)]
threads = [
    threading.Thread(target=guarded, args=(name, *lists[name])) for name in range(1, 16)
]
armed = False
signal.signal(signal.SIGALRM, interrupt)
for thread in threads:
    thread.start()
chance = random.Random(0)
ends = time.monotonic() + float(argv[2])
number = 0
while time.monotonic() < ends:
    number += 1
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.01))
        step(chance, b"0 %d" % number, *lists[0])
        armed = False
    except KeyboardInterrupt:
        armed = False
        hits += 1
signal.setitimer(signal.ITIMER_REAL, 0)
over.set()
for thread in threads:
    thread.join()
pulled = [payload for each, _ in lists for payload in each if payload is not None]
added = sorted(seq for _, each in lists for seq in each)
left = [entry.payload for entry in store.entries("pulls")]
problems = list(errors)
if sorted(pulled + left) != sorted(b"%d" % n for n in range(3000)):
    problems.append("pulls")
if added != [entry.seq for entry in store.entries("k")]:
    problems.append("pushes")
stones = [stone.seq for stone in store.history("pulls")]
if len(stones) != len(pulled) or len(set(stones)) != len(stones):
    problems.append("tombstones")
claims = [entry.seq for entry in store.entries("claims")]
acked = [stone.seq for stone in store.history("claims")]
if len(set(claims + acked)) != 3000 or len(claims) + len(acked) != 3000:
    problems.append("claims")
log = collections.Counter(entry.payload for entry in store.entries("log"))
if set(log.values()) - {2}:
    problems.append("transactions")
found = store._database._committer
if found.joined or found.queue or found.carried or found.lock.locked():
    problems.append("not at rest")
store.close()
tell(hits > 20, len(added) > 100, problems)
"""


@pytest.mark.parametrize("sync", [True, False, "group"])
def test_sixteen_threads_with_all_verbs_and_ctrl_c_do_each_thing_once(path, child, sync):
    """What was returned is in the file, what was pulled is not, and nothing was done twice."""
    process = child(HAMMER, path, sync, 3)
    process.expect("True True []")
    process.finish()
