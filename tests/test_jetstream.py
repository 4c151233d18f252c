"""The space over JetStream, against a real server."""

import asyncio
import itertools
import json
import os
import signal
import ssl
import subprocess
import threading

import pytest
from children import eventually
from interrupts import every_step, interrupted
from nats_servers import Cluster, NatsServer, Proxy
from proof import tried

from sqlspace import (
    BackendError,
    CanceledError,
    ClosedError,
    Context,
    DeadlineError,
    DecodeError,
    SpaceError,
    call,
    serve,
)
from sqlspace.jetstream import AsyncJetStream, JetStream, receipts
from sqlspace.jetstream.subjects import Subjects
from sqlspace.space import AsyncSpace, Space
from sqlspace.testing import check_async_space, check_space
from sqlspace.waiting import MISSING

# nats-py leaves those of connections that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")

names = (f"space{number}" for number in itertools.count())


@pytest.fixture
def stream():
    return next(names)


@pytest.fixture
def space(nats_server, stream):
    with JetStream(nats_server.url, stream=stream) as space:
        yield space


def link_of(space):
    return space._started.space.link if isinstance(space, JetStream) else space.link


def asleep(space, key, number=1, *, takes=True):
    """Wait until so many calls of a space sleep until they are rung."""
    bells = space._started.space._bells._bells

    def are():
        bell = bells.get((key, takes))
        return bell is not None and len(bell.asleep) == number and not bell.looking

    eventually(are, f"{number} calls asleep")


def settled(space):
    """Wait until nothing is under way in the background."""
    eventually(lambda: link_of(space)._is_settled, "that it is settled")


async def quiet(space):
    """Likewise, in a loop."""
    while not space.link._is_settled:  # noqa: ASYNC110  # that rings no event
        await asyncio.sleep(0.001)


def in_thread(verb, *arguments, **bounds):
    """Begin a call in a thread: a function that waits for its end and returns what it got."""
    outcome = []

    def run():
        try:
            outcome.append(verb(*arguments, **bounds))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(60)
        assert not thread.is_alive()
        return outcome[0]

    return result


def drained(space, key):
    found = []
    while (value := space.inp(key, MISSING)) is not MISSING:
        found.append(value)
    return found


# -- the law


@pytest.fixture
def only_rings(monkeypatch):
    """Waiters never look by themselves: else a missing ring is a delay that no test notices."""
    monkeypatch.setattr("sqlspace.jetstream.bells.LOOK_AGAIN_SECONDS", 1e6)


@pytest.mark.usefixtures("only_rings")
def test_it_obeys_the_law_of_the_protocol(nats_server):
    check_space(lambda: JetStream(nats_server.url, stream=next(names)))


@pytest.mark.usefixtures("only_rings")
def test_it_obeys_the_law_of_the_protocol_for_coroutines(nats_server):
    check_async_space(lambda: AsyncJetStream(nats_server.url, stream=next(names)))


def test_both_are_spaces(space, nats_server):
    assert isinstance(space, Space)
    assert isinstance(AsyncJetStream(nats_server.url), AsyncSpace)


def test_what_one_client_adds_another_takes_in_order(space, nats_server, stream):
    with JetStream([nats_server.url], stream=stream) as other:
        for number in range(20):
            (space if number % 2 else other).out("k", number)
        assert [space.len("k"), other.len("k")] == [20, 20]
        assert [(other if number % 3 else space).in_("k", 0) for number in range(20)] == [
            *range(20)
        ]
        for one in (space, other):  # what another client has taken is counted for a moment yet
            eventually(lambda one=one: one.len("k") == 0)


def test_bytes_go_through_a_codec_of_the_users(nats_server, stream):
    with JetStream(nats_server.url, stream=stream, dumps=bytes, loads=bytes) as space:
        for value in (b"", b"\0\r\n\xff", os.urandom(500_000)):
            space.out("k", value)
            assert space.rd("k") == space.in_("k") == value


def test_requests_are_answered_over_it(space):
    """`out` knows ttl, so nothing is left behind by whoever gives up."""
    server = in_thread(serve, space, "upper", str.upper)
    assert call(space, "upper", "hello", 10) == "HELLO"
    space.close()
    assert server() is None


# -- takers


def test_each_entry_goes_to_one_of_many_processes_and_in_order_for_each(
    nats_server, stream, space, child
):
    takers = [
        child(
            """
            from sqlspace.jetstream import JetStream
            with JetStream(argv[0], stream=argv[1]) as space:
                tell("ready")
                while (value := space.in_("k")) >= 0:
                    tell(value)
            tell("end")
            """,
            nats_server.url,
            stream,
        )
        for _ in range(4)
    ]
    for taker in takers:
        taker.expect("ready")
    for number in range(200):
        space.out("k", number)
    for _ in takers:
        space.out("k", -1)
    shares = []
    for taker in takers:
        shares.append([])
        while (line := taker.told()) != "end":
            shares[-1].append(int(line))
        taker.finish()
    assert sorted(number for share in shares for number in share) == list(range(200))
    for share in shares:
        assert share == sorted(share)
    assert space.len("k") == 0
    tried("JetStream: takers of one key in processes", "200 entries, 4 processes")


def test_a_waiter_asks_the_server_for_nothing(space, nats_server):
    waiters = [in_thread(space.in_, "a"), in_thread(space.rd, "b")]
    asleep(space, "a")
    asleep(space, "b", takes=False)
    asked = link_of(space).requests
    # The pings of the connection are no messages.
    before = nats_server.ask("varz")["in_msgs"]
    assert not threading.Event().wait(0.5)
    assert link_of(space).requests == asked
    assert nats_server.ask("varz")["in_msgs"] == before
    for key, waiter in zip("ab", waiters, strict=True):
        space.out(key, key)
        assert waiter() == key


@pytest.mark.usefixtures("only_rings")
def test_a_ring_that_came_for_a_taker_that_was_canceled_wakes_another(space, nats_server, stream):
    """The server rings one taker for one entry; that one passes it on."""
    with JetStream(nats_server.url, stream=stream) as other:
        for _ in range(20):
            context = Context()
            waits = [
                in_thread(one.in_, "k", context=c) for one, c in ((space, context), (other, None))
            ]
            asleep(space, "k")
            asleep(other, "k")
            adding = in_thread(space.out, "k", "it")
            context.cancel()
            found = waits[0]()
            adding()
            if found == "it":
                space.out("k", "it")
            else:
                assert isinstance(found, CanceledError)
            assert waits[1]() == "it"
    assert space.len("k") == 0


def test_a_wait_is_a_delay_and_no_hang_when_its_ring_was_lost(space, monkeypatch, nats_server):
    monkeypatch.setattr("sqlspace.jetstream.bells.LOOK_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr("sqlspace.jetstream.bells.Bells._ring", lambda *_: None)
    waiter = in_thread(space.in_, "k")
    asleep(space, "k")
    space.out("k", 1)
    assert waiter() == 1


# -- ends of a wait


def test_close_ends_a_wait_while_the_server_is_silent(nats_server, stream, start_nats):
    proxy = start_nats(Proxy(nats_server.port))
    space = JetStream(proxy.url, stream=stream)
    waiter = in_thread(space.in_, "a")
    asleep(space, "a")
    proxy.freeze()
    looking = in_thread(space.inp, "b")
    eventually(lambda: link_of(space)._replies)
    space.close()
    for call_ in (waiter, looking):
        assert isinstance(call_(), ClosedError)


@pytest.mark.parametrize("end", ["timeout", "context"])
def test_a_wait_ends_in_time_while_the_server_is_silent(nats_server, stream, start_nats, end):
    proxy = start_nats(Proxy(nats_server.port))
    with JetStream(proxy.url, stream=stream, patience=30.0) as space:
        context = Context()
        timeout = 0.2 if end == "timeout" else None
        waiter = in_thread(space.in_, "k", timeout, context=context)
        asleep(space, "k")
        proxy.freeze()
        if end == "context":
            context.cancel()
        assert isinstance(waiter(), DeadlineError if timeout else CanceledError)
        proxy.mend()
        space.out("k", 1)
        assert space.inp("k") == 1


def test_ctrl_c_ends_a_wait_and_takes_nothing(nats_server, stream, child, space):
    taker = child(
        """
        from sqlspace.jetstream import JetStream
        with JetStream(argv[0], stream=argv[1]) as space:
            try:
                tell("ready")
                space.in_("k")
            except KeyboardInterrupt:
                tell("interrupted")
        """,
        nats_server.url,
        stream,
    )
    taker.expect("ready")
    taker.send(signal.SIGINT)
    taker.expect("interrupted")
    taker.finish()
    space.out("k", 1)
    assert space.inp("k") == 1


def test_ctrl_c_at_each_instruction_of_a_take_loses_nothing(space):
    """It was taken, or it stands there: at its place, unless it was returned already."""
    steps = strikes = 0
    for step in every_step():
        for number in range(2):
            space.out("k", number)
        value, more = interrupted(lambda: space.in_("k", 0), *step)
        settled(space)
        rest = drained(space, "k")
        if value is MISSING:
            strikes += 1
            assert sorted(rest) == [0, 1], f"at {step}"
        else:
            assert [value, *rest] == [0, 1], f"at {step}"
        steps += 1
        if not more:
            break
    assert strikes > 50
    tried("JetStream: Ctrl-C in a take", f"{steps} instructions")


def canceling(coroutine, nth, *, after):
    """Drive a coroutine, and cancel its task at its n-th suspension.

    Args:
        coroutine: The call.
        nth: From 0 on.
        after: Whether what it waits for comes first, or never.
    """

    class Steps:
        def __await__(self):
            task = asyncio.current_task()
            inner = coroutine.__await__()
            send = lambda: next(inner)  # noqa: E731
            for step in itertools.count():
                try:
                    future = send()
                except StopIteration as stop:
                    return stop.value
                if step == nth:
                    if after:
                        future.add_done_callback(lambda _: task.cancel())
                    else:
                        task.cancel()
                try:
                    yield future
                except BaseException as error:
                    send = lambda error=error: inner.throw(error)  # noqa: E731
                else:
                    send = lambda: next(inner)  # noqa: E731

    async def run():
        return await Steps()

    return run()


@pytest.mark.parametrize("delay", [0.0, 0.004])
def test_a_take_that_is_canceled_anywhere_loses_nothing(nats_server, stream, start_nats, delay):
    """It is returned, or the entry stands at its place."""
    proxy = start_nats(Proxy(nats_server.port))
    canceled = taken = 0

    async def run():
        nonlocal canceled, taken
        async with (
            AsyncJetStream(proxy.url, stream=stream) as space,
            AsyncJetStream(nats_server.url, stream=stream) as other,
        ):
            proxy.delay = delay

            def sleeping(key):
                bell = space._bells._bells.get((key, True))
                return bell is not None and bell.asleep

            for after, there, verb in itertools.product(
                (False, True), ("before", "meanwhile", "asleep"), ("in_", "inp")
            ):
                for nth in range(8):
                    key = f"{after}-{there}-{verb}-{nth}"
                    if there == "before":
                        await other.out(key, 0)
                        await other.out(key, 1)
                    take = asyncio.create_task(
                        canceling(
                            getattr(space, verb)(key, *("none",) * (verb == "inp")),
                            nth,
                            after=after,
                        )
                    )
                    if there != "before":
                        await asyncio.sleep(0)
                        while there == "asleep" and not (  # noqa: ASYNC110
                            take.done() or sleeping(key)
                        ):
                            await asyncio.sleep(0)
                        await other.out(key, 0)
                        await other.out(key, 1)
                    value = "canceled"
                    try:
                        value = await take
                    except asyncio.CancelledError:
                        canceled += 1
                    await quiet(space)
                    rest = [await other.inp(key), await other.inp(key), await other.inp(key)]
                    if value == 0:
                        taken += 1
                        assert rest == [1, None, None], key
                    else:
                        assert value in ("none", "canceled")
                        assert rest == [0, 1, None], key

    asyncio.run(run())
    assert canceled > 20
    assert taken > 20
    tried("JetStream: canceled takes", f"{canceled + taken} at {canceled} places")


def test_a_claim_that_was_given_up_without_an_answer_lands_in_vain(nats_server, stream, start_nats):
    """It may arrive at any time: whoever gave it up sees to it that it takes nothing."""
    proxy = start_nats(Proxy(nats_server.port))

    async def run():
        async with AsyncJetStream(nats_server.url, stream=stream) as other:
            space = await AsyncJetStream(proxy.url, stream=stream, patience=0.3)
            await other.out("k", 0)
            await other.out("k", 1)
            writing = space.link.write_if

            async def late(*arguments):
                proxy.freeze()  # it is sent, and held up
                return await writing(*arguments)

            space.link.write_if = late
            with pytest.raises(BackendError, match="it may have happened"):
                await space.in_("k")
            space.link.write_if = writing
            assert await other.len("k") == 2
            proxy.mend()
            await quiet(space)
            assert [await other.inp("k"), await other.inp("k"), await other.inp("k")] == [
                0,
                1,
                None,
            ]
            await space.close()

    asyncio.run(run())


def test_a_claim_whose_answer_was_lost_is_asked_for(nats_server, stream, start_nats):
    proxy = start_nats(Proxy(nats_server.port))

    async def run():
        async with (
            AsyncJetStream(nats_server.url, stream=stream) as other,
            AsyncJetStream(proxy.url, stream=stream) as space,
        ):
            await other.out("k", 0)
            await other.out("k", 1)
            writing = space.link.write_if

            async def unheard(subject, *arguments):
                proxy.delay = 0.5
                written = asyncio.create_task(writing(subject, *arguments))
                while not await other.link.last_message(
                    Subjects(stream).receipts, subject, doing="look"
                ):
                    pass
                proxy.cut()
                proxy.delay = 0.0
                proxy.mend()
                return await written

            space.link.write_if = unheard
            assert await space.in_("k") == 0
            space.link.write_if = writing
            assert [await space.inp("k"), await other.inp("k")] == [1, None]

    asyncio.run(run())


# -- takers that die


async def claimed_by_the_dead(space, key, value):
    """An entry whose taker died between its claim and the deletion; the claim."""
    await space.out(key, value)
    taken = await space.try_take(key)
    space._taking.clear()
    space._receipts._mine.clear()
    return taken.claim


def test_the_entry_of_a_taker_that_died_is_passed_by_and_then_deleted(nats_server, stream):
    async def run():
        async with (
            AsyncJetStream(nats_server.url, stream=stream) as dead,
            AsyncJetStream(nats_server.url, stream=stream) as space,
        ):
            await claimed_by_the_dead(dead, "k", "consumed")
            await space.out("k", "next")
            assert await space.in_("k") == "next"
            assert await space.inp("k") is None
            assert await space.len("k") == 1
            await space._receipts.sweep()
            assert await space.len("k") == 1  # it may still live
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(receipts, "HELP_SECONDS", 0.0)
                await space._receipts.sweep()
                assert await space.len("k") == 0
                assert await space.rdp("k") is None
                await space._receipts.sweep()
                patch.setattr(receipts, "DOOMED_SECONDS", 0.0)
                for _ in range(3):
                    await space._receipts.sweep()
            info = await space.link.info(Subjects(stream).receipts, None)
            assert info["state"]["messages"] == 0

    asyncio.run(run())


def test_a_taker_that_comes_back_after_its_entry_was_taken_off_it_loses_nothing(
    nats_server, stream
):
    """Whoever gives back, and finds that it was thought dead, adds the value anew."""

    async def run():
        async with (
            AsyncJetStream(nats_server.url, stream=stream) as frozen,
            AsyncJetStream(nats_server.url, stream=stream) as space,
        ):
            claim = await claimed_by_the_dead(frozen, "k", "value")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(receipts, "HELP_SECONDS", 0.0)
                for _ in range(3):
                    await space._receipts.sweep()
            assert await space.len("k") == 0
            await frozen._receipts.undo(claim)
            await frozen._receipts.undo(claim)
            assert [await space.inp("k"), await space.inp("k")] == ["value", None]

    asyncio.run(run())


@pytest.mark.usefixtures("only_rings")
def test_an_entry_that_is_given_back_wakes_a_taker(nats_server, stream):
    """It went past that entry, and would sleep."""

    async def run():
        async with (
            AsyncJetStream(nats_server.url, stream=stream) as space,
            AsyncJetStream(nats_server.url, stream=stream) as other,
        ):
            claim = await claimed_by_the_dead(space, "k", "value")
            waiting = asyncio.create_task(other.in_("k"))
            bells = other._bells._bells
            while not (bells and bells["k", True].asleep):  # noqa: ASYNC110
                await asyncio.sleep(0)
            await space._receipts.undo(claim)
            async with asyncio.timeout(30):
                assert await waiting == "value"

    asyncio.run(run())


def test_no_sweep_takes_an_entry_off_a_taker_that_has_given_it_back(nats_server, stream):
    async def run():
        async with AsyncJetStream(nats_server.url, stream=stream) as space:
            claim = await claimed_by_the_dead(space, "k", "value")
            await space._receipts.undo(claim)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(receipts, "HELP_SECONDS", 0.0)
                for _ in range(3):
                    await space._receipts.sweep()
            assert [await space.inp("k"), await space.inp("k")] == ["value", None]

    asyncio.run(run())


def test_a_slow_claim_of_an_entry_whose_receipt_is_gone_takes_nothing(nats_server, stream):
    """A receipt goes a minute after its entry: a taker that slept longer must look."""

    async def run():
        async with (
            AsyncJetStream(nats_server.url, stream=stream) as slow,
            AsyncJetStream(nats_server.url, stream=stream) as space,
        ):
            await space.out("k", "once")
            message = await slow._from("k", 0)
            assert await space.in_("k") == "once"
            assert await space.len("k") == 0
            receipt = Subjects(stream).receipt(message.seq)
            await space.link.purge(Subjects(stream).receipts, receipt, doing="purge")
            seen = asyncio.get_running_loop().time() - receipts.TRUST_SECONDS
            assert await slow._receipts.claim("k", message, seen) is None

    asyncio.run(run())


def test_a_slow_claim_takes_what_stands_or_was_deleted_in_its_stead(nats_server, stream):
    async def run():
        async with AsyncJetStream(nats_server.url, stream=stream) as space:
            seen = asyncio.get_running_loop().time() - receipts.TRUST_SECONDS
            await space.out("k", 1)
            message = await space._from("k", 0)
            claim = await space._receipts.claim("k", message, seen)
            assert claim is not None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(receipts, "HELP_SECONDS", 0.0)
                await space._receipts.sweep()
            assert await space.len("k") == 0
            # The same call once more, as if it had waited for the answer until now.
            patch.setattr(space.link, "new_id", lambda: claim.token)
            assert await space._receipts.claim("k", message, seen) is not None
            patch.undo()

    asyncio.run(run())


def test_receipts_are_dropped_in_the_end(nats_server, stream):
    async def run():
        async with AsyncJetStream(nats_server.url, stream=stream) as space:
            for number in range(10):
                await space.out("k", number)
                assert await space.in_("k") == number
            await space.len("k")
            info = await space.link.info(Subjects(stream).receipts, None)
            assert info["state"]["messages"] == 10
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(receipts, "RECEIPT_SECONDS", -1.0)
                space._receipts.drop_old()
            await quiet(space)
            info = await space.link.info(Subjects(stream).receipts, None)
            assert info["state"]["messages"] == 0

    asyncio.run(run())


# -- what is in the way


def test_what_the_codec_cant_read_goes_to_the_dead_letters(space, nats_server, stream):
    with JetStream(nats_server.url, stream=stream, dumps=bytes, loads=bytes) as raw:
        raw.out("k", b"{not json")
        space.out("k", "next")
        for verb in (space.rd, space.rdp):
            with pytest.raises(DecodeError, match="it stays") as caught:
                verb("k")
            assert (caught.value.key, caught.value.payload) == ("k", b"{not json")
        assert space.len("k") == 2
        with pytest.raises(DecodeError, match="it is under 'k/dead' now") as caught:
            space.in_("k")
        assert (caught.value.key, caught.value.payload) == ("k", b"{not json")
        assert isinstance(caught.value.__cause__, json.JSONDecodeError)
        assert space.in_("k", 0) == "next"
        assert [raw.inp("k/dead"), raw.inp("k/dead")] == [b"{not json", None]
        long = "k" * 1024
        raw.out(long, b"\xff")
        with pytest.raises(DecodeError, match="it stays"):
            space.inp(long)
        assert raw.inp(long) == b"\xff"


def test_an_error_that_is_no_verdict_over_the_entry_comes_through(nats_server, stream):
    def loads(payload):
        if alarms:
            raise alarms.pop()
        return payload

    alarms = []
    with JetStream(nats_server.url, stream=stream, dumps=bytes, loads=loads) as space:
        space.out("k", b"fine")
        for verb in (space.rd, space.in_):
            alarms.append(TimeoutError("an alarm"))
            with pytest.raises(TimeoutError, match="an alarm"):
                verb("k")
        assert space.in_("k", 0) == b"fine"


def test_an_entry_is_gone_when_its_ttl_is_over(space):
    space.out("k", "short", ttl=0.05)
    space.out("k", "stays", ttl=float("inf"))
    space.out("k", "long", ttl=1e300)
    space.out("k", "minutes", ttl=60)
    assert space.len("k") == 4
    assert not threading.Event().wait(0.06)
    assert space.rdp("k") == "stays"  # the server removes it when a second is over
    assert eventually(lambda: space.len("k") == 3, "the server's removal")
    assert drained(space, "k") == ["stays", "long", "minutes"]


def test_a_stream_that_knows_no_ttl_refuses_only_that(nats_server, stream):
    """As one of a server before 2.11: nothing is written, and all else works."""

    async def make():
        async with AsyncJetStream(nats_server.url, stream=next(names)) as any_space:
            config = {**any_space.settings.streams[0], "name": stream, "allow_msg_ttl": False}
            for name in ("subjects", "republish"):
                text = json.dumps(config[name]).replace(any_space.settings.subjects.entries, stream)
                config[name] = json.loads(text)
            await any_space.link.api(f"STREAM.CREATE.{stream}", config, "make", writes=True)

    asyncio.run(make())
    with JetStream(nats_server.url, stream=stream) as space:
        with pytest.raises(BackendError, match="a ttl needs nats-server"):
            space.out("k", 1, ttl=60)
        space.out("k", 2, ttl=float("inf"))
        assert (space.len("k"), space.in_("k", 0)) == (1, 2)


@pytest.mark.parametrize("closed", [False, True])
def test_misuse_is_refused_before_anything_is_touched(space, closed):
    if closed:
        space.close()
    asked = link_of(space).requests
    for call_, kind in (
        (lambda: space.out("k", {1, 2}), TypeError),
        (lambda: space.out("k", float("nan")), ValueError),
        (lambda: space.out("k", "\ud800"), ValueError),
        (lambda: space.out("k", 1, ttl=0), ValueError),
        (lambda: space.out("k", 1, ttl="1"), TypeError),
        (lambda: space.out("k", "x" * 2_000_000), ValueError),
        (lambda: space.out("", 1), ValueError),
        (lambda: space.in_("k", -1), ValueError),
        (lambda: space.rd("k", context=1), TypeError),
        (lambda: space.len(1), TypeError),
    ):
        with pytest.raises(kind):
            call_()
    assert link_of(space).requests == asked


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({"servers": 1}, TypeError, "servers must be str or several"),
        ({"servers": []}, ValueError, "servers must name"),
        ({"servers": [1]}, TypeError, "servers must be str"),
        ({"stream": "a.b"}, ValueError, "stream must be"),
        ({"dumps": 1}, TypeError, "dumps must be callable"),
        ({"loads": None}, TypeError, "loads must be callable"),
        ({"replicas": 0}, ValueError, "replicas must be at least 1"),
        ({"storage": "tape"}, ValueError, "storage must be"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be"),
        ({"max_msgs": "1"}, TypeError, "max_msgs must be"),
        ({"patience": 0}, ValueError, "patience must be"),
        ({"patience": "1"}, TypeError, "patience must be"),
        ({"error_cb": print}, TypeError, "error_cb is no option"),
        ({"colour": "red"}, TypeError, "colour is no option"),
    ],
)
def test_a_space_is_made_with_what_makes_sense(arguments, kind, match):
    for made in (JetStream, AsyncJetStream):
        with pytest.raises(kind, match=match):
            made(**arguments)


def test_a_full_stream_takes_nothing_in_and_can_be_taken_from(nats_server, stream):
    """Receipts have a stream of their own: else nothing could be taken from a full one."""
    with JetStream(nats_server.url, stream=stream, max_msgs=2) as space:
        space.out("k", 0)
        space.out("k", 1)
        with pytest.raises(BackendError, match=r"maximum messages exceeded.* nothing was written"):
            space.out("k", 2)
        assert drained(space, "k") == [0, 1]
        space.out("k", 3)
        assert space.inp("k") == 3


def test_a_stream_that_is_there_is_used_as_it_is_or_refused(nats_server, stream):
    async def make(**config):
        async with AsyncJetStream(nats_server.url, stream=next(names)) as any_space:
            await any_space.link.api(f"STREAM.CREATE.{config['name']}", config, "make", writes=True)

    with JetStream(nats_server.url, stream=stream, max_msgs=7) as first:
        first.out("k", 1)
    with JetStream(nats_server.url, stream=stream, max_msgs=9, storage="memory") as second:
        assert second.in_("k", 0) == 1
    with pytest.raises(BackendError, match="its duplicate_window, 120 s, must be longer"):
        JetStream(nats_server.url, stream=stream, patience=200)
    for extra, match in (
        ({}, "republish is .*"),
        ({"retention": "workqueue"}, "retention is 'workqueue', not 'limits'"),
        ({"max_age": 10**9}, "max_age is 1000000000, not 0"),
        ({"subjects": ["elsewhere.>"]}, "subjects is"),
    ):
        name = next(names)
        asyncio.run(make(**{"name": name, "subjects": [f"{name}.key.*"], **extra}))
        for made in (JetStream, lambda *a, **b: asyncio.run(AsyncJetStream(*a, **b).open())):
            with pytest.raises(BackendError, match=f"stream {name} is not one of ours: .*{match}"):
                made(nats_server.url, stream=name)


# -- its life


def test_an_unclosed_one_is_warned_of(nats_server, stream):
    space = JetStream(nats_server.url, stream=stream)
    thread = space._started._thread
    with pytest.warns(ResourceWarning, match="unclosed <sqlspace.jetstream.JetStream"):
        del space
    thread.join(60)
    assert not thread.is_alive()


def test_closed_while_calls_begin_none_hangs(nats_server):
    for _ in range(10):
        space = JetStream(nats_server.url, stream=next(names))
        calls = [in_thread(space.in_, "k") for _ in range(4)]
        calls += [in_thread(space.out, "j", 1) for _ in range(4)]
        space.close()
        for call_ in calls:
            assert call_() is None or isinstance(call_(), (ClosedError, BackendError))


def test_a_forked_child_connects_anew(space):
    space.out("k", 1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert space.in_("k", 5) == 1
            space.out("j", 2)
            space.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert space.in_("j", 5) == 2
    waiter = in_thread(space.in_, "k")
    asleep(space, "k")
    space.out("k", 3)
    assert waiter() == 3


def test_an_async_one_is_awaited_or_entered_first(nats_server, stream):
    async def run():
        space = AsyncJetStream(nats_server.url, stream=stream)
        with pytest.raises(SpaceError, match="not open"):
            await space.out("k", 1)
        async with space as same:
            assert same is space
            await space.out("k", 1)
        with pytest.raises(ClosedError):
            await space.in_("k")
        with pytest.raises(TypeError):
            await space.in_(1)
        await space.close()
        other = await AsyncJetStream(nats_server.url, stream=stream)
        waiting = asyncio.create_task(other.in_("empty"))
        await asyncio.sleep(0)
        await asyncio.gather(other.close(), other.close())
        with pytest.raises(ClosedError):
            await waiting

    asyncio.run(run())


# -- failures


def test_without_a_server_it_says_so():
    server = NatsServer()
    try:
        for _ in range(2):
            with pytest.raises(BackendError, match=r"can't connect to nats://127.* within 0.3 s"):
                JetStream(server.url, patience=0.3)
    finally:
        server.close()


def test_a_server_that_dies_is_waited_for_and_nothing_is_lost(start_nats, stream):
    server = start_nats()
    with JetStream(server.url, stream=stream, patience=30.0) as space:
        for number in range(5):
            space.out("k", number)
        assert space.in_("k") == 0
        waiter = in_thread(space.in_, "later")
        asleep(space, "later")
        server.kill()
        taking, adding = in_thread(space.in_, "k"), in_thread(space.out, "later", "it")
        server.start()
        assert taking() == 1
        assert adding() is None
        assert waiter() == "it"
        assert drained(space, "k") == [2, 3, 4]


def test_a_server_that_stays_away_is_an_error_and_nothing_is_lost(start_nats, stream):
    server = start_nats()
    with JetStream(server.url, stream=stream, patience=0.5) as space:
        space.out("k", 1)
        waiter = in_thread(space.in_, "empty", 0.3)
        asleep(space, "empty")
        server.kill()
        for verb in (
            lambda: space.out("k", 2),
            lambda: space.in_("k"),
            lambda: space.rd("k", 0),
            lambda: space.inp("k"),
            lambda: space.len("k"),
        ):
            with pytest.raises(BackendError, match=r"127\.0\.0\.1"):
                verb()
        found = waiter()
        assert isinstance(found, BackendError)
        assert "time is over" in str(found)
        server.start()
        eventually(lambda: link_of(space).connected)
        rest = drained(space, "k")
        assert rest[0] == 1
        assert rest[1:] in ([], [2])


def test_it_speaks_tls_and_knows_passwords(start_nats, tmp_path, stream):
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
    )
    server = NatsServer(
        f'tls {{ cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem" }}\n'
        "authorization { user: me, password: secret }"
    )
    start_nats(server)
    tls = ssl.create_default_context(cafile=f"{tmp_path}/cert.pem")
    with JetStream(server.url, stream=stream, tls=tls, user="me", password="secret") as space:
        space.out("k", "sealed")
        assert space.in_("k", 5) == "sealed"
        assert "secret" not in repr(space)
    with pytest.raises(BackendError, match=r"refuses us: .*Authorization Violation"):
        JetStream(server.url, stream=stream, tls=tls, user="me", password="wrong")
    with pytest.raises(BackendError, match="can't connect") as caught:
        JetStream(server.url, stream=stream, user="me", password="secret", patience=1.0)
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    secret = server.url.replace("//", "//me:secret@")
    with JetStream(secret, stream=stream, tls=tls) as space:
        assert "secret" not in repr(space)


def test_a_cluster_of_three_does_without_any_one(start_nats, stream):
    cluster = start_nats(Cluster())
    with (
        JetStream(cluster.urls, stream=stream, replicas=3, patience=30.0) as space,
        JetStream(cluster.urls[1], stream=stream, patience=30.0) as other,
    ):
        taken, errors = [], []

        def take(one):
            try:
                while (value := one.in_("k")) is not None:
                    taken.append(value)
            except Exception as error:
                errors.append(error)

        takers = [threading.Thread(target=take, args=(one,)) for one in (space, other, space)]
        for taker in takers:
            taker.start()
        for number in range(60):
            if number == 20:
                leader = json.loads(json.dumps(space_info(space, stream)))["cluster"]["leader"]
                [server] = [one for one in cluster.servers if f"name: {leader}" in server_text(one)]
                server.kill()
            if number == 50:
                server.start()
            space.out("k", number)
        for _ in takers:
            space.out("k", None)
        for taker in takers:
            taker.join(60)
        assert errors == []
        assert sorted(taken) == list(range(60))
        eventually(lambda: space.len("k") == 0)


def space_info(space, stream):
    engine = space._started
    return asyncio.run_coroutine_threadsafe(
        engine.space.link.info(stream, None), engine.loop
    ).result(30)


def server_text(server):
    with open(server._path, encoding="utf-8") as file:
        return file.read()
