"""Processes that wait: what they cost those who work, and what they cost while nothing comes."""

import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection

from bench_rows import Aim, Part, Plan, Row, compared
from bench_sides import KEY, PAYLOAD, PROCESSES, REST_SECONDS

import sqlspace

PUSHES = 20
"""A round, of which the median counts."""
PAIR_KEY = "pair"
IDLE_PROCESSES = 8
WAITERS = 16


class Waiters:
    """A process whose threads wait, one for each of its keys, whenever it is told to.

    `stop` is by a push to each key, and tells the CPU seconds of the process since `start`.
    """

    def __init__(self, path: str, keys: Sequence[str]) -> None:
        self.keys = keys
        self._connection, theirs = PROCESSES.Pipe()
        self._worker = PROCESSES.Process(target=_wait, args=(theirs, path, keys), daemon=True)
        self._worker.start()
        theirs.close()

    def start(self) -> None:
        """Returns when all are about to wait."""
        self._connection.send(True)
        self._connection.recv()

    def stop(self, store: sqlspace.Store) -> tuple[float, int]:
        """End the waits; CPU seconds, and how many entries they have had in between."""
        for key in self.keys:
            store.push(key, b"")
        return self.stopped()

    def stopped(self) -> tuple[float, int]:
        found: tuple[float, int] = self._connection.recv()
        return found

    def seconds(self) -> float:
        """CPU seconds of the process so far, told without any of its waits ending."""
        self._connection.send(False)
        seconds: float = self._connection.recv()
        return seconds

    def close(self) -> None:
        self._connection.close()
        self._worker.join()


def _wait(connection: Connection, path: str, keys: Sequence[str]) -> None:
    """Entries end a wait if they are empty; others are taken, and the wait goes on."""
    taken = [0]

    def wait(store: sqlspace.Store, key: str) -> None:
        while store.pull(key):
            taken[0] += 1

    def stop(threads: Sequence[threading.Thread], before: float) -> None:
        for thread in threads:
            thread.join()
        connection.send((cpu_seconds() - before, taken[0]))

    with sqlspace.open(path, sync=False, history=None) as store:
        while True:
            try:
                start = connection.recv()
            except EOFError:
                return
            if not start:
                connection.send(cpu_seconds())
                continue
            taken[0] = 0
            before = cpu_seconds()
            threads = [threading.Thread(target=wait, args=(store, key)) for key in keys]
            for thread in threads:
                thread.start()
            threading.Thread(target=stop, args=(threads, before), daemon=True).start()
            connection.send(None)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def bystanders(plan: Plan) -> list[Part]:
    """What those who wait cost a pair that works, and what they cost each other."""
    part = Part("Processes that wait beside others", "× the time", "with them, µs", "without, µs")
    with tempfile.TemporaryDirectory(dir=plan.folder) as place, ExitStack() as stack:
        path = os.path.join(place, "busy.db")
        store = stack.enter_context(sqlspace.open(path, sync=False, history=None))
        idle = [Waiters(path, [f"idle {nth}"]) for nth in range(IDLE_PROCESSES)]
        hear, say = PROCESSES.Pipe(duplex=False)
        partner = PROCESSES.Process(target=_partner, args=(path, say), daemon=True)
        partner.start()
        say.close()
        pause = threading.Event()
        crowded: list[float] = []
        apart: list[float] = []
        for nth in range(plan.rounds + 1):
            for beside_idle in (True, False) if nth % 2 else (False, True):
                if beside_idle:
                    for one in idle:
                        one.start()
                    pause.wait(10 * REST_SECONDS)  # until all are asleep
                figure = _pair(store, hear, plan.times)
                if beside_idle:
                    for one in idle:
                        one.stop(store)
                if nth:
                    (crowded if beside_idle else apart).append(figure)
        store.push(PAIR_KEY, b"")
        partner.join()
        for one in idle:
            one.close()
        name = f"a busy pair, while {IDLE_PROCESSES} processes wait on other keys: one message"
        part.rows.append(compared(name, crowded, apart, Aim("≤", 1.2), short=True))
        plan.step()
    part.rows += _on_one_key(plan)
    plan.step()
    return [part]


def _partner(path: str, say: Connection) -> None:
    """Pull until an empty entry comes; tell of each that ends a batch."""
    with sqlspace.open(path, sync=False, history=None) as store:
        while entry := store.pull(PAIR_KEY):
            if entry == b"last":
                say.send_bytes(b"!")


def _pair(store: sqlspace.Store, hear: Connection, times: int) -> float:
    """µs of a message, from the first push to the last one's receipt."""
    start = time.perf_counter()
    for _ in range(times - 1):
        store.push(PAIR_KEY, PAYLOAD)
    store.push(PAIR_KEY, b"last")
    hear.recv_bytes()
    return (time.perf_counter() - start) / times * 1e6


def _on_one_key(plan: Plan) -> list[Row]:
    """Waiters on one key, of whom each push wakes whom it must, beside a single one."""
    pushes: dict[int, list[float]] = {WAITERS: [], 1: []}
    work: dict[int, list[float]] = {WAITERS: [], 1: []}
    times = PUSHES
    pause = threading.Event()
    with tempfile.TemporaryDirectory(dir=plan.folder) as place, ExitStack() as stack:
        path = os.path.join(place, "one-key.db")
        store = stack.enter_context(sqlspace.open(path, sync=False, history=None))
        waiters = [Waiters(path, [KEY]) for _ in range(WAITERS)]
        for nth in range(plan.rounds + 1):
            for count in (WAITERS, 1) if nth % 2 else (1, WAITERS):
                for one in waiters[:count]:
                    one.start()
                pause.wait(10 * REST_SECONDS)
                idle = sum(one.seconds() for one in waiters[:count]) + cpu_seconds()
                taken = []
                for _ in range(times):
                    pause.wait(REST_SECONDS)  # all are asleep again
                    before = time.perf_counter()
                    store.push(KEY, PAYLOAD)
                    taken.append((time.perf_counter() - before) * 1e6)
                pause.wait(REST_SECONDS)
                busy = sum(one.seconds() for one in waiters[:count]) + cpu_seconds()
                for _ in range(count):
                    store.push(KEY, b"")
                had = sum(one.stopped()[1] for one in waiters[:count])
                if had != times:
                    raise AssertionError(f"of {times} entries {had} arrived")
                if nth:
                    pushes[count].append(statistics.median(taken))
                    work[count].append((busy - idle) / times * 1e6)
        for one in waiters:
            one.close()
    return [
        compared(f"{WAITERS} processes wait on one key, to one: a push", *pushes.values()),
        compared(
            f"{WAITERS} processes wait on one key, to one: CPU time of all, a push",
            *work.values(),
        ),
    ]


def idling(plan: Plan) -> list[Part]:
    """CPU time of many threads that wait, and for whom nothing comes."""
    part = Part("Waiting for nothing", "% of one core", "", "")
    threads = 25
    with (
        tempfile.TemporaryDirectory(dir=plan.folder) as place,
        sqlspace.open(os.path.join(place, "idle.db"), sync=False) as store,
    ):
        crews = [
            Waiters(store.path, [f"{nth} {key}" for key in range(threads)])
            for nth in range(IDLE_PROCESSES)
        ]
        for crew in crews:
            crew.start()
        threading.Event().wait(0.5)  # until all are asleep
        before = sum(crew.seconds() for crew in crews)
        threading.Event().wait(plan.idle_seconds)
        used = sum(crew.seconds() for crew in crews) - before
        for crew in crews:
            crew.stop(store)
            crew.close()
    name = f"{threads * IDLE_PROCESSES} threads of {IDLE_PROCESSES} processes wait"
    percent = used / plan.idle_seconds * 100
    taken = f"{used * 1e3:,.0f} ms in {plan.idle_seconds:g} s"
    part.rows.append(Row(name, [percent], Aim("≤", 1), taken, unit=" %", short=True))
    plan.step()
    return [part]
