"""How a backlog, a long history and a crowd of delayed entries change a verb's time and memory.

Nothing should: the head of a queue is one step away, whatever lies behind it.
"""

import itertools
import multiprocessing
import os
import statistics
import threading
import time
from typing import Any

from bench_sides import KEY, LEASE_SECONDS, PAYLOAD, Figures, in_turns, ours

import sqlspace
from sqlspace import clock

AT_ONCE = 10_000  # rows in a transaction, where a file is made
ROUNDS = ("push", "pull", "push", "claim", "ack")


def make(path: str, rows: int) -> None:
    """A file with so many tombstones and, behind them, so many live entries, of one key."""
    with sqlspace.open(path, sync=False, history=None) as store:
        push_ready(store, rows)
        left = rows
        while left:
            left -= len(store.pull_many(KEY, AT_ONCE))
        push_ready(store, rows)
        tombstones = store.stats().tombstones
        last = next(iter(store.entries(KEY)))
        if (store.len(KEY), tombstones, last.payload) != (rows, rows, PAYLOAD):
            raise AssertionError(f"{path} isn't what it should be")


def push_ready(store: sqlspace.Store, rows: int) -> None:
    for first in range(0, rows, AT_ONCE):
        store.push_many(KEY, [PAYLOAD] * min(AT_ONCE, rows - first))


def beside_empty(folder: str, big: str, rounds: int, times: int) -> Figures:
    """The verbs on the file of `make`, and on one that holds nothing else."""
    empty = os.path.join(folder, "empty.db")
    with (
        sqlspace.open(big, sync=False, history=None) as full,
        sqlspace.open(empty, sync=False, history=None) as bare,
    ):
        sides = {"empty": ours(bare), "backlog": ours(full)}
        return in_turns(sides, ROUNDS, rounds, times)


def behind_delayed(folder: str, rows: int, rounds: int, times: int) -> Figures:
    """The verbs behind so many entries whose time hasn't come, and with none before them."""
    with (
        sqlspace.open(os.path.join(folder, "delayed.db"), sync=False, history=None) as full,
        sqlspace.open(os.path.join(folder, "ready.db"), sync=False, history=None) as bare,
    ):
        full.push_many(KEY, [PAYLOAD] * rows, delay=LEASE_SECONDS)
        sides = {"empty": ours(bare), "delayed": ours(full)}
        return in_turns(sides, ROUNDS, rounds, times)


def falling_due(folder: str, rows: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each pull of entries that all fall due at once, and of as many ready ones."""
    found = []
    for name, delay in (("due", 3.0), ("plain", None)):
        with sqlspace.open(os.path.join(folder, f"{name}.db"), sync=False) as store:
            store.push_many(KEY, [PAYLOAD] * rows, delay=delay)
            if delay is not None:
                first = next(iter(store.entries(KEY)))
                assert first.due_at is not None
                threading.Event().wait(max(0.0, first.due_at - clock.now() / 1e6) + 0.01)
            found.append([_milliseconds(store) for _ in range(rows)])
    return found[0], found[1]


def _milliseconds(store: sqlspace.Store) -> float:
    start = time.perf_counter()
    if store.pullp(KEY) is None:
        raise AssertionError("an entry is missing")
    return (time.perf_counter() - start) * 1e3


def percentiles(figures: list[float]) -> tuple[float, float, float]:
    """The middle, the 99th and the longest."""
    return statistics.median(figures), statistics.quantiles(figures, n=100)[98], max(figures)


def resident(path: str, times: int) -> dict[str, float]:
    """MB of a process that works on the file for a while, after each kind of work."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    worker = context.Process(target=_work, args=(path, times, results), daemon=True)
    worker.start()
    found: dict[str, float] = results.get()
    worker.join()
    return found


def _work(path: str, times: int, results: Any) -> None:
    found = {}
    with sqlspace.open(path, sync=False, history=None) as store:
        found["open"] = _status("VmRSS")
        side = ours(store)
        side["push"](2 * times)
        found["push"] = _status("VmRSS")
        side["pull"](times)
        found["pull"] = _status("VmRSS")
        for _ in range(times):
            side["claim"](1)
            side["ack"](1)
        found["claim, ack"] = _status("VmRSS")
        side["push"](2 * times)
        for _ in range(times):
            store.peek(KEY)
        found["peek"] = _status("VmRSS")
        for _ in itertools.islice(store.entries(KEY), 20 * times):
            pass
        found["entries()"] = _status("VmRSS")
        for delivery in itertools.islice(store.consume(KEY), times):
            with delivery:
                pass
        found["consume"] = _status("VmRSS")
    found["at its highest"] = _status("VmHWM")
    results.put(found)


def _status(field: str) -> float:
    """MB of this process, as Linux has them."""
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[field].split()[0]) / 1024
