"""The space over JetStream, beside nats-py's own publish, and its pull and acknowledged ack.

One client, one key, the same server. A coroutine stands beside coroutines of the same loop; a
thread beside the same coroutines, run by a loop of its own, and handed to a loop in a thread.
"""

import asyncio
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

from bench_peers import versions
from bench_rows import Aim, Part, Plan, Row, beside, each
from bench_servers import SERVERS, running
from bench_sides import KEY, in_order

TEXT = "x" * 98  # 100 bytes of JSON
MOST_TIMES = 400

Verbs = dict[str, Callable[[], Awaitable[Any]]]


def jetstream(plan: Plan) -> list[Part]:
    """One client: coroutines, and threads."""
    part = Part("Over JetStream, one client", "× its speed", "ours, /s", "nats-py, /s")
    [server] = [one for one in SERVERS if one.name == "NATS JetStream"]
    if shutil.which(server.program) is None or find_spec(server.module) is None:
        part.rows.append(Row(server.name, [], None, f"{server.program} or {server.module} missing"))
        return [part]
    with tempfile.TemporaryDirectory(dir=plan.folder) as place, running(server, place) as address:
        with asyncio.Runner() as runner:
            found = runner.run(_coroutines(plan, f"nats://{address}"))
        for verb in ("out", "in_"):
            _show(part, f"{verb}, of a coroutine", found["ours", verb], found["nats", verb], 0.8)
        plan.step()
        found = _threads(plan, f"nats://{address}")
        for verb in ("out", "in_"):
            for other, words in (("run", "its loop run for each"), ("hop", "handed to its loop")):
                _show(
                    part, f"{verb}, of a thread: {words}", found["ours", verb], found[other, verb]
                )
        plan.step()
    part.notes.append(
        "out is a publish; in_ stands beside fetch(1) of a pull consumer and ack_sync. "
        + versions(["nats-py"])
    )
    return [part]


def _show(
    part: Part, name: str, own: list[float], other: list[float], aim: float | None = None
) -> None:
    part.rows.append(beside(name, each(own, other), own, other, aim and Aim("≥", aim)))


async def _raw(url: str, stream: str) -> tuple[Verbs, Callable[[], Awaitable[None]]]:
    """nats-py by itself: its verbs, and how to close it."""
    import nats

    client = await nats.connect(url)
    context = client.jetstream()
    await context.add_stream(name=stream, subjects=[f"{stream}.*"], retention="workqueue")
    subscription = await context.pull_subscribe(f"{stream}.{KEY}", durable=stream)

    async def put() -> None:
        await context.publish(f"{stream}.{KEY}", f'"{TEXT}"'.encode())

    async def get() -> None:
        (message,) = await subscription.fetch(1)
        await message.ack_sync()

    return {"out": put, "in_": get}, client.close


async def _coroutines(plan: Plan, url: str) -> dict[tuple[str, str], list[float]]:
    from sqlspace.jetstream import AsyncJetStream

    raw, close = await _raw(url, "raw")
    async with AsyncJetStream(url, stream="ours") as space:
        sides = {"ours": {"out": lambda: space.out(KEY, TEXT), "in_": lambda: space.in_(KEY)}}
        sides["nats"] = raw
        times, found = min(plan.times, MOST_TIMES), {}
        for nth in range(plan.rounds + 1):
            for verb in ("out", "in_"):
                for side in in_order(sides, nth):
                    step = sides[side][verb]
                    begun = time.perf_counter()
                    for _ in range(times):
                        await step()
                    if nth:
                        rate = times / (time.perf_counter() - begun)
                        found.setdefault((side, verb), []).append(rate)
    await close()
    return found


def _threads(plan: Plan, url: str) -> dict[tuple[str, str], list[float]]:
    from sqlspace.jetstream import JetStream

    with ExitStack() as stack:
        space = stack.enter_context(JetStream(url, stream="ours"))
        sides = {"ours": {"out": lambda: space.out(KEY, TEXT), "in_": lambda: space.in_(KEY)}}
        runner = stack.enter_context(asyncio.Runner())
        run = runner.get_loop().run_until_complete
        verbs, close = run(_raw(url, "run"))
        stack.callback(lambda close=close: run(close()))
        sides["run"] = {name: lambda verb=verb: run(verb()) for name, verb in verbs.items()}

        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        stack.callback(thread.join)
        stack.callback(lambda: loop.call_soon_threadsafe(loop.stop))

        def hop(coroutine: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

        verbs, close = hop(_raw(url, "hop"))
        stack.callback(lambda: hop(close()))
        sides["hop"] = {name: lambda verb=verb: hop(verb()) for name, verb in verbs.items()}

        times, found = min(plan.times, MOST_TIMES), {}
        for nth in range(plan.rounds + 1):
            for verb in ("out", "in_"):
                for side in in_order(sides, nth):
                    step = sides[side][verb]
                    begun = time.perf_counter()
                    for _ in range(times):
                        step()
                    if nth:
                        rate = times / (time.perf_counter() - begun)
                        found.setdefault((side, verb), []).append(rate)
    return found
