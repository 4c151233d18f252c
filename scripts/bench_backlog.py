"""How a backlog, a long history, many keys and a crowd of delayed entries change time and memory.

Nothing should: the head of a queue is one step away, whatever lies behind it.
"""

import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from bench_rows import Aim, Part, Plan, Row, beside, compared, number
from bench_sides import KEY, LEASE_SECONDS, PAYLOAD, PROCESSES, Figures, in_turns, ours

import sqlspace
from sqlspace import clock

AT_ONCE = 10_000  # rows in a transaction, where a file is made
VERBS = ("push", "pull", "peek", "claim", "ack")
ROUNDS = ("push", "peek", "pull", "push", "claim", "ack")
ENTRIES_PER_KEY = 10
KEYS_AT_ONCE = 1000


def backlog(plan: Plan) -> list[Part]:
    """All that this file measures."""
    with tempfile.TemporaryDirectory(dir=plan.folder) as place:
        big, wide = os.path.join(place, "big.db"), os.path.join(place, "wide.db")
        make(big, plan.rows)
        plan.step()
        make_wide(wide, plan.rows)
        plan.step()
        cost = Part("A crowded store, sync=False", "× an empty one's time", "µs", "empty, µs")
        title = f"{plan.rows:,} live, {plan.rows:,} tombstones"
        wide_title = f"{plan.rows:,} live under {plan.rows // ENTRIES_PER_KEY:,} keys"
        delayed = plan.rows // 10
        for name, found in (
            (title, beside_empty(place, big, plan)),
            (wide_title, beside_empty(place, wide, plan)),
            (f"behind {delayed:,} delayed", behind_delayed(place, delayed, plan)),
        ):
            for verb in VERBS:
                crowded, bare = found[verb, "crowded"], found[verb, "empty"]
                row = compared(
                    f"{verb}: {name}",
                    crowded,
                    bare,
                    Aim("≤", 1.3),
                    short=name == title and verb in {"push", "pull"},
                )
                cost.rows.append(row)
            plan.step()
        parts = [cost, _opening(place, big, title, plan), _due(place, delayed, plan)]
        if os.path.exists("/proc/self/status"):
            parts.append(_memory(place, big, title, plan))
        return parts


def _opening(place: str, big: str, title: str, plan: Plan) -> Part:
    part = Part("Opening a store", "ms more", f"{title}, ms", "empty, ms")
    sides = {
        "crowded": {"open": _opened(big)},
        "empty": {"open": _opened(os.path.join(place, "open.db"))},
    }
    found = in_turns(sides, ("open",), plan.rounds, 1)
    crowded, bare = ([figure / 1e3 for figure in found["open", side]] for side in sides)
    more = [with_ - without for with_, without in zip(crowded, bare, strict=True)]
    row = beside("open and close", more, crowded, bare, Aim("≤", 10), unit=" ms", short=True)
    part.rows.append(row)
    plan.step()
    return part


def _opened(path: str) -> Callable[[int], None]:
    def opened(times: int) -> None:
        for _ in range(times):
            sqlspace.open(path, sync=False).close()

    return opened


def _due(place: str, rows: int, plan: Plan) -> Part:
    title = f"One pull, while {rows:,} fall due at once"
    part = Part(title, "× the time of ready ones", "fallen due, ms", "ready all along, ms")
    due, plain = (percentiles(figures) for figures in falling_due(place, rows))
    for name, own, other in zip(("median", "p99", "longest"), due, plain, strict=True):
        part.rows.append(Row(name, [own / other], None, number(own), number(other)))
    plan.step()
    return part


def _memory(place: str, big: str, title: str, plan: Plan) -> Part:
    part = Part("Resident memory of a process after", "MB more", f"{title}, MB", "empty, MB")
    full = resident(big, plan.times)
    empty = resident(os.path.join(place, "memory.db"), plan.times)
    for name, figure in full.items():
        more = [figure - empty[name]]
        row = Row(name, more, Aim("≤", 10), number(figure), number(empty[name]), " MB")
        part.rows.append(row)
    plan.step()
    return part


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


def make_wide(path: str, rows: int) -> None:
    """A file with so many live entries, a few of each of many keys, on both sides of ours."""
    keys = [f"{'az'[nth % 2]} {nth}" for nth in range(rows // ENTRIES_PER_KEY)]
    with sqlspace.open(path, sync=False, history=None) as store:
        for first in range(0, len(keys), KEYS_AT_ONCE):
            with store.transaction() as transaction:
                for key in keys[first : first + KEYS_AT_ONCE]:
                    transaction.push_many(key, [PAYLOAD] * ENTRIES_PER_KEY)


def push_ready(store: sqlspace.Store, rows: int) -> None:
    for first in range(0, rows, AT_ONCE):
        store.push_many(KEY, [PAYLOAD] * min(AT_ONCE, rows - first))


def beside_empty(folder: str, big: str, plan: Plan) -> Figures:
    """The verbs on a crowded file, and on one that holds nothing else."""
    with (
        tempfile.TemporaryDirectory(dir=folder) as place,
        sqlspace.open(big, sync=False, history=None) as full,
        sqlspace.open(os.path.join(place, "empty.db"), sync=False, history=None) as bare,
    ):
        sides = {"empty": ours(bare), "crowded": ours(full)}
        return in_turns(sides, ROUNDS, plan.rounds, plan.times)


def behind_delayed(folder: str, rows: int, plan: Plan) -> Figures:
    """The verbs behind so many entries whose time hasn't come, and with none before them."""
    with (
        sqlspace.open(os.path.join(folder, "delayed.db"), sync=False, history=None) as full,
        sqlspace.open(os.path.join(folder, "ready.db"), sync=False, history=None) as bare,
    ):
        full.push_many(KEY, [PAYLOAD] * rows, delay=LEASE_SECONDS)
        sides = {"empty": ours(bare), "crowded": ours(full)}
        return in_turns(sides, ROUNDS, plan.rounds, plan.times)


def falling_due(folder: str, rows: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each pull of entries that all fall due at once, and of as many ready ones."""
    found = []
    for name, delay in (("due", 0.5 + rows / 40_000), ("plain", None)):
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
    results: Any = PROCESSES.SimpleQueue()
    worker = PROCESSES.Process(target=_work, args=(path, times, results), daemon=True)
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
