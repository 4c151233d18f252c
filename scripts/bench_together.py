"""Many at once: threads on one Store, and processes on one file.

Whoever is in a crowd works until the same moment, an operation after the other; its rate is what
all have done in that time. An operation that fails isn't counted as done, but as an error, and is
tried again, as its user would.
"""

import math
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self

from bench_limits import fsync_milliseconds
from bench_rows import Aim, Part, Plan, Row, beside, each, number
from bench_sides import KEY, LEASE_SECONDS, PAYLOAD, PROCESSES, in_order

import sqlspace

FSYNC_MILLISECONDS = 0.15
"""What an fdatasync must take for its sharing to pay."""
STOCK_A_SECOND = 30_000
"""More than a crowd takes."""
CLAIMED_KEY = "claimed"

Verb = Callable[[], object]
"""One operation; None: there was nothing to take."""


class Client(NamedTuple):
    """One user of a queue, whichever."""

    put: Callable[[bytes], object]
    get: Verb
    close: Callable[[], object]
    tidy: Callable[[], None] = lambda: None
    """Called between rounds, untimed."""

    def verb(self, name: str, payload: bytes) -> Verb:
        """`push`, `pull` or `tidy`, as a crowd runs it."""
        put = self.put
        verbs: dict[str, Verb] = {
            "push": lambda: put(payload) or True,
            "pull": self.get,
            "tidy": self.tidy,  # once, for it returns None
        }
        return verbs[name]


class Share(NamedTuple):
    """What one of a crowd has done."""

    count: int
    seconds: float
    median: float
    """Of an operation's seconds; NaN if none was done."""
    longest: float
    errors: int
    error: str


def work(verb: Verb, start: float, seconds: float) -> Share:
    """Do it again and again, until so long after `start`, or until there is nothing to take."""
    taken: list[float] = []
    errors, error = 0, ""
    end = start + seconds
    before = time.perf_counter()
    while before < end:
        try:
            if verb() is None:
                before = time.perf_counter()
                break
        except Exception as raised:
            errors, error = errors + 1, f"{type(raised).__name__}: {raised}"
            before = time.perf_counter()
            continue
        after = time.perf_counter()
        taken.append(after - before)
        before = after
    count = len(taken) - (before > end)  # what ends too late isn't counted, however long it took
    middle = statistics.median(taken) if taken else math.nan
    longest = max(taken, default=math.nan)
    return Share(count, max(min(before, end) - start, 1e-9), middle, longest, errors, error)


def rate(shares: Sequence[Share]) -> float:
    """Operations a second of all of them; if none was done in time, by the quickest of those."""
    count = sum(share.count for share in shares)
    if count:
        return count / max(share.seconds for share in shares)
    late = [share.longest for share in shares if share.longest > 0]
    if not late:
        raise AssertionError(
            next((share.error for share in shares if share.error), "nothing there")
        )
    return 1 / min(late)


def in_threads(verbs: Sequence[Verb], seconds: float) -> list[Share]:
    """Each in a thread of its own, all at once."""
    start: list[float] = []
    gate = threading.Barrier(len(verbs), action=lambda: start.append(time.perf_counter()))

    def run(verb: Verb) -> Share:
        gate.wait()
        return work(verb, start[0], seconds)

    with ThreadPoolExecutor(len(verbs)) as pool:
        return list(pool.map(run, verbs))


class Crew:
    """Processes that have the same queue open, each with a client of its own.

    Args:
        opener: Makes a client of a path and a promise; importable by its name.
        path: Of the queue.
        sync: The promise.
        count: Of processes.
    """

    def __init__(
        self, opener: Callable[[str, Any], Client], path: str, sync: object, count: int
    ) -> None:
        self._connections: list[Connection] = []
        self._workers = []
        for _ in range(count):
            ours, theirs = PROCESSES.Pipe()
            worker = PROCESSES.Process(target=_serve, args=(theirs, opener, path, sync))
            worker.daemon = True
            worker.start()
            theirs.close()
            self._connections.append(ours)
            self._workers.append(worker)
        for connection in self._connections:
            if failure := connection.recv():
                self.close()
                raise RuntimeError(failure)

    def run(self, verb: str, seconds: float, payload: bytes = PAYLOAD) -> list[Share]:
        """All at once."""
        start = time.perf_counter() + 0.02  # the same clock in all processes
        for connection in self._connections:
            connection.send((verb, start, seconds, payload))
        return [connection.recv() for connection in self._connections]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for worker in self._workers:
            worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(
    connection: Connection, opener: Callable[[str, Any], Client], path: str, sync: object
) -> None:
    try:
        client = opener(path, sync)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send("")
    while True:
        try:
            verb, start, seconds, payload = connection.recv()
        except EOFError:
            client.close()
            return
        time.sleep(max(0.0, start - time.perf_counter()))
        connection.send(work(client.verb(verb, payload), start, seconds))


def open_ours(path: str, sync: Any) -> Client:
    """A Store that pushes and pulls."""
    store = sqlspace.open(path, sync=sync, history=None)
    return Client(lambda payload: store.push(KEY, payload), lambda: store.pullp(KEY), store.close)


class Stocked:
    """A Store with fsync, what threads do with it, and enough for them to take.

    Args:
        store: It, empty.
        stock: More than a crowd takes in a round.
    """

    def __init__(self, store: sqlspace.Store, stock: int) -> None:
        self._store = store
        self._stock = stock
        self._claimed: deque[sqlspace.Delivery] = deque()
        self.verbs: dict[str, Verb] = {
            "push": lambda: store.push(KEY, PAYLOAD),
            "pull": lambda: store.pullp(KEY),
            "ack": self._ack,
        }

    def _ack(self) -> object:
        try:
            delivery = self._claimed.popleft()
        except IndexError:
            return None
        delivery.ack()
        return delivery

    def fill(self) -> None:
        """Make good what was taken."""
        self._store.push_many(KEY, [PAYLOAD] * (self._stock - self._store.len(KEY)))
        missing = self._stock - len(self._claimed)
        if missing:
            self._store.push_many(CLAIMED_KEY, [PAYLOAD] * missing)
            self._claimed += self._store.claim_many(CLAIMED_KEY, missing, lease=LEASE_SECONDS)


def threads(plan: Plan) -> list[Part]:
    """Many threads on one Store with fsync: one commit for all that wait."""
    part = Part("Threads on one Store, sync=True", "× one's speed", "all together, /s", "one, /s")
    crowds: Mapping[str, Mapping[int, Aim | None]] = {
        "push": {1: None, 16: Aim("≥", 4), 64: Aim("≥", 5)},
        "pull": {1: None, 16: Aim("≥", 3)},
        "ack": {1: None, 16: Aim("≥", 3)},
    }
    found: dict[tuple[str, int], list[float]] = {}
    fsyncs: list[float] = []
    with (
        tempfile.TemporaryDirectory(dir=plan.folder) as place,
        sqlspace.open(os.path.join(place, "threads.db"), sync=True, history=None) as store,
    ):
        stocked = Stocked(store, int(plan.seconds * STOCK_A_SECOND))
        for nth in range(plan.rounds + 1):
            for verb, sides in crowds.items():
                for count in in_order(sides, nth):
                    stocked.fill()
                    shares = in_threads([stocked.verbs[verb]] * count, plan.seconds)
                    _fail(shares)
                    if nth:
                        found.setdefault((verb, count), []).append(rate(shares))
            fsyncs.append(fsync_milliseconds(plan.folder, 50))
            plan.step()
    fsync = statistics.median(fsyncs)
    for verb, sides in crowds.items():
        one = found[verb, 1]
        for count, aim in sides.items():
            if aim is None:
                continue
            many = found[verb, count]
            here = replace(aim, counts=fsync >= FSYNC_MILLISECONDS)
            row = beside(f"{count} threads, {verb}", each(many, one), many, one, here, short=True)
            part.rows.append(row)
    part.notes.append(
        f"The aims count where a bare fdatasync of an append takes {FSYNC_MILLISECONDS} ms or "
        f"more; here it took {fsync:.2f} ms."
    )
    return [part]


def _fail(shares: Sequence[Share]) -> None:
    """None of our own may fail here."""
    for share in shares:
        if share.error:
            raise AssertionError(share.error)


def processes(plan: Plan) -> list[Part]:
    """8 processes that push to one file: how much together, and how fairly."""
    speed = Part("8 processes pushing to one file", "× one's speed", "together, /s", "one, /s")
    fair = Part("Fairness of 8 processes pushing to one file", "×", "it", "to")
    with tempfile.TemporaryDirectory(dir=plan.folder) as place, ExitStack() as stack:
        crews = {
            (sync, count): stack.enter_context(
                Crew(open_ours, os.path.join(place, f"{sync}-{count}.db"), sync, count)
            )
            for sync in (True, "group")
            for count in (1, 8)
        }
        found = _rounds(plan, crews)
    rates = {side: [rate(shares) for shares in rounds] for side, rounds in found.items()}
    for sync, bound in ((True, None), ("group", 2)):
        for other in dict.fromkeys((sync, True)):
            many, one = rates[sync, 8], rates[other, 1]
            aim = Aim("≥", bound) if bound is not None and other == sync else None
            name = f"sync={sync!r}, to one with sync={other!r}"
            speed.rows.append(beside(name, each(many, one), many, one, aim, short=bool(aim)))
        fair.rows += _fairness(found[sync, 8], found[sync, 1], f"sync={sync!r}")
    return [speed, fair]


def _rounds(plan: Plan, crews: Mapping[Any, Crew]) -> dict[Any, list[list[Share]]]:
    """What each crew has pushed, in rounds of changing order."""
    found: dict[Any, list[list[Share]]] = {side: [] for side in crews}
    for nth in range(plan.rounds + 1):
        for side in in_order(crews, nth):
            shares = crews[side].run("push", plan.seconds)
            if nth:
                found[side].append(shares)
        plan.step()
    return found


def _fairness(many: list[list[Share]], one: list[list[Share]], name: str) -> list[Row]:
    counts = [sum(share.count for share in member) for member in zip(*many, strict=True)]
    shares = [share for crowd in many for share in crowd]
    alone = statistics.median(share.median for crowd in one for share in crowd) * 1e3
    longest = max(share.longest for share in shares) * 1e3
    errors = sum(share.errors for share in shares)
    return [
        Row(
            f"{name}: the slowest one's share to the fastest one's",
            [min(counts) / max(counts)],
            Aim("≥", 0.8),
            f"{min(counts):,} pushes",
            f"{max(counts):,}",
            short=True,
        ),
        Row(
            f"{name}: the longest push to one process's median push",
            [longest / alone],
            Aim("≤", 100),
            f"{number(longest)} ms",
            f"{number(alone)} ms",
        ),
        Row(f"{name}: errors", [errors], Aim("≤", 0), f"{sum(counts):,} pushes"),
    ]
