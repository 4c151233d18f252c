"""The same operations twice: as nothing but statements, and by a Store; and how to time them.

What is compared is run in turns, so that what else the machine does hits all sides alike. A figure
is the µs of one operation, averaged over one batch; the first round warms up and isn't counted.
"""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import apsw

import sqlspace
from sqlspace import entries
from sqlspace.connection import Options, connect, open_verified

PAYLOAD = os.urandom(100)
KEY = "bench"
LEASE_SECONDS = 3600

Batch = Callable[[int], None]
"""Does so many operations."""
Side = dict[str, Batch]
"""By verb."""
Figures = dict[tuple[str, str], list[float]]
"""µs of each operation by (verb, side), a figure a round."""


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
    execute = raw_execute(path, sync)
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

    return {"push": push, "pull": pull, "claim": claim, "ack": ack}


def ours(store: sqlspace.Store) -> Side:
    """The verbs."""
    claimed: deque[sqlspace.Delivery] = deque()

    def push(times: int) -> None:
        for _ in range(times):
            store.push(KEY, PAYLOAD)

    def pull(times: int) -> None:
        for _ in range(times):
            store.pull(KEY)

    def claim(times: int) -> None:
        for _ in range(times):
            claimed.append(store.claim(KEY, lease=LEASE_SECONDS))

    def ack(times: int) -> None:
        for _ in range(times):
            claimed.popleft().ack()

    return {"push": push, "pull": pull, "claim": claim, "ack": ack}


def microseconds(batch: Batch, times: int) -> float:
    start = time.perf_counter()
    batch(times)
    return (time.perf_counter() - start) / times * 1e6


def in_turns(sides: dict[str, Side], verbs: Sequence[str], rounds: int, times: int) -> Figures:
    """Each verb on each side, round by round, the sides in changing order."""
    found: Figures = {}
    for number in range(rounds + 1):
        for verb in verbs:
            for side in list(sides) if number % 2 else list(reversed(sides)):
                figure = microseconds(sides[side][verb], times)
                if number:
                    found.setdefault((verb, side), []).append(figure)
    return found


def spread(figures: Sequence[float]) -> str:
    """The median, and where the half in the middle lies."""
    quartiles = statistics.quantiles(figures, n=4)
    return f"{statistics.median(figures):,.1f} ({quartiles[0]:,.1f} to {quartiles[2]:,.1f})"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    return statistics.median(numerator) / statistics.median(denominator)
