"""Several verbs, one commit: all of them or none, and nobody sees anything in between."""

import os
import threading

import apsw
import pytest
from children import eventually
from clocks import install

import sqlspace
from sqlspace import DeadlineError, LeaseError, StoreError
from sqlspace.doorbell import limit_token


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path, sync=False) as opened:
        yield opened


@pytest.fixture
def clock(monkeypatch):
    return install(monkeypatch)


def picture(store):
    """All entries and tombstones."""
    keys = ["k", "other", "k/dead", *store.keys()]
    return {key: (list(store.entries(key)), list(store.history(key))) for key in keys}


def payloads(store, key="k"):
    return [entry.payload for entry in store.entries(key)]


# Each verb: prepared, called, and told what it must return.
VERBS = {
    "push": lambda it, _: it.push("k", b"new", headers={"a": "b"}, delay=5, ttl=9, dedupe="a"),
    "push_many": lambda it, _: it.push_many("other", [b"new", b"newer"], ttl=5),
    "pullp": lambda it, _: it.pullp("k"),
    "pull_many": lambda it, _: it.pull_many("k", 5),
    "put": lambda it, _: it.put("k", b"new", ttl=5),
    "clear": lambda it, _: it.clear("k"),
    "remove": lambda it, _: it.remove("k", 2),
    "ack": lambda it, claimed: it.ack(claimed),
    "nack": lambda it, claimed: it.nack(claimed),
    "nack later": lambda it, claimed: it.nack(claimed, 5),
    "nack of the last attempt": lambda it, claimed: it.nack(claimed),
}


def prepare(store, name):
    store.push_many("k", [b"1", b"2", b"3"])
    store.push("other", b"4")
    store.push("claimed", b"5")
    return store.claim("claimed", max_attempts=1 if "last" in name else None)


def alike(one, other):
    """The same, but for the tokens and times, which differ by nothing under a clock that stands."""
    return picture(one) == picture(other)


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_of_a_transaction_does_what_the_stores_does(store, tmp_path, clock, name):
    """The same result, the same rows."""
    with sqlspace.open(tmp_path / "twin.db", sync=False) as twin:
        claimed, double = prepare(store, name), prepare(twin, name)
        verb = name.partition(" ")[0]
        with store.transaction() as together:
            result = VERBS[name](together, claimed)
        if verb in ("ack", "nack"):
            args = (5,) if "later" in name else ()
            right = getattr(double, verb)(*args)
        else:
            right = VERBS[name](twin, double)
        assert result == right
        assert alike(store, twin)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", VERBS)
def test_an_exception_out_of_the_block_rolls_all_back(store, clock, name, error):
    """It comes through; a delivery is unsettled as before."""
    claimed = prepare(store, name)
    before = picture(store)
    with pytest.raises(error, match="mine"), store.transaction() as together:
        VERBS[name](together, claimed)
        raise error("mine")
    assert picture(store) == before
    assert not store._database._session.connection.in_transaction
    claimed.ack()
    assert store.push("k", b"goes on")


def test_several_verbs_over_several_keys_are_one_commit(store):
    """Another connection sees all of it at the end, and nothing before."""
    claimed = prepare(store, "")
    watcher = apsw.Connection(store.path, apsw.SQLITE_OPEN_READONLY)
    count = "SELECT count(*), max(seq), sum(state) FROM sqlspace_entries"
    before = watcher.execute(count).get
    with store.transaction() as together:
        together.push("a", b"a")
        together.push_many("b", [b"b1", b"b2"])
        assert together.pullp("k") == b"1"
        together.put("other", b"c")
        together.ack(claimed)
        assert together.remove("k", 2)
        assert watcher.execute(count).get == before
    assert watcher.execute(count).get != before
    watcher.close()
    assert store.keys() == ["a", "b", "k", "other"]
    assert (payloads(store), payloads(store, "other")) == ([b"3"], [b"c"])
    assert [stone.outcome for stone in store.history("claimed")] == ["acked"]


def test_a_transaction_sees_what_it_has_done(store, clock):
    """len, peek and the taking verbs; what was taken is not taken again."""
    store.push("k", b"1")
    with store.transaction() as together:
        together.push("k", b"2")
        together.push("k", b"later", delay=5)
        assert (together.len("k"), together.peek("k")) == (3, b"1")
        assert together.pullp("k") == b"1"
        assert together.peek("k") == b"2"
        assert together.pull_many("k", 5) == [b"2"]
        assert (together.len("k"), together.peek("k"), together.pullp("k")) == (1, None, None)
        assert together.clear("k") == 1
        assert together.len("k") == 0
    assert store.keys() == []


def test_an_empty_transaction_is_one_too(store):
    """And an empty batch."""
    with store.transaction():
        pass
    with store.transaction() as together:
        assert together.push_many("k", []) == []
        assert together.pull_many("k", 3) == []
    assert store.keys() == []


def test_a_return_out_of_the_block_commits(store):
    """As any end that is no exception."""

    def work():
        with store.transaction() as together:
            return together.push("k", b"1")

    assert store.get("k", work()).payload == b"1"


# -- misuse


INSIDE = {
    "push": lambda store, it: store.push("k", b"x"),
    "push with options": lambda store, it: store.push("k", b"x", dedupe="a", max_len=5),
    "push_many": lambda store, it: store.push_many("k", [b"x"]),
    "pull": lambda store, it: store.pull("k"),
    "pull without waiting": lambda store, it: store.pull("k", 0),
    "pull_any": lambda store, it: store.pull_any(["k"]),
    "pullp": lambda store, it: store.pullp("k"),
    "pull_many": lambda store, it: store.pull_many("k", 1),
    "peek": lambda store, it: store.peek("k"),
    "len": lambda store, it: store.len("k"),
    "wait": lambda store, it: store.wait("k"),
    "wait_empty": lambda store, it: store.wait_empty("k"),
    "put": lambda store, it: store.put("k", b"x"),
    "clear": lambda store, it: store.clear("k"),
    "remove": lambda store, it: store.remove("k", 1),
    "get": lambda store, it: store.get("k", 1),
    "keys": lambda store, it: store.keys(),
    "entries": lambda store, it: list(store.entries("k")),
    "history": lambda store, it: list(store.history("k")),
    "stats": lambda store, it: store.stats(),
    "claim": lambda store, it: store.claim("k"),
    "claimp": lambda store, it: store.claimp("k"),
    "claim_many": lambda store, it: store.claim_many("k", 1),
    "consume": lambda store, it: next(store.consume("k")),
    "ack_many": lambda store, it: store.ack_many([it]),
    "requeue": lambda store, it: store.requeue("k"),
    "compact": lambda store, it: store.compact(),
    "backup": lambda store, it: store.backup(store.path + ".copy"),
    "ack": lambda store, it: it.ack(),
    "nack": lambda store, it: it.nack(),
    "extend": lambda store, it: it.extend(5),
    "space": lambda store, it: store.space().inp("k"),
    "space's rd": lambda store, it: store.space().rd("k"),
    "space's out": lambda store, it: store.space().out("k", 1),
    "nested": lambda store, it: store.transaction().__enter__(),
}


@pytest.mark.parametrize("use", INSIDE.values(), ids=INSIDE)
def test_another_verb_of_the_store_inside_is_refused_and_the_transaction_goes_on(store, use):
    """ValueError that names the transaction: the verb would wait for itself."""
    claimed = prepare(store, "")
    with store.transaction() as together:
        together.push("new", b"1")
        with pytest.raises(ValueError, match="inside a transaction of the same store"):
            use(store, claimed)
        together.push("new", b"2")
        together.ack(claimed)
    assert payloads(store, "new") == [b"1", b"2"]
    assert payloads(store) == [b"1", b"2", b"3"]
    assert not os.path.exists(store.path + ".copy")


def test_another_store_is_free_meanwhile(store, tmp_path):
    """Also one in a transaction of its own."""
    with (
        sqlspace.open(tmp_path / "other.db", sync=False) as other,
        store.transaction() as one,
        other.transaction() as two,
    ):
        one.push("k", b"1")
        two.push("k", b"2")
    with sqlspace.open(tmp_path / "other.db", sync=False) as other:
        assert (store.pull("k"), other.pull("k")) == (b"1", b"2")


def test_a_transaction_belongs_to_its_thread_and_ends_with_its_block(store):
    """ValueError in another thread, after the end, before the beginning, and for a second block."""
    errors = []

    def use():
        with pytest.raises(ValueError, match="belongs to the thread that opened it"):
            together.push("k", b"x")
        errors.append("seen")

    with store.transaction() as together:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        together.push("k", b"1")
    assert errors == ["seen"]
    with pytest.raises(ValueError, match="over"):
        together.push("k", b"x")
    with pytest.raises(ValueError, match="once"), together:
        pass
    with pytest.raises(ValueError, match="hasn't begun"):
        store.transaction().push("k", b"x")
    assert payloads(store) == [b"1"]


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (lambda it: it.push("", b"x"), ValueError, "key"),
        (lambda it: it.push("k", "x"), TypeError, "payload"),
        (lambda it: it.push("k", b"x", headers=5), TypeError, "headers"),
        (lambda it: it.push("k", b"x", max_len=0), ValueError, "max_len"),
        (lambda it: it.push("k", b"x", dedupe=""), ValueError, "dedupe"),
        (lambda it: it.push("k", b"x", delay=5, ttl=5), ValueError, "delay"),
        (lambda it: it.push("k", b"x", timeout=5), TypeError, "timeout"),
        (lambda it: it.push_many("k", [b"x", "y"]), TypeError, "payloads"),
        (lambda it: it.push_many("k", [b"x"], ttl=0), ValueError, "ttl"),
        (lambda it: it.pullp(b"k"), TypeError, "key"),
        (lambda it: it.pull_many("k", 0), ValueError, "limit"),
        (lambda it: it.peek(""), ValueError, "key"),
        (lambda it: it.len(5), TypeError, "key"),
        (lambda it: it.put("k", None), TypeError, "payload"),
        (lambda it: it.put("k", b"x", ttl=-1), ValueError, "ttl"),
        (lambda it: it.clear("\0"), ValueError, "key"),
        (lambda it: it.remove("k", 0), ValueError, "seq"),
        (lambda it: it.ack(None), TypeError, "delivery"),
        (lambda it: it.nack(5), TypeError, "delivery"),
    ],
)
def test_misuse_inside_changes_nothing_and_the_transaction_goes_on(store, use, error, words):
    """It names the argument, as everywhere."""
    with store.transaction() as together:
        together.push("k", b"1")
        with pytest.raises(error, match=words):
            use(together)
        together.push("k", b"2")
    assert payloads(store) == [b"1", b"2"]


# -- verbs that fail inside


def test_a_verb_that_fails_leaves_what_was_done_before_it(store, monkeypatch):
    """Each is all or nothing by itself: in the middle of it, the store fails."""
    from sqlspace import transaction  # noqa: PLC0415

    store.push_many("k", [b"1", b"2"])

    def failing(*_):
        raise apsw.IOError("the disk")

    with store.transaction() as together:
        together.push("other", b"kept")
        together.pullp("k")
        with monkeypatch.context() as patch:
            patch.setattr(transaction.taking, "take_up_to", failing)
            with pytest.raises(StoreError, match="the disk"):
                together.pull_many("k", 2)
        with monkeypatch.context() as patch:
            patch.setattr(transaction.entries, "room_token", failing)
            with pytest.raises(StoreError, match="the disk"):
                together.put("k", b"not to be")
            with pytest.raises(StoreError, match="the disk"):
                together.clear("k")
        together.push("other", b"more")
    assert (payloads(store), payloads(store, "other")) == ([b"2"], [b"kept", b"more"])


def test_a_full_key_raises_at_once_and_adds_nothing(store):
    """There is nobody who could make room: the others wait for this transaction."""
    with store.transaction() as together:
        together.push("k", b"1", max_len=1)
        with pytest.raises(DeadlineError, match="1 entries or more"):
            together.push("k", b"2", max_len=1)
        together.pullp("k")
        together.push("k", b"3", max_len=1)
    assert payloads(store) == [b"3"]


def test_a_known_name_adds_nothing_in_a_transaction(store):
    """Known from before, and from this one; one that is rolled back is not known."""
    seq = store.push("k", b"1", dedupe="a")
    with store.transaction() as together:
        assert together.push("k", b"2", dedupe="a") == seq
        new = together.push("k", b"3", dedupe="b")
        assert together.push("k", b"4", dedupe="b") == new
    with pytest.raises(LookupError), store.transaction() as together:
        together.push("k", b"5", dedupe="c")
        raise LookupError
    assert payloads(store) == [b"1", b"3"]
    store.push("k", b"6", dedupe="c")
    assert payloads(store) == [b"1", b"3", b"6"]


# -- deliveries


@pytest.mark.parametrize("settle", ["ack", "nack"])
def test_a_delivery_is_settled_when_the_transaction_commits_and_not_before(store, settle):
    """Inside its own block, too: the end of that has nothing left to do."""
    store.push("k", b"1")
    with store.claim("k") as claimed:
        with pytest.raises(LookupError), store.transaction() as together:
            getattr(together, settle)(claimed)
            raise LookupError
        claimed.extend(50)  # unsettled still
        with store.transaction() as together:
            getattr(together, settle)(claimed)
            together.push("invoices", claimed.payload)
        with pytest.raises(LeaseError, match="settled"):
            claimed.ack()
    assert payloads(store) == ([] if settle == "ack" else [b"1"])
    assert payloads(store, "invoices") == [b"1"]


@pytest.mark.parametrize("settle", ["ack", "nack"])
def test_a_delivery_whose_lease_is_lost_raises_and_the_rest_stands(store, clock, settle):
    """LeaseError, for that verb alone if it is caught."""
    store.push_many("k", [b"1", b"2"])
    lost, held = store.claim("k", lease=5), store.claim("k", lease=50)
    clock.go(5)
    with store.transaction() as together:
        together.push("other", b"1")
        with pytest.raises(LeaseError):
            getattr(together, settle)(lost)
        together.ack(held)
        with pytest.raises(LeaseError):
            together.ack(held)  # twice
    assert payloads(store) == [b"1"]
    assert payloads(store, "other") == [b"1"]


def test_what_is_taken_away_inside_can_not_be_acked_inside(store):
    """clear, put and remove win over the lease, here as everywhere."""
    store.push("k", b"1")
    claimed = store.claim("k")
    with store.transaction() as together:
        together.clear("k")
        with pytest.raises(LeaseError):
            together.ack(claimed)
    assert claimed.lost


def test_a_delivery_of_another_store_is_refused(store, tmp_path):
    """A ValueError; it stays unsettled."""
    with sqlspace.open(tmp_path / "other.db", sync=False) as other:
        other.push("k", b"1")
        foreign = other.claim("k")
        with store.transaction() as together:
            for settle in (together.ack, together.nack):
                with pytest.raises(ValueError, match="another store"):
                    settle(foreign)
        foreign.ack()


# -- the others


def test_waiters_are_woken_after_the_commit_and_by_no_rollback(store):
    """Who waits for an entry or for room sleeps on while the transaction runs."""
    store.push("full", b"1")
    found, seqs = [], []
    taker = threading.Thread(target=lambda: found.append(store.pull("k", 60)))
    pusher = threading.Thread(target=lambda: seqs.append(store.push("full", b"2", max_len=1)))
    for thread in (taker, pusher):
        thread.start()
    bell = store._database.bell
    waited = {"k", limit_token("full", 1)}
    eventually(lambda: set(bell.tokens()) == waited, "two that wait")
    rung = []
    ring, wake = bell.ring, bell.wake
    bell.ring = lambda token, *besides: (rung.append(token), ring(token, *besides))
    try:
        with pytest.raises(LookupError), store.transaction() as together:
            together.push("k", b"rolled back")
            together.pullp("full")
            raise LookupError
        assert rung == []
        with store.transaction() as together:
            together.push("k", b"1")
            together.pullp("full")
            assert rung == []
            assert found == seqs == []
        assert {"k", "\0full"} <= set(rung)
    finally:
        del bell.ring
    assert bell.wake == wake
    taker.join()
    pusher.join()
    assert found == [b"1"]
    assert payloads(store, "full") == [b"2"]


def test_another_process_is_woken_after_the_commit(store, child):
    """And finds all of it."""
    process = child(
        """
        with sqlspace.open(argv[0], sync=False) as store:
            tell("ready")
            tell(store.pull("k", 60).decode(), store.len("other"))
        """,
        store.path,
    )
    process.expect("ready")
    with store.transaction() as together:
        together.push("k", b"work")
        together.push_many("other", [b"1", b"2"])
    process.expect("work 2")
    process.finish()


def test_other_threads_wait_for_the_end_and_none_gets_in_between(store):
    """Reading and writing transactions of eight threads leave the sum as it was."""
    store.push("k", b"0")
    errors = []

    def work():
        try:
            for _ in range(25):
                with store.transaction() as together:
                    number = int(together.pullp("k"))
                    assert together.len("k") == 0
                    together.push("k", b"%d" % (number + 1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.pull("k") == b"200"


def test_others_look_while_a_transaction_runs(store):
    """Looks lock nothing; they see what was committed."""
    store.push("k", b"1")
    seen = []
    with store.transaction() as together:
        together.pullp("k")
        thread = threading.Thread(
            target=lambda: seen.extend([store.peek("k"), store.len("k"), store.keys()])
        )
        thread.start()
        thread.join()
    assert seen == [b"1", 1, ["k"]]
    assert store.peek("k") is None


# -- what fails in the middle


def test_a_commit_that_fails_leaves_nothing_and_the_store_goes_on(store):
    """StoreError; deliveries are unsettled; nobody is woken."""
    claimed = prepare(store, "")
    before = picture(store)
    connection = store._database._session.connection
    connection.set_commit_hook(lambda: True)
    try:
        with pytest.raises(StoreError), store.transaction() as together:
            together.push("k", b"x")
            together.ack(claimed)
    finally:
        connection.set_commit_hook(None)
    assert picture(store) == before
    claimed.ack()
    store.push("k", b"goes on")


def test_a_transaction_that_sqlite_has_rolled_back_commits_nothing_of_what_follows(store):
    """It says so, at the next verb and at the end: half of it would be worse than none."""
    with pytest.raises(StoreError, match="rolled the transaction back"), store.transaction() as it:
        it.push("k", b"1")
        store._database._session.connection.execute("ROLLBACK")
        with pytest.raises(StoreError, match="rolled the transaction back"):
            it.push("k", b"2")
    assert store.keys() == []
    with store.transaction() as it:
        it.push("k", b"3")
    assert payloads(store) == [b"3"]


def test_a_store_that_is_closed_inside_refuses_its_verbs_and_is_closed_at_the_end(path):
    """By the thread itself; what was done before the close is committed or not, and whole."""
    store = sqlspace.open(path, sync=False)
    with pytest.raises(sqlspace.ClosedError), store.transaction() as together:
        together.push("k", b"1")
        store.close()
        together.push("k", b"2")
    assert store._database._session is None
    with sqlspace.open(path, sync=False) as store:
        assert store.keys() == []


def test_a_close_by_another_thread_waits_for_the_transaction(path):
    """Calls under way end first."""
    store = sqlspace.open(path, sync=False)
    with store.transaction() as together:
        together.push("k", b"1")
        closer = threading.Thread(target=store.close)
        closer.start()
        eventually(lambda: store._database.closed, "the close")
    closer.join()
    with sqlspace.open(path, sync=False) as store:
        assert payloads(store) == [b"1"]


FORKED = """
store = sqlspace.open(argv[0], sync=False)
with store.transaction() as together:
    together.push("k", b"1")
    pid = os.fork()
    if not pid:
        said = []
        for use in (
            lambda: together.push("k", b"child"),
            lambda: together.len("k"),
            lambda: store.push("k", b"child"),
            lambda: store.len("k"),
            lambda: together.__exit__(None, None, None),
            lambda: store.push("k", b"child"),
        ):
            try:
                use()
            except sqlspace.StoreError as error:
                said.append("forked in the middle" in str(error))
            except BaseException as error:
                said.append(repr(error))
        tell(*said)
        with sqlspace.open(argv[0], sync=False) as anew:  # what the parent does is not in its way
            tell(anew.len("k"))
        os._exit(0)
    tell("forked")
    assert hear() == "go on"
    together.push("k", b"2")
assert os.waitpid(pid, 0)[1] == 0
tell(*[entry.payload.decode() for entry in store.entries("k")])
store.close()
"""


def test_a_child_that_was_forked_inside_can_not_use_the_store_and_the_parent_can(path, child):
    """The transaction is the parent's; the child is told, by every verb of either."""
    process = child(FORKED, path)
    told = {process.told() for _ in range(3)}
    assert told == {"forked", "True True True True True True", "0"}
    process.tell("go on")
    process.expect("1 2")
    process.finish()


BESIDE_A_FORK = """
from sqlspace.session import Session

store = sqlspace.open(argv[0], sync=False)
payloads = [bytes([n % 256]) * 20_000 for n in range(300)]  # more than the page cache holds
firsts = payloads if argv[1] == "at once" else [b"x"]  # whose commit must not cut the -wal
waits, go = os.pipe()
whole = Session.abandon

def abandon(session):
    os.close(go)
    os.read(waits, 1)
    whole(session)

Session.abandon = abandon
with store.transaction() as together:
    together.push_many("k", firsts)
    pid = os.fork()
    if not pid:
        os._exit(0)
    if argv[1] == "at once":
        os.close(go)
        os.waitpid(pid, 0)
    assert together.len("k") == len(firsts)
    together.push("k", b"last")
if argv[1] == "in the next":
    with store.transaction() as together:
        together.push_many("next", payloads)
        os.close(go)
        os.waitpid(pid, 0)
        assert together.len("next") == 300
        together.push("next", b"last")
    assert store.pull_many("next", 400) == [*payloads, b"last"]
tell(store.pull_many("k", 400) == [*firsts, b"last"])
store.close()
"""


@pytest.mark.parametrize("lets_go", ["at once", "in the next"])
def test_a_child_that_was_forked_inside_rolls_nothing_of_its_parents_back(path, child, lets_go):
    """Neither of the transaction that was open at the fork nor of one that is when it lets go."""
    process = child(BESIDE_A_FORK, path, lets_go)
    process.expect("True")
    process.finish()
    connection = apsw.Connection(path)
    assert connection.pragma("integrity_check") == "ok"
    connection.close()


INTERRUPTED = """
import random

random.seed(int(argv[1]))
store = sqlspace.open(argv[0], sync=False)
hits = wholes = 0

def interrupt(*_):
    raise KeyboardInterrupt

def work():
    with store.transaction() as together:
        together.push("a", b"x")
        together.push_many("b", [b"x", b"y"])
        together.pullp("c")
        together.ack(claimed)

signal.signal(signal.SIGALRM, interrupt)
for number in range(600):
    for key in "abcd":
        store.clear(key)
    store.push("c", b"x")
    store.push("d", b"x")
    claimed = store.claim("d")
    before = tuple(store.len(key) for key in "abcd")
    returned = False
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0007))
        work()
        returned = True
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        hits += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    found = tuple(store.len(key) for key in "abcd")
    assert found in ((0, 0, 1, 1), (1, 2, 0, 0)), (number, found)
    assert not returned or found == (1, 2, 0, 0), number
    wholes += found[0]
    assert not store._database._session.connection.in_transaction
store.push("after", b"works")
assert store.pull("after") == b"works"
store.close()
tell(hits > 50, wholes > 0)
"""


def test_an_interrupted_transaction_did_all_or_nothing_and_the_store_goes_on(path, child):
    """Ctrl-C at any moment."""
    process = child(INTERRUPTED, path, 3)
    process.expect("True True")
    process.finish()


@pytest.mark.parametrize("where", ["its entry", "its exit"])
def test_an_interrupt_in_the_block_itself_rolls_all_back(store, where):
    """In a frame that goes on: the transaction is over when the exception is out of the block."""
    with pytest.raises(KeyboardInterrupt), store.transaction() as together:
        if where == "its exit":
            together.push("k", b"1")
        raise KeyboardInterrupt
    store.push("k", b"2")
    assert payloads(store) == [b"2"]
