"""How soon a process that waits has what another one pushes.

Latency is from before a push in one process to after the pull in another, and at rest that one is
asleep when it comes. Beside it stand multiprocessing.Queue, whose put and get do the same in
memory, and the limit for a queue in a SQLite file: the raw push, a byte through a pipe that wakes
the other process, and the raw pull.
"""

import os
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

from bench_limits import appending
from bench_rows import Aim, Part, Plan, compared, number
from bench_sides import (
    KEY,
    PROCESSES,
    REST_SECONDS,
    in_order,
    microseconds,
    raw_execute,
    raw_pull,
    raw_push,
)

import sqlspace

MESSAGES = 20
"""A round, of which the median counts."""
PATIENCE_SECONDS = 30
MEMORY = "multiprocessing.Queue"
RAW = "raw statements and a pipe"
TIME = struct.Struct("q")

Send = Callable[[int], Any]
"""Sends the time at which it is called; 0 is the last."""


def answer_store(path: str, sync: bool, results: Connection) -> None:
    with sqlspace.open(path, sync=sync, history=None) as store:
        answer(lambda: int(store.pull(KEY)), results)


def answer_raw(path: str, bell: Connection, results: Connection) -> None:
    execute = raw_execute(path, sync=False)

    def receive() -> int:
        bell.recv_bytes()
        return int(raw_pull(execute))

    answer(receive, results)


def answer_queue(inbox: Any, results: Connection) -> None:
    answer(inbox.get, results)


def answer(receive: Callable[[], int], results: Connection) -> None:
    """Tell how long ago what was received had been sent."""
    results.send_bytes(TIME.pack(0))
    while sent := receive():
        results.send_bytes(TIME.pack(time.monotonic_ns() - sent))


class Receiver:
    """A process that receives; `send` sends to it."""

    def __init__(self, send: Send, target: Callable[..., None], *arguments: Any) -> None:
        self.send = send
        self._results, theirs = PROCESSES.Pipe(duplex=False)
        self._worker = PROCESSES.Process(target=target, args=(*arguments, theirs), daemon=True)
        self._worker.start()
        theirs.close()
        self._microseconds()

    def _microseconds(self) -> float:
        if not self._results.poll(PATIENCE_SECONDS):
            raise AssertionError(f"a message did not arrive within {PATIENCE_SECONDS} s")
        (nanoseconds,) = TIME.unpack(self._results.recv_bytes())
        return float(nanoseconds) / 1e3

    def microseconds(self) -> float:
        """From the send to the receipt of one message."""
        self.send(time.monotonic_ns())
        return self._microseconds()

    def close(self) -> None:
        self.send(0)
        self._worker.join()


@contextmanager
def receivers(place: str) -> Any:
    """The three of them, and one with fsync."""
    with ExitStack() as stack:
        inbox: Any = PROCESSES.Queue()
        hear, bell = PROCESSES.Pipe(duplex=False)
        plain = os.path.join(place, "raw.db")
        execute = raw_execute(plain, sync=False)

        def push_raw(sent: int) -> None:
            raw_push(execute, str(sent).encode())
            bell.send_bytes(b"!")

        found = {
            MEMORY: Receiver(inbox.put, answer_queue, inbox),
            RAW: Receiver(push_raw, answer_raw, plain, hear),
        }
        for sync in (False, True):
            path = os.path.join(place, f"{sync}.db")
            store = stack.enter_context(sqlspace.open(path, sync=sync, history=None))
            push = _sender(store)
            found[f"sync={sync}"] = Receiver(push, answer_store, path, sync)
        try:
            yield found
        finally:
            for each_one in found.values():
                each_one.close()


def _sender(store: sqlspace.Store) -> Send:
    return lambda sent: store.push(KEY, str(sent).encode())


def measured(
    sides: Mapping[str, Callable[[], float]], rounds: int, rest_seconds: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By side, the median of each round, and all figures; a round has MESSAGES of each side."""
    pause = threading.Event()
    medians: dict[str, list[float]] = {side: [] for side in sides}
    everything: dict[str, list[float]] = {side: [] for side in sides}
    for nth in range(rounds + 1):
        found: dict[str, list[float]] = {side: [] for side in sides}
        if rest_seconds:  # one of each in turn
            for _ in range(MESSAGES):
                for side in in_order(sides, nth):
                    pause.wait(rest_seconds)
                    found[side].append(sides[side]())
        else:
            for side in in_order(sides, nth):
                found[side] = [sides[side]() for _ in range(MESSAGES * 5)]
        if nth:  # the first warms up
            for side, figures in found.items():
                medians[side].append(statistics.median(figures))
                everything[side] += figures
    return medians, everything


def latency(plan: Plan) -> list[Part]:
    """From a push in one process to the pull in another."""
    part = Part("From a push to another process's pull", "× the time", "sqlspace, µs", "other, µs")
    ours = "sync=False"
    with (
        tempfile.TemporaryDirectory(dir=plan.folder) as place,
        receivers(place) as found,
        tempfile.TemporaryFile(dir=plan.folder) as file,
    ):
        sides = {side: found[side].microseconds for side in (MEMORY, RAW, ours)}
        for name, rest in (("at rest", REST_SECONDS), ("back to back", 0.0)):
            medians, everything = measured(sides, plan.rounds, rest)
            part.rows += [
                compared(
                    f"{name}, to {MEMORY}",
                    medians[ours],
                    medians[MEMORY],
                    Aim("≤", 0.8),
                    short=True,
                ),
                compared(f"{name}, to {RAW}", medians[ours], medians[RAW]),
            ]
            part.notes.append(f"p99, µs, {name}: " + _p99(everything))
            plan.step()
        append = appending(file.fileno())
        durable = {
            "sync=True": found["sync=True"].microseconds,
            "two bare fdatasyncs": lambda: microseconds(append, 2) * 2,
        }
        medians, everything = measured(durable, plan.rounds, REST_SECONDS)
        name = "at rest, sync=True, to two bare fdatasyncs of an append"
        part.rows.append(compared(name, *medians.values(), Aim("≤", 1.5), short=True))
        part.notes.append("p99, µs, sync=True: " + _p99(everything))
        plan.step()
    return [part]


def _p99(everything: Mapping[str, Sequence[float]]) -> str:
    found = {side: statistics.quantiles(each, n=100)[98] for side, each in everything.items()}
    return ", ".join(f"{side} {number(figure)}" for side, figure in found.items())
