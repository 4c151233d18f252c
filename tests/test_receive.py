"""`sqlspace.jetstream.receive`: from a stream into a store, each once, whatever dies."""

import itertools
import threading
import time

import pytest
import tenacity
from children import PATIENCE_SECONDS, eventually
from nats_servers import NatsServer
from streams import Stream

import sqlspace
from sqlspace.jetstream import Endpoint, JetStream, receive

# nats-py leaves those of connections that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")

AT_ONCE = tenacity.wait_none()

names = (f"receive{number}" for number in itertools.count())


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


@pytest.fixture
def store(path):
    with sqlspace.open(path) as store:
        yield store


@pytest.fixture
def url(nats_server):
    return nats_server.url


@pytest.fixture
def name():
    return next(names)


@pytest.fixture
def stream(url, name):
    stream = Stream(url, name, max_msgs=-1)
    yield stream
    stream.close()


def numbers(*span):
    return [b"%d" % number for number in range(*span)]


def fill(stream, key, payloads):
    for payload in payloads:
        stream.publish(key, payload)


def drained(store, keys, url, name):
    return receive(store, keys, Endpoint(url, stream=name), drain=True, wait=AT_ONCE)


def test_all_comes_in_order_and_leaves_the_stream(store, url, name, stream):
    """Of several keys."""
    for key in ("a", "b.c"):
        fill(stream, key, numbers(300))
    assert drained(store, ["a", "b.c"], url, name) == 600
    assert store.pull_many("a", 1000) == store.pull_many("b.c", 1000) == numbers(300)
    assert stream.count() == 0


def test_there_and_back_an_entry_is_what_it_was(store, url, name, stream, tmp_path):
    """With its headers, and what is left of its time."""
    headers = {"plain": "x", "é": "ü\n", "Nats-Msg-Id": "mine"}
    store.push("mail", b"\x00\xff", headers=headers, ttl=1000)
    (sent,) = store.entries("mail")
    sqlspace.forward(store, "mail", Endpoint(url, stream=name), drain=True)
    with sqlspace.open(tmp_path / "other.db") as other:
        drained(other, "mail", url, name)
        (entry,) = other.entries("mail")
    assert (entry.payload, entry.headers) == (b"\x00\xff", headers)
    assert abs(entry.expires_at - sent.expires_at) < 1


def test_what_a_space_put_there_comes_too_and_the_expired_does_not(store, url, name, stream):
    """As its codec has made it."""
    with JetStream(url, stream=name) as space:
        space.out("mail", {"a": 1})
    stream.publish("mail", b"old", headers={"Sqlspace-Expires": "1.0"})
    stream.publish("mail", b"new", headers={"Sqlspace-Expires": str(time.time() + 1000)})
    stream.publish("mail", b"odd", headers={"Sqlspace-Expires": "x", "Sqlspace-Headers": "{"})
    drained(store, "mail", url, name)
    assert store.pull_many("mail", 10) == [b'{"a": 1}'.replace(b" ", b""), b"new", b"odd"]
    assert stream.count() == 0


def test_it_goes_on_with_what_comes_until_its_context_ends(store, url, name, stream):
    """It is rung."""
    context = sqlspace.Context()
    counts = []
    thread = threading.Thread(
        target=lambda: counts.append(
            receive(store, ["a", "b"], Endpoint(url, stream=name), context=context)
        )
    )
    thread.start()
    for key in ("a", "b", "a"):
        before = store.len(key)
        stream.publish(key, b"x")
        eventually(lambda key=key, before=before: store.len(key) == before + 1)
    context.cancel()
    thread.join(PATIENCE_SECONDS)
    assert counts == [3]


def test_a_closed_store_ends_it(path, url, name, stream):
    """Quietly; what wasn't pushed stays in the stream."""
    store = sqlspace.open(path)
    thread = threading.Thread(target=receive, args=(store, "a", Endpoint(url, stream=name)))
    thread.start()
    stream.publish("a", b"x")
    eventually(lambda: store.len("a") == 1)
    store.close()
    stream.publish("a", b"y")
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert stream.payloads("a") == [b"y"]


def test_a_receiver_that_is_killed_between_push_and_delete_doubles_nothing(
    child, store, url, name, stream
):
    """The next one pushes again, and the store knows it; also when all was pulled meanwhile."""
    fill(stream, "mail", numbers(200))
    process = child(
        """
        from sqlspace.jetstream import Endpoint, receive
        from sqlspace.jetstream.link import Link
        async def purge(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)
        Link.purge = purge
        receive(sqlspace.open(argv[0]), "mail", Endpoint(argv[1], stream=argv[2]))
        """,
        *(store.path, url, name),
    )
    assert process._process.wait(PATIENCE_SECONDS) == -9
    first = store.pull_many("mail", 1000)
    assert 0 < len(first) < 200
    assert stream.count() == 200
    drained(store, "mail", url, name)
    assert first + store.pull_many("mail", 1000) == numbers(200)
    assert stream.count() == 0


def test_a_server_that_is_killed_all_the_while_loses_and_doubles_nothing(store, name):
    """Nor does it change places."""
    with NatsServer() as server:
        stream = Stream(server.url, name, max_msgs=-1)
        fill(stream, "mail", numbers(400))
        context = sqlspace.Context()
        endpoint = Endpoint(server.url, stream=name, patience=0.5)
        thread = threading.Thread(
            target=receive,
            args=(store, "mail", endpoint),
            kwargs={"context": context, "wait": AT_ONCE},
        )
        thread.start()
        for at in (1, 129, 257):
            eventually(lambda at=at: store.len("mail") >= at)
            server.kill()
            server.start()
        eventually(lambda: store.len("mail") == 400)
        eventually(lambda: stream.count() == 0)
        context.cancel()
        thread.join(PATIENCE_SECONDS)
        stream.close()
    assert store.pull_many("mail", 1000) == numbers(400)


def test_a_stream_that_was_made_anew_is_another(store, url, name):
    """Its seqs begin again, and are not taken for those of the first."""
    for payload in (b"first", b"second"):
        stream = Stream(url, name, max_msgs=-1)
        stream.publish("mail", payload)
        drained(store, "mail", url, name)
        stream.delete()
        stream.close()
    assert store.pull_many("mail", 10) == [b"first", b"second"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((5, "a", Endpoint()), TypeError, "store must be a sqlspace.Store"),
        ((None, "", Endpoint()), ValueError, "keys must not be the empty str"),
        ((None, "a", print), TypeError, "endpoint must be an Endpoint of jetstream"),
    ],
)
def test_misuse_is_refused(store, arguments, error, message):
    given, *others = arguments
    with pytest.raises(error, match=message):
        receive(given or store, *others)
    with pytest.raises(TypeError, match="drain must be bool"):
        receive(store, "a", Endpoint(), drain=1)
