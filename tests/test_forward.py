"""`sqlspace.forward` to a function and to a command: in order, held while the endpoint is down."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import tenacity
from children import PATIENCE_SECONDS, eventually

import sqlspace
from sqlspace import forwarding, taking
from sqlspace.entries import Lease

AT_ONCE = tenacity.wait_none()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path) as store:
        yield store


class Sink:
    """An endpoint that remembers what arrived, and is down when it is told so."""

    def __init__(self):
        self.arrived = []
        self.tried = []
        self.down = set()
        self.lock = threading.Lock()

    def __call__(self, delivery):
        with self.lock:
            self.tried.append((delivery.key, delivery.seq, delivery.attempts))
            if delivery.key in self.down or delivery.payload in self.down:
                raise ConnectionError("the endpoint is down")
            self.arrived.append((delivery.key, delivery.payload))

    def of(self, key):
        with self.lock:
            return [payload for under, payload in self.arrived if under == key]


@pytest.fixture
def sink():
    return Sink()


@pytest.fixture
def forwarding_to(store):
    """Forward in a thread until the test is over; ends it and returns how many were sent."""
    running = []

    def start(keys, send, **options):
        context = sqlspace.Context()
        result = []

        def run():
            try:
                result.append(sqlspace.forward(store, keys, send, context=context, **options))
            except BaseException as error:
                result.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        running.append((context, thread))

        def end():
            context.cancel()
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
            return result[0]

        return end

    yield start
    for context, thread in running:
        context.cancel()
        thread.join(PATIENCE_SECONDS)


def numbers(count):
    return [b"%d" % number for number in range(count)]


def outcomes(store, key):
    return [stone.outcome for stone in store.history(key)]


# -- in order, and held


def test_all_is_sent_in_order_and_acked(store, sink):
    """Key by key, and what was sent is in the history as acked."""
    for key in ("a", "b", "c"):
        store.push_many(key, numbers(50))
    assert sqlspace.forward(store, ["a", "b"], sink, drain=True) == 100
    assert sink.of("a") == sink.of("b") == numbers(50)
    assert outcomes(store, "a") == ["acked"] * 50
    assert store.len("c") == 50


def test_while_the_endpoint_is_down_the_store_holds_and_then_all_goes_out(
    store, sink, forwarding_to
):
    """In order, each once; what failed is tried first, and nothing behind it before."""
    sink.down.add("mail")
    store.push_many("mail", numbers(10))
    end = forwarding_to("mail", sink, wait=AT_ONCE)
    eventually(lambda: len(sink.tried) > 20)
    store.push_many("mail", [b"later"])
    assert {seq for _, seq, _ in sink.tried} == {1}
    assert store.len("mail") == 11
    sink.down.clear()
    eventually(lambda: len(sink.of("mail")) == 11)
    assert end() == 11
    assert sink.of("mail") == [*numbers(10), b"later"]


def test_a_failing_key_does_not_hold_up_the_others(store, sink, forwarding_to):
    """Neither by its pause, nor while its endpoint hangs."""
    hangs, go = threading.Event(), threading.Event()

    def send(delivery):
        if delivery.key == "hangs":
            hangs.set()
            go.wait(PATIENCE_SECONDS)
        sink(delivery)

    sink.down.add("down")
    for key in ("hangs", "down", "up"):
        store.push_many(key, numbers(20))
    end = forwarding_to(["hangs", "down", "up"], send)
    assert hangs.wait(PATIENCE_SECONDS)
    eventually(lambda: sink.of("up") == numbers(20))
    assert (store.len("down"), store.len("hangs")) == (20, 20)
    go.set()
    eventually(lambda: sink.of("hangs") == numbers(20))
    end()


def test_one_worker_goes_on_with_other_keys_while_one_waits_out_its_pause(store, sink):
    """The keys take turns, so a full one doesn't keep the others waiting either."""
    sink.down.add("down")
    store.push("down", b"x")
    store.push_many("a", numbers(3))
    store.push_many("b", numbers(3))
    context = sqlspace.Context()

    def send(delivery):
        if len(sink.arrived) == 5:
            context.cancel()
        sink(delivery)

    wait = tenacity.wait_fixed(1000)
    assert sqlspace.forward(store, ["down", "a", "b"], send, wait=wait, workers=1, context=context)
    assert [key for key, _ in sink.arrived] == ["a", "b"] * 3
    assert len([key for key, _, _ in sink.tried if key == "down"]) == 1


def test_a_pause_stands_in_the_file_and_grows_with_the_attempts(store, sink):
    """So another forwarder waits it out too."""
    seen = []

    def wait(state):
        seen.append((state.attempt_number, type(state.outcome.exception())))
        if len(seen) == 3:
            context.cancel()
            return 1000.0
        return 0.0

    context = sqlspace.Context()
    sink.down.add("mail")
    store.push_many("mail", numbers(2))
    assert sqlspace.forward(store, "mail", sink, wait=wait, context=context) == 0
    assert seen == [(1, ConnectionError), (2, ConnectionError), (3, ConnectionError)]
    first, second = store.entries("mail")
    assert (first.state, first.attempts, second.state) == ("delayed", 3, "ready")
    assert first.due_at > sqlspace.clock.now() / 1e6 + 900
    sink.down.clear()
    sqlspace.forward(store, "mail", sink, context=sqlspace.Context(0))
    assert sink.arrived == []


def test_the_pauses_are_doubled_up_to_ten_seconds():
    """From 0.1 s on, with some jitter."""
    pause = forwarding.Pause(None)
    for attempts, least in ((1, 0.1), (2, 0.2), (5, 1.6), (7, 6.4), (8, 10.0), (5000, 10.0)):
        assert least <= pause(attempts, ValueError()) <= least + 0.1


def test_two_forwarders_keep_the_order(store, path, sink):
    """And nothing is sent twice by them, as long as none dies."""
    for key in ("a", "b"):
        store.push_many(key, numbers(100))
    with sqlspace.open(path) as other:
        threads = [
            threading.Thread(
                target=sqlspace.forward, args=(each, ["a", "b"], sink), kwargs={"drain": True}
            )
            for each in (store, other, store)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
    assert sink.of("a") == sink.of("b") == numbers(100)


def test_an_entry_whose_time_to_live_is_over_is_not_sent(store, sink):
    """Also if it was tried before."""
    sink.down.add(b"short")
    store.push("mail", b"short", ttl=0.05)
    store.push("mail", b"long", ttl=1000)
    assert sqlspace.forward(store, "mail", sink, wait=AT_ONCE, drain=True) == 1
    assert sink.of("mail") == [b"long"]
    assert outcomes(store, "mail") == ["expired", "acked"]


def test_after_max_attempts_the_entry_is_a_dead_letter_and_the_next_goes_on(store, sink):
    """By the machinery of all claims."""
    sink.down.add(b"bad")
    store.push_many("mail", [b"1", b"bad", b"3"])
    assert sqlspace.forward(store, "mail", sink, max_attempts=3, wait=AT_ONCE, drain=True) == 2
    assert sink.of("mail") == [b"1", b"3"]
    assert [attempts for _, seq, attempts in sink.tried if seq == 2] == [1, 2, 3]
    (letter,) = store.entries("mail/dead")
    assert letter.payload == b"bad"


def test_the_lease_is_renewed_while_the_function_is_at_it(store, path):
    """For longer than it is, so no other forwarder sends the entry too."""
    store.push("mail", b"x")
    deadlines = []

    def send(delivery):
        first = delivery.deadline
        eventually(lambda: delivery.deadline > first)
        deadlines.append(delivery.lost)

    assert sqlspace.forward(store, "mail", send, lease=0.2, drain=True) == 1
    assert deadlines == [False]


def test_the_id_is_the_same_each_time_and_another_in_another_file(store, tmp_path):
    """So an endpoint can tell a repetition; a file that was restored doesn't repeat ids."""
    copy = str(tmp_path / "copy.db")
    store.backup(copy)
    store.push("mail", b"x")
    seen = []

    def send(delivery):
        seen.append(delivery.id)
        assert len(seen) == 2

    sqlspace.forward(store, "mail", send, wait=AT_ONCE, drain=True)
    assert seen[0] == seen[1]
    assert seen[0].split("/")[:2] == [store._database.file_id, "1"]
    with sqlspace.open(copy) as restored:
        assert restored.push("mail", b"y") == 1
        assert restored.claimp("mail").id != seen[0]
    with sqlspace.open(tmp_path / "other.db") as other:
        other.push("mail", b"x")
        assert other.claimp("mail").id.partition("/")[0] != seen[0].partition("/")[0]


# -- the end of it


def test_a_drained_forwarder_waits_for_what_is_delayed_or_held_by_others(store, sink):
    """It ends when nothing lives any more, not when nothing is ready."""
    store.push("mail", b"late", delay=0.05)
    store.push("mail", b"now")
    held = store.claim("mail")
    thread = threading.Thread(
        target=sqlspace.forward, args=(store, "mail", sink), kwargs={"drain": True}
    )
    thread.start()
    eventually(lambda: sink.of("mail") == [])
    held.nack()
    thread.join(PATIENCE_SECONDS)
    assert sorted(sink.of("mail")) == [b"late", b"now"]


def test_it_ends_with_the_store_and_with_its_context(path, sink):
    """Quietly; how many were sent is the answer."""
    store = sqlspace.open(path)
    context = sqlspace.Context()
    context.cancel()
    store.push("mail", b"x")
    assert sqlspace.forward(store, "mail", sink, context=context) == 0
    assert sqlspace.forward(store, "mail", sink, context=sqlspace.Context(0.05)) == 1
    counts = []
    thread = threading.Thread(
        target=lambda: counts.append(sqlspace.forward(store, ["mail", "post"], sink))
    )
    thread.start()
    store.push("post", b"y")
    eventually(lambda: store.len("post") == 0)
    store.close()
    thread.join(PATIENCE_SECONDS)
    assert counts == [1]
    assert sqlspace.forward(store, "mail", sink) == 0


def test_a_failure_of_the_store_comes_out(store, path, sink, tmp_path):
    """StoreError, as of any verb."""
    store.push("mail", b"x")
    os.rename(path, tmp_path / "elsewhere")
    with pytest.raises(sqlspace.MovedError):
        sqlspace.forward(store, "mail", sink)


def test_what_is_no_exception_ends_it_and_gives_the_entry_back(store):
    """SystemExit of the function is that of the caller."""
    store.push("mail", b"x")

    def send(_):
        raise SystemExit(7)

    with pytest.raises(SystemExit):
        sqlspace.forward(store, "mail", send)
    (entry,) = store.entries("mail")
    assert (entry.state, entry.attempts) == ("ready", 0)


def test_a_function_may_settle_the_entry_by_itself(store):
    """To nack it, say, without a failure of the endpoint."""
    store.push_many("mail", numbers(2))
    seen = []

    def send(delivery):
        seen.append(delivery.payload)
        if len(seen) == 1:
            delivery.nack()

    sqlspace.forward(store, "mail", send, drain=True)
    assert seen == [b"0", b"0", b"1"]


def test_a_killed_forwarder_is_succeeded_after_its_lease_in_order(child, store, path, sink):
    """What it had under way is sent once more, with the same id, and nothing before it."""
    store.push_many("mail", numbers(5))
    dying = child(
        """
        store = sqlspace.open(argv[0])
        def send(delivery):
            tell(delivery.id)
            if delivery.payload == b"2":
                time.sleep(1000)
        sqlspace.forward(store, "mail", send, lease=0.5)
        """,
        path,
    )
    dying.told(), dying.told()
    last = dying.told()
    dying.kill()
    ids = []

    def send(delivery):
        ids.append(delivery.id)
        sink(delivery)

    assert sqlspace.forward(store, "mail", send, drain=True) == 3
    assert sink.of("mail") == [b"2", b"3", b"4"]
    assert ids[0] == last


def test_ctrl_c_ends_it_when_what_is_under_way_is_done(child, store, path):
    """It was sent, so it is acked; then KeyboardInterrupt comes out."""
    store.push_many("mail", numbers(5))
    process = child(
        """
        store = sqlspace.open(argv[0])
        def send(delivery):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            tell("interrupted")
            hear()
        try:
            sqlspace.forward(store, "mail", send)
        except KeyboardInterrupt:
            tell("ended", store.len("mail"))
        store.close()
        """,
        path,
    )
    process.expect("interrupted")
    process.tell()
    process.expect("ended 4")
    process.finish()


# -- a command


def test_a_command_is_run_for_each_entry_with_its_payload_and_its_names(store, tmp_path):
    """Exit code 0 is arrival."""
    out = tmp_path / "out"
    store.push("mail", b"payload\n", headers={"a": "ü"})
    script = f'cat >> {out}; echo "$SQLSPACE_KEY $SQLSPACE_SEQ $SQLSPACE_ATTEMPTS" >> {out}; '
    script += f'echo "$SQLSPACE_HEADERS $SQLSPACE_ID" >> {out}'
    assert sqlspace.forward(store, "mail", ["sh", "-c", script], drain=True) == 1
    payload, names, headers = out.read_text(encoding="utf-8").splitlines()
    assert (payload, names) == ("payload", "mail 1 1")
    assert headers.startswith('{"a":"ü"} ' + store._database.file_id + "/1/")


def test_a_command_that_fails_is_an_endpoint_that_is_down(store, tmp_path, caplog):
    """The same entry again, and why in the log."""
    out, down = tmp_path / "out", tmp_path / "down"
    down.touch()
    store.push_many("mail", [b"1\n", b"2\n"])
    script = f"test -e {down} && test $SQLSPACE_ATTEMPTS -lt 3 && exit 5; cat >> {out}"
    assert sqlspace.forward(store, "mail", ["sh", "-c", script], wait=AT_ONCE, drain=True) == 2
    assert out.read_bytes() == b"1\n2\n"
    assert "entry 1 could not be sent, attempt 2: sh ended with 5" in caplog.text


def test_a_command_that_is_gone_is_an_endpoint_that_is_down(store, tmp_path):
    """As between two versions of it; it need not be there all the time, but at first."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nrm $0\n")
    program.chmod(0o755)
    store.push_many("mail", numbers(2))
    failures = []

    def wait(state):
        failures.append(str(state.outcome.exception()))
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        return 0

    assert sqlspace.forward(store, "mail", [str(program)], wait=wait, drain=True) == 2
    assert failures == [f"{program}: No such file or directory"]


def test_a_command_under_way_is_ended_and_its_entry_given_back(store, tmp_path, forwarding_to):
    """As if it had never been tried, though many exit with 0 when they are told to end."""
    ready = tmp_path / "ready"
    store.push("mail", b"x")
    script = f"trap 'exit 0' TERM; touch {ready}; while :; do sleep 0.01; done"
    end = forwarding_to("mail", ["sh", "-c", script])
    eventually(ready.exists)
    assert end() == 0
    (entry,) = store.entries("mail")
    assert (entry.state, entry.attempts) == ("ready", 0)


def test_a_command_that_will_not_end_is_killed(store, tmp_path, forwarding_to, monkeypatch):
    """After a while of grace."""
    monkeypatch.setattr(forwarding, "_GRACE_SECONDS", 0.01)
    ready = tmp_path / "ready"
    store.push("mail", b"x")
    script = f"trap '' TERM; touch {ready}; while :; do sleep 0.01; done"
    end = forwarding_to("mail", ["sh", "-c", script])
    eventually(ready.exists)
    assert end() == 0


# -- what stands behind it


def test_claiming_many_in_order_ends_before_the_first_that_is_barred(store):
    """An entry that another has leased bars all behind it, and none before it."""
    store.push_many("mail", numbers(6))
    held = store.claim_many("mail", 4)
    held[0].nack()
    held[1].nack()
    wanted = Lease(60_000_000, None, ordered=True)

    def claim(limit=10):
        work, found = taking.claim_many(["mail"], limit, wanted, store._deliver)
        store._database.write(work)
        return [delivery.seq for delivery in found]

    assert claim(1) == [1]
    assert claim() == []  # its own lease bars, too
    store.clear("mail")
    store.push_many("mail", numbers(6))
    first = store.claim_many("mail", 3)
    second = store.claim_many("mail", 1)
    for delivery in first:
        delivery.nack()
    assert claim() == [delivery.seq for delivery in first]
    assert second[0].seq == first[-1].seq + 1


# -- misuse


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, "a", print), TypeError, "store must be a sqlspace.Store, not int"),
        ((None, 1, print), TypeError, "keys must be an iterable of str, not int"),
        ((None, [], print), ValueError, "keys must name at least one key"),
        ((None, "", print), ValueError, "keys must not be the empty str"),
        ((None, "a", "true"), TypeError, "send must be a function, a command"),
        ((None, "a", 5), TypeError, "send must be a function, a command"),
        ((None, "a", []), ValueError, "send must name a program"),
        ((None, "a", ["true", 5]), TypeError, r"send\[1\] must be str, not int"),
        ((None, "a", ["true", "a\0"]), ValueError, r"send\[1\] must not hold a NUL"),
        ((None, "a", ["no-such-program"]), ValueError, "there is no program 'no-such-program'"),
    ],
)
def test_misuse_is_refused_before_anything_is_sent(store, arguments, error, message):
    """In the words of all arguments."""
    given, *others = arguments
    with pytest.raises(error, match=message):
        sqlspace.forward(given or store, *others)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lease": 0}, ValueError, "lease must be more than 0"),
        ({"max_attempts": 0}, ValueError, "max_attempts must be at least 1"),
        ({"workers": 0}, ValueError, "workers must be at least 1"),
        ({"workers": 1.5}, TypeError, "workers must be int"),
        ({"drain": 1}, TypeError, "drain must be bool"),
        ({"wait": 1.0}, TypeError, "wait must be one of tenacity's"),
        ({"context": 5}, TypeError, "context must be a sqlspace.Context"),
    ],
)
def test_bad_options_are_refused(store, options, error, message):
    """Likewise."""
    with pytest.raises(error, match=message):
        sqlspace.forward(store, "a", print, **options)
    with pytest.raises(ValueError, match="max_attempts needs a key of at most"):
        sqlspace.forward(store, "a" * 1024, print, max_attempts=3)


def test_with_children_ignored_a_command_is_refused(store):
    """The kernel would forget its exit code, and Python take that for 0."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(ValueError, match="SIGCHLD"):
            sqlspace.forward(store, "a", ["true"])
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_without_tenacity_it_says_what_to_install(path):
    """The rest works without it."""
    code = (
        "import sys; sys.modules['tenacity'] = None\n"
        "import sqlspace\n"
        "with sqlspace.open(sys.argv[1]) as store:\n"
        "    try:\n"
        "        sqlspace.forward(store, 'a', print)\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "sqlspace.forward needs tenacity: pip install 'sqlspace[forward]'\n"
