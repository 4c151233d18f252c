"""The same operations twice: as nothing but statements, and by a Store; and how to time them.

What is compared is run in turns, so that what else the machine does hits all sides alike. A figure
is the µs of one operation, averaged over one batch; the first round warms up and isn't counted.
"""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import apsw

import sqlspace
from sqlspace import entries, upkeep
from sqlspace.connection import Options, connect, open_verified

# Children are forked from a process that has nothing open, and has imported what takes long.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["sqlspace", "rich.progress", "rich.table", "concurrent.futures"])

PAYLOAD = os.urandom(100)
KEY = "bench"
LEASE_SECONDS = 3600
REST_SECONDS = 0.005
"""In which a process that waits falls asleep again."""

Name = TypeVar("Name", bound=Hashable)
Batch = Callable[[int], None]
"""Does so many operations."""
Side = Mapping[str, Batch]
"""By verb."""
Figures = dict[tuple[str, str], list[float]]
"""µs of each operation by (verb, side), a figure a round."""


def raw_execute(path: str, sync: bool) -> Any:
    """`execute` of a connection of apsw's own to a file with our schema, with our settings."""
    return raw_connection(path, sync).execute


def raw_connection(path: str, sync: bool) -> apsw.Connection:
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
    return connect(options, apsw.SQLITE_OPEN_READWRITE)


def now_micros() -> int:
    return time.time_ns() // 1000


def raw_push(execute: Any, payload: bytes) -> None:
    execute(entries.INSERT, (KEY, payload, None, now_micros()))


def raw_pull(execute: Any) -> bytes:
    now = now_micros()
    head: Any = execute(entries.SELECT_HEAD, (now, KEY)).fetchall()
    execute(entries.TAKE, (now, KEY, head[0][0]))
    return bytes(head[0][2])


def raw(path: str, sync: bool) -> Side:
    """What a verb runs when nothing is in its way, and nothing else."""
    connection = raw_connection(path, sync)
    execute: Any = connection.execute
    leased: deque[tuple[int, bytes]] = deque()

    def push(times: int) -> None:
        for _ in range(times):
            raw_push(execute, PAYLOAD)

    def pull(times: int) -> None:
        for _ in range(times):
            raw_pull(execute)

    def claim(times: int) -> None:
        for _ in range(times):
            now = now_micros()
            head: Any = execute(entries.SELECT_HEAD, (now, KEY)).fetchall()
            seq, attempts, token = head[0][0], head[0][6], os.urandom(16)
            micros = LEASE_SECONDS * 1_000_000
            execute(entries.LEASE, (now, KEY, seq, micros, token, None, attempts))
            leased.append((seq, token))

    def ack(times: int) -> None:
        for _ in range(times):
            execute(entries.ACK, (now_micros(), *leased.popleft()))

    def push_many(times: int) -> None:
        now = now_micros()
        execute("BEGIN IMMEDIATE")
        connection.executemany(entries.INSERT, [(KEY, PAYLOAD, None, now)] * times)
        execute("COMMIT")

    def pull_many(times: int) -> None:
        now = now_micros()
        execute("BEGIN IMMEDIATE")
        heads = execute(entries.SELECT_HEADS, (now, KEY, times)).fetchall()
        last = execute(upkeep.SELECT_LAST_TAKEN).get
        rows = [(3, now, last, nth, head[0]) for nth, head in enumerate(heads, 1)]
        connection.executemany(upkeep.ENTOMB, rows)
        execute("COMMIT")

    return {
        "push": push,
        "pull": pull,
        "claim": claim,
        "ack": ack,
        "push_many": push_many,
        "pull_many": pull_many,
    }


def ours(store: sqlspace.Store) -> Side:
    """The verbs."""
    claimed: deque[sqlspace.Delivery] = deque()

    def push(times: int) -> None:
        for _ in range(times):
            store.push(KEY, PAYLOAD)

    def pull(times: int) -> None:
        for _ in range(times):
            store.pull(KEY)

    def peek(times: int) -> None:
        for _ in range(times):
            store.peek(KEY)

    def claim(times: int) -> None:
        for _ in range(times):
            claimed.append(store.claim(KEY, lease=LEASE_SECONDS))

    def ack(times: int) -> None:
        for _ in range(times):
            claimed.popleft().ack()

    def push_many(times: int) -> None:
        store.push_many(KEY, [PAYLOAD] * times)

    def pull_many(times: int) -> None:
        if len(store.pull_many(KEY, times)) < times:
            raise AssertionError("entries are missing")

    return {
        "push": push,
        "pull": pull,
        "peek": peek,
        "claim": claim,
        "ack": ack,
        "push_many": push_many,
        "pull_many": pull_many,
    }


def microseconds(batch: Batch, times: int) -> float:
    start = time.perf_counter()
    batch(times)
    return (time.perf_counter() - start) / times * 1e6


def in_turns(sides: Mapping[str, Side], verbs: Sequence[str], rounds: int, times: int) -> Figures:
    """Each verb on each side, round by round, the sides in changing order."""
    found: Figures = {}
    for nth in range(rounds + 1):
        for verb in verbs:
            for side in in_order(sides, nth):
                figure = microseconds(sides[side][verb], times)
                if nth:
                    found.setdefault((verb, side), []).append(figure)
    return found


def in_order(sides: Iterable[Name], nth: int) -> list[Name]:
    """The sides of this round: every second one backwards, and each begins elsewhere."""
    names = list(sides)
    first = nth // 2 % len(names)
    names = names[first:] + names[:first]
    return names if nth % 2 else names[::-1]
