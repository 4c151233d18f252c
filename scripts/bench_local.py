"""The space in memory, beside queue.Queue."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench_rows import Aim, Part, Plan, beside, each
from bench_sides import KEY, in_turns, microseconds

import sqlspace


def local(plan: Plan) -> list[Part]:
    """One thread, two threads that take turns, and a crowd that waits."""
    part = Part("In memory, beside queue.Queue", "× its speed", "Local, µs", "queue.Queue, µs")
    _alone(part, plan)
    _handed_over(part, plan)
    _waiting(part, plan)
    return [part]


def _alone(part: Part, plan: Plan) -> None:
    plain: queue.Queue[bytes] = queue.Queue()
    with sqlspace.Local() as space:

        def both(times: int) -> None:
            for _ in range(times):
                space.out(KEY, b"")
                space.in_(KEY)

        def taken(times: int) -> None:
            for _ in range(times):
                space.out(KEY, b"")
                space.inp(KEY)

        def put_get(times: int) -> None:
            for _ in range(times):
                plain.put(b"")
                plain.get()

        sides = {"Local": {"inp": taken, "in_": both}, "Queue": {"inp": put_get, "in_": put_get}}
        found = in_turns(sides, ("inp", "in_"), plan.rounds, 5 * plan.times)
    for verb, aim in (("inp", Aim("≥", 1.2)), ("in_", None)):
        own, other = found[verb, "Local"], found[verb, "Queue"]
        part.rows.append(
            beside(
                f"out and {verb}, to put and get",
                each(other, own),
                own,
                other,
                aim,
                short=aim is not None,
            )
        )
    plan.step()


def _handed_over(part: Part, plan: Plan) -> None:
    """There and back, between two threads that both wait for each other."""
    there: queue.Queue[bytes] = queue.Queue()
    back: queue.Queue[bytes] = queue.Queue()
    with sqlspace.Local() as space:

        def by_queue(times: int) -> None:
            _play(
                times,
                (lambda: there.put(b""), back.get),
                (there.get, lambda: back.put(b"")),
            )

        def by_local(times: int) -> None:
            _play(
                times,
                (lambda: space.out("there", b""), lambda: space.in_("back")),
                (lambda: space.in_("there"), lambda: space.out("back", b"")),
            )

        sides = {"Local": {"turns": by_local}, "Queue": {"turns": by_queue}}
        found = in_turns(sides, ("turns",), plan.rounds, plan.times)
    own, other = found["turns", "Local"], found["turns", "Queue"]
    name = "from a thread to another that waits, and back"
    part.rows.append(beside(name, each(other, own), own, other, short=True))
    plan.step()


def _play(
    times: int, mine: Sequence[Callable[[], Any]], yours: Sequence[Callable[[], Any]]
) -> None:
    def run(moves: Sequence[Callable[[], Any]]) -> None:
        first, second = moves
        for _ in range(times):
            first()
            second()

    partner = threading.Thread(target=run, args=(yours,))
    partner.start()
    run(mine)
    partner.join()


def _waiting(part: Part, plan: Plan) -> None:
    """Many waiters, each on a key or a queue of its own; one entry for each."""
    own: list[float] = []
    other: list[float] = []
    for nth in range(min(plan.rounds, 5) + 1):
        queues: list[queue.Queue[bytes]] = [queue.Queue() for _ in range(plan.crowd)]
        with sqlspace.Local() as space:
            keys = [str(key) for key in range(plan.crowd)]
            sides = [
                (
                    own,
                    [_binding(space.in_, key) for key in keys],
                    [_binding(space.out, key) for key in keys],
                ),
                (other, [one.get for one in queues], [one.put for one in queues]),
            ]
            for figures, takes, gives in sides if nth % 2 else reversed(sides):
                figure = _all_return(takes, gives)
                if nth:
                    figures.append(figure)
    name = f"{plan.crowd:,} threads wait on as many keys: one entry each, until all have returned"
    part.rows.append(beside(name, each(other, own), own, other, short=True))
    plan.step()


def _binding(verb: Callable[..., Any], key: str) -> Callable[..., Any]:
    return lambda *value: verb(key, *value)


def _all_return(takes: Sequence[Callable[..., Any]], gives: Sequence[Callable[..., Any]]) -> float:
    """µs of one entry, once all wait."""
    threads = [threading.Thread(target=take) for take in takes]
    for thread in threads:
        thread.start()
    time.sleep(0.05)  # until the last has fallen asleep

    def give(times: int) -> None:
        for one in gives[:times]:
            one(b"")
        for thread in threads:
            thread.join()

    return microseconds(give, len(gives))
