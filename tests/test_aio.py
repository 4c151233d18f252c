"""The verbs for coroutines: nothing is lost wherever they are cancelled, and no loop is blocked."""

import asyncio
import contextlib
import gc
import itertools
import multiprocessing
import os
import random
import threading
import time
import weakref

import pytest
import uvloop
from children import eventually
from proof import tried

import sqlspace
import sqlspace.aio
from sqlspace import ClosedError, DecodeError, LeaseError
from sqlspace.testing import check_async_space

LIMIT_SECONDS = 30


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine in a new loop, of either kind, with a limit."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(coroutine):
        async def limited():
            async with asyncio.timeout(LIMIT_SECONDS):
                return await coroutine

        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(limited())

    return run


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "queue.db")


def open_(path, **options):
    return sqlspace.aio.open(path, sync=False, **options)


# -- the law


def test_a_local_keeps_the_law():
    """In memory."""
    check_async_space(sqlspace.aio.Local)


def test_a_durable_space_keeps_the_law(tmp_path):
    """In a file."""
    number = itertools.count()

    async def make():
        return (await open_(tmp_path / f"{next(number)}.db")).space()

    check_async_space(make)


# -- cancelled


TAKES = {
    "pull": lambda store: store.pull("k"),
    "pullp": lambda store: store.pullp("k"),
    "pull_any": lambda store: store.pull_any(["j", "k"]),
    "pull_many": lambda store: store.pull_many("k", 1),
    "claim": lambda store: store.claim("k"),
    "claimp": lambda store: store.claimp("k"),
    "claim in turn": lambda store: store.claim("k", ordered=True),
    "claim_many": lambda store: store.claim_many("k", 1),
    "in_": lambda store: store.space(dumps=bytes, loads=bytes).in_("k"),
    "inp": lambda store: store.space(dumps=bytes, loads=bytes).inp("k"),
}
WAITS = "pull", "pull_any", "claim", "claim in turn", "in_"


async def go_on(turns):
    for _ in range(min(turns, 12)):
        await asyncio.sleep(0)
    if turns > 12:
        await asyncio.sleep(1e-5 * 1.1 ** (turns - 12))


@pytest.mark.parametrize(
    ("verb", "late"),
    [(verb, False) for verb in TAKES] + [(verb, True) for verb in WAITS],
    ids=lambda it: it if isinstance(it, str) else "awaited" if it else "there",
)
def test_a_take_that_is_cancelled_anywhere_loses_nothing(path, verb, late):
    """It returned the entry, or that is ready at its place; so on, until it isn't cancelled."""
    cancelled = returned = 0

    async def once(store, turns):
        nonlocal cancelled, returned
        if not late:
            await store.push_many("k", [b"first", b"second"])
        take = asyncio.create_task(TAKES[verb](store))
        if late:
            await go_on(random.randrange(16))
            await store.push_many("k", [b"first", b"second"])
        await go_on(turns)
        done = take.done()
        take.cancel()
        await asyncio.wait([take])
        got = None if take.cancelled() else take.result()
        cancelled += got is None
        returned += got is not None
        if isinstance(got, list):
            (got,) = got
        if isinstance(got, sqlspace.aio.Delivery):
            await got.ack()
            got = got.payload
        if isinstance(got, tuple):
            got = got[1]
        left = [entry.payload async for entry in store.entries("k") if entry.state == "ready"]
        assert ([] if got is None else [got]) + left == [b"first", b"second"]
        await store.clear("k")
        return done

    async def main():
        async with open_(path, history=0) as store:
            for turns in itertools.count():
                if await once(store, turns):
                    break
            for _ in range(150):
                await once(store, random.randrange(turns + 2))

    asyncio.run(main())
    assert cancelled
    assert returned
    tried("takes by coroutines, cancelled at each of their steps", f"{cancelled + returned} takes")


@pytest.mark.parametrize("verb", ["push", "push_many", "push with dedupe", "push for room"])
def test_a_push_that_is_cancelled_anywhere_did_nothing(path, verb):
    """Or it returned; so on, until it isn't cancelled."""
    verbs = {
        "push": lambda store: store.push("k", b"x"),
        "push_many": lambda store: store.push_many("k", [b"x"]),
        "push with dedupe": lambda store: store.push("k", b"x", dedupe="d"),
        "push for room": lambda store: store.push("k", b"x", max_len=1),
    }

    async def main():
        async with open_(path, history=0) as store:
            for turns in itertools.count():
                push = asyncio.create_task(verbs[verb](store))
                await go_on(turns)
                done = push.done()
                push.cancel()
                await asyncio.wait([push])
                assert await store.len("k") == (not push.cancelled())
                await store.clear("k")
                if done:
                    return

    asyncio.run(main())


def test_a_crowd_that_is_cancelled_at_random_loses_and_doubles_nothing(path, run):
    """Producers and consumers, thousands of takes, half of them cancelled somewhere."""
    count = 600
    taken, cancelled = [], 0

    async def produce(store, mine):
        for number in mine:
            await store.push("k", b"%d" % number)

    async def consume(store, chance):
        nonlocal cancelled
        while len(taken) < count:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(chance.choice([0, 1e-4, 5e-4, 2e-3, 1e-2])):
                    taken.append(await store.pull("k"))
                    continue
            cancelled += 1

    async def main():
        async with open_(path) as store, asyncio.TaskGroup() as group:
            for start in range(4):
                group.create_task(produce(store, range(start, count, 4)))
            for seed in range(8):
                group.create_task(consume(store, random.Random(seed)))
        assert sorted(map(int, taken)) == list(range(count))

    run(main())
    assert cancelled
    tried("pulls by a crowd of coroutines, cancelled at random", f"{cancelled + count} pulls")


def test_a_take_found_nothing_in_a_shared_commit_and_its_undo_touches_nobody(path):
    """What it once saw at the head is another's by now, and must not be put back."""
    with sqlspace.open(path, sync=False) as store, sqlspace.open(path, sync=False) as other:
        store.push("k", b"theirs")
        grab = sqlspace.taking.Grab(store._database, ["k"])
        assert grab.probe(store._database._session.connection)
        assert other.pull("k", 0) == b"theirs"
        push = sqlspace.pushing.Push("other", b"x")
        store._database.write_all([grab, push])
        assert (grab.got, push.error) == (False, None)
        grab.done.append(None)
        store._database.undo(grab)
        assert store.pullp("k") is None


def test_a_loop_that_is_closed_with_takes_under_way_leaves_all_in_the_store(path):
    """Its tasks are thrown away unfinished, so nobody awaits their end."""
    with sqlspace.open(path, sync=False) as store:
        for turns in range(40):
            loop = asyncio.new_event_loop()
            wrapped = sqlspace.aio.Store(store)

            async def begin(wrapped=wrapped, turns=turns):
                takes = [asyncio.ensure_future(verb(wrapped)) for verb in TAKES.values()]
                await go_on(turns)
                return takes

            store.push_many("k", [b"%d" % number for number in range(20)])
            takes = loop.run_until_complete(begin())
            returned = [take.result() for take in takes if take.done()]
            for take in takes:
                take._log_destroy_pending = False
            loop.close()
            left = [weakref.ref(take) for take in takes]
            del takes, take, loop
            # They are held by the worker until it has done what they wanted, and by the doorbell.
            eventually(lambda left=left: [wake_and_collect(store)] and not any(it() for it in left))
            settled(wrapped)
            kept = sum(
                len(each) if isinstance(each, list) else each is not None for each in returned
            )
            # Who is thrown away hands its undoing over to a thread, and that may have just begun.
            eventually(lambda ready=20 - kept: store.stats().keys["k"].ready == ready, turns)
            store.clear("k")


@pytest.mark.parametrize("kind", ["local", "store"])
def test_a_wait_of_a_closed_loop_swallows_no_wake_up(path, kind, monkeypatch):
    """What wakes it, or was handed to it, goes to the next who waits."""
    monkeypatch.setattr("sqlspace.waiting.LOOK_AGAIN_SECONDS", 3600.0)
    with sqlspace.Local() if kind == "local" else open_plain(path) as plain:
        local = kind == "local"
        wrapped = sqlspace.aio.Local(plain) if local else sqlspace.aio.Store(plain._store).space()
        loop = asyncio.new_event_loop()

        async def begin():
            take = asyncio.ensure_future(wrapped.in_("k"))
            await go_on(30)
            return take

        take = loop.run_until_complete(begin())
        take._log_destroy_pending = False
        loop.close()
        got = []
        thread = threading.Thread(target=lambda: got.append(plain.in_("k", LIMIT_SECONDS)))
        thread.start()
        eventually(lambda: parks(plain, kind) == 2)
        plain.out("k", "first")
        thread.join(LIMIT_SECONDS)
        assert got == ["first"]
        assert not take.done()


def wake_and_collect(store):
    store._database.bell.wake_all()
    gc.collect()


def open_plain(path):
    return sqlspace.open(path, sync=False).space()


def parks(plain, kind):
    """How many wait there to take."""
    if kind == "local":
        return len(plain._bags["k"].takers)
    return len(plain._database.bell._takers.get("k", ()))


def settled(store):
    """The engine has done all that it was handed, and its threads have ended."""
    store._engine._pool.shutdown()
    store._engine.close()
    worker = store._engine._worker
    if worker is not None:
        worker.join(LIMIT_SECONDS)
        assert not worker.is_alive()


@pytest.mark.parametrize("turns", [0, 1, 5, 20, 40])
def test_a_transaction_that_is_cancelled_is_rolled_back(path, turns):
    """Its function runs to its end, and then nothing of it is committed."""

    async def main():
        async with open_(path) as store:
            await store.push("a", b"kept")
            began, goes_on = threading.Event(), threading.Event()

            def move(together):
                began.set()
                assert goes_on.wait(LIMIT_SECONDS)
                together.push("b", together.pullp("a"))

            task = asyncio.create_task(store.transact(move))
            assert await asyncio.to_thread(began.wait, LIMIT_SECONDS)
            task.cancel()
            await asyncio.sleep(0)
            for _ in range(turns):
                task.cancel()
                await asyncio.sleep(0)
            assert not task.done()
            goes_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await store.peek("a"), await store.len("b")) == (b"kept", 0)

    asyncio.run(main())


@contextlib.contextmanager
def locked(path):
    """Another has the write lock meanwhile."""
    with sqlspace.open(path, sync=False) as other, other.transaction() as together:
        together.push("held", b"")
        yield


@pytest.mark.parametrize("verb", ["push", "pull", "claim", "pull_many"])
def test_what_is_cancelled_when_the_store_has_just_closed_is_taken_back(path, verb, monkeypatch):
    """It was done, its task not yet told; the store is closed, and the task is cancelled."""
    plain = sqlspace.open(path, sync=False)
    plain.push("k", b"x")
    tell = sqlspace.aio.engine._tell

    async def main():
        store = sqlspace.aio.Store(plain)
        verbs = {**TAKES, "push": lambda store: store.push("k", b"y")}
        task = asyncio.create_task(verbs[verb](store))

        def close_first(jobs):
            monkeypatch.undo()
            tell(jobs)
            plain.close()
            store._engine.close()
            task.cancel()

        monkeypatch.setattr("sqlspace.aio.engine._tell", close_first)
        await asyncio.wait([task], timeout=LIMIT_SECONDS)
        assert task.cancelled()
        settled(store)

    asyncio.run(main())
    with sqlspace.open(path, sync=False) as again:
        assert [(entry.payload, entry.state) for entry in again.entries("k")] == [(b"x", "ready")]


def test_another_file_in_the_place_of_a_closed_one_is_left_alone(path, caplog):
    """What can't be taken back is told."""
    store = sqlspace.open(path, sync=False)
    store.push("k", b"theirs")
    grab = sqlspace.taking.Grab(store._database, ["k"])
    assert grab.run()
    store.close()
    for end in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + end)
    store._database.undo(grab)
    assert not os.path.exists(path)
    with sqlspace.open(path, sync=False) as other:
        seq = other.push("k", b"ours")
        assert (seq, other.pull("k")) == (grab.head.seq, b"ours")
        store._database.undo(grab)
        assert other.pullp("k") is None
    assert caplog.text.count("could not be undone") == 2


@pytest.mark.parametrize("verb", [*WAITS, "push for room"])
def test_what_a_wait_has_found_when_the_store_closes_is_taken_back(path, verb, monkeypatch):
    """As above, behind a wait."""
    plain = sqlspace.open(path, sync=False)
    verbs = {**TAKES, "push for room": lambda store: store.push("k", b"y", max_len=1)}
    run = sqlspace.aio.engine.Engine._run

    async def main():
        store = sqlspace.aio.Store(plain)
        if verb == "push for room":
            plain.push("k", b"x")
        task = asyncio.create_task(verbs[verb](store))
        eventually_parked = asyncio.Event()

        async def noted(engine, step, call_off):
            outcome = await run(engine, step, call_off)
            if outcome is not None:
                eventually_parked.set()
            elif not task.cancelling():
                plain.close()
                task.cancel()
                await asyncio.sleep(0)
            return outcome

        monkeypatch.setattr("sqlspace.aio.engine.Engine._run", noted)
        await eventually_parked.wait()
        if verb == "push for room":
            plain.pull("k")
        else:
            plain.push("k", b"x")
        await asyncio.wait([task], timeout=LIMIT_SECONDS)
        assert task.cancelled()

    asyncio.run(main())
    with sqlspace.open(path, sync=False) as again:
        wanted = [] if verb == "push for room" else [(b"x", "ready")]
        assert [(entry.payload, entry.state) for entry in again.entries("k")] == wanted


def test_a_verb_is_cancelled_at_once_while_another_process_has_the_write_lock(path, run):
    """It has not begun, and never will, whichever of those that were handed over together."""

    async def main():
        async with open_(path, busy_timeout=3600) as store:
            await store.push("k", b"x")
            for cancelled in range(4):
                with locked(path):
                    verbs = [store.push("k", b"y") for _ in range(3)]
                    tasks = [asyncio.create_task(verb) for verb in (*verbs, store.pull("k"))]
                    await asyncio.sleep(0.01)
                    tasks[cancelled].cancel()
                    await asyncio.wait([tasks[cancelled]])
                    assert tasks[cancelled].cancelled()
                    left = [task for task in tasks if not task.done()]
                    assert len(left) == 3
                await asyncio.gather(*left)
                assert await store.len("k") == (4 if cancelled == 3 else 2)
                await store.put("k", b"x")

    run(main())


@pytest.mark.parametrize("verb", [*WAITS, "push for room"])
def test_a_wait_is_cancelled_at_once_while_another_process_has_the_write_lock(
    path, verb, run, monkeypatch
):
    """It was woken, for time has passed, and wants to take what is there, or to push."""
    clock, ahead, joined = sqlspace.clock.now, [0], threading.Event()
    join = sqlspace.committer.Committer.join
    pushes = verb == "push for room"
    verbs = {**TAKES, "push for room": lambda store: store.push("k", b"y", max_len=1)}
    monkeypatch.setattr("sqlspace.clock.now", lambda: clock() + ahead[0])

    def noted(committer, operation):
        join(committer, operation)
        if ahead[0] and type(operation) is not sqlspace.committer.Work:
            joined.set()

    async def main():
        async with open_(path, busy_timeout=3600) as store:
            await store.push("k", b"x", **({"ttl": 60} if pushes else {"delay": 60}))
            task = asyncio.create_task(verbs[verb](store))
            bell = store._database.bell
            await asyncio.to_thread(eventually, lambda: bell._takers or bell._readers)
            with locked(path):
                monkeypatch.setattr("sqlspace.committer.Committer.join", noted)
                ahead[0] = 70_000_000
                bell.wake_all()
                await asyncio.to_thread(joined.wait, LIMIT_SECONDS)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
            assert await store.len("k") == (not pushes)

    run(main())


def test_a_timeout_around_a_timeout_still_tells_which_of_them_struck(path, run):
    """No cancellation is swallowed, and none is left behind."""

    async def main():
        async with open_(path) as store:
            for inner, outer in ((0.01, 3600), (3600, 0.01), (0.01, 0.01)):
                for verb in WAITS:
                    struck = []
                    try:
                        async with asyncio.timeout(outer) as outside:
                            try:
                                async with asyncio.timeout(inner) as inside:
                                    await TAKES[verb](store)
                            except TimeoutError:
                                struck.append("inner")
                                await asyncio.sleep(0)
                    except TimeoutError:
                        struck.append("outer")
                    assert asyncio.current_task().cancelling() == 0
                    assert outside.expired() == ("outer" in struck)
                    assert outside.expired() or (inside.expired() and struck == ["inner"])
                    await asyncio.sleep(0)

    run(main())


def test_a_block_that_is_cancelled_again_and_again_still_gives_back_its_entry(path, run):
    """The second cancellation strikes while the first one's nack waits for the lock."""

    async def main():
        async with open_(path, busy_timeout=3600) as store:
            await store.push("k", b"x")

            async def work():
                async with await store.claim("k", lease=3600):
                    begun.set()
                    await asyncio.sleep(3600)

            begun = asyncio.Event()
            task = asyncio.create_task(work())
            await begun.wait()
            with locked(path):
                for _ in range(5):
                    task.cancel()
                    await asyncio.sleep(0.002)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await store.pullp("k") == b"x"

    run(main())


def test_a_call_for_which_no_thread_can_start_did_nothing(path, run, monkeypatch):
    """StoreError; and nothing of it is done later either."""

    def refuse(_):
        raise RuntimeError("can't start new thread")

    async def main():
        async with open_(path) as store:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                with pytest.raises(sqlspace.StoreError, match="no thread"):
                    await store.push("k", b"x")
            await store.push("k", b"y")
            assert await store.pull_many("k", 2) == [b"y"]

    run(main())


@pytest.mark.parametrize("behind", [False, True])
def test_ctrl_c_while_a_call_is_handed_over_leaves_nothing_of_it(path, behind, monkeypatch):
    """Before the worker has it, or behind that; the worker serves the next ones all the same."""
    submit = sqlspace.aio.engine.Engine._submit

    def interrupted(engine, job):
        monkeypatch.undo()
        if behind:
            submit(engine, job)
            eventually(lambda: job.operation.finished)
        raise KeyboardInterrupt

    async def main():
        async with open_(path) as store:
            monkeypatch.setattr("sqlspace.aio.engine.Engine._submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                await store.push("k", b"x")
            assert await store.pullp("k") is None

    asyncio.run(main())


def test_a_worker_whose_start_was_cut_off_works_for_nobody(path, monkeypatch):
    """Of two, one might undo what the other has not done yet."""
    start = sqlspace.aio.engine._start
    cut_off = []

    def interrupted(run, name):
        monkeypatch.undo()
        cut_off.append(start(run, name))
        raise KeyboardInterrupt

    async def main():
        async with open_(path) as store:
            monkeypatch.setattr("sqlspace.aio.engine._start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                await store.push("k", b"x")
            cut_off[0].join(LIMIT_SECONDS)
            assert not cut_off[0].is_alive()
            assert await store.pullp("k") is None

    asyncio.run(main())


def test_of_what_is_undone_together_the_last_is_undone_first(path):
    """A push can't be undone while the pull stands that took its entry."""
    job = sqlspace.aio.engine._Job

    async def main():
        async with open_(path) as store:
            loop = asyncio.get_running_loop()
            push = job(sqlspace.pushing.Push("k", b"x"), loop)
            pull = job(sqlspace.taking.Grab(store._database, ["k"]), loop)
            store._engine._carry_out([push, pull])
            assert (pull.operation.head.payload, await store.len("k")) == (b"x", 0)
            undoes = [job(each.operation, loop, undoes=each) for each in (push, pull)]
            store._engine._carry_out(undoes)
            assert await store.len("k") == 0
            assert not [stone async for stone in store.history("k")]

    asyncio.run(main())


def test_ctrl_c_while_the_loop_is_told_leaves_nobody_waiting():
    """The loop is told again."""

    class Interrupted(asyncio.Future):
        def set_result(self, result):
            super().set_result(result)
            raise KeyboardInterrupt

    async def main():
        loop = asyncio.get_running_loop()
        first, second = (sqlspace.aio.engine._Job(None, loop) for _ in range(2))
        first.future = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            sqlspace.aio.engine._tell([first, second])
        await asyncio.wait_for(second.future, LIMIT_SECONDS)

    asyncio.run(main())


def test_a_store_that_was_cancelled_while_it_opened_is_closed(path):
    """Nobody has it."""
    opened = []

    async def main():
        for turns in range(30):
            task = asyncio.ensure_future(open_(path)._open())
            await go_on(turns)
            task.cancel()
            await asyncio.wait([task])
            opened.append(not task.cancelled())
            if opened[-1]:
                await task.result().close()
            assert not [
                each
                for each in sqlspace.forks.databases
                if each.options.path == path and not each.closed
            ]

    asyncio.run(main())
    assert not opened[1]


def test_a_transaction_of_a_closed_loop_is_rolled_back(path):
    """Nobody will know what it did."""
    with sqlspace.open(path, sync=False) as plain:
        store = sqlspace.aio.Store(plain)
        loop = asyncio.new_event_loop()
        began, goes_on = threading.Event(), threading.Event()

        def push(together):
            began.set()
            assert goes_on.wait(LIMIT_SECONDS)
            together.push("k", b"x")

        async def begin():
            task = asyncio.ensure_future(store.transact(push))
            await asyncio.to_thread(began.wait, LIMIT_SECONDS)
            return task

        task = loop.run_until_complete(begin())
        task._log_destroy_pending = False
        loop.close()
        goes_on.set()
        store._engine._pool.shutdown()
        assert plain.pullp("k") is None


def test_a_closed_store_has_no_thread(path, run):
    """Though somebody keeps it."""

    async def main():
        store = await open_(path)
        wait = asyncio.create_task(store.pull("k"))
        await asyncio.gather(*(store.len("k") for _ in range(20)))
        threads = store._engine._pool._threads
        assert threads
        await store.close()
        with pytest.raises(ClosedError):
            await wait
        ended = [*threads, store._engine._worker, store._engine._listener]
        for thread in filter(None, ended):
            await asyncio.to_thread(thread.join, LIMIT_SECONDS)
            assert not thread.is_alive()

    run(main())


def test_what_is_refused_in_a_shared_commit_is_refused_alone(path):
    """Each of them has its own error."""

    async def main():
        async with open_(path) as store:
            await store.push_many("k", [b"1", b"2"])
            one, two = await store.claim_many("k", 2)
            await one.ack()
            acks = (one.ack(), two.ack(), store.push("j", b"x"), one.ack())
            ended = await asyncio.gather(*acks, return_exceptions=True)
            assert [type(each) for each in ended] == [LeaseError, type(None), int, LeaseError]
            pushes = [sqlspace.pushing.Push("k", b"x") for _ in range(3)]
        store._database.write_all(pushes)
        assert [type(each.error) for each in pushes] == [ClosedError] * 3

    asyncio.run(main())


def test_who_came_while_something_was_undone_leads_behind_it(path, monkeypatch):
    """It had joined the queue, for somebody led."""
    with sqlspace.open(path, sync=False) as store:
        database = store._database
        store.push("k", b"x")
        grab = sqlspace.taking.Grab(database, ["k"])
        assert grab.run()
        undo = grab.undo
        thread = threading.Thread(target=store.push, args=("j", b"y"), daemon=True)

        def while_one_pushes(connection):
            thread.start()
            eventually(lambda: database._committer.queue)
            undo(connection)

        grab.undo = while_one_pushes
        database.undo(grab)
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()


def test_a_coroutine_that_is_thrown_away_leaves_the_queue_of_those_who_wait():
    """By hand, or by the garbage collector: what comes then stays for the next one."""
    plain = sqlspace.Local()

    async def main():
        take = sqlspace.aio.Local(plain).in_("k")
        take.send(None)
        assert len(plain._bags["k"].takers) == 1
        take.close()
        await asyncio.to_thread(eventually, lambda: "k" not in plain._bags)
        plain.out("k", 1)
        assert plain.inp("k") == 1

    asyncio.run(main())


def test_a_look_that_was_not_begun_when_its_wait_ended_takes_nothing():
    """It is in the pool's queue, and those before it end last."""

    async def main():
        plain = sqlspace.Local()
        looks = []

        async def late(step, _):
            looks.append(step)
            if len(looks) == 1:
                raise asyncio.CancelledError
            return step()

        with pytest.raises(asyncio.CancelledError):
            await sqlspace.aio.waiting.wait(plain._taking(["k"]), late)
        plain.out("k", 1)
        assert looks[0]() is None
        assert plain.inp("k") == 1

    asyncio.run(main())


# -- together


def test_many_coroutines_share_commits(path, run, monkeypatch):
    """64 that push at once need no 64 commits, and no 64 threads."""
    threads = set()
    step = sqlspace.pushing.Push.step

    def noted(push, connection):
        threads.add(threading.get_ident())
        return step(push, connection)

    monkeypatch.setattr(sqlspace.pushing.Push, "step", noted)
    commits = []

    async def main():
        async with sqlspace.aio.open(path) as store:
            await store.push("k", b"first")
            connection = store._database._session.connection
            connection.set_commit_hook(lambda: bool(commits.append(None)))
            await asyncio.gather(*(store.push("k", b"x") for _ in range(64)))
            connection.set_commit_hook(None)
            assert await store.len("k") == 65

    run(main())
    assert len(commits) <= 2
    assert len(threads) == 1


def test_the_loop_goes_on_while_another_process_has_the_write_lock(path, run):
    """A verb waits for it in a thread; the loop turns, and other tasks do what needs no lock."""

    async def main():
        async with open_(path) as store:
            await store.push("k", b"head")
            with sqlspace.open(path, sync=False) as other, other.transaction() as together:
                together.push("k", b"held")
                verbs = [
                    store.push("k", b"x"),
                    store.pull("k"),
                    store.claim("k"),
                    store.put("j", b""),
                ]
                tasks = [asyncio.create_task(verb) for verb in verbs]
                for _ in range(20):
                    assert await store.peek("k") == b"head"
                assert not any(task.done() for task in tasks)
            await asyncio.gather(*tasks)

    run(main())


def test_a_thousand_waits_take_no_threads(path, run):
    """They sleep in the loop; each gets one entry."""

    async def main():
        async with open_(path) as store:
            pulls = [asyncio.create_task(store.pull("k")) for _ in range(1000)]
            await store.push_many("k", [b"%d" % number for number in range(500)])
            for number in range(500, 1000):
                await store.push("k", b"%d" % number)
            assert sorted(map(int, await asyncio.gather(*pulls))) == list(range(1000))
            names = [t.name for t in threading.enumerate() if t.name.startswith("sqlspace-aio")]
            assert len(names) <= 16 + 2
            assert not store._engine._waits

    run(main())


def test_loops_in_several_threads_share_one_store(path):
    """And so do plain threads; each entry is handed to one of them."""
    count = 300
    taken = []

    async def main(store):
        while (payload := await store.pull("k")) != b"end":
            taken.append(payload)

    with sqlspace.open(path, sync=False) as plain:
        store = sqlspace.aio.Store(plain)

        def by_hand():
            while (payload := plain.pull("k", LIMIT_SECONDS)) != b"end":
                taken.append(payload)

        threads = [threading.Thread(target=asyncio.run, args=(main(store),)) for _ in range(3)]
        threads += [threading.Thread(target=by_hand) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(count):
            plain.push("k", b"%d" % number)
        for _ in threads:
            plain.push("k", b"end")
        for thread in threads:
            thread.join(LIMIT_SECONDS)
            assert not thread.is_alive()
        assert sorted(map(int, taken)) == list(range(count))


def test_a_thread_and_a_coroutine_hand_each_other_work(path, run):
    """Ping-pong on one file, by a Store and one for coroutines."""

    async def main():
        async with open_(path) as store:
            with sqlspace.open(path, sync=False) as plain:

                def echo():
                    for _ in range(50):
                        plain.push("back", plain.pull("there", LIMIT_SECONDS))

                thread = threading.Thread(target=echo)
                thread.start()
                for number in range(50):
                    await store.push("there", b"%d" % number)
                    assert await store.pull("back") == b"%d" % number
                await asyncio.to_thread(thread.join)

    run(main())


def _push_soon(path):
    with sqlspace.open(path, sync=False) as store:
        store.wait("ready", LIMIT_SECONDS)
        store.push("k", b"from another process")


def test_a_waiting_coroutine_is_woken_by_another_process(path, run, monkeypatch):
    """By its ring, not because it looked again."""
    monkeypatch.setattr("sqlspace.waiting.LOOK_AGAIN_SECONDS", 3600.0)

    async def main():
        async with open_(path) as store:
            process = multiprocessing.get_context("spawn").Process(target=_push_soon, args=(path,))
            process.start()
            pull = asyncio.create_task(store.pull("k"))
            await store.push("ready", b"")
            assert await pull == b"from another process"
            await asyncio.to_thread(process.join)

    run(main())


def test_what_the_clock_decides_is_seen(path, run):
    """A delay that is over wakes who waits, though nobody rings."""

    async def main():
        async with open_(path) as store:
            await store.push("k", b"later", delay=0.05)
            assert await store.pull("k") == b"later"
            await store.push("k", b"short", ttl=0.05)
            await store.wait_empty("k")

    run(main())


# -- the verbs


def test_each_verb_does_what_the_plain_one_does(path, run):
    """The whole list, once through."""

    async def main():
        async with open_(path) as store:
            assert (store.path, store.sync) == (path, False)
            first = await store.push("k", b"one", headers={"a": "b"}, ttl=60)
            assert await store.push("k", b"1", dedupe="d") == await store.push(
                "k", b"2", dedupe="d"
            )
            assert await store.push_many("k", [b"x", b"y"]) == [first + 2, first + 3]
            assert (await store.get("k", first)).headers == {"a": "b"}
            assert await store.keys() == ["k"]
            assert (await store.len("k"), await store.peek("k")) == (4, b"one")
            assert await store.pull_many("k", 2) == [b"one", b"1"]
            assert await store.pull_any(["j", "k"]) == ("k", b"x")
            assert [stone.seq async for stone in store.history("k")] == [
                first,
                first + 1,
                first + 2,
            ]
            assert await store.remove("k", first + 3)
            await store.wait_empty("k")
            assert await store.pullp("k") is None
            seq = await store.put("k", b"only")
            await store.wait("k")
            assert [entry.seq async for entry in store.entries("k")] == [seq]
            assert await store.clear("k") == 1
            assert await store.transact(lambda together: together.push("k", b"t")) > seq
            assert (await store.stats()).keys["k"].ready == 1
            assert (await store.compact()).bytes_after > 0
            await store.backup(path + ".copy")
            async with sqlspace.aio.open(path + ".copy") as copy:
                assert await copy.pull("k") == b"t"
            assert "aio" in repr(store)

    run(main())


def test_deliveries_are_settled_by_their_block_or_by_hand(path, run):
    """Acked at its end, given back by an exception or a cancellation, or settled before."""

    async def main():
        async with open_(path) as store:
            await store.push_many("k", [b"1", b"2", b"3"])
            async with await store.claim("k", lease=60) as job:
                assert (job.payload, job.key, job.attempts, job.headers) == (b"1", "k", 1, {})
                assert (job.seq, job.lost) == (1, False)
                before = job.deadline
                await job.extend(120)
                assert job.deadline > before
            with pytest.raises(LeaseError):
                await job.ack()
            with pytest.raises(ZeroDivisionError):
                async with await store.claimp("k", max_attempts=1) as job:
                    raise ZeroDivisionError
            assert await store.requeue("k") == 1
            two, three = await store.claim_many("k", 2)
            await store.ack_many([two])
            await three.nack(0)

            async def work():
                async with await store.claim("k"):
                    begun.set()
                    await asyncio.sleep(3600)

            begun = asyncio.Event()
            task = asyncio.create_task(work())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with await store.claim("k") as job:
                assert (job.payload, job.attempts) == (three.payload, 3)
                await job.nack()
            assert await store.len("k") == 1

    run(main())


def test_consume_ends_with_the_store(path, run):
    """Each delivery is settled by the block inside the loop."""

    async def main():
        async with open_(path) as store:
            await store.push_many("k", [b"1", b"2"])
            seen = []
            async for job in store.consume("k"):
                async with job:
                    seen.append(job.payload)
                if len(seen) == 2:
                    await store.close()
            assert seen == [b"1", b"2"]

    run(main())


def test_what_cannot_be_read_is_buried(path, run):
    """DecodeError, as from the plain space; the entry is among the dead letters."""

    async def main():
        async with open_(path) as store:
            space = store.space()
            await store.push_many("k", [b"{", b"{", b"1"])
            with pytest.raises(DecodeError):
                await space.rd("k")
            with pytest.raises(DecodeError):
                await space.in_("k")
            with pytest.raises(DecodeError):
                await space.inp("k")
            assert await space.in_("k") == 1
            assert await store.len("k/dead") == 2

    run(main())


def test_misuse_is_told_before_anything_is_touched(path, run):
    """TypeError and ValueError, with the words of the plain verbs."""

    async def main():
        async with open_(path) as store:
            for verb, kind in (
                (lambda: store.push("", b""), ValueError),
                (lambda: store.push("k", "text"), TypeError),
                (lambda: store.push("k", b"", timeout=1), TypeError),
                (lambda: store.pull(1), TypeError),
                (lambda: store.pull_many("k", 0), ValueError),
                (lambda: store.claim("k", lease=0), ValueError),
                (lambda: store.transact(None), TypeError),
                (lambda: store.ack_many([1]), TypeError),
            ):
                with pytest.raises(kind):
                    await verb()
            for verb in (store.entries, store.consume):
                with pytest.raises(ValueError, match="key"):
                    verb("")
            assert await store.keys() == []

    run(main())


def test_close_ends_every_wait_and_all_that_comes_later(path, run):
    """ClosedError; twice is as once."""

    async def main():
        store = await open_(path)
        waits = [store.pull("k"), store.claim("k"), store.wait("k"), store.space().rd("k")]
        tasks = [asyncio.create_task(wait) for wait in waits]
        await go_on(30)
        await store.close()
        await store.close()
        for task in tasks:
            with pytest.raises(ClosedError):
                await task
        for verb in (store.push("k", b""), store.pull("k"), store.pullp("k"), store.len("k")):
            with pytest.raises(ClosedError):
                await verb

    run(main())


def test_a_store_that_is_forgotten_warns_and_leaves_no_thread(path):
    """ResourceWarning, as from the plain one."""

    async def main():
        store = await open_(path)
        await store.push("k", b"")
        return store._engine

    with pytest.warns(ResourceWarning, match="unclosed"):
        engine = asyncio.run(main())
        gc.collect()
    worker = engine._worker
    if worker is not None:
        worker.join(LIMIT_SECONDS)
        assert not worker.is_alive()


def test_a_forked_child_uses_a_loop_of_its_own(path):
    """The engine's threads are the parent's; the child starts new ones."""

    async def use(store, payload):
        await store.push("k", payload)
        return await store.space(dumps=bytes, loads=bytes).in_("k")

    with sqlspace.open(path, sync=False) as plain:
        store = sqlspace.aio.Store(plain)
        assert asyncio.run(use(store, b"parent")) == b"parent"
        child = os.fork()
        if not child:
            try:
                os._exit(asyncio.run(asyncio.wait_for(use(store, b"child"), 20)) != b"child")
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert asyncio.run(use(store, b"again")) == b"again"


# -- Local


def test_a_local_is_shared_by_loops_and_threads():
    """What a coroutine waits for a thread hands over, and the other way round."""
    plain = sqlspace.Local()

    async def main():
        space = sqlspace.aio.Local(plain)
        take = asyncio.create_task(space.in_("there"))
        await asyncio.sleep(0)
        plain.out("there", object)
        assert await take is object
        thread = threading.Thread(target=lambda: plain.out("got", plain.in_("back", LIMIT_SECONDS)))
        thread.start()
        await space.out("back", 1)
        assert await space.in_("got") == 1
        await asyncio.to_thread(thread.join)
        await space.put("k", 1, ttl=0.03)
        assert not await space.out_if_empty("k", 2)
        began = time.monotonic()
        await space.nrd("k")
        assert time.monotonic() - began >= 0.02
        await space.out("b", 2)
        assert await space.in_any(["a", "b"]) == ("b", 2)
        assert await space.keys() == []

    asyncio.run(main())
