"""`sqlspace.forward` to a JetStream: each entry is in the stream once, whatever dies."""

import itertools
import threading

import pytest
import tenacity
from children import PATIENCE_SECONDS, eventually
from nats_servers import NatsServer, Proxy
from streams import Stream

import sqlspace
from sqlspace import forwarding, taking
from sqlspace.entries import Lease
from sqlspace.jetstream import Endpoint, JetStream
from sqlspace.jetstream.headers import carried, entry_headers
from sqlspace.jetstream.link import Link

# nats-py leaves those of connections that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")

AT_ONCE = tenacity.wait_none()

names = (f"forward{number}" for number in itertools.count())


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path) as store:
        yield store


@pytest.fixture
def name():
    return next(names)


@pytest.fixture
def stream_of():
    """Look into a stream: of a server's URL, a name, and its configuration if it is to be made."""
    streams = []

    def start(url, name, **config):
        streams.append(Stream(url, name, **config))
        return streams[-1]

    yield start
    for stream in streams:
        stream.close()


@pytest.fixture
def url(nats_server):
    return nats_server.url


@pytest.fixture
def stream(url, name, stream_of):
    return stream_of(url, name)


def numbers(*span):
    return [b"%d" % number for number in range(*span)]


def forward(store, keys, url, name, **options):
    return sqlspace.forward(
        store, keys, Endpoint(url, stream=name), drain=True, wait=AT_ONCE, **options
    )


def taken(stream):
    return [message.payload for message in stream.take("mail")]


DIES = """
from sqlspace.forwarding import Forwarder
from sqlspace.jetstream import Endpoint, JetStream

def die(self, sent, route):
    os.kill(os.getpid(), signal.SIGKILL)

Forwarder._arrived = die
store = sqlspace.open(argv[0])
sqlspace.forward(store, "mail", Endpoint(argv[1], stream=argv[2]), lease=0.05)
"""


def forward_and_die(child, store, url, name):
    """Send what is ready, in a process that is killed before it can ack; then the lease ends."""
    process = child(DIES, store.path, url, name)
    assert process._process.wait(PATIENCE_SECONDS) == -9
    eventually(lambda: all(entry.state != "leased" for entry in store.entries("mail")))


# -- what arrives


def test_all_is_in_the_stream_in_order_as_it_was_pushed(store, url, name, stream):
    """Of several keys, in batches of several sizes; a key of any kind."""
    keys = ["a", "a.b c", "grüße 🗝", "x" * 1024]
    for key in keys:
        store.push_many(key, numbers(1200))
    assert forward(store, keys, url, name) == 4800
    for key in keys:
        assert stream.payloads(key) == numbers(1200)
        assert store.len(key) == 0


def test_an_entry_goes_with_its_headers_and_its_id(store, url, name, stream):
    """Each can be read by any client of NATS."""
    headers = {"from": "me", "Content-Type": "text/plain; charset=utf-8"}
    store.push("mail", b"\x00\xff", headers=headers)
    identity = store.claim("mail")
    identity.nack()
    forward(store, "mail", url, name)
    (message,) = stream.messages("mail")
    assert message.payload == b"\x00\xff"
    assert headers.items() <= dict(message.headers).items()
    assert message.headers["Nats-Msg-Id"] == identity.id


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"plain": "text with blanks"},
        {"": "no name", "a:b": "1", "a b": "2", "é": "3", "line\n": "4"},
        {"blank": "", "edges": " x ", "line": "a\r\nb", "tab": "\t", "utf": "é🗝", "nul": "\0"},
        {"Nats-Msg-Id": "mine", "nats-expected-stream": "x", "Sqlspace-Headers": "y"},
        {"Case": "1", "case": "2"},
        {"lone": "\udc80"},
    ],
)
def test_headers_come_back_as_they_were(headers):
    """Those that can't be headers of NATS go into one that can."""
    sent = carried(headers)
    assert entry_headers({**sent, "Nats-Msg-Id": "id"}) == headers
    for title, text in sent.items():
        assert (title + text).isascii()
        assert (title + text).isprintable()
        assert text == text.strip() != ""


def test_strange_headers_of_others_are_kept_as_they_are():
    """What isn't ours is no reason to lose anything."""
    for text in ("{", "[]", '{"a": 1}'):
        assert entry_headers({"Sqlspace-Headers": text, "a": "b"}) == {
            "Sqlspace-Headers": text,
            "a": "b",
        }


def test_what_is_left_of_the_time_to_live_goes_along(store, url, name, stream):
    """The exact end for who reads it, and whole seconds for the server, rounded up."""
    before = sqlspace.clock.now() / 1e6
    store.push("mail", b"x", ttl=100.5)
    store.push("mail", b"y")
    forward(store, "mail", url, name)
    first, second = stream.messages("mail")
    assert before + 100 < float(first.headers["Sqlspace-Expires"]) < before + 200
    assert 1 <= int(first.headers["Nats-TTL"]) <= 101
    assert not {"Nats-TTL", "Sqlspace-Expires"} & set(second.headers)


def test_what_has_expired_is_not_sent(store, url, name, stream):
    """As with all takers."""
    store.push("mail", b"x", ttl=1e-6)
    store.push("mail", b"y")
    assert forward(store, "mail", url, name) == 1
    assert stream.payloads("mail") == [b"y"]


# -- the endpoint is down


def test_while_the_server_is_down_the_store_holds_and_then_all_goes_out(store, name, stream_of):
    """Also if it wasn't there at first."""
    server = NatsServer()
    context = sqlspace.Context()
    endpoint = Endpoint(server.url, stream=name, patience=0.2)
    store.push_many("mail", numbers(0, 2000))
    thread = threading.Thread(
        target=sqlspace.forward,
        args=(store, "mail", endpoint),
        kwargs={"context": context, "wait": AT_ONCE},
    )
    thread.start()
    with server:
        try:
            stream = stream_of(server.url, name)
            eventually(lambda: store.len("mail") == 0)
            server.kill()
            store.push_many("mail", numbers(2000, 4000))
            eventually(lambda: next(iter(store.entries("mail"))).attempts > 1)
            assert store.len("mail") == 2000
            server.start()
            eventually(lambda: store.len("mail") == 0)
        finally:
            context.cancel()
            thread.join(PATIENCE_SECONDS)
        assert stream.payloads("mail") == numbers(4000)


def test_an_end_while_the_server_is_down_is_at_once(store, name, monkeypatch):
    """And what was claimed is given back as it was."""
    monkeypatch.setattr(forwarding, "_GRACE_SECONDS", 1000)
    server = NatsServer()
    context = sqlspace.Context()
    store.push("mail", b"x")
    endpoint = Endpoint(server.url, stream=name, patience=1000)
    thread = threading.Thread(
        target=sqlspace.forward, args=(store, "mail", endpoint), kwargs={"context": context}
    )
    thread.start()
    eventually(lambda: next(iter(store.entries("mail"))).state == "leased")
    context.cancel()
    thread.join(PATIENCE_SECONDS)
    server.close()
    (entry,) = store.entries("mail")
    assert (entry.state, entry.attempts) == ("ready", 0)


def test_a_full_stream_holds_up_the_key_and_nothing_changes_places(
    store, url, name, stream_of, caplog
):
    """A batch is in it whole or not at all, so after a failure a small one is tried."""
    stream = stream_of(url, name, max_msgs=30)
    store.push_many("mail", numbers(64))
    context = sqlspace.Context()
    endpoint = Endpoint(url, stream=name)
    thread = threading.Thread(
        target=sqlspace.forward,
        args=(store, "mail", endpoint),
        kwargs={"context": context, "wait": tenacity.wait_fixed(0.01)},
    )
    thread.start()
    arrivals = []
    try:

        def arrived():
            arrivals.extend(taken(stream))
            return len(arrivals) >= 64

        eventually(arrived)
    finally:
        context.cancel()
        thread.join(PATIENCE_SECONDS)
    assert arrivals == numbers(64)
    assert "maximum messages exceeded" in caplog.text


def test_an_entry_that_is_too_large_is_a_dead_letter_in_the_end(store, url, name, stream, caplog):
    """It alone; those before it and behind it go out."""
    store.push_many("mail", [b"1", b"2", bytes(1 << 20), b"4"])
    assert forward(store, "mail", url, name, max_attempts=2) == 3
    assert stream.payloads("mail") == [b"1", b"2", b"4"]
    (letter,) = store.entries("mail/dead")
    assert len(letter.payload) == 1 << 20
    assert "the server takes messages of at most 1,048,576" in caplog.text


def test_a_stream_without_room_for_positions_is_refused(store, url, name, stream_of, caplog):
    """In words, and nothing is sent."""
    stream = stream_of(url, name, subjects=[f"{name}.key.*"])
    store.push("mail", b"x")
    context = sqlspace.Context()

    def wait(_):
        context.cancel()
        return 0

    sqlspace.forward(store, "mail", Endpoint(url, stream=name), wait=wait, context=context)
    assert f"stream {name} is not one of ours: subjects is ['{name}.key.*'], not" in caplog.text
    assert stream.count() == 0


# -- each once


def test_a_restart_long_after_the_duplicate_window_sends_nothing_twice(
    child, store, url, name, stream_of
):
    """Though all was taken from the stream meanwhile: the position tells."""
    stream = stream_of(url, name, duplicate_window=100_000_000)
    store.push_many("mail", numbers(60))
    held = store.claim_many("mail", 60)
    last = held[-1].id
    for delivery in held:
        delivery.nack()
    forward_and_die(child, store, url, name)
    assert taken(stream) == numbers(60)
    eventually(lambda: stream.forgets("mail", last), "the end of the duplicate window")
    assert store.len("mail") == 60
    store.push_many("mail", numbers(60, 100))
    forward(store, "mail", url, name)
    assert taken(stream) == numbers(60, 100)


def test_an_entry_that_comes_due_after_later_ones_is_sent(child, store, url, name, stream):
    """It is behind the last seq that was sent, and was never sent itself."""
    store.push("mail", b"late", delay=1000)
    (entry,) = store.entries("mail")
    store.push_many("mail", numbers(10))
    forward_and_die(child, store, url, name)
    store._database.transact(lambda connection: come_due(connection, entry.seq))
    forward(store, "mail", url, name)
    assert stream.payloads("mail") == [*numbers(10), b"late"]


def come_due(connection, seq):
    connection.execute(
        "UPDATE sqlspace_entries SET state = 0, due_at = NULL, delay = NULL WHERE seq = ?", (seq,)
    )
    return ["mail"]


def test_a_file_that_was_restored_sends_what_is_new_in_it(store, url, name, stream, tmp_path):
    """Its seqs were given before, to others, and the stream's window is open."""
    copy = str(tmp_path / "copy.db")
    store.push("mail", b"0")
    store.backup(copy)
    store.push_many("mail", [b"lost 1", b"lost 2"])
    forward(store, "mail", url, name)
    with sqlspace.open(copy) as restored:
        restored.pull("mail")
        restored.push_many("mail", [b"new 1", b"new 2"])
        forward(restored, "mail", url, name)
    assert stream.payloads("mail") == [b"0", b"lost 1", b"lost 2", b"new 1", b"new 2"]


def test_two_stores_never_collide(store, url, name, stream, tmp_path):
    """Same key, same seqs, same stream."""
    with sqlspace.open(tmp_path / "other.db") as other:
        for each in (store, other):
            each.push_many("mail", [b"%s %d" % (each.path[-8:].encode(), n) for n in range(50)])
            forward(each, "mail", url, name)
        assert len(set(stream.payloads("mail"))) == 100
        assert len(stream.positions()) == 2


def claimed(store, limit=50):
    """A batch as a forwarder claims it, for a moment only."""
    wanted = Lease(1, None, ordered=True)
    work, batch = taking.claim_many(["mail"], limit, wanted, store._deliver)
    store._database.write(work)
    eventually(lambda: batch[-1].lost)
    return batch


@pytest.mark.parametrize("window_seconds", [0.1, 120])
def test_a_forwarder_that_stood_still_sends_nothing_after_its_successor(
    store, url, name, stream_of, monkeypatch, window_seconds
):
    """Whatever it knew before: its write is refused, as the position is another now.

    Nor does it send one by one then, for the server knows the ids: not for long.
    """
    stream = stream_of(url, name, duplicate_window=int(window_seconds * 1e9))
    stood, successor = (Endpoint(url, stream=name)._sender(store) for _ in range(2))
    try:
        store.push_many("mail", numbers(100))
        first = claimed(store)
        assert stood.send(first).result() == 50
        stood.acked(first)  # so it believes; it knows the position by now
        store.clear("mail")
        store.push_many("mail", numbers(100, 150))
        second = claimed(store)
        assert successor.send(claimed(store)).result() == 50
        if window_seconds < 1:
            stream.publish("other", b"", message_id="as old as those")
            eventually(lambda: stream.forgets("other", "as old as those"))
        monkeypatch.setattr(Link, "publish", None)
        assert stood.send(second).result() == 50
        assert successor.send(claimed(store)).result() == 50
        assert stream.payloads("mail") == [*numbers(50), *numbers(100, 150)]
    finally:
        stood.close()
        successor.close()


def test_what_another_has_under_way_stays_in_the_position(store, url, name, stream):
    """One that comes due before those, and is sent by a second forwarder, doesn't hide them."""
    first, second, third = (Endpoint(url, stream=name)._sender(store) for _ in range(3))
    try:
        store.push_many("mail", numbers(20))
        batch = claimed(store)
        early, late = batch[:5], batch[5:]
        assert first.send(late).result() == 15
        assert second.send(early).result() == 5
        assert len(stream.positions()[0].payload.split()) == 20
        again = claimed(store)
        assert third.send(again).result() == 20
        assert sorted(stream.payloads("mail")) == sorted(numbers(20))
    finally:
        for each in (first, second, third):
            each.close()


def test_a_position_forgets_what_has_left_the_store(store, url, name, stream):
    """It doesn't grow."""
    store.push_many("mail", numbers(3000))
    forward(store, "mail", url, name)
    (position,) = stream.positions()
    assert len(position.payload.split()) <= 2 * 999
    store.push("mail", b"x")
    forward(store, "mail", url, name)
    (position,) = stream.positions()
    assert len(position.payload.split()) == 1


def test_two_forwarders_at_once_send_each_entry_once_and_in_order(store, path, url, name, stream):
    """Of one store, over the same keys."""
    keys = ["a", "b", "c"]
    for key in keys:
        store.push_many(key, numbers(700))
    with sqlspace.open(path) as other:
        threads = [
            threading.Thread(target=forward, args=(each, keys, url, name))
            for each in (store, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
    for key in keys:
        assert stream.payloads(key) == numbers(700)


def test_leases_are_renewed_while_a_batch_is_under_way(store, name, stream_of, start_nats):
    """However long the server takes; another forwarder sends nothing meanwhile."""
    server = start_nats()
    proxy = start_nats(Proxy(server.port))
    stream = stream_of(server.url, name)
    context = sqlspace.Context()
    endpoint = Endpoint(proxy.url, stream=name, patience=1000, ping_interval=1000)
    thread = threading.Thread(
        target=sqlspace.forward,
        args=(store, "mail", endpoint),
        kwargs={"context": context, "lease": 0.3},
    )
    thread.start()
    try:
        store.push("mail", b"first")
        eventually(lambda: store.len("mail") == 0)
        proxy.freeze()
        store.push_many("mail", numbers(100))
        first = eventually(lambda: next(store.entries("mail")).deadline)
        eventually(lambda: next(store.entries("mail")).deadline > first + 0.4)
        assert store.claimp("mail", ordered=True) is None
        proxy.mend()
        eventually(lambda: store.len("mail") == 0)
    finally:
        context.cancel()
        thread.join(PATIENCE_SECONDS)
    assert stream.payloads("mail") == [b"first", *numbers(100)]


# -- a stream that has no batches


def test_without_batches_all_arrives_in_order_too(store, url, name, stream_of):
    """One at a time."""
    stream = stream_of(url, name, allow_atomic=False)
    for key in ("a", "b"):
        store.push_many(key, numbers(150))
    assert forward(store, ["a", "b"], url, name) == 300
    assert stream.payloads("a") == stream.payloads("b") == numbers(150)


def test_without_batches_a_crash_repeats_nothing_once_the_position_is_written(
    child, store, url, name, stream_of
):
    """As with them; and before that the server knows the ids, for a while."""
    stream = stream_of(url, name, allow_atomic=False)
    store.push_many("mail", numbers(20))
    forward_and_die(child, store, url, name)
    assert taken(stream) == numbers(20)
    forward(store, "mail", url, name)
    assert stream.payloads("mail") == []


def test_what_is_there_without_a_position_is_not_sent_again(store, url, name, stream_of):
    """As a crash without batches leaves it, or whatever has removed the position."""
    stream = stream_of(url, name, duplicate_window=120_000_000_000)
    store.push_many("mail", numbers(20))
    held = store.claim_many("mail", 20)
    for delivery in held[:7]:
        stream.publish("mail", delivery.payload, message_id=delivery.id)
    for delivery in held:
        delivery.nack()
    assert forward(store, "mail", url, name) == 20
    assert stream.payloads("mail") == numbers(20)


# -- misuse


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stream": "a.b"}, ValueError, "stream must be"),
        ({"stream": 5}, TypeError, "stream must be str"),
        ({"patience": 0}, ValueError, "patience must be more than 0"),
        ({"patience": None}, ValueError, "patience must be more than 0"),
        ({"patience": "x"}, TypeError, "patience must be"),
    ],
)
def test_misuse_of_an_endpoint_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Endpoint(**options)


def test_a_space_is_an_endpoint_too_and_takes_what_was_sent(store, url, name):
    """`in_` of a JetStream reads what a store holds, if its codec does."""
    with JetStream(url, stream=name) as space:
        store.push_many("mail", [b'{"a": 1}', b"[2]"])
        assert sqlspace.forward(store, "mail", space, drain=True) == 2
        assert [space.in_("mail", 10), space.in_("mail", 10)] == [{"a": 1}, [2]]
        assert space.len("mail") == 0
