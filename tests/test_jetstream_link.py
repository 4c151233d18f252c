"""The link to NATS: requests that are tried again, and never done twice."""

import asyncio
import itertools

import pytest
from nats_servers import Proxy

from sqlspace.errors import BackendError, ClosedError
from sqlspace.jetstream.link import DUPLICATE_IN_BATCH, Link, Outgoing, RefusedError
from sqlspace.jetstream.subjects import Subjects, decoded, encoded

KEYS = (
    *("k", " ", "a b", "a.b", "a/b", "*", ">", "$", "=", "=2E", "\n", "\x7f", "K", "é", "e\u0301"),
    *("a" * 1024, "é" * 512, "\N{FOX FACE}" * 256, "." * 1024),
)

# nats-py leaves those of connections that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")

names = (f"link{number}" for number in itertools.count())


async def open_link(url, name, *, patience=5.0, **options):
    link = Link(url, patience, options)
    await link.open()
    await link.ensure_stream(
        {"name": name, "subjects": [f"{name}.key.*"], "allow_atomic": True, "discard": "new"}
    )
    return link


async def held(link, name):
    """All that the stream holds, in its order."""
    found, seq = [], 0
    while message := await link.next_message(
        name, f"{name}.key.*", seq, direct=False, doing="look"
    ):
        found.append(message.payload)
        seq = message.seq + 1
    return found


def test_every_key_is_one_token_of_a_subject_and_comes_back():
    tokens = {encoded(key): key for key in KEYS}
    assert len(tokens) == len(KEYS)
    for token, key in tokens.items():
        assert decoded(token) == key
        assert token.isascii()
        assert not set(token) & set(" .*>\r\n\t")
        assert len(f"$JS.API.DIRECT.GET.{Subjects('s' * 128).entry(key)}") < 4096
    assert encoded("mail-to_bob7") == "mail-to_bob7"
    assert encoded("a.b=") == "a=2Eb=3D"


@pytest.mark.parametrize(
    ("name", "kind"), [(None, TypeError), ("", ValueError), ("a.b", ValueError), ("é", ValueError)]
)
def test_a_stream_has_a_plain_name(name, kind):
    with pytest.raises(kind, match="stream must be"):
        Subjects(name)


def test_a_publish_whose_answer_was_lost_is_not_stored_twice(nats_server, start_nats):
    name = next(names)
    proxy = start_nats(Proxy(nats_server.port))

    async def run():
        link = await open_link(proxy.url, name)
        proxy.delay = 0.3
        publishing = asyncio.create_task(link.publish(f"{name}.key.a", b"once"))
        other = await open_link(nats_server.url, name)
        while not await held(other, name):
            pass
        proxy.cut()
        proxy.delay = 0.0
        proxy.mend()
        assert await publishing == 1
        assert await held(other, name) == [b"once"]
        await link.close(1.0)
        await other.close(1.0)

    asyncio.run(run())


def test_a_server_that_is_killed_loses_nothing_that_it_has_acknowledged(start_nats):
    name = next(names)
    server = start_nats()

    async def run():
        link = await open_link(server.url, name, patience=20.0)
        acknowledged = []

        async def publish(number):
            await link.publish(f"{name}.key.{number % 7}", b"%d" % number)
            acknowledged.append(number)

        for first in range(0, 300, 50):
            tasks = [asyncio.create_task(publish(first + more)) for more in range(50)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            server.kill()
            server.start()
            await asyncio.gather(*tasks)
        assert sorted(map(int, await held(link, name))) == list(range(300))
        assert sorted(acknowledged) == list(range(300))
        await link.close(1.0)

    asyncio.run(run())


def test_a_batch_is_stored_in_order_and_all_of_it_or_none(nats_server):
    """One message that is there already refuses all of them."""
    name = next(names)

    async def run():
        link = await open_link(nats_server.url, name)
        messages = [
            Outgoing(f"{name}.key.a", b"%d" % number, f"id{number}") for number in range(40)
        ]
        await link.publish_batch(messages[:30])
        with pytest.raises(RefusedError) as refused:
            await link.publish_batch(messages[29:])
        assert refused.value.number == DUPLICATE_IN_BATCH
        await link.publish_batch(messages[30:])
        assert await held(link, name) == [b"%d" % number for number in range(40)]
        await link.close(1.0)

    asyncio.run(run())


def test_only_the_first_of_many_can_write_at_a_place(nats_server):
    name = next(names)

    async def run():
        links = [await open_link(nats_server.url, name) for _ in range(8)]
        for place in range(30):
            subject = f"{name}.key.{place}"
            answers = await asyncio.gather(
                *(link.write_if(subject, b"", 0, "claim") for link in links), return_exceptions=True
            )
            assert sum(isinstance(answer, int) for answer in answers) == 1
            assert sum(isinstance(answer, RefusedError) for answer in answers) == 7
        for link in links:
            await link.close(1.0)

    asyncio.run(run())


def test_a_request_that_nobody_answers_ends_with_the_patience(nats_server, start_nats):
    name = next(names)
    proxy = start_nats(Proxy(nats_server.port))

    async def run():
        link = await open_link(proxy.url, name, patience=0.5)
        for end in (proxy.freeze, proxy.cut):
            end()
            with pytest.raises(BackendError, match=r"out: no answer .* it may have happened"):
                await link.publish(f"{name}.key.a", b"x", doing="out")
            with pytest.raises(BackendError, match=r"look: no answer .* nothing changed"):
                await held(link, name)
            proxy.mend()
            link.patience = 10.0
            await link.publish(f"{name}.key.a", b"y")
            link.patience = 0.5
        await link.close(1.0)
        with pytest.raises(ClosedError):
            await link.publish(f"{name}.key.a", b"z")

    asyncio.run(run())


def test_only_this_package_needs_nats(child):
    """Without the extra it says which one."""
    without = child(
        """
        assert "nats" not in sys.modules
        sys.modules["nats"] = None
        try:
            import sqlspace.jetstream
        except ImportError as error:
            tell(error)
        """
    )
    without.expect("sqlspace.jetstream needs nats-py: pip install 'sqlspace[nats]'")
    without.finish()


def test_a_batch_rings_for_each_of_its_messages(nats_server):
    name = next(names)

    async def run():
        link = await open_link(nats_server.url, name)
        await link.ensure_stream(
            {
                "name": f"{name}r",
                "subjects": [f"{name}r.key.*"],
                "allow_atomic": True,
                "republish": {
                    "src": f"{name}r.key.*",
                    "dest": f"{name}r.new.{{{{wildcard(1)}}}}",
                    "headers_only": True,
                },
            }
        )
        rung = asyncio.Semaphore(0)
        await link.listen(f"{name}r.new.a", "", rung.release)
        await link.publish_batch([Outgoing(f"{name}r.key.a", b"x", f"id{n}") for n in range(5)])
        async with asyncio.timeout(30):
            for _ in range(5):
                await rung.acquire()
        await link.close(1.0)

    asyncio.run(run())


def test_what_is_too_large_is_refused_before_it_is_sent(nats_server):
    """The server would cut the connection over it."""
    name = next(names)

    async def run():
        link = await open_link(nats_server.url, name)
        asked = link.requests
        for payload, headers in ((b"x" * link.max_payload, {}), (b"", {"H": "é" * 600_000})):
            with pytest.raises(ValueError, match="must be at most 1,048,576 bytes here"):
                await link.publish(f"{name}.key.a", payload, headers=headers)
        assert link.requests == asked
        large = b"x" * (link.max_payload - 600)
        await link.publish_batch([Outgoing(f"{name}.key.a", large, f"id{n}") for n in range(3)])
        assert await held(link, name) == [large] * 3
        await link.close(1.0)

    asyncio.run(run())
