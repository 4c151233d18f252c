"""How fast a store is, beside the limit that SQLite sets on the same machine in the same run.

The limit ("raw") is the same statement on the same schema with the same pragmas, run on apsw by one
thread, autocommit, drained: no lock, no look at the file's identity, no doorbell, no Python around
it. Rounds of both are interleaved, and what counts is the ratio of the medians: the figures
themselves change with the machine and with what else it does.

Latency is from before a push in one process to after the pull in another that was asleep waiting
for it, beside multiprocessing.Queue, whose put and get do the same in memory, and beside the limit
for a queue in a SQLite file: the raw push, a byte through a pipe that wakes the other process, and
the raw pull.
"""

import argparse
import multiprocessing
import os
import platform
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import apsw
from rich.console import Console
from rich.table import Table

import sqlspace
from sqlspace import store as verbs
from sqlspace.connection import Options, connect, open_verified

PAYLOAD = b"x" * 100
KEY = "bench"

Batch = Callable[[int], None]
"""Does so many operations."""


def raw_execute(path: str, sync: bool) -> Any:
    """A connection of apsw's own to a file with our schema, with our settings."""
    options = Options(
        path=path,
        sync=sync,
        history=None,
        embed=False,
        mode=0o600,
        busy_timeout=30.0,
        allow_network=False,
        vfs=None,
    )
    open_verified(options).close()
    return connect(options, apsw.SQLITE_OPEN_READWRITE).execute


def raw(folder: str, sync: bool) -> tuple[Batch, Batch]:
    """Push and pull as nothing but statements."""
    execute = raw_execute(os.path.join(folder, "raw.db"), sync)

    def push(times: int) -> None:
        for _ in range(times):
            execute(verbs.INSERT, (KEY, PAYLOAD, None, time.time_ns() // 1000))

    def pull(times: int) -> None:
        for _ in range(times):
            head: Any = execute(verbs.SELECT_HEADS, (KEY, 1)).fetchall()
            execute(verbs.TAKE, (time.time_ns() // 1000, head[0][0], KEY))

    return push, pull


def ours(folder: str, sync: bool) -> tuple[Batch, Batch]:
    """Push and pull of a Store."""
    store = sqlspace.open(os.path.join(folder, "ours.db"), sync=sync, history=None)

    def push(times: int) -> None:
        for _ in range(times):
            store.push(KEY, PAYLOAD)

    def pull(times: int) -> None:
        for _ in range(times):
            store.pull(KEY)

    return push, pull


def microseconds(batch: Batch, times: int) -> float:
    start = time.perf_counter()
    batch(times)
    return (time.perf_counter() - start) / times * 1e6


def alone(folder: str, sync: bool, rounds: int, times: int) -> dict[str, list[float]]:
    """One thread pushes and pulls; µs of each operation, a figure a round."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        sides = {"raw": raw(place, sync), "sqlspace": ours(place, sync)}
        for number in range(rounds + 1):
            for verb in (0, 1):
                order = list(sides) if number % 2 else list(reversed(sides))
                for side in order:
                    figure = microseconds(sides[side][verb], times)
                    if number:  # the first round warms up
                        found.setdefault(f"{('push', 'pull')[verb]} {side}", []).append(figure)
    return found


def answer_store(path: str, results: Any, ready: Any) -> None:
    with sqlspace.open(path, sync=False) as store:
        ready.set()
        while sent := int(store.pull(KEY)):
            results.put(time.monotonic_ns() - sent)


def answer_raw(path: str, bell: Any, results: Any, ready: Any) -> None:
    execute = raw_execute(path, sync=False)
    ready.set()
    while True:
        bell.recv_bytes()
        head: Any = execute(verbs.SELECT_HEADS, (KEY, 1)).fetchall()
        execute(verbs.TAKE, (time.time_ns() // 1000, head[0][0], KEY))
        if not (sent := int(head[0][2])):
            return
        results.put(time.monotonic_ns() - sent)


def answer_queue(inbox: Any, results: Any, ready: Any) -> None:
    ready.set()
    while sent := inbox.get():
        results.put(time.monotonic_ns() - sent)


def latency(folder: str, rounds: int) -> dict[str, list[float]]:
    """µs from a push to the other process's pull, each taken alone."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    inbox: Any = context.Queue()
    hear, bell = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path, plain = os.path.join(place, "latency.db"), os.path.join(place, "raw.db")
        execute = raw_execute(plain, sync=False)

        def push_raw(sent: int) -> None:
            row = (KEY, str(sent).encode(), None, time.time_ns() // 1000)
            execute(verbs.INSERT, row)
            bell.send_bytes(b"!")

        with sqlspace.open(path, sync=False) as store:
            sides: dict[str, Callable[[int], Any]] = {
                "multiprocessing.Queue": inbox.put,
                "raw statements and a pipe": push_raw,
                "sqlspace": lambda sent: store.push(KEY, str(sent).encode()),
            }
            found: dict[str, list[float]] = {side: [] for side in sides}
            workers = []
            for target, arguments in (
                (answer_queue, (inbox,)),
                (answer_raw, (plain, hear)),
                (answer_store, (path,)),
            ):
                ready: Any = context.Event()
                worker = context.Process(
                    target=target, args=(*arguments, results, ready), daemon=True
                )
                worker.start()
                ready.wait()
                workers.append(worker)
            pause = threading.Event()
            for number in range(rounds + 20):
                for side, send in sides.items():
                    pause.wait(0.005)  # until the other side sleeps again
                    send(time.monotonic_ns())
                    try:
                        figure = results.get(timeout=30) / 1e3
                    except queue.Empty:
                        sys.exit(f"{side}: a message did not arrive within 30 s")
                    if number >= 20:  # the first ones warm up
                        found[side].append(figure)
            for send in sides.values():
                send(0)
            for worker in workers:
                worker.join()
    return found


def spread(figures: list[float]) -> str:
    quartiles = statistics.quantiles(figures, n=4)
    return f"{statistics.median(figures):,.1f} ({quartiles[0]:,.1f} to {quartiles[2]:,.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", help="where the files go (a disk, not a tmpfs)", default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--times", type=int, default=2000, help="operations a round, without fsync")
    arguments = parser.parse_args()
    console = Console()
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, apsw {apsw.apsw_version()} "
        f"(SQLite {apsw.sqlite_lib_version()})"
    )
    table = Table("verb, 100 bytes, one thread", "raw, µs", "sqlspace, µs", "of raw", "aim")
    for sync, times, aim in ((False, arguments.times, 0.8), (True, arguments.times // 10, 0.95)):
        found = alone(arguments.folder, sync, arguments.rounds, times)
        for verb in ("push", "pull"):
            limit, own = found[f"{verb} raw"], found[f"{verb} sqlspace"]
            ratio = statistics.median(limit) / statistics.median(own)
            name = f"{verb}, sync={sync}"
            table.add_row(name, spread(limit), spread(own), f"{ratio:.2f}", f"≥ {aim}")
    console.print(table)
    table = Table("push to the other process's pull, sync=False", "median, µs", "p99, µs", "ratio")
    found = latency(arguments.folder, arguments.rounds * 20)
    base = statistics.median(found["multiprocessing.Queue"])
    for side, figures in found.items():
        p99 = statistics.quantiles(figures, n=100)[98]
        ratio = statistics.median(figures) / base
        table.add_row(side, spread(figures), f"{p99:,.0f}", f"{ratio:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
