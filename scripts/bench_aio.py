"""Coroutines on a Store: many beside one, and both beside threads, on the same file."""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable

from bench_limits import fsync_milliseconds
from bench_rows import Aim, Part, Plan, beside, compared, each
from bench_sides import KEY, PAYLOAD, in_order
from bench_together import FSYNC_MILLISECONDS, STOCK_A_SECOND, Verb, in_threads, rate

import sqlspace
import sqlspace.aio

CROWD = 64
HANDOFFS = 100
"""There and back, a round."""


def coroutines(plan: Plan) -> list[Part]:
    """Pushes and pulls with fsync, and a hand-off without."""
    part = Part("Coroutines on one Store, sync=True", "×", "it, /s", "beside, /s")
    found: dict[tuple[str, str, int], list[float]] = {}
    fsyncs: list[float] = []
    with tempfile.TemporaryDirectory(dir=plan.folder) as place:
        path = os.path.join(place, "aio.db")
        with sqlspace.open(path, history=None) as store, asyncio.Runner() as runner:
            wrapped = sqlspace.aio.Store(store)
            stock = int(plan.seconds * STOCK_A_SECOND * 2)
            in_tasks: dict[str, Callable[[], Awaitable[object]]] = {
                "push": lambda: wrapped.push(KEY, PAYLOAD),
                "pull": lambda: wrapped.pullp(KEY),
            }
            by_hand: dict[str, Verb] = {
                "push": lambda: store.push(KEY, PAYLOAD),
                "pull": lambda: store.pullp(KEY),
            }
            sides = [(side, count) for side in ("tasks", "threads") for count in (1, CROWD)]
            for nth in range(plan.rounds + 1):
                for verb, by_one in by_hand.items():
                    for side, count in in_order(sides, nth):
                        store.push_many(KEY, [PAYLOAD] * max(0, stock - store.len(KEY)))
                        if side == "tasks":
                            speed = runner.run(_rate(in_tasks[verb], count, plan.seconds))
                        else:
                            speed = rate(in_threads([by_one] * count, plan.seconds))
                        if nth:
                            found.setdefault((verb, side, count), []).append(speed)
                fsyncs.append(fsync_milliseconds(plan.folder, 50))
                plan.step()
    counts = statistics.median(fsyncs) >= FSYNC_MILLISECONDS
    aims = {"push": Aim("≥", 5, counts), "pull": None}
    for verb, aim in aims.items():
        one, many = found[verb, "tasks", 1], found[verb, "tasks", CROWD]
        name = f"{CROWD} coroutines to one, {verb}"
        part.rows.append(beside(name, each(many, one), many, one, aim, short=True))
    for verb in aims:
        for count in (1, CROWD):
            own, other = found[verb, "tasks", count], found[verb, "threads", count]
            plural = "s" if count > 1 else ""
            name = f"{count} coroutine{plural} to {count} thread{plural}, {verb}"
            part.rows.append(beside(name, each(own, other), own, other))
    return [part, _handoff(plan)]


async def _rate(verb: Callable[[], Awaitable[object]], count: int, seconds: float) -> float:
    """Operations a second of so many tasks."""
    done = 0
    end = time.perf_counter() + seconds

    async def work() -> None:
        nonlocal done
        while True:  # one at least
            await verb()
            done += 1
            if time.perf_counter() >= end:
                return

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(count)))
    return done / (time.perf_counter() - start)


def _handoff(plan: Plan) -> Part:
    """From a push to the pull that waits for it, between two tasks and between two threads."""
    part = Part(
        "A hand-off in a process, sync=False", "× threads' time", "tasks, µs", "threads, µs"
    )
    tasks: list[float] = []
    threads: list[float] = []
    with tempfile.TemporaryDirectory(dir=plan.folder) as place:
        path = os.path.join(place, "handoff.db")
        with sqlspace.open(path, sync=False, history=None) as store, asyncio.Runner() as runner:
            wrapped = sqlspace.aio.Store(store)
            for nth in range(plan.rounds + 1):
                took = {
                    "tasks": runner.run(_ping_pong(wrapped)),
                    "threads": _ping_pong_by_hand(store),
                }
                if nth:
                    tasks.append(took["tasks"])
                    threads.append(took["threads"])
            plan.step()
    part.rows.append(compared("there and back, by two that wait in turns", tasks, threads))
    return part


async def _ping_pong(store: sqlspace.aio.Store) -> float:
    async def answer() -> None:
        for _ in range(HANDOFFS):
            await store.push("back", await store.pull("there"))

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        group.create_task(answer())
        for _ in range(HANDOFFS):
            await store.push("there", PAYLOAD)
            await store.pull("back")
    return (time.perf_counter() - start) / HANDOFFS * 1e6


def _ping_pong_by_hand(store: sqlspace.Store) -> float:
    asked = iter(range(HANDOFFS))
    answered = iter(range(HANDOFFS))

    def ask() -> object:
        if next(asked, None) is None:
            return None
        store.push("there", PAYLOAD)
        return store.pull("back")

    def answer() -> object:
        if next(answered, None) is None:
            return None
        return store.push("back", store.pull("there"))

    start = time.perf_counter()
    in_threads([ask, answer], 60)
    return (time.perf_counter() - start) / HANDOFFS * 1e6
