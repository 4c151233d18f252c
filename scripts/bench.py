"""How fast a store is, beside the limit that SQLite sets on the same machine in the same run.

The limit ("raw") is the same statements on the same schema with the same pragmas, run on apsw by
one thread, autocommit, drained: no lock, no look at the file's identity, no doorbell, no Python
around it. Rounds of both are interleaved, and what counts is the ratio of the medians: the figures
themselves change with the machine and with what else it does.

Latency is from before a push in one process to after the pull in another that was asleep waiting
for it, beside multiprocessing.Queue, whose put and get do the same in memory, and beside the limit
for a queue in a SQLite file: the raw push, a byte through a pipe that wakes the other process, and
the raw pull.

A backlog, a long history and many delayed entries are measured beside a store that has none: see
bench_backlog.py.
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
import bench_backlog
from bench_sides import (
    KEY,
    Figures,
    in_turns,
    ours,
    ratio,
    raw,
    raw_execute,
    raw_pull,
    raw_push,
    spread,
)
from rich.console import Console
from rich.table import Table

import sqlspace

VERBS = ("push", "pull", "claim", "ack")

Send = Callable[[int], Any]
"""Sends the time at which it is called; 0 is the last."""


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
        if not (sent := int(raw_pull(execute))):
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
            raw_push(execute, str(sent).encode())
            bell.send_bytes(b"!")

        with sqlspace.open(path, sync=False) as store:
            sides: dict[str, Send] = {
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


def show_alone(console: Console, folder: str, rounds: int, times: int) -> None:
    table = Table("of raw", "aim", "verb, 100 bytes, one thread", "sqlspace, µs", "raw, µs")
    for sync, number, aims in (
        (False, times, {"push": 0.8, "pull": 0.8, "claim": 0.75, "ack": 0.75}),
        (True, max(1, times // 10), dict.fromkeys(VERBS, 0.95)),
    ):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = os.path.join(place, "ours.db")
            with sqlspace.open(path, sync=sync, history=None) as store:
                sides = {"raw": raw(os.path.join(place, "raw.db"), sync), "sqlspace": ours(store)}
                found = in_turns(sides, bench_backlog.ROUNDS, rounds, number)
        for verb in VERBS:
            limit, own = found[verb, "raw"], found[verb, "sqlspace"]
            of_raw, aim = f"{ratio(limit, own):.2f}", f"≥ {aims[verb]}"
            table.add_row(of_raw, aim, f"{verb}, sync={sync}", spread(own), spread(limit))
    console.print(table)


def show_latency(console: Console, folder: str, rounds: int) -> None:
    table = Table("of a Queue", "push to the other process's pull, sync=False", "µs", "p99, µs")
    found = latency(folder, rounds)
    for side, figures in found.items():
        p99 = statistics.quantiles(figures, n=100)[98]
        of_queue = ratio(figures, found["multiprocessing.Queue"])
        table.add_row(f"{of_queue:.2f}", side, spread(figures), f"{p99:,.0f}")
    console.print(table)


def show_beside_empty(console: Console, found: Figures, side: str, title: str) -> None:
    table = Table("of empty", "aim", f"{title}, sync=False", "µs", "on an empty store, µs")
    for verb in VERBS:
        crowded, empty = found[verb, side], found[verb, "empty"]
        of_empty = f"{ratio(crowded, empty):.2f}"
        table.add_row(of_empty, "≤ 1.3", verb, spread(crowded), spread(empty))
    console.print(table)


def show_falling_due(console: Console, folder: str, rows: int) -> None:
    title = f"one pull, while {rows:,} fall due at once, sync=False"
    table = Table(title, "median, ms", "p99, ms", "longest, ms")
    due, plain = bench_backlog.falling_due(folder, rows)
    for name, figures in (("fallen due", due), ("ready all along", plain)):
        table.add_row(name, *(f"{each:,.2f}" for each in bench_backlog.percentiles(figures)))
    console.print(table)


def show_memory(console: Console, folder: str, big: str, title: str, times: int) -> None:
    if not os.path.exists("/proc/self/status"):
        return
    table = Table("more, MB", "resident memory of a process after", f"{title}, MB", "empty, MB")
    full = bench_backlog.resident(big, times)
    empty = bench_backlog.resident(os.path.join(folder, "memory.db"), times)
    for name, figure in full.items():
        more = figure - empty[name]
        table.add_row(f"{more:+.1f}", name, f"{figure:.1f}", f"{empty[name]:.1f}")
    console.print(table)


def show_backlog(console: Console, folder: str, rounds: int, times: int, rows: int) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        big = os.path.join(place, "big.db")
        bench_backlog.make(big, rows)
        title = f"{rows:,} live, {rows:,} tombstones"
        found = bench_backlog.beside_empty(place, big, rounds, times)
        show_beside_empty(console, found, "backlog", title)
        found = bench_backlog.behind_delayed(place, rows // 10, rounds, times)
        show_beside_empty(console, found, "delayed", f"behind {rows // 10:,} delayed")
        show_falling_due(console, place, rows // 10)
        show_memory(console, place, big, title, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", help="where the files go (a disk, not a tmpfs)", default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--times", type=int, default=2000, help="operations a round, without fsync")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the backlog; 0: without it")
    parser.add_argument("--quick", action="store_true", help="rough figures, a tenth of the rows")
    arguments = parser.parse_args()
    rounds, times, rows = arguments.rounds, arguments.times, arguments.rows
    if arguments.quick:
        rounds, times, rows = min(rounds, 5), min(times, 1000), min(rows, 100_000)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, apsw {apsw.apsw_version()} "
        f"(SQLite {apsw.sqlite_lib_version()})"
    )
    folder = arguments.folder or tempfile.gettempdir()
    show_alone(console, folder, rounds, times)
    show_latency(console, folder, rounds * 20)
    if rows:
        show_backlog(console, folder, rounds, times, rows)


if __name__ == "__main__":
    main()
